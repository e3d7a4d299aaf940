"""What every generator in the place of the pixel diffusion has to keep to: shared by the tests of each."""
import numpy as np
import pandas as pd
from dal_med.loop.loop import active_learning
from dal_med.loop.record import record_files
from test_firewall import digests
from test_guided_generation import inputs, permuted


def run_of(tmp_path_factory, **changes):
    "A run, and what it was given: run, data, settings, plan, cache."
    folder, cache = tmp_path_factory.mktemp('run'), tmp_path_factory.mktemp('cache')
    data, settings, plan = inputs(folder/'a', cache, **changes)
    return active_learning(data, folder/'a', settings, cache=cache, plan=plan), data, settings, plan, cache


def bought(run): return np.unique(np.concatenate([pd.read_parquet(p).position for p in run.glob('rounds/*/*/picks.parquet')]))


def unbought_labels_change_nothing(first, folder):
    "Nor in a cache of their own, where all that runs share is made anew."
    a, data, settings, plan, _ = first
    hidden = np.setdiff1d(np.arange(len(data.labels)), plan.pool[bought(a)])
    b = active_learning(permuted(data, hidden), folder/'b', settings, cache=folder/'cache', plan=plan)
    assert digests(a) == digests(b) and record_files(a) == record_files(b)


def a_bought_label_changes(first, folder, weights: str):
    "What is made, in each round, and what makes it."
    a, data, settings, plan, cache = first
    b = active_learning(permuted(data, plan.pool[plan.start]), folder/'b', settings, cache=cache, plan=plan)
    changed = {name for name, digest in digests(b).items() if digests(a).get(name) != digest}
    assert {'00/5_generate/images.npy', f'00/5_generate/generator/{weights}', '01/5_generate/images.npy'} <= changed


def each_image_is_judged(run):
    for r in range(2):
        made, verdict = (pd.read_parquet(run/'rounds'/f'{r:02d}'/p) for p in ('5_generate/synthetic.parquet', '6_gate/decisions.parquet'))
        assert len(made) == len(verdict) > 0 and made.label.tolist() == verdict.label.tolist()
