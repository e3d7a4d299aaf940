"""Whatever stops a sweep, the same command finishes it, with the same records as an undisturbed one."""
import ast, base64, json, os, re, shutil, signal, subprocess, sys, threading, time
import numpy as np
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from papermill.translators import PythonTranslator
from dal_med.loop.record import record_files
from dal_med.run.grid import read_sweep
from dal_med.run.sweep import dal_sweep, engine_pid
from dal_med.run.workflow import snakemake_command, write_workflow
from sweep_tools import ROOT, Folder, children, processes, wait_for
from tiny import tiny

KILLS = 20


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
    "A sweep over four seeds that nothing happens to."
    f = Folder(tmp_path_factory.mktemp('undisturbed'))
    f.call('--gpus', '2')
    return f


@pytest.fixture
def again(undisturbed, tmp_path):
    "A copy of it, to be damaged."
    f = Folder(tmp_path/'copy')
    shutil.copytree(undisturbed.out, f.out)
    return f


def at_work(folder, rounds=1):
    "Wait until some run is in the middle."
    wait_for(lambda: any(len(list(p.glob('rounds/*'))) > rounds for p in folder.out.glob('runs/*') if p.name not in folder.finished()), what='a run in progress')


def executed(folder): return {p.name: p.stat().st_mtime_ns for p in (folder.out/'notebooks').iterdir()}


def test_undisturbed(undisturbed):
    f = undisturbed
    assert len(f.records()) == 4 and all(len(r) == 1 + 8*3 for r in f.records().values())
    assert f.finished() == sorted(f.records()) and not list((f.out/'failed').iterdir())
    devices = set()
    for name in f.finished():
        notebook = json.loads((f.out/'notebooks'/f'{name}.ipynb').read_text())
        assert notebook['metadata']['kernelspec']['name'] == 'python3' or 'python3' in (f.out/'logs'/f'{name}.log').read_text()
        devices |= set(re.findall(r'sees (\d) threads 1', str(notebook['cells'])))
    assert devices == {'0', '1'}, 'each run sees one of the two accelerators'


def test_finished_runs_are_not_repeated(again, undisturbed):
    before = executed(again)
    assert '4 of 4 runs are finished' in again.call()
    again.write(notebook='chain.ipynb', parameters=dict(cache=str(again.path)), vary=dict(seed=[3, 1, 0, 4]), include=[dict(seed=[2])])
    assert '5 of 5 runs are finished' in again.call()
    assert before.items() <= executed(again).items() and len(executed(again)) == 5
    assert undisturbed.records().items() <= again.records().items()


def test_other_code_is_another_run(again):
    path = again.path/'chain.ipynb'
    path.write_text(path.read_text().replace('sweep_partials(run)', 'sweep_partials(run) # again'))
    assert not {*read_sweep(again.path/'sweep.yaml', again.out).runs} & {*again.records()}


def test_runs_that_fail(tmp_path, undisturbed):
    f = Folder(tmp_path/'failing')
    for seed, what in enumerate(('raise', 'memory', 'killed')): f.fault(seed, what)
    said = f.call(expect=1)
    assert '1 of 4 runs are finished' in said
    assert re.search(r'failed: seed0-\w{8}: cell 7 of 7, `with locked\(.*`: ValueError: seed 0 is unlucky; try another', said)
    assert re.search(r'failed: seed1-\w{8}: cell 7 of 7, .*: MemoryError', said)
    assert re.search(r'failed: seed2-\w{8}: .*DeadKernelError: Kernel died', said)
    assert [n[:5] for n in f.finished()] == ['seed3'] and sorted(p.name[:5] for p in (f.out/'failed').glob('*.ipynb')) == ['seed0', 'seed1', 'seed2']
    assert 'unlucky' in next((f.out/'failed').glob('seed0*')).read_text() and 'unlucky' in next((f.out/'logs').glob('seed0*')).read_text()
    before = executed(f)
    f.heal()
    assert '4 of 4 runs are finished' in f.call()
    assert f.records() == undisturbed.records() and before.items() <= executed(f).items()
    assert not list((f.out/'failed').glob('*.ipynb'))


