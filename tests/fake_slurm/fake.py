"""What Snakemake's SLURM executor needs of SLURM, on one machine: jobs are processes, accounts are files in the folder that FAKE_SLURM names.
A file `vanish` there makes the node of one job disappear in the middle of its run: the processes are gone, and only sacct says so."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

STATE = Path(os.environ['FAKE_SLURM'])


def option(*names):
    "The value of an option, as `--name value`, `--name=value` or `-n value`."
    for i, a in enumerate(sys.argv):
        for n in names:
            if a == n: return sys.argv[i + 1]
            if a.startswith(f'{n}='): return a[len(n) + 1:]


def write(job, **what):
    path = STATE/f'{job}.json'
    part = path.with_suffix(f'.{os.getpid()}')
    part.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **what}))
    os.replace(part, path)


def jobs(): return {int(p.stem): json.loads(p.read_text()) for p in STATE.glob('*.json')}


def end(job, state):
    "Kill every process of a job, wherever it has gone."
    write(job, state=state)
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if f'SLURM_JOB_ID={job}\0'.encode() in (p/'environ').read_bytes() + b'\0': os.kill(int(p.name), signal.SIGKILL)
        except OSError: continue


def sbatch():
    job = len(jobs()) + 1
    while True:
        try: os.close(os.open(STATE/f'{job}.number', os.O_CREAT | os.O_EXCL))
        except FileExistsError: job += 1
        else: break
    write(job, state='PENDING', name=option('--job-name'), argv=sys.argv[1:])
    subprocess.Popen([sys.executable, __file__, str(job), option('--output').replace('%j', str(job)), option('-D'), option('--wrap')], start_new_session=True,
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(job)


def node(job, output, folder, script):
    "Run a job, as slurmd would."
    write(job, state='RUNNING')
    vanish = STATE/'vanish'
    try: os.replace(vanish, STATE/f'vanished.{job}')
    except FileNotFoundError: vanish = None
    with open(output, 'w') as log: process = subprocess.Popen(['sh', '-c', script], cwd=folder, stdout=log, stderr=log, env={**os.environ, 'SLURM_JOB_ID': str(job)}, start_new_session=True)
    if vanish:
        watched = Path((STATE/f'vanished.{job}').read_text())
        while process.poll() is None and len(list(watched.glob('*/rounds/*'))) < 3: time.sleep(.02)
        end(job, 'NODE_FAIL')
    code = process.wait()
    if jobs()[int(job)]['state'] == 'RUNNING': write(job, state='FAILED' if code else 'COMPLETED')


def sacct():
    if option('--name'): print('\n'.join(f'{i}|{j["state"]}' for i, j in jobs().items() if j['name'] == option('--name')))
    elif '-o' in sys.argv and 'nodelist' in option('-o'): print('node1')


def squeue(): print('\n'.join(f'{i}|{j["state"]}' for i, j in jobs().items() if j['name'] == option('--name')))
def scancel(): [end(int(a), 'CANCELLED') for a in sys.argv[1:] if a.isdigit()]
def sinfo(): print('PARTITION\ndebug*')
def scontrol(): print('MaxArraySize            = 1001\nMinJobAge               = 300 sec')
def sacctmgr(): pass
def sshare(): pass


def srun():
    command = sys.argv[1:]
    while command[0].startswith('-'): command.pop(0)
    os.execvp(command[0], command)


if __name__ == '__main__': node(*sys.argv[1:])
