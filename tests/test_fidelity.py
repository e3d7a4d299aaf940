"""The record of how far synthetic images lie from the pool: there where it is asked for, the same after a kill, blind to unbought labels, and without effect on the run."""
import multiprocessing, os, signal, time
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest
import torch
from dal_med.loop.fidelity import read_fidelity
from dal_med.loop.loop import active_learning
from dal_med.loop.plan import make_plan
from dal_med.loop.record import record_files
from dal_med.run.execute import open_input
from tiny import run_once, tiny

ON = dict(measures=dict(synthetic=True, least=10, resamples=20))


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')


def run(folder, cache, data=None, plan=None, **changes):
    "A tiny run in `folder`, with its data and plan."
    torch.set_num_threads(1)
    config = tiny(folder, cache, **changes)
    data, settings = data or open_input(config), config.settings()
    plan = plan or make_plan(data.labels, data.groups, seed=settings['seed'], split_seed=settings['split_seed'], start_fraction=settings['start_fraction'])
    return active_learning(data, folder, settings, cache=cache, plan=plan), data, plan


@pytest.fixture(scope='module')
def measured(tmp_path_factory, cache): return run(tmp_path_factory.mktemp('measured')/'run', cache, **ON)


def fidelity_files(folder): return {k: v for k, v in record_files(folder).items() if k.endswith('fidelity.parquet')}


def test_each_generating_round_has_its_record(measured):
    folder, _, plan = measured
    table = read_fidelity(folder.parent)
    assert sorted(set(table['round'])) == [0, 1] and table.labels_bought.min() == len(plan.start) + 12
    assert table.extractor.str.startswith('judge: in-domain test_efficientnet at 32 px, weights ').all()
    assert (table.value.isna() == (table.reason != '')).all()
    whole = table[(table['class'] == 'all') & (table.images == 'made') & (table.reason == '')]
    assert {'kid', 'precision', 'recall', 'density', 'coverage', 'memorisation', 'near_copies'} <= set(whole.measure)
    assert {'synthetic', 'floor', 'excess', 'same_classes'} == set(whole[whole.measure == 'kid'].of)
    assert (whole.low <= whole.high).all() and (whole[whole.measure == 'kid'].n_reference > 100).all()
    for r in (0, 1):
        decisions = pd.read_parquet(folder/'rounds'/f'{r:02d}'/'6_gate'/'decisions.parquet')
        own = table[(table['round'] == r) & (table['class'] == 'all') & (table.measure == 'kid') & (table.of == 'synthetic')].set_index('images').n
        assert own['made'] == len(decisions) and own['kept'] == decisions.admitted.sum()


def test_measuring_changes_nothing_else(measured, tmp_path, cache):
    off = record_files(run(tmp_path/'run', cache)[0])
    ours = {'run.json', *fidelity_files(measured[0])}  # files.json names the other file, and seconds are no part of the record
    on = {k: v for k, v in record_files(measured[0]).items() if k not in ours and not k.endswith('6_gate/files.json')}
    assert len(ours) == 3 and not fidelity_files(tmp_path/'run')
    assert on == {k: v for k, v in off.items() if k in on} and {*off} == {*on, 'run.json', *(k for k in off if k.endswith('6_gate/files.json'))}


def test_unbought_labels_change_nothing(measured, tmp_path, cache):
    folder, data, plan = measured
    bought = np.unique(np.concatenate([pd.read_parquet(p).position for p in folder.glob('rounds/*/*/picks.parquet')]))
    hidden, labels = np.setdiff1d(np.arange(len(data.labels)), plan.pool[bought]), data.metadata.label.to_numpy(dtype=object).copy()
    labels[hidden] = np.random.default_rng(0).permutation(labels[hidden])
    other = run(tmp_path/'run', cache, replace(data, metadata=data.metadata.assign(label=labels)), plan, **ON)[0]
    assert len(fidelity_files(other)) == 2 and record_files(other) == record_files(folder)


def test_a_bought_label_does(measured, tmp_path, cache):
    "The digests above can differ."
    folder, data, plan = measured
    labels, row = data.metadata.label.to_numpy(dtype=object).copy(), plan.pool[plan.start[0]]
    labels[row] = next(c for c in data.classes if c != labels[row])
    other = run(tmp_path/'run', cache, replace(data, metadata=data.metadata.assign(label=labels)), plan, **ON)[0]
    assert fidelity_files(other) != fidelity_files(folder)


def test_a_run_killed_in_the_gate_ends_with_the_same_record(tmp_path):
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['dal_med.run.execute', 'dal_med.generate.pixel_diffusion', 'diffusers.models.unets.unet_2d'])
    def start(name):
        process = context.Process(target=run_once, args=(tmp_path/name/'run', tmp_path/name/'cache'), kwargs=ON)
        process.start()
        return process
    def done(name):
        process = start(name)
        process.join()
        assert process.exitcode == 0
        return record_files(tmp_path/name/'run')
    whole, rounds = done('whole'), tmp_path/'killed'/'run'/'rounds'
    for r in (0, 1):
        process, before, gate = start('killed'), rounds/f'{r:02d}'/'5_generate', rounds/f'{r:02d}'/'6_gate'
        while process.is_alive() and not before.exists(): time.sleep(.002)
        time.sleep(.02)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert before.exists() and not gate.exists(), 'the kill came too late to mean anything'
    assert done('killed') == whole and len(fidelity_files(tmp_path/'whole'/'run')) == 2


def test_a_cold_start_measures_in_its_label_free_encoder(tmp_path, cache):
    run_once(tmp_path/'run', cache, start_scheme='cold', encoder=dict(steps=3, batch_size=16), **ON)
    table = read_fidelity(tmp_path)
    assert table.extractor.str.startswith('encoder: in-domain test_resnet at 32 px').all()
    assert ((table['class'] == 'all') & (table.measure == 'kid') & table.value.notna()).any()