def test_runs_killed_at_random_moments(tmp_path, undisturbed):
    f, rng, killed, phases = Folder(tmp_path/'killed'), np.random.default_rng(0), [], set()

    def killer():
        "SIGKILL papermill, its shell or its kernel, one time in four at once, else some time after the run has done a phase more."
        while len(killed) < KILLS:
            time.sleep(.01)
            found = [p for p in processes(f'{f.out}/parameters/') if children(p)]
            if not found: continue
            victim, done = int(rng.choice(found)), lambda: len(list(f.out.glob('runs/*/rounds/*/2_evaluate')))
            before, soon = done(), rng.random() < .25
            while not soon and done() == before and os.path.exists(f'/proc/{victim}'): time.sleep(.002)
            time.sleep(rng.uniform(0, .2))
            try: os.kill(int(rng.choice([victim, *children(victim)])), signal.SIGKILL)
            except ProcessLookupError: continue
            killed.append(victim)
            phases.add(before)

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    for calls in range(30):
        process = f.start('--retries', '2')
        said = process.communicate(timeout=150)[0]
        assert process.returncode == (0 if len(f.finished()) == 4 else 1), said
        if len(f.finished()) == 4 and len(killed) < KILLS: # all too quick: begin again
            assert f.records() == undisturbed.records()
            shutil.rmtree(f.out)
        elif not process.returncode: break
    thread.join(1)
    assert len(killed) >= KILLS and len(phases) > 5, 'the kills fell on too few different moments to mean anything'
    assert f.records() == undisturbed.records()
    assert not list(f.out.rglob('.*.partial')), 'a half-written file was left behind'


