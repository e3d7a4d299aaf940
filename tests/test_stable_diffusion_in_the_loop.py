"""Stable Diffusion as the generator of a run, on a tiny twin with random weights: adapters learn from bought labels alone, round by round."""
import json
import pytest
from dal_med.generate.stable_diffusion.extra import lora_missing
from dal_med.loop.loop import active_learning
from dal_med.run.config import Lora, make_config
from other_generators import a_bought_label_changes, each_image_is_judged, run_of, unbought_labels_change_nothing
from test_firewall import digests
from test_guided_generation import inputs

if lora_missing(): pytest.skip(f'{" and ".join(lora_missing())} not installed (pip install "dal_med[lora]")', allow_module_level=True)
from dal_med.generate.stable_diffusion.base_model import MIRROR


@pytest.fixture(scope='module')
def twin(tmp_path_factory):
    from dal_med.generate.stable_diffusion.tiny import write_twin
    return write_twin(tmp_path_factory.mktemp('base')/'sd')


def lora(twin, **changes): return dict(generator='stable_diffusion', stable_diffusion=dict(base=str(twin), rank=4, pretraining=dict(steps=1), finetuning=dict(steps=2), sampling=dict(steps=2)) | changes)


@pytest.fixture(scope='module')
def first(twin, tmp_path_factory): return run_of(tmp_path_factory, **lora(twin))


def test_unbought_labels_change_nothing(first, tmp_path): unbought_labels_change_nothing(first, tmp_path)
def test_a_bought_label_changes_what_is_made(first, tmp_path): a_bought_label_changes(first, tmp_path, 'shared.safetensors')


def test_what_was_made_is_judged_and_prompts_name_the_classes(first):
    a, data, settings, plan, cache = first
    each_image_is_judged(a)
    kept = json.loads((a/'rounds'/'01'/'5_generate'/'generator'/'stable_diffusion.json').read_text())
    assert kept['options']['classes'] == [*data.classes] and [*(cache/'latents').glob('*.safetensors')]
    label_free, = (p for p in cache.glob('generator-*') if p.is_dir())
    assert json.loads((label_free/'stable_diffusion.json').read_text())['seen'] == [] and json.loads((cache/f'{label_free.name}.json').read_text())['steps'] == 1


def test_the_base_is_the_pinned_one(): assert Lora().base == MIRROR


def test_steered_through_the_decoder(twin, first, tmp_path):
    "And refused through the network before anything is run."
    _, data, settings, plan, cache = first
    steer = dict(settings['sampling'], steer=dict(objective='entropy', strength=1., most=1., between=[0., 1.], through='image'))
    b = active_learning(data, tmp_path/'b', {**settings, 'sampling': steer}, cache=cache, plan=plan)
    assert digests(b)['00/5_generate/images.npy'] != digests(first[0])['00/5_generate/images.npy']
    steer['steer']['through'] = 'network'
    with pytest.raises(ValueError, match="set it to 'image'"): active_learning(data, tmp_path/'c', {**settings, 'sampling': steer}, cache=cache, plan=plan)
    assert not (tmp_path/'c'/'rounds').exists()


def test_bad_input(twin, tmp_path):
    with pytest.raises(ValueError, match='without labels nothing says how many'): make_config(lora(twin, pretraining=dict(steps=None)))
    with pytest.raises(ValueError, match='nothing to learn before there are labels'): make_config(lora(twin, adapters='class', pretraining=dict(steps=3)))
    data, settings, plan = inputs(tmp_path/'a', tmp_path/'cache', **lora('someone/some-model', revision='0'*40, download=False))
    with pytest.raises(ConnectionError, match='Two ways out'): active_learning(data, tmp_path/'a', settings, cache=tmp_path/'cache', plan=plan)
    assert not (tmp_path/'a'/'rounds').exists()
