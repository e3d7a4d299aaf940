"""SIGKILL at 20 random moments, each time resumed, ends with the record of the undisturbed run, byte for byte."""
import multiprocessing, os, signal, time
import numpy as np
from dal_med.loop.record import record_files
from tiny import run_once

KILLS = 20


def start(context, folder):
    process = context.Process(target=run_once, args=(folder/'run', folder/'cache'))
    process.start()
    return process


def test_killed_runs_end_with_the_same_record(tmp_path):
    context = multiprocessing.get_context('forkserver')  # imports once; each run is a fresh fork
    context.set_forkserver_preload(['dal_med.run.execute', 'dal_med.generate.pixel_diffusion', 'diffusers.models.unets.unet_2d'])
    records, seconds = [], 0.
    for name in ('first', 'second'):  # two undisturbed runs agree; the second is timed, the fork server being warm
        begin, process = time.monotonic(), start(context, tmp_path/name)
        process.join()
        seconds = time.monotonic() - begin
        assert process.exitcode == 0
        records.append(record_files(tmp_path/name/'run'))
    assert records[0] == records[1] and len(records[0]) > 20

    moment, killed, phases, number = np.random.default_rng(0).random(), 0, set(), 0
    while killed < KILLS:
        folder, number = tmp_path/f'run{number}', number + 1
        while True:
            process = start(context, folder)
            if killed < KILLS:
                moment = (moment + .618) % 1  # a random start, then spread evenly over the run
                time.sleep(.8*seconds*moment)
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    killed += 1
                    phases.add(len(list(folder.glob('run/rounds/*/*'))))
            process.join()
            if process.exitcode == 0: break
            assert process.exitcode == -signal.SIGKILL
        assert record_files(folder/'run') == records[0]
        assert not list(folder.rglob('.*.partial')), 'a half-written file was left behind'
    assert len(phases) > 5, 'the kills fell on too few different moments to mean anything'
