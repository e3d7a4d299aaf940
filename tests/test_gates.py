"""The gate's checks on real dermoscopic images: planted copies are found, garbage is turned away, and real images of other lesions pass."""
from pathlib import Path
import numpy as np
import pytest
import torch
from dal_med.data.datasets import open_dataset
from dal_med.data.sources import data_root
from dal_med.generate.originals import describe
from dal_med.generate.pixel_unshuffle import dihedral
from dal_med.generate.registration import detail_threshold, is_copy, resemblance
from dal_med.generate.sanity import fit_sanity, garbage, insane
from dal_med.loop.plan import make_plan


@pytest.fixture(scope='module')
def real():
    "1,500 images of split 0's pool and 100 of its validation part; the test part is not touched."
    root = data_root()
    near = [Path(__file__).parents[1]/'prepared'/'ham10000_64', *([root/'ham10000_64', root.parent/'prepared'/'ham10000_64'] if root else [])]
    found = next((p for p in near if (p/'manifest.json').exists()), None)
    if found is None: pytest.skip('HAM10000 is not prepared at 64 pixels: dal_prepare ham10000 SOURCE prepared/ham10000_64 --size 64')
    torch.set_num_threads(1)
    data = open_dataset(found)
    plan = make_plan(data.labels, data.groups, seed=0, split_seed=0)
    return np.asarray(data.images[plan.pool[:1500]]), data.groups[plan.pool[:1500]], np.asarray(data.images[plan.validation[:100]])


@pytest.fixture(scope='module')
def references(real): return describe(real[0])


@pytest.fixture(scope='module')
def limits(real, references): return detail_threshold(references, real[1], most=200)


def recoloured(x): return np.clip(x*[.8, 1.1, .9] + [20, -10, 5], 0, 255).astype(np.uint8)
def cropped(x): return np.repeat(np.repeat(x[:, 8:56, 4:52], 4, 1), 4, 2).reshape(len(x), 64, 3, 64, 3, 3).mean((2, 4)).round().astype(np.uint8)


@pytest.mark.parametrize('kind', ['exact', 'flipped', 'recoloured', 'cropped'])
def test_planted_copies_are_caught(kind, real, references, limits):
    x, rows = real[0][::15][:100], np.arange(0, 1500, 15)[:100]
    copies = dict(exact=lambda: x, flipped=lambda: dihedral(x, np.arange(100) % 8), recoloured=lambda: recoloured(x), cropped=lambda: cropped(x))[kind]()
    found = resemblance(references, copies)
    assert (is_copy(found, limits) & (found.most_alike == rows)).sum() >= 99


def test_other_lesions_are_no_copies(real, references, limits): assert is_copy(resemblance(references, real[2]), limits).mean() <= .08


def test_garbage_is_turned_away_and_real_images_are_not(real):
    sane = fit_sanity(real[0], real[1], rate=.02)
    assert insane(real[2], sane).any(axis=1).mean() <= .1
    for kind, x in garbage(real[2]).items(): assert insane(x, sane).any(axis=1).mean() >= (.8 if kind == 'swapped channels' else .99), kind
