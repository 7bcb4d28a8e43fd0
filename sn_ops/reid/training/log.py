"""The log of a run: a progress bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..requirements import need

# The values that the bar shows, where a run has them; metrics.jsonl and TensorBoard get all.
_BAR = ("loss", "nearest_is_positive", "support_positives", "positive_distance", "negative_distance", "accuracy", "lr")
_SHORT = {
    "nearest_is_positive": "near+",
    "support_positives": "S+",
    "positive_distance": "d+",
    "negative_distance": "d-",
    "accuracy": "acc",
}


class RunLog:
    """The log of a run; a context manager. On ranks other than 0 it writes and shows nothing.

    metrics.jsonl has one JSON object a line: every `run.log_every` steps the means since the last line ("epoch" from 1,
    "step" from 1 over the whole run, "lr", "loss", the terms, the support-set statistics, "seconds" a step), those of
    the remaining steps at the end of training, and the scores of each evaluation. A resumed run cuts off the lines
    after its checkpoint and continues there.

    Args:
        folder: of the run.
        every: steps between lines.
        steps: of the whole run, for the bar.
        writes: whether this process writes and shows anything.
        progress: show a progress bar on stderr.
        tensorboard: write events to `folder`/tensorboard too.

    Raises:
        ImportError: the package tqdm or, with `tensorboard`, tensorboard is missing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        steps: int,
        writes: bool = True,
        progress: bool = True,
        tensorboard: bool = False,
    ) -> None:
        self.file = folder / "metrics.jsonl"
        self.every, self.writes = every, writes
        self._gathered: dict[str, list[float]] = {}  # name -> sum, number of steps that had it
        self._count = 0
        self._since = time.perf_counter()
        self._bar: Any = None
        self._events: Any = None
        self._writer = need("torch.utils.tensorboard").SummaryWriter if writes and tensorboard else None
        if writes and progress:
            self._bar = need("tqdm").tqdm(total=steps, unit="step", file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()

    def start(self, step: int, state: Mapping[str, Any] | None) -> None:
        """Continues after a step with the `state` of a checkpoint; None begins a new file."""
        self._since = time.perf_counter()
        if self._bar is not None:
            self._bar.update(step)
        if state is not None:
            self._gathered, self._count = {k: list(v) for k, v in state["gathered"].items()}, int(state["count"])
        if self._writer is not None:
            self._events = self._writer(str(self.file.parent / "tensorboard"), purge_step=step + 1)
        if not self.writes:
            return
        kept = b"" if state is None or not self.file.exists() else self.file.read_bytes()[: int(state["bytes"])]
        self.file.write_bytes(kept)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the length of the file, and the sums for the next line."""
        return {
            "bytes": self.file.stat().st_size if self.writes and self.file.exists() else 0,
            "gathered": {key: list(pair) for key, pair in self._gathered.items()},
            "count": self._count,
        }

    def step(self, epoch: int, step: int, lr: float, values: Mapping[str, float]) -> None:
        """Adds the values of a step; `epoch` and `step` from 1, the latter over the whole run.

        Means are over the steps whose value is finite, without gradients that overflow in half precision.
        """
        self._count += 1
        for key, value in values.items():
            if math.isfinite(value):
                pair = self._gathered.setdefault(key, [0.0, 0])
                pair[0] += value
                pair[1] += 1
        if self._bar is not None:
            shown = {**values, "lr": lr}
            text = {_SHORT.get(key, key): f"{shown[key]:.3g}" for key in _BAR if key in shown}
            self._bar.set_description(f"epoch {epoch}", refresh=False)
            self._bar.set_postfix(text, refresh=False)
            self._bar.update()
        if self._count >= self.every:
            self.flush(epoch, step, lr)

    def flush(self, epoch: int, step: int, lr: float) -> None:
        """Writes a line of the remaining steps, if there are any.

        Only for the end of training: elsewhere the lines of a resumed run would differ from those of one that was
        never stopped.

        Args:
            epoch: of the last step, from 1.
            step: the last step, from 1 over the whole run.
            lr: the learning rate of the last step.
        """
        if self._count == 0:
            return
        means = {key: total / number for key, (total, number) in self._gathered.items()}
        now = time.perf_counter()
        seconds = (now - self._since) / self._count
        self._gathered, self._count, self._since = {}, 0, now
        self.write({"epoch": epoch, "step": step, "lr": lr, **means, "seconds": seconds})

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a line of metrics.jsonl, and its numbers as TensorBoard events."""
        if not self.writes:
            return
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")
        if self._events is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key not in ("epoch", "step"):
                    self._events.add_scalar(key, value, int(record["step"]))

    def say(self, text: str) -> None:
        """Prints a line on stderr, above the bar; nothing without a bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
