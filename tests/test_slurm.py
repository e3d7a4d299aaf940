"""A sweep on a cluster: a fake one, whose nodes can be made to vanish, and a real one of a single node where SLURM's daemons are installed."""
import getpass, json, os, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest
import yaml
from sweep_tools import ROOT, Folder, wait_for

PROFILE = ROOT/'nbs'/'experiments'/'profiles'/'slurm'/'config.yaml'
RESOURCES = dict(threads=2, mem_mb=700, runtime='2h', gpu=1, partition='gpu', extra='--nice=5')
pytest.importorskip('snakemake_executor_plugin_slurm', reason='snakemake-executor-plugin-slurm is not installed')


def profile(folder, **changes):
    "The committed profile, in a hurry."
    path = Path(folder)/'profiles'/'slurm'/'config.yaml'
    path.parent.mkdir(parents=True)
    hurry = {'slurm-init-seconds-before-status-checks': 1, 'seconds-between-status-checks': 1, 'latency-wait': 10, 'retries': 0}
    path.write_text(yaml.safe_dump({**yaml.safe_load(PROFILE.read_text()), **hurry, **changes}))


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "The same sweep without a cluster."
    f = Folder(tmp_path_factory.mktemp('alone'), runs=2)
    f.call()
    return f.records()


class Fake:
    def __init__(self, folder):
        self.state = folder/'slurm'
        self.state.mkdir()
        self.env = dict(FAKE_SLURM=str(self.state), PATH=f'{ROOT/"tests"/"fake_slurm"}{os.pathsep}{os.environ["PATH"]}')

    def jobs(self): return [json.loads(p.read_text()) for p in sorted(self.state.glob('*.json'), key=lambda p: int(p.stem))]
    def states(self): return [j['state'] for j in self.jobs()]


@pytest.fixture
def fake(tmp_path): return Fake(tmp_path)


def test_a_node_vanishes(tmp_path, fake, undisturbed):
    profile(tmp_path)
    f = Folder(tmp_path, runs=2, resources=RESOURCES)
    (fake.state/'vanish').write_text(str(f.out/'runs'))
    said = f.call('--profile', 'slurm', cores=0, env=fake.env, expect=1)
    assert sorted(fake.states()) == ['COMPLETED', 'NODE_FAIL'] and '1 of 2 runs are finished' in said and 'node failure' in said
    assert '2 of 2 runs are finished' in f.call('--profile', 'slurm', cores=0, env=fake.env)
    assert sorted(fake.states()) == ['COMPLETED', 'COMPLETED', 'NODE_FAIL']
    assert f.records() == undisturbed
    asked = ' '.join(fake.jobs()[0]['argv'])
    for option in ('-p gpu', '-t 120', '--mem 700', '--cpus-per-task=2', '--gpus=1', '--nice=5'): assert option in asked, asked
    notebook = (f.out/'notebooks'/f'{f.finished()[0]}.ipynb').read_text()
    assert 'threads 2' in notebook


def test_a_vanished_node_is_made_up_for_by_a_retry(tmp_path, fake, undisturbed):
    profile(tmp_path, retries=1)
    f = Folder(tmp_path, runs=2)
    (fake.state/'vanish').write_text(str(f.out/'runs'))
    assert '2 of 2 runs are finished' in f.call('--profile', 'slurm', cores=0, env=fake.env)
    assert f.records() == undisturbed and 'NODE_FAIL' in fake.states()


def test_stopping_cancels_jobs(tmp_path, fake):
    profile(tmp_path)
    f = Folder(tmp_path, runs=1)
    f.fault(0, 'slow')
    process = f.start('--profile', 'slurm', cores=0, env=fake.env)
    wait_for(lambda: fake.states() == ['RUNNING'] and list(f.out.glob('runs/*/rounds/*')), what='a run on the cluster')
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and fake.states() == ['CANCELLED'], said + f.log()


CONF = '''
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={port}
SlurmdPort={other}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=0
SlurmdTimeout=5
MinJobAge=300
ReturnToService=2
SlurmctldParameters=enable_configless
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=only Nodes=ALL Default=YES MaxTime=INFINITE State=UP
'''


