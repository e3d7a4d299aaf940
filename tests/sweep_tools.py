"""Cheap sweeps, and what disturbs them, for tests that start `dal_sweep` as a user does."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
import yaml
from dal_med.loop.record import record_files

ROOT = Path(__file__).resolve().parents[1]
SWEEP = [sys.executable, '-m', 'dal_med.run.sweep']

CELLS = [
    (['# A run without a network: phases that depend on each other, written by the real `write_phase`'], None),
    (['import hashlib, os, time',
      'from pathlib import Path',
      'from dal_med.loop.record import claim, locked, sweep_partials, write_phase',
      'from dal_med.run.config import notebook_config',
      'from dal_med.run.repair import damage, set_aside'], []),
    (['names_before = set(globals())'], []),
    (["folder = 'run'", "cache = '.'", 'seed = 0', 'rounds = 8', 'budget = 1'], ['parameters']),
    (['config = notebook_config(globals(), names_before)',
      'run, fault = Path(folder), Path(cache)/f"fault-{seed}"',
      'print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"), "threads", os.environ["OMP_NUM_THREADS"])'], []),
    (['def phase(round, out):',
      '    before = (run/"rounds"/f"{round - 1:02d}"/"2_evaluate"/"test.txt").read_text() if round else str(config.settings())',
      '    (out/"test.txt").write_text(hashlib.sha256(before.encode()).hexdigest())',
      '    time.sleep(.06)',
      '    (out/"more.txt").write_text("x"*2000)'], []),
    (['with locked(run/".turn", wait=True):',
      '    if damage(run): set_aside(run)',
      '    claim(run, dict(settings=config.settings()))',
      '    sweep_partials(run)',
      '    for r in range(rounds):',
      '        if r == 3 and fault.exists():',
      '            what = fault.read_text()',
      '            if what == "raise": raise ValueError(f"seed {seed} is unlucky;\\ntry another")',
      '            if what == "memory": hog = bytearray(10**15)',
      '            if what == "killed": os.kill(os.getpid(), 9)',
      '            if what == "slow": time.sleep(20)',
      '        write_phase(run/"rounds"/f"{r:02d}"/"2_evaluate", lambda out: phase(r, out))'], [])]


def write_template(path):
    cells = [dict(cell_type='markdown' if tags is None else 'code', id=f'c{i}', metadata=dict(tags=tags) if tags else {}, source='\n'.join(lines),
                  **({} if tags is None else dict(execution_count=None, outputs=[]))) for i, (lines, tags) in enumerate(CELLS)]
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(display_name='gone', language='python', name='no-such-kernel')), nbformat=4, nbformat_minor=5)))


class Folder:
    "A sweep over seeds in a folder of its own; `call` is what a user types."

    def __init__(self, path, runs=4, **content):
        self.path, self.out = Path(path), Path(path)/'out'
        self.path.mkdir(exist_ok=True)
        write_template(self.path/'chain.ipynb')
        self.write(**{**dict(notebook='chain.ipynb', parameters=dict(cache=str(self.path)), vary=dict(seed=[*range(runs)])), **content})

    def write(self, **content): (self.path/'sweep.yaml').write_text(yaml.safe_dump(content))
    def fault(self, seed, what): (self.path/f'fault-{seed}').write_text(what)
    def heal(self): [p.unlink() for p in self.path.glob('fault-*')]
    def records(self): return {p.name: record_files(p) for p in sorted((self.out/'runs').iterdir())}
    def finished(self): return sorted(p.stem for p in (self.out/'notebooks').glob('*.ipynb'))

    def start(self, *options, cores=2, env=None):
        return subprocess.Popen([*SWEEP, str(self.path/'sweep.yaml'), str(self.out), '--cores', str(cores), *options], cwd=self.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env={**os.environ, **(env or {})}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # as from a terminal, wherever the tests run

    def call(self, *options, expect=0, **more):
        process = self.start(*options, **more)
        said = process.communicate(timeout=150)[0]
        assert process.returncode == expect, said + self.log()
        return said

    def log(self):
        path = self.out/'snakemake.log'
        return path.read_text() if path.exists() else ''


def processes(text):
    "Numbers of the living processes whose command line contains `text`."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try: line = (p/'cmdline').read_bytes().replace(b'\0', b' ').decode(errors='replace')
        except OSError: continue
        if text in line and int(p.name) != os.getpid(): found.append(int(p.name))
    return found


def children(pid):
    try: return [int(c) for t in Path(f'/proc/{pid}/task').iterdir() for c in (t/'children').read_text().split()]
    except OSError: return []


def wait_for(condition, seconds=60, what='what was waited for'):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found: return found
        time.sleep(.02)
    raise AssertionError(f'{what} did not happen within {seconds} s')
