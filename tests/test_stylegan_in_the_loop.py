"""A GAN in the place of the diffusion model, through the whole loop: learnt without labels once a split, then round by round from what was bought."""
import json
import numpy as np
import pandas as pd
import pytest
from dal_med.generate.stylegan.generator import StyleGAN
from dal_med.loop.loop import active_learning
from dal_med.loop.record import record_files
from test_firewall import digests
from test_guided_generation import inputs, permuted

GAN = dict(generator='stylegan', stylegan=dict(width=4, widest=8, latent=16, pretraining=dict(steps=5, batch_size=8), finetuning=dict(steps=4, batch_size=4)))


@pytest.fixture(scope='module')
def first(tmp_path_factory):
    "A run, and what it was given."
    folder, cache = tmp_path_factory.mktemp('run'), tmp_path_factory.mktemp('cache')
    data, settings, plan = inputs(folder/'a', cache, **GAN)
    return active_learning(data, folder/'a', settings, cache=cache, plan=plan), data, settings, plan, cache


def bought(run): return np.unique(np.concatenate([pd.read_parquet(p).position for p in run.glob('rounds/*/*/picks.parquet')]))


def test_unbought_labels_change_nothing(first, tmp_path):
    "Nor in a cache of their own, where the label-free generator is learnt anew."
    a, data, settings, plan, _ = first
    hidden = np.setdiff1d(np.arange(len(data.labels)), plan.pool[bought(a)])
    b = active_learning(permuted(data, hidden), tmp_path/'b', settings, cache=tmp_path/'cache', plan=plan)
    assert digests(a) == digests(b) and record_files(a) == record_files(b)


def test_a_bought_label_changes_what_is_made(first, tmp_path):
    a, data, settings, plan, cache = first
    b = active_learning(permuted(data, plan.pool[plan.start]), tmp_path/'b', settings, cache=cache, plan=plan)
    changed = {name for name, digest in digests(b).items() if digests(a).get(name) != digest}
    assert {'00/5_generate/images.npy', '00/5_generate/generator/stylegan.safetensors', '01/5_generate/images.npy'} <= changed


def test_each_round_goes_on_from_the_last(first, tmp_path):
    a, data, settings, plan, cache = first
    label_free, = (p for p in cache.glob('generator-*') if p.is_dir())
    assert json.loads((cache/f'{label_free.name}.json').read_text())['steps'] == 5 and StyleGAN.load(label_free).seen == []
    last = StyleGAN.load(a/'rounds'/'01'/'5_generate'/'generator')
    assert last.kimg == pytest.approx((5*8 + 2*4*4)/1000) and last.seen == sorted({*data.labels[plan.pool[bought(a)]].tolist()})
    for r in range(2):
        made, verdict = (pd.read_parquet(a/'rounds'/f'{r:02d}'/p) for p in ('5_generate/synthetic.parquet', '6_gate/decisions.parquet'))
        assert len(made) == len(verdict) > 0 and made.label.tolist() == verdict.label.tolist()
    before = label_free.stat().st_mtime_ns
    active_learning(data, tmp_path/'other', {**settings, 'seed': 1, 'rounds': 2}, cache=cache)
    assert [p for p in cache.glob('generator-*') if p.is_dir()] == [label_free] and label_free.stat().st_mtime_ns == before, 'all runs on the split share it'


def test_what_a_gan_cannot_do_is_refused_before_anything_is_run(tmp_path):
    for changes, said in ((dict(sampling=dict(steer=dict(objective='entropy'))), 'sampling.steer: the generator stylegan cannot'), (dict(sampling=dict(image_to_image=.5)), 'sampling.image_to_image: the generator stylegan cannot'),
                          (dict(phantom=dict(n=600, size=24)), 'power of two')):
        data, settings, plan = inputs(tmp_path/'a', tmp_path/'cache', **GAN, **changes)
        with pytest.raises(ValueError, match=said): active_learning(data, tmp_path/'a', settings, cache=tmp_path/'cache', plan=plan)
        assert not (tmp_path/'a'/'rounds').exists() and not [*(tmp_path/'cache').glob('generator-*')]