def test_engine_and_command_killed(tmp_path, undisturbed):
    f = Folder(tmp_path/'headless')
    process = f.start()  # 1. Snakemake is killed
    at_work(f)
    os.kill(engine_pid(f.out), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and 'failed: ' in said
    assert not processes(f'{f.out}/parameters/'), 'dal_sweep takes the runs along'

    process = f.start()  # 2. dal_sweep is killed: its engine goes on, and the next call waits for it
    wait_for(lambda: processes(f'{f.out}/parameters/'), what='a run')
    process.kill()
    process.wait()
    engine = engine_pid(f.out)
    assert engine
    second = f.start()
    wait_for(lambda: 'waiting for that first' in second.stdout.readline(), what='waiting for the engine')
    os.kill(engine, signal.SIGKILL)  # 3. and is killed in its turn: what it ran lives on, and is waited for
    second.kill()
    second.wait()
    assert '4 of 4 runs are finished' in f.call()
    assert f.records() == undisturbed.records()
    wait_for(lambda: not processes(f'{f.out}/parameters/'), what='the end of what was left behind')
    assert f.finished() == undisturbed.finished()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_stopped(tmp_path, number):
    f = Folder(tmp_path/'stopped', runs=2)
    f.fault(0, 'slow')
    process = f.start()
    at_work(f, rounds=2)
    kernels = [c for p in processes(f'{f.out}/parameters/') for c in children(p)]
    process.send_signal(number)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + number and 'stopping; the same command goes on' in said and not engine_pid(f.out)
    wait_for(lambda: not processes(str(f.out)) and not any(os.path.exists(f'/proc/{k}') for k in kernels), 10, 'the end of everything that was started')


def test_two_sweeps_on_one_folder(tmp_path):
    f = Folder(tmp_path/'one', runs=1)
    first = f.start()
    wait_for(lambda: engine_pid(f.out), what='the engine')
    assert f'another process is at work in {f.out}' in f.call(expect=2)
    assert '1 of 1 runs are finished' in first.communicate(timeout=60)[0]


def test_stale_marks_of_snakemake(again, undisturbed):
    name = again.finished()[0]
    (again.out/'notebooks'/f'{name}.ipynb').unlink()
    locks, incomplete = again.out/'.snakemake'/'locks', again.out/'.snakemake'/'incomplete'
    for folder in (locks, incomplete): folder.mkdir(parents=True, exist_ok=True)
    for mark in ('0.input.lock', '0.output.lock'): (locks/mark).write_text('\n'.join(f'notebooks/{n}.ipynb' for n in undisturbed.finished()))
    for n in undisturbed.finished(): shutil.copy(ROOT/'README.md', incomplete/base64.b64encode(f'notebooks/{n}.ipynb'.encode()).decode())
    before = executed(again)
    assert '4 of 4 runs are finished' in again.call()
    assert before.items() <= executed(again).items() and again.records() == undisturbed.records()


def test_corrupt_records(again, undisturbed):
    "One of a run that is finished, one of a run that is not, one gone."
    a, b, c, d = again.finished()
    (again.out/'runs'/a/'rounds'/'05'/'2_evaluate'/'test.txt').write_text('0')
    (again.out/'runs'/b/'rounds'/'02'/'2_evaluate'/'files.json').write_text('{')
    (again.out/'notebooks'/f'{b}.ipynb').unlink()
    shutil.rmtree(again.out/'runs'/c)
    before = executed(again)
    said = again.call()
    assert f'{a} is run again: rounds/05/2_evaluate/test.txt is not what was written' in said and f'{c} is run again: its record is gone' in said
    assert again.records() == undisturbed.records() and executed(again)[f'{d}.ipynb'] == before[f'{d}.ipynb']
    assert (again.out/'runs'/a/'damaged'/'1'/'rounds'/'05'/'2_evaluate'/'test.txt').read_text() == '0'


def test_full_disk(tmp_path, undisturbed):
    if os.geteuid(): pytest.skip('mounting a small tmpfs needs root')
    f = Folder(tmp_path/'full')
    f.out.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', str(f.out)], capture_output=True, text=True)
    if mounted.returncode: pytest.skip(f'a small tmpfs cannot be mounted here: {mounted.stderr.strip()}')
    try:
        process = f.start()
        at_work(f)
        with open(f.out/'other', 'wb', buffering=0) as other:
            try:
                while True: other.write(bytes(4096))
            except OSError: pass
        said = process.communicate(timeout=90)[0]
        assert process.returncode == 1 and f'the disk that holds {f.out} is full: free some space' in said
        assert len(f.finished()) < 4
        (f.out/'other').unlink()
        assert '4 of 4 runs are finished' in f.call()
        assert f.records() == undisturbed.records()
    finally: subprocess.run(['umount', '-l', str(f.out)], check=True)


def refused(path, capsys, **options):
    "Nothing is started and nothing written; the message."
    out = path.parent/'nothing'
    with pytest.raises(SystemExit) as e: dal_sweep(str(path), str(out), **options)
    assert e.value.code == 2 and not out.exists()
    return capsys.readouterr().err


def test_refused_before_launch(tmp_path, capsys):
    f = Folder(tmp_path)
    path, good = f.path/'sweep.yaml', dict(notebook='chain.ipynb', vary=dict(seed=[0]))
    for content, message in ((dict(parameters=dict(bugdet=3)), "unknown parameter 'bugdet': did you mean 'budget'?"), (dict(parameters=dict(training=dict(stps=3))), "did you mean 'steps'?"),
                             (dict(notebook='none.ipynb'), 'there is no notebook'), (dict(parameters=dict(dataset='no/such')), 'prepare it first'),
                             (dict(resources=dict(threads=64)), 'lower it, or give more by --cores'), (dict(vary=dict(seed=0)), 'expected a list of values')):
        path.write_text(yaml.safe_dump({**good, **content}))
        assert message in refused(path, capsys, cores=2)
    path.write_text(yaml.safe_dump(good))
    with pytest.raises(SystemExit): dal_sweep(str(path), str(tmp_path/'{seed}'))
    assert 'has braces in its name' in capsys.readouterr().err
    assert 'neither can be negative' in refused(path, capsys, cores=-1)
    template = json.loads((f.path/'chain.ipynb').read_text())
    for tags, count in (([], 0), (['parameters', 'parameters'], 2)):
        changed = [c for c in template['cells'] if c['metadata'].get('tags') != ['parameters']] + [dict(c, metadata=dict(tags=['parameters'])) for c in template['cells'] if c['metadata'].get('tags') == ['parameters'] for _ in tags]
        (f.path/'chain.ipynb').write_text(json.dumps(dict(template, cells=changed)))
        assert f"has {count} cells tagged 'parameters'; expected exactly one" in refused(path, capsys)


plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3), max_leaves=6)


