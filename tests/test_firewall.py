"""Labels that were not bought change nothing: not a pick, not a pixel, not a verdict, not a prediction."""
import json
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest
import torch
from dal_med.generate.released import release
from dal_med.loop.loop import active_learning
from dal_med.loop.once_a_split import new_generator
from dal_med.loop.plan import make_plan
from dal_med.loop.record import record_files
from dal_med.query.strategies import STRATEGIES
from dal_med.run.execute import open_input
from tiny import tiny


def digests(folder):
    "Digests of all that a run made, the heavy files that it pruned included."
    made = {name: digest for path in sorted(folder.glob('rounds/*/*/files.json')) for name, digest in
            {f'{path.parent.parent.name}/{path.parent.name}/{k}': v for k, v in json.loads(path.read_text()).items()}.items()}
    assert any(name.endswith('5_generate/images.npy') for name in made) and any(name.endswith('decisions.parquet') for name in made)
    return made


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')


CASES = {**{name: dict(strategy=name) for name in STRATEGIES}, 'every check of the gate': dict(checks=dict(sanity=.02, registered=.02, near=.02))}


@pytest.mark.parametrize('changes', CASES.values(), ids=CASES)
def test_unbought_labels_change_nothing(changes, tmp_path, cache):
    torch.set_num_threads(1)
    config = tiny(tmp_path/'a', cache, **changes)
    data, settings = open_input(config), config.settings()
    plan = make_plan(data.labels, data.groups, seed=settings['seed'], split_seed=settings['split_seed'], start_fraction=settings['start_fraction'])
    a = active_learning(data, tmp_path/'a', settings, cache=cache, plan=plan)

    bought = np.unique(np.concatenate([pd.read_parquet(p).position for p in a.glob('rounds/*/*/picks.parquet')]))
    assert len(bought) == len(plan.start) + 2*settings['budget']
    hidden = np.setdiff1d(np.arange(len(data.labels)), plan.pool[bought])  # of the pool, of validation and of test
    labels = data.metadata.label.to_numpy(dtype=object).copy()
    labels[hidden] = np.random.default_rng(0).permutation(labels[hidden])
    permuted = replace(data, metadata=data.metadata.assign(label=labels))
    assert (permuted.labels != data.labels).mean() > .1 and (permuted.labels[plan.pool[bought]] == data.labels[plan.pool[bought]]).all()

    b = active_learning(permuted, tmp_path/'b', settings, cache=cache, plan=plan)
    assert digests(a) == digests(b)
    assert record_files(a) == record_files(b)


def test_the_check_can_fail(tmp_path, cache):
    "A label that was bought does change what follows: the digests above are sensitive."
    config = tiny(tmp_path/'a', cache)
    data, settings = open_input(config), config.settings()
    plan = make_plan(data.labels, data.groups, seed=0, start_fraction=settings['start_fraction'])
    a = active_learning(data, tmp_path/'a', settings, cache=cache, plan=plan)
    labels = data.metadata.label.to_numpy(dtype=object).copy()
    row = plan.pool[plan.start[0]]
    labels[row] = next(c for c in data.classes if c != labels[row])
    b = active_learning(replace(data, metadata=data.metadata.assign(label=labels)), tmp_path/'b', settings, cache=cache, plan=plan)
    assert digests(a) != digests(b)


def test_released_weights_must_not_have_seen_what_is_held_back(tmp_path, cache):
    "A run may begin from a generator that others trained, unless that has learnt from one of the run's test images."
    config = tiny(tmp_path/'a', cache)
    data, settings = open_input(config), config.settings()
    plan, ids = make_plan(data.labels, data.groups, seed=0, start_fraction=settings['start_fraction']), data.metadata.image_id.to_numpy(str)
    model = new_generator(settings, len(data.classes), data.images.shape[1])
    model.fit(data.images[plan.pool], np.full(len(plan.pool), -1), steps=2, batch_size=8)
    for name, rows in (('pool', plan.pool), ('all but one', np.setdiff1d(np.arange(len(ids)), plan.test[1:]))): release(model, tmp_path/name, ids[rows], dict(name='phantom', also_in=[]))
    begun = settings | dict(pretraining=dict(settings['pretraining'], steps=0, start=str(tmp_path/'all but one')))
    with pytest.raises(ValueError, match=f'learnt from {1 + len(plan.validation)} of the {len(plan.validation) + len(plan.test)} images'): active_learning(data, tmp_path/'a', begun, cache=cache, plan=plan)
    assert not [*(tmp_path/'a').glob('*.json')]
    begun['pretraining']['start'] = str(tmp_path/'pool')
    a = active_learning(data, tmp_path/'b', begun, cache=cache, plan=plan)
    assert any(name.endswith('5_generate/images.npy') for name in digests(a))
