"""A GAN in the place of the diffusion model, through the whole loop: learnt without labels once a split, then round by round from what was bought."""
import json
import pytest
from dal_med.generate.stylegan.generator import StyleGAN
from dal_med.loop.loop import active_learning
from other_generators import a_bought_label_changes, bought, each_image_is_judged, run_of, unbought_labels_change_nothing
from test_guided_generation import inputs

GAN = dict(generator='stylegan', stylegan=dict(width=4, widest=8, latent=16, pretraining=dict(steps=5, batch_size=8), finetuning=dict(steps=4, batch_size=4)))


@pytest.fixture(scope='module')
def first(tmp_path_factory): return run_of(tmp_path_factory, **GAN)


def test_unbought_labels_change_nothing(first, tmp_path): unbought_labels_change_nothing(first, tmp_path)
def test_a_bought_label_changes_what_is_made(first, tmp_path): a_bought_label_changes(first, tmp_path, 'stylegan.safetensors')


def test_each_round_goes_on_from_the_last(first, tmp_path):
    a, data, settings, plan, cache = first
    label_free, = (p for p in cache.glob('generator-*') if p.is_dir())
    assert json.loads((cache/f'{label_free.name}.json').read_text())['steps'] == 5 and StyleGAN.load(label_free).seen == []
    last = StyleGAN.load(a/'rounds'/'01'/'5_generate'/'generator')
    assert last.kimg == pytest.approx((5*8 + 2*4*4)/1000) and last.seen == sorted({*data.labels[plan.pool[bought(a)]].tolist()})
    each_image_is_judged(a)
    before = label_free.stat().st_mtime_ns
    active_learning(data, tmp_path/'other', {**settings, 'seed': 1, 'rounds': 2}, cache=cache)
    assert [p for p in cache.glob('generator-*') if p.is_dir()] == [label_free] and label_free.stat().st_mtime_ns == before, 'all runs on the split share it'


def test_what_a_gan_cannot_do_is_refused_before_anything_is_run(tmp_path):
    for changes, said in ((dict(sampling=dict(steer=dict(objective='entropy'))), 'sampling.steer: the generator stylegan cannot'), (dict(sampling=dict(image_to_image=.5)), 'sampling.image_to_image: the generator stylegan cannot'),
                          (dict(phantom=dict(n=600, size=24)), 'power of two')):
        data, settings, plan = inputs(tmp_path/'a', tmp_path/'cache', **GAN, **changes)
        with pytest.raises(ValueError, match=said): active_learning(data, tmp_path/'a', settings, cache=tmp_path/'cache', plan=plan)
        assert not (tmp_path/'a'/'rounds').exists() and not [*(tmp_path/'cache').glob('generator-*')]
