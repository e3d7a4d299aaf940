"""Images steered, started from the pool, drawn in excess, allocated by recall, and a ratio chosen: through the whole loop, within the label budget."""
import json
import numpy as np
import pandas as pd
import pytest
import torch
from dataclasses import replace
from dal_med.loop.loop import active_learning, check_settings
from dal_med.loop.plan import make_plan
from dal_med.loop.record import record_files
from dal_med.run.execute import open_input
from test_firewall import digests
from tiny import tiny

HARD = dict(sampling=dict(steps=2, steer=dict(objective='entropy', between=[0., 1.]), image_to_image=.9, oversample=2.))
CHOSEN = dict(allocation=dict(adaptive=True, most=40), curriculum=dict(real_until=0, full_from=1, ratio=2., weigh='judge', choose='validation'), gate=dict(judge_threshold=.01, quantile=1.))


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')


def inputs(folder, cache, **changes):
    torch.set_num_threads(1)
    config = tiny(folder, cache, **changes)
    data, settings = open_input(config), config.settings()
    return data, settings, make_plan(data.labels, data.groups, seed=0, split_seed=0, start_fraction=settings['start_fraction'])


def permuted(data, rows):
    labels = data.metadata.label.to_numpy(dtype=object).copy()
    labels[rows] = np.random.default_rng(0).permutation(labels[rows])
    return replace(data, metadata=data.metadata.assign(label=labels))


@pytest.mark.parametrize('how', ['hard', 'chosen'])
def test_unbought_labels_change_nothing(how, tmp_path, cache):
    "With the validation labels among the bought ones exactly where they are counted."
    data, settings, plan = inputs(tmp_path/'a', cache, **(HARD if how == 'hard' else CHOSEN))
    a = active_learning(data, tmp_path/'a', settings, cache=cache, plan=plan)
    counted = json.loads((a/'run.json').read_text())['labels']['validation_bought']
    assert counted == (len(plan.validation) if how == 'chosen' else 0)
    bought = np.unique(np.concatenate([pd.read_parquet(p).position for p in a.glob('rounds/*/*/picks.parquet')]))
    hidden = np.setdiff1d(np.arange(len(data.labels)), np.r_[plan.pool[bought], plan.validation if counted else []].astype(int))
    b = active_learning(permuted(data, hidden), tmp_path/'b', settings, cache=cache, plan=plan)
    assert digests(a) == digests(b) and record_files(a) == record_files(b)
    if counted:
        c = active_learning(permuted(data, plan.validation), tmp_path/'c', settings, cache=cache, plan=plan)
        assert digests(a) != digests(c), 'validation labels are read, or else they need not be counted'


def test_what_was_asked_for_is_what_happens(tmp_path, cache):
    data, settings, plan = inputs(tmp_path/'a', cache, **HARD)
    a = active_learning(data, tmp_path/'a', settings, cache=cache, plan=plan)
    ids, unbought = data.metadata.image_id.to_numpy(str), set(data.metadata.image_id[plan.pool])
    for r in range(2):
        made, verdict = (pd.read_parquet(a/'rounds'/f'{r:02d}'/p) for p in ('5_generate/synthetic.parquet', '6_gate/decisions.parquet'))
        unbought -= set(pd.read_parquet(a/'rounds'/f'{r:02d}'/'4_query'/'picks.parquet').image_id)
        wanted = dict(zip(data.classes, json.loads((a/'rounds'/f'{r:02d}'/'5_generate'/'wanted.json').read_text())))
        assert made.label.value_counts().to_dict() == {k: 2*n for k, n in wanted.items() if n}, 'twice as many as wanted'
        assert set(made.source) <= unbought, 'walks start from images without a label'
        kept = verdict[verdict.admitted].label.value_counts()
        assert all(n <= wanted[k] for k, n in kept.items()) and set(verdict.reason[verdict.admitted]) <= {'admitted'}
        for k in kept.index:
            mine = verdict[verdict.label == k]
            left = mine.learner_entropy[mine.reason == 'surplus']
            assert not len(left) or left.max() <= mine.learner_entropy[mine.admitted].min(), 'the most uncertain are kept'


def test_a_ratio_chosen_is_the_ratio_trained(tmp_path, cache):
    data, settings, plan = inputs(tmp_path/'a', cache, **CHOSEN)
    a = active_learning(data, tmp_path/'a', settings, cache=cache, plan=plan)
    files = sorted(a.glob('rounds/*/1_train/ratios.json'))
    assert files, 'no round had synthetic images to choose among'
    for path in files:
        found, trained = json.loads(path.read_text()), json.loads(path.with_name('training.json').read_text())
        assert set(found['balanced_accuracy']) == {'0.0', '0.5', '1.0', '2.0'} and found['fixed'] == 2. and str(found['chosen']) in found['balanced_accuracy']
        assert all(s <= found['chosen']*n for s, n in zip(trained['synthetic'], trained['real']))
    for path in a.glob('rounds/*/5_generate/synthetic.parquet'): assert len(pd.read_parquet(path)) <= 40
    assert len(list(a.rglob('3_predict/validation.parquet'))) == 1, 'the labels are bought once'


def test_a_generator_that_cannot_be_steered_is_refused(tmp_path, cache, monkeypatch):
    from dal_med.loop import phases
    data, settings, plan = inputs(tmp_path/'a', cache, **HARD)
    class Plain:
        def sample(self, labels, rng=0): ...
    monkeypatch.setattr(phases, 'get_generator', lambda name: Plain)
    with pytest.raises(ValueError, match='sampling.steer and sampling.image_to_image: the generator pixel_diffusion cannot'): check_settings(settings, plan)
