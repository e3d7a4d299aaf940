"""A study at fixed label counts: labels that were not bought change nothing, and a killed unit goes on to the same record."""
import multiprocessing, os, signal
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest
import torch
from dal_med.data.phantom import prepare_phantom
from dal_med.loop.fixed_labels import fixed_labels
from dal_med.loop.record import record_files
from dal_med.loop.unit import fixed_plan
from tiny import tiny

ARMS = ['none', 'traditional', 'oversampling', 'diffusion', 'diffusion_gated', 'diffusion_guided', 'diffusion_uncertain', 'diffusion_from_pool', 'diffusion_guessed', 'diffusion_judges', 'diffusion_first']


def settings(**changes): return tiny('unused', 'unused', budget=40, arms=ARMS, ratios=[1., 2.], generator='none', strategy='random', **changes).settings()


@pytest.fixture(scope='module')
def data(tmp_path_factory): return prepare_phantom(tmp_path_factory.mktemp('data')/'phantom', n=400, size=32)


def study(data, folder, plan=None, arms=ARMS):
    torch.set_num_threads(1)
    return fixed_labels(data, folder/'unit', settings(), arms, [1., 2.], spare=1.5, cache=folder/'cache', plan=plan, bar=False)


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    "With the plan that all tests here share: which rows are bought depends on the classes, as the simulator knows them."
    return study(data, tmp_path_factory.mktemp('undisturbed'), fixed_plan(data.labels, data.groups, 40, seed=0))


def with_labels(data, labels): return replace(data, metadata=data.metadata.assign(label=labels))


def test_unbought_labels_change_nothing(data, undisturbed, tmp_path):
    "Not a pixel, not a verdict, not a prediction: neither labels of the pool nor those of validation and test; and nothing is shared with the first unit but the data."
    plan = fixed_plan(data.labels, data.groups, 40, seed=0)
    labels, hidden = data.metadata.label.to_numpy(dtype=object).copy(), np.setdiff1d(np.arange(len(data.labels)), plan.pool[plan.start])
    labels[hidden] = np.random.default_rng(0).permutation(labels[hidden])
    permuted = with_labels(data, labels)
    assert (permuted.labels != data.labels).mean() > .1
    files = record_files(study(permuted, tmp_path, plan))
    assert files == record_files(undisturbed)
    assert sum(name.endswith('decisions.parquet') for name in files) == 5 and sum(name.endswith('test.parquet') for name in files) == 1 + 3 + 2*8
    assert pd.concat([pd.read_parquet(p) for p in undisturbed.glob('rounds/00/*/decisions.parquet')]).admitted.any()


def test_the_check_can_fail(data, undisturbed, tmp_path):
    "A label that was bought does change what follows."
    plan = fixed_plan(data.labels, data.groups, 40, seed=0)
    labels, bought = data.metadata.label.to_numpy(dtype=object).copy(), plan.pool[plan.start]
    a, b = bought[labels[bought] == 'MEL'][0], bought[labels[bought] == 'NV'][0]
    labels[a], labels[b] = labels[b], labels[a]
    one, other = record_files(undisturbed), record_files(study(with_labels(data, labels), tmp_path, plan))
    assert one.keys() == other.keys()
    assert not any(one[k] == other[k] for k in one if k.endswith(('decisions.parquet', 'picks.parquet')) or ('2_fit' in k and k.endswith('test.parquet')))


def killed(path, folder, step):
    "Run until the named function is called for the third time, then die without a word."
    import dal_med.loop.candidates, dal_med.loop.fixed_labels
    from dal_med.data.datasets import open_dataset
    module, name = (dal_med.loop.fixed_labels, 'predict') if step == 'fit' else (dal_med.loop.candidates, 'drawn')
    calls, before = [0], getattr(module, name)
    def dies(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 3: os.kill(os.getpid(), signal.SIGKILL)
        return before(*args, **kwargs)
    if step == 'fit': module.predict = dies
    else: module.WAYS['drawn'] = dies
    study(open_dataset(path), folder)


@pytest.mark.parametrize('step', ['fit', 'candidates'])
def test_a_killed_unit_goes_on(data, undisturbed, tmp_path, step):
    process = multiprocessing.get_context('spawn').Process(target=killed, args=(data.path, tmp_path, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'cache').rglob('images.npy') if '.partial' not in str(p)}
    assert len(before) == 2 if step == 'candidates' else len(before) > 2
    assert record_files(study(data, tmp_path)) == record_files(undisturbed)
    assert {p: p.stat().st_mtime_ns for p in before} == before  # what was kept was not made again
    assert not [*tmp_path.rglob('*.partial')]
