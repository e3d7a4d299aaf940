"""Training shared by two processes ends where training by one does. They talk over gloo on the CPU; several accelerators go the same way through `accelerate`, with a backend of their own."""
import os, socket, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

HERE, STEPS = Path(__file__).resolve(), 6
TRAININGS = {'test_vit': ('test_vit', {}), 'test_resnet': ('test_resnet', {}), 'test_resnet_average': ('test_resnet', dict(ema=.5)),
             'test_vit_average_mixed': ('test_vit', dict(ema=.5, augmentation='randaugment', mixing='cutmix'))}
LAUNCHED = 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'


def work(out: Path):
    "What each process does: train small classifiers, write down every weight they end with, and their losses; and try to do a run."
    from dal_med.data.phantom import phantom
    from dal_med.learn.classifier import create_classifier
    from dal_med.learn.training import train
    from dal_med.run.config import make_config
    from dal_med.run.execute import execute
    torch.set_num_threads(1)
    p = phantom(64, size=32, rng=0)
    for name, (backbone, options) in TRAININGS.items():
        model = create_classifier(backbone, 7, 32, dropout=0., rng=0)
        told = train(model, p.images, np.asarray(p.labels), steps=STEPS, batch_size=16, lr=1e-3, rng=1, **options)
        assert not model.training
        weights = {k: v.cpu().contiguous().numpy() for k, v in model.state_dict().items()}
        save_file({**weights, 'loss': told['loss']}, out/f'{name}-{os.environ.get("RANK", "alone")}.safetensors')
    if 'RANK' in os.environ:
        try: execute(make_config(dict(folder=str(out/'run'), cache=str(out/'cache'))), wait=True)
        except RuntimeError as e: (out/f'refused-{os.environ["RANK"]}.txt').write_text(str(e))


def launch(processes: int, out: Path) -> subprocess.CompletedProcess:
    "This file, in one process or in two launched together; `accelerate launch --cpu` would quietly start a single one without MPI, so torchrun does it."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    together = ['-m', 'torch.distributed.run', '--nproc_per_node', str(processes), '--master_addr', '127.0.0.1', '--master_port', str(port)]
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHED} | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', CUDA_VISIBLE_DEVICES='', GLOO_SOCKET_IFNAME='lo')
    return subprocess.run([sys.executable, *(together if processes > 1 else []), str(HERE), str(out)], env=env, capture_output=True, text=True, timeout=150)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> dict:
    "What one process ended with, and each of two."
    out = tmp_path_factory.mktemp('two')
    for processes in (1, 2):
        done = launch(processes, out)
        assert done.returncode == 0, done.stderr[-3000:]
    assert not (out/'run').exists()
    return {p.stem: load_file(p) for p in out.glob('*.safetensors')} | dict(refused=[p.read_text() for p in sorted(out.glob('refused-*.txt'))])


@pytest.mark.parametrize('name', TRAININGS)
def test_both_processes_hold_the_same_classifier(trained, name):
    first, second = trained[f'{name}-0'], trained[f'{name}-1']
    assert first.keys() == second.keys() and len(first) > 10
    for k in first: np.testing.assert_array_equal(first[k], second[k], k)


@pytest.mark.parametrize('name', [k for k, (backbone, _) in TRAININGS.items() if backbone == 'test_vit'])
def test_two_processes_train_what_one_trains(trained, name):
    "Weights move by up to a rate of 1e-3 a step, so 1e-4 is a tenth of one step; batch normalisation would differ, its statistics being each process's own."
    alone, shared = trained[f'{name}-alone'], trained[f'{name}-0']
    np.testing.assert_allclose(shared['loss'], alone['loss'], atol=1e-5)
    for k in alone: np.testing.assert_allclose(shared[k], alone[k], atol=1e-4, err_msg=k)
    assert shared['loss'].shape == (STEPS,) and np.ptp(shared['loss']) > .1


def test_a_run_is_the_work_of_one_process(trained):
    "Its phases write one record; two processes would wait for each other for ever, one for the folder's lock and one in training."
    assert [m.split(':')[0] for m in trained['refused']] == [f'this is process {i} of 2 launched together, and a run is the work of one' for i in (1, 2)]


if __name__ == '__main__': work(Path(sys.argv[1]))
