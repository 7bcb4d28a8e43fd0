"""The processes of a run, and what they compute together."""

from __future__ import annotations

from .collectives import global_mean
from .ranks import Parallel, pick_device, processes
from .sync_batchnorm import GroupBatchNorm, sync_batchnorm

__all__ = [
    "GroupBatchNorm",
    "Parallel",
    "global_mean",
    "pick_device",
    "processes",
    "sync_batchnorm",
]
