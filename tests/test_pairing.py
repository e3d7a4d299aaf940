"""Runs of one seed share split, start set and initial weights, whatever their strategy and generator."""
import json
import torch
from dal_med.run.execute import execute
from tiny import tiny


def identity(folder):
    run = json.loads((folder/'run.json').read_text())
    return run['plan']['split'], run['plan']['start'], run['initial_weights']


def test_runs_of_a_seed_are_paired(tmp_path):
    torch.set_num_threads(1)
    arms = {(strategy, generator, seed): execute(tiny(tmp_path/f'{strategy}-{generator}-{seed}', tmp_path/'cache', strategy=strategy, generator=generator, seed=seed, rounds=2), bar=False)[0]
            for strategy, generator, seed in [('random', 'none', 0), ('entropy', 'pixel_diffusion', 0), ('coreset', 'none', 0), ('random', 'none', 1)]}
    found = {arm: identity(folder) for arm, folder in arms.items()}
    assert len({found[arm] for arm in found if arm[2] == 0}) == 1
    (split, start, weights), (other_split, other_start, other_weights) = found['random', 'none', 0], found['random', 'none', 1]
    assert split == other_split and start != other_start and weights != other_weights
    first = {arm: json.loads((folder/'rounds/00/1_train/files.json').read_text())['classifier.safetensors'] for arm, folder in arms.items() if arm[2] == 0}
    assert len(set(first.values())) == 1  # round 0 is the same in every arm of a seed, bit for bit
