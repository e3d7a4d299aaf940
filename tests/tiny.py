"""The smallest run that goes through every phase, for tests that a notebook cell cannot hold."""
from dal_med.run.config import Config, make_config


def tiny(folder, cache, **changes) -> Config:
    "Three rounds on 600 phantoms at 32 px with two gated generations: a few seconds on one core. Registration, which costs more than all else, is left to the tests that ask for it."
    settings = dict(folder=str(folder), cache=str(cache), strategy='entropy', generator='pixel_diffusion', rounds=3, budget=12, start_fraction=.06,
                    phantom=dict(n=600, size=32), training=dict(steps=6, batch_size=16), judge=dict(training=dict(steps=4, batch_size=16)),
                    diffusion=dict(width=16), pretraining=dict(steps=3, batch_size=8), finetuning=dict(steps=3, batch_size=8), sampling=dict(steps=2),
                    prediction=dict(passes=3, views=2), checks=dict(registered=None), curriculum=dict(real_until=0, full_from=1, ratio=1.))
    return make_config({**settings, **changes})


def run_once(folder, cache, **changes):
    "Execute in this process; the target of processes that get killed."
    import torch
    from dal_med.run.execute import execute
    torch.set_num_threads(1)
    execute(tiny(folder, cache, **changes), bar=False)
