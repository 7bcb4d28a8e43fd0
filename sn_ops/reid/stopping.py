"""How a run ends before its time: signals, and losses that are not finite."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .data.records import Sample
from .files import replace_json

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
EXIT_NONFINITE = 76


class StoppedError(Exception):
    """A signal asked the run to stop; its checkpoint is written."""

    exit_status = EXIT_STOPPED

    def __init__(self, name: str, checkpoint: Path) -> None:
        super().__init__(
            f"sn_ops.reid: {name}: the run has stopped and its checkpoint is written, {checkpoint}; "
            f"--resume {checkpoint.parent.parent} goes on there"
        )
        self.checkpoint = checkpoint


class NonFiniteLossError(RuntimeError):
    """The loss, or a gradient, is NaN or infinite; a report of the batch is written."""

    exit_status = EXIT_NONFINITE

    def __init__(self, text: str, report: Path) -> None:
        super().__init__(text)
        self.report = report


class StopSignals:
    """Notes SIGTERM and SIGINT, so that the loop can stop between two steps; a context manager.

    A second signal of the same run acts as if nothing had been set up. In a thread other than the main one, where
    Python allows no handlers, signals are not noted.
    """

    def __init__(self) -> None:
        self.name = ""
        """Which signal came; empty for none."""
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}
        self._at_once = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            self._restore()
            signal.raise_signal(number)
            return
        self.name = signal.Signals(number).name
        if self._at_once and os.getpid() == self._owner:
            raise _AtOnceError(self.name)

    @contextmanager
    def at_once(self, checkpoint: Path) -> Iterator[None]:
        """Work that nothing is lost of: a signal ends it where it is.

        Raises:
            StoppedError: a signal came, now or before. Whatever the work then raises is taken for a consequence: the
                signal may have ended processes that the work needs.
        """
        try:
            self._at_once = True
            if self.name:
                raise _AtOnceError(self.name)
            yield
        except _AtOnceError as error:
            raise StoppedError(str(error), checkpoint) from None
        except Exception as error:
            if self.name:
                raise StoppedError(self.name, checkpoint) from error
            raise
        finally:
            self._at_once = False
        # A destructor, or a callback of C code, may have swallowed the error that the signal raised there.
        if self.name:
            raise StoppedError(self.name, checkpoint)


def outlive_stop_signals(worker: int) -> None:
    """What a process that reads images begins with: it outlives the signals that stop the run, which schedulers and
    terminals send to all its processes, so that the batch it owes arrives and no dead process is an error of its own.

    It ends when its run's process does, or asks it to, which is a second SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


class _AtOnceError(BaseException):
    """Not an `Exception`: nothing on its way up may take it for an error of its own."""


def report_nonfinite(
    folder: Path,
    *,
    rank: int,
    position: dict[str, int],
    values: dict[str, float],
    samples: list[Sample],
    embedding: Tensor,
    model: nn.Module,
) -> NonFiniteLossError:
    """Writes nonfinite.json (nonfinite-rank<r>.json for ranks other than 0) to the run's folder.

    It has the step, the loss and its terms, every image of this rank's batch with identity, camera, the norm of its
    embedding and how many entries of it are not finite, and the parameters and gradients that are not.

    Args:
        folder: of the run.
        rank: of this process.
        position: "epoch" and "step", from 1.
        values: the loss and its terms.
        samples: the images of this rank's batch.
        embedding: `[n, D]`, of these images.
        model: the network, with the gradients of this step.

    Returns:
        The error to raise.
    """
    norms = embedding.detach().float().norm(dim=1).tolist()
    bad_entries = (~torch.isfinite(embedding.detach())).sum(1).tolist()
    parameters = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    gradients = [
        name
        for name, value in model.named_parameters()
        if value.grad is not None and not bool(torch.isfinite(value.grad).all())
    ]
    bad_values = [name for name, value in values.items() if not _finite(value)]
    file = folder / ("nonfinite.json" if rank == 0 else f"nonfinite-rank{rank}.json")
    replace_json(
        file,
        {
            **position,
            "rank": rank,
            "values": {name: _plain(value) for name, value in values.items()},
            "nonfinite_values": bad_values,
            "nonfinite_parameters": parameters,
            "nonfinite_gradients": gradients,
            "images": [
                {
                    "path": str(sample.path),
                    "pid": sample.pid,
                    "camera": sample.camera,
                    "embedding_norm": _plain(norm),
                    "nonfinite_entries": bad,
                }
                for sample, norm, bad in zip(samples, norms, bad_entries, strict=True)
            ],
        },
    )
    bad_images = sum(bad > 0 for bad in bad_entries)
    return NonFiniteLossError(
        f"sn_ops.reid: loss: expected finite numbers, got {', '.join(f'{n} {values[n]}' for n in bad_values)} in step "
        f"{position['step']} (epoch {position['epoch']}); {bad_images} of {len(samples)} embeddings, {len(parameters)} "
        f"parameters and {len(gradients)} gradients are not finite; the batch is described in {file}",
        file,
    )


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if _finite(value) else str(value)
