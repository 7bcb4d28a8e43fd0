"""The losses of the trainer: metric terms, the identity loss, the cross-batch memory."""

from __future__ import annotations

from .base import MetricLoss, Stats
from .cross_batch_memory import Memory
from .terms import IdentityLoss, Losses, NoMetric, SNMetric, SupConMetric, TripletMetric, build_losses

__all__ = [
    "IdentityLoss",
    "Losses",
    "Memory",
    "MetricLoss",
    "NoMetric",
    "SNMetric",
    "Stats",
    "SupConMetric",
    "TripletMetric",
    "build_losses",
]
