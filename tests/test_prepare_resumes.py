"""`dal_prepare`, killed at any moment and called again, ends with the same bytes as one that was left alone."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

N = 1200


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    "An official download of 1,200 small images."
    folder = tmp_path_factory.mktemp('source')
    (folder/'HAM10000_images_part_1').mkdir()
    rng, lines = np.random.default_rng(0), ['lesion_id,image_id,dx']
    for i in range(N):
        coarse = Image.fromarray(rng.integers(30, 226, (5, 6, 3), dtype=np.uint8))
        coarse.resize((120, 90), Image.Resampling.BICUBIC).save(folder/'HAM10000_images_part_1'/f'ISIC_{i:07}.jpg')
        lines.append(f'HAM_{i},ISIC_{i:07},{("nv", "mel")[i % 2]}')
    (folder/'HAM10000_metadata.csv').write_text('\n'.join(lines) + '\n')
    return folder


def start(source, dest):
    return subprocess.Popen([sys.executable, '-m', 'dal_med.data.prepare', 'ham10000', source, dest, '--size', '32'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def content(folder): return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_killed_and_called_again(source, tmp_path):
    undisturbed, killed = tmp_path/'undisturbed', tmp_path/'killed'
    assert start(source, undisturbed).wait() == 0
    rng, interrupted = np.random.default_rng(1), 0
    for _ in range(6):
        run = start(source, killed)
        while run.poll() is None and not list(tmp_path.glob('.killed.*.unfinished')): time.sleep(.01)
        time.sleep(rng.uniform(0, .3))
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL)
        interrupted += run.wait() == -signal.SIGKILL
        run.communicate()
        assert run.returncode == 0 or not killed.exists()
    last = start(source, killed)
    said = last.communicate()
    assert last.returncode == 0, said
    assert interrupted >= 2, 'the runs ended before they could be killed'
    assert content(killed) == content(undisturbed)
    assert sorted(f.name for f in tmp_path.iterdir()) == ['killed', 'undisturbed']
