"""Stable Diffusion as the generator of a run, on a tiny twin with random weights: adapters learn from bought labels alone, round by round."""
import json
import numpy as np
import pandas as pd
import pytest
from dal_med.generate.stable_diffusion.extra import lora_missing
from dal_med.loop.loop import active_learning
from dal_med.loop.record import record_files
from dal_med.run.config import make_config
from test_firewall import digests
from test_guided_generation import inputs, permuted

if lora_missing(): pytest.skip(f'{" and ".join(lora_missing())} not installed (pip install "dal_med[lora]")', allow_module_level=True)


@pytest.fixture(scope='module')
def twin(tmp_path_factory):
    from dal_med.generate.stable_diffusion.tiny import write_twin
    return write_twin(tmp_path_factory.mktemp('base')/'sd')


def lora(twin, **changes): return dict(generator='stable_diffusion', stable_diffusion=dict(base=str(twin), rank=4, finetuning=dict(steps=2), sampling=dict(steps=2)) | changes)


@pytest.fixture(scope='module')
def first(twin, tmp_path_factory):
    "A run, and what it was given."
    folder, cache = tmp_path_factory.mktemp('run'), tmp_path_factory.mktemp('cache')
    data, settings, plan = inputs(folder/'a', cache, **lora(twin))
    return active_learning(data, folder/'a', settings, cache=cache, plan=plan), data, settings, plan, cache


def test_unbought_labels_change_nothing(first, tmp_path):
    "Nor without the latents and prompts that the first run kept."
    a, data, settings, plan, _ = first
    bought = np.unique(np.concatenate([pd.read_parquet(p).position for p in a.glob('rounds/*/*/picks.parquet')]))
    b = active_learning(permuted(data, np.setdiff1d(np.arange(len(data.labels)), plan.pool[bought])), tmp_path/'b', settings, cache=tmp_path/'cache', plan=plan)
    assert digests(a) == digests(b) and record_files(a) == record_files(b)


def test_a_bought_label_changes_what_is_made(first, tmp_path):
    a, data, settings, plan, cache = first
    b = active_learning(permuted(data, plan.pool[plan.start]), tmp_path/'b', settings, cache=cache, plan=plan)
    changed = {name for name, digest in digests(b).items() if digests(a).get(name) != digest}
    assert {'00/5_generate/images.npy', '00/5_generate/generator/shared.safetensors', '01/5_generate/images.npy'} <= changed


def test_what_was_made_is_judged_and_the_adapter_goes_on(first):
    a, data, settings, plan, cache = first
    for r in range(2):
        made, verdict = (pd.read_parquet(a/'rounds'/f'{r:02d}'/p) for p in ('5_generate/synthetic.parquet', '6_gate/decisions.parquet'))
        assert len(made) == len(verdict) > 0
    kept = [json.loads((a/'rounds'/'01'/'5_generate'/'generator'/'stable_diffusion.json').read_text())]
    assert kept[0]['options']['classes'] == [*data.classes] and [*(cache/'latents').glob('*.safetensors')]


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
