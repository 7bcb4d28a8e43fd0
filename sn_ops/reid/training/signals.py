"""Stopping a run by a signal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again


class StoppedError(Exception):
    """A signal stopped the run; its checkpoint is written."""

    exit_status = EXIT_STOPPED

    def __init__(self, name: str, checkpoint: Path) -> None:
        super().__init__(
            f"sn_ops.reid: {name}: the run has stopped and its checkpoint is written, {checkpoint}; "
            f"--resume {checkpoint.parent.parent} goes on there"
        )
        self.checkpoint = checkpoint


class StopSignals:
    """Records SIGTERM and SIGINT, so that the loop can stop between two steps; a context manager.

    A second signal acts as it would without this. Threads other than the main one record no signals, since Python
    allows no handlers there.
    """

    def __init__(self) -> None:
        self.name = ""
        """The name of the first signal; empty before it."""
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
        """For work that may be lost: a signal interrupts it at once.

        Raises:
            StoppedError: a signal came, during the work or before. It replaces errors that the work raises after the
                signal, which may have ended processes that the work needs.
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
        # A destructor or a callback from C may have swallowed the signal's error.
        if self.name:
            raise StoppedError(self.name, checkpoint)


class _AtOnceError(BaseException):
    """Not an `Exception`, so that no handler catches it on its way up."""
