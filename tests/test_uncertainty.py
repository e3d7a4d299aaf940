"""The loop's other ways to ask what a classifier does not know: they go on after a kill, count what they buy, and see no label that was not bought."""
import json
import shutil
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest
import torch
from dal_med.loop.collect import labels_after
from dal_med.loop.loop import active_learning
from dal_med.loop.plan import make_plan
from dal_med.loop.record import record_files
from dal_med.run.execute import open_input
from tiny import tiny


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')


def digests(folder): return {str(p.parent.relative_to(folder)): json.loads(p.read_text()) for p in sorted(folder.glob('rounds/*/*/files.json'))}


def inputs(folder, cache, **prediction):
    torch.set_num_threads(1)
    config = tiny(folder, cache, strategy='bald', generator='none', prediction=dict(passes=3, views=1, **prediction))
    data, settings = open_input(config), config.settings()
    return data, settings, make_plan(data.labels, data.groups, seed=settings['seed'], split_seed=settings['split_seed'], start_fraction=settings['start_fraction'])


def permuted(data, rows):
    "The data set with the labels of some rows permuted among them."
    labels = data.metadata.label.to_numpy(dtype=object).copy()
    labels[rows] = np.random.default_rng(0).permutation(labels[rows])
    return replace(data, metadata=data.metadata.assign(label=labels))


@pytest.mark.parametrize('uncertainty', ['laplace', 'ensemble', 'snapshot'])
def test_unbought_labels_change_nothing(uncertainty, tmp_path, cache):
    "With a temperature as well, for which the validation labels are bought: nobody knows those of test, nor the pool's rest."
    data, settings, plan = inputs(tmp_path/'a', cache, uncertainty=uncertainty, members=2, temperature='validation')
    a = active_learning(data, tmp_path/'a', settings, cache=cache, plan=plan)
    bought = np.unique(np.concatenate([pd.read_parquet(p).position for p in a.glob('rounds/*/*/picks.parquet')]))
    hidden = np.setdiff1d(np.arange(len(data.labels)), np.r_[plan.pool[bought], plan.validation])
    other = permuted(data, hidden)
    assert (other.labels[hidden] != data.labels[hidden]).mean() > .1
    b = active_learning(other, tmp_path/'b', settings, cache=cache, plan=plan)
    assert digests(a) == digests(b) and record_files(a) == record_files(b)


def test_validation_labels_matter_where_they_are_bought_and_nowhere_else(tmp_path, cache):
    runs = {}
    for name, temperature in (('with', 'validation'), ('without', 'none')):
        data, settings, plan = inputs(tmp_path/name, cache, temperature=temperature)
        for which, d in (('true', data), ('permuted', permuted(data, plan.validation))):
            runs[name, which] = active_learning(d, tmp_path/name/which, settings, cache=cache, plan=plan)
    assert digests(runs['with', 'true']) != digests(runs['with', 'permuted'])
    assert digests(runs['without', 'true']) == digests(runs['without', 'permuted'])
    n, bought = len(plan.validation), {name: json.loads((folder/'run.json').read_text())['labels']['validation_bought'] for name, folder in runs.items()}
    assert bought['with', 'true'] == n > 0 and bought['without', 'true'] == 0
    table = pd.read_parquet(runs['with', 'true']/'rounds'/'00'/'3_predict'/'validation.parquet')
    assert table.image_id.tolist() == data.metadata.image_id[plan.validation].tolist() and table.label.tolist() == data.metadata.label[plan.validation].tolist()
    assert len(list(runs['with', 'true'].rglob('validation.parquet'))) == 1 + settings['rounds']  # the labels once; the predictions of each round
    assert not list(runs['without', 'true'].rglob('temperature.json'))
    assert [labels_after(runs['with', 'true'], r) - labels_after(runs['without', 'true'], r) for r in range(3)] == [0, n, n]


def test_an_old_configuration_keeps_its_record(tmp_path, cache):
    "`dropout` is what runs did before there was a choice, to the bit."
    data, settings, plan = inputs(tmp_path/'a', cache)
    assert set(settings['prediction']) == {'passes', 'views'}
    named = {**settings, 'prediction': dict(settings['prediction'], uncertainty='dropout', members=5, temperature='none')}
    a, b = (active_learning(data, tmp_path/n, s, cache=cache, plan=plan) for n, s in (('a', settings), ('b', named)))
    assert digests(a) == digests(b)


@pytest.mark.parametrize('uncertainty', ['laplace', 'ensemble', 'snapshot', 'dropout'])
def test_a_run_cut_off_before_a_prediction_ends_the_same(uncertainty, tmp_path, cache):
    data, settings, plan = inputs(tmp_path/'a', cache, uncertainty=uncertainty, members=2, temperature='validation')
    settings = {**settings, 'rounds': 3}

    class Cut(Exception): pass
    def cut(round, phase, done):
        if (round, phase) == (1, 'predict'): raise Cut
    whole = active_learning(data, tmp_path/'a', settings, cache=cache, plan=plan)
    with pytest.raises(Cut): active_learning(data, tmp_path/'b', settings, cache=cache, plan=plan, progress=cut)
    shutil.rmtree(tmp_path/'b'/'rounds'/'01'/'2_evaluate')
    again = active_learning(data, tmp_path/'b', settings, cache=cache, plan=plan)
    assert digests(whole) == digests(again) and record_files(whole) == record_files(again)
