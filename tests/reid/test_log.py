"""The lines of a run's log."""

from __future__ import annotations

from pathlib import Path

import pytest

from sn_ops.reid.training.log import RunLog
from support.tiny_runs import metrics


def test_log(tmp_path: Path) -> None:
    """Means over a line's steps, going on in the midst of a line, values that overflow; TensorBoard has the same."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, every=2, steps=4, progress=False, tensorboard=True) as log:
        log.start(0, None)
        for step, norm in ((1, float("inf")), (2, 4.0), (3, 1.0)):
            log.step(1, step, 0.5, {"loss": float(step), "gradient_norm": norm})
        state = log.state()
        log.step(1, 4, 0.5, {"loss": 100.0})  # of a run that was killed
    with RunLog(tmp_path, every=2, steps=4, progress=False, tensorboard=True) as log:
        log.start(3, state)
        log.step(2, 4, 0.25, {"loss": 5.0, "gradient_norm": 3.0})
    assert metrics(tmp_path) == [
        {"epoch": 1, "step": 2, "lr": 0.5, "loss": 1.5, "gradient_norm": 4.0},
        {"epoch": 2, "step": 4, "lr": 0.25, "loss": 4.0, "gradient_norm": 2.0},
    ]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 1.5), (4, 4.0)]
    silent = tmp_path / "other"
    silent.mkdir()
    with RunLog(silent, every=1, steps=4, writes=False, tensorboard=True) as log:
        log.start(0, None)
        log.step(1, 1, 0.5, {"loss": 1.0})
    assert not list(silent.iterdir())
