"""The learning rate as a function of the position in the run: it has no state that a resumed run would restore."""

from __future__ import annotations

import math

from ..config import OptimConfig


def learning_rate(optim: OptimConfig, epoch: int, step: int, steps: int) -> float:
    """The learning rate of one step.

    First a linear warm-up, step by step, from `warmup_start * lr` over `warmup_epochs`. Then by `schedule`:

    "paper"     with e the epoch counted from 1: `lr` while e < decay_start, then
                `lr * decay_floor ** ((e + 1 - decay_start) / (epochs + 1 - decay_start))`; the authors' recipe, with
                decay_start 76 and decay_floor 0.001. It reaches `decay_floor * lr` in the last epoch; with fewer epochs
                than decay_start it is constant.
    "cosine"    from `lr` after the warm-up to `decay_floor * lr` at the end, step by step.
    "constant"  `lr`.

    Args:
        optim: the schedule and its constants.
        epoch: the epoch, from 0.
        step: the step in the epoch, from 0.
        steps: the number of steps of an epoch.
    """
    position = epoch + step / steps
    if position < optim.warmup_epochs:
        return optim.lr * (optim.warmup_start + (1 - optim.warmup_start) * position / optim.warmup_epochs)
    if optim.schedule == "paper" and epoch + 1 >= optim.decay_start:
        return optim.lr * optim.decay_floor ** (
            (epoch + 2 - optim.decay_start) / (optim.epochs + 1 - optim.decay_start)
        )
    if optim.schedule == "cosine":
        done = (position - optim.warmup_epochs) / (optim.epochs - optim.warmup_epochs)
        return optim.lr * (optim.decay_floor + (1 - optim.decay_floor) * 0.5 * (1 + math.cos(math.pi * done)))
    return optim.lr
