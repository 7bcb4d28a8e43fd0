"""Training: from a configuration to a run's folder."""

from __future__ import annotations

from .nonfinite import EXIT_NONFINITE, NonFiniteLossError
from .run import train
from .signals import EXIT_STOPPED, StoppedError

__all__ = ["EXIT_NONFINITE", "EXIT_STOPPED", "NonFiniteLossError", "StoppedError", "train"]