@settings(max_examples=300, deadline=None)
@given(plain)
def test_parameters_are_data(value):
    "papermill writes parameters as code; whatever they hold, what is read back is the same value and nothing else."
    assert ast.literal_eval(PythonTranslator.translate(value)) == value


@pytest.mark.parametrize('value', ['"); open("pwned", "w"); ("', "'''\nopen('pwned', 'w')\n'''", '\\"\nopen("pwned", "w") #', '{open("pwned","w")}', '$(touch pwned)`touch pwned`; touch pwned', '\u2028open("pwned","w")'])
def test_nothing_is_injected(tmp_path, value):
    "Neither into a notebook nor into the engine's shell, not through a value and not through a run's name."
    found = ast.parse(f'x = {PythonTranslator.translate(value)}').body
    assert len(found) == 1 and ast.literal_eval(found[0].value) == value
    f = Folder(tmp_path, vary=dict(cache=[value]))
    sweep = read_sweep(f.path/'sweep.yaml', f.out)
    assert re.fullmatch(r'[A-Za-z0-9.+=_-]+', *sweep.runs)
    write_workflow(sweep, f.out, threads=1)
    name = next(iter(sweep.runs))
    assert yaml.safe_load((f.out/'parameters'/f'{name}.yaml').read_text())['cache'] == value and value not in (f.out/'Snakefile').read_text()


def test_hostile_folder_and_value(tmp_path):
    f = Folder(tmp_path/"it's $(touch pwned); a \"folder\"", runs=1, vary=dict(seed=[0]), parameters=dict(cache='"); open("pwned", "w"); ("'))
    assert '1 of 1 runs are finished' in f.call()
    assert not list(tmp_path.rglob('pwned')) and not os.path.exists('pwned')


def test_a_thousand_runs(tmp_path):
    "Expanded, checked and listed in under 20 s, and Snakemake would do just that."
    f = Folder(tmp_path, vary=dict(seed=[*range(500)], budget=[1, 2]))
    name = next(iter(read_sweep(f.path/'sweep.yaml', f.out).runs))
    (f.out/'notebooks').mkdir(parents=True)
    (f.out/'notebooks'/f'{name}.ipynb').write_text('{}')
    begin = time.monotonic()
    said = f.call('--dry_run')
    assert time.monotonic() - begin < 20
    assert '999 of 1000 runs would be run' in said and f'finished {name}' in said
    write_workflow(read_sweep(f.path/'sweep.yaml', f.out), f.out, threads=1)
    engine = subprocess.run(snakemake_command(f.out, cores=2, dry_run=True), capture_output=True, text=True)
    wanted = set(re.findall(r'output: notebooks/(.*)\.ipynb', engine.stdout + engine.stderr))
    assert wanted == set(re.findall(r'to run +(\S+)', said)) and len(wanted) == 999


def test_the_real_loop(tmp_path):
    "The template of the study, killed once."
    config = tiny(tmp_path/'alone', tmp_path/'cache')
    keep = ('strategy', 'generator', 'rounds', 'budget', 'start_fraction', 'phantom', 'training', 'judge', 'diffusion', 'pretraining', 'finetuning', 'sampling', 'prediction', 'checks', 'curriculum')
    given = {k: v for k, v in config.model_dump(mode='json').items() if k in keep}
    f = Folder(tmp_path/'real', notebook=str(ROOT/'nbs'/'experiments'/'active_learning.ipynb'), parameters=dict(given, cache=str(tmp_path/'cache')), vary=dict(seed=[0]))
    process = f.start(cores=1)  # one thread: sums of floating-point numbers depend on their order
    at_work(f, rounds=1)
    for p in processes(f'{f.out}/parameters/'): [os.kill(c, signal.SIGKILL) for c in children(p) if not children(c)]
    process.communicate(timeout=120)
    assert process.returncode == 1
    f.call(cores=1)
    code = f'from tiny import run_once; run_once({str(tmp_path/"alone")!r}, {str(tmp_path/"cache")!r})'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT/'tests')
    assert [*f.records().values()] == [record_files(tmp_path/'alone')]