class Daemons:
    "munged, slurmctld and slurmd on loopback, in a folder of their own."

    def __init__(self, folder):
        self.folder, self.running = folder, {}
        for name in ('state', 'spool', 'bin'): (folder/name).mkdir()
        (folder/'bin'/'srun').write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')  # the executor hides SLURM_CONF from srun; a real cluster has /etc/slurm
        (folder/'bin'/'srun').chmod(0o755)
        self.env = dict(SLURM_CONF=str(folder/'slurm.conf'), PATH=f'{folder}/bin{os.pathsep}{os.environ["PATH"]}')
        ports = [socket.socket() for _ in range(2)]
        for s in ports: s.bind(('127.0.0.1', 0))
        numbers = [s.getsockname()[1] for s in ports]
        for s in ports: s.close()
        (folder/'slurm.conf').write_text(CONF.format(host=socket.gethostname().split('.')[0], user=getpass.getuser(), folder=folder, port=numbers[0], other=numbers[1], cpus=os.cpu_count()))
        (folder/'munge.key').write_bytes(os.urandom(128))
        os.chmod(folder/'munge.key', 0o600)
        self.start('munged', '--foreground', '--force', f'--socket={folder}/munge.socket', f'--key-file={folder}/munge.key', f'--pid-file={folder}/munge.pid', f'--log-file={folder}/munge.log', f'--seed-file={folder}/munge.seed')
        wait_for((folder/'munge.socket').exists, 20, 'munged')
        self.start('slurmctld', '-D')
        self.start('slurmd', '-D', '-N', socket.gethostname().split('.')[0])
        wait_for(lambda: 'idle' in self.ask('sinfo', '-h', '-o', '%T'), 40, 'an idle node')

    def start(self, name, *options):
        self.running[name] = subprocess.Popen([shutil.which(name) or f'/usr/sbin/{name}', *options], env={**os.environ, **self.env}, stdout=open(self.folder/f'{name}.out', 'w'), stderr=subprocess.STDOUT)

    def ask(self, *command): return subprocess.run(command, env={**os.environ, **self.env}, capture_output=True, text=True).stdout

    def stop(self):
        for process in reversed(self.running.values()):
            process.terminate()
            try: process.wait(10)
            except subprocess.TimeoutExpired: process.kill()


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    missing = [d for d in ('munged', 'slurmctld', 'slurmd', 'sbatch') if not shutil.which(d, path=f'{os.environ["PATH"]}:/usr/sbin')]
    if missing: pytest.skip(f'{", ".join(missing)} not installed here (Debian: munge slurmctld slurmd slurm-client)')
    if os.geteuid(): pytest.skip('slurmd needs root')
    folder = tmp_path_factory.mktemp('slurm')
    daemons = Daemons(folder)
    yield daemons
    daemons.stop()


def test_a_real_cluster_of_one_node(tmp_path, slurm, undisturbed):
    profile(tmp_path, **{'slurm-status-command': 'squeue'})  # no accounts are kept here
    f = Folder(tmp_path, runs=2, resources=dict(mem_mb=400, runtime=10))
    f.fault(1, 'killed')
    said = f.call('--profile', 'slurm', cores=0, env=slurm.env, expect=1)
    assert '1 of 2 runs are finished' in said and 'Kernel died' in said
    f.heal()
    assert '2 of 2 runs are finished' in f.call('--profile', 'slurm', cores=0, env=slurm.env)
    assert f.records() == undisturbed
    assert slurm.ask('squeue', '-h', '--states=all', '-o', '%T').split().count('COMPLETED') == 2


def test_a_real_node_vanishes(tmp_path, slurm, undisturbed):
    profile(tmp_path, **{'slurm-status-command': 'squeue'})
    f = Folder(tmp_path, runs=2, resources=dict(mem_mb=400, runtime=10))
    f.fault(0, 'slow')
    process = f.start('--profile', 'slurm', cores=0, env=slurm.env)
    wait_for(lambda: len(f.finished()) == 1 and list(f.out.glob('runs/seed0-*/rounds/02')), 120, 'a run on the cluster')
    slurm.running['slurmd'].kill()
    for p in Path('/proc').glob('[0-9]*'):  # the whole node is gone
        try:
            environment = (p/'environ').read_bytes()
            if str(slurm.folder).encode() in environment and (b'SLURM_JOB_ID=' in environment or b'slurmstepd' in (p/'cmdline').read_bytes()): os.kill(int(p.name), signal.SIGKILL)
        except OSError: continue
    said = process.communicate(timeout=150)[0]
    assert process.returncode == 1 and '1 of 2 runs are finished' in said
    f.heal()
    slurm.start('slurmd', '-D', '-N', socket.gethostname().split('.')[0])
    wait_for(lambda: 'idle' in slurm.ask('sinfo', '-h', '-o', '%T'), 60, 'an idle node')
    assert '2 of 2 runs are finished' in f.call('--profile', 'slurm', cores=0, env=slurm.env)
    assert f.records() == undisturbed
