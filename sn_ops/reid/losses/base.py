"""What all metric terms share: their call, normalisation, and the pairs that they compare."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sn_ops.distributed import all_gather_rows

Stats = dict[str, Tensor]
"""Detached 0-d tensors by name, the same on every rank of a group."""

# Smaller squared distances have no derivative, as in sn_ops.
_LEAST_SQUARE = 1e-12


class MetricLoss(nn.Module, ABC):
    """A loss of embeddings `[n, D]`, floating point, and labels int64 `[n]`.

    With `candidates` `[M, D]` and `candidate_labels` int64 `[M]`, positives and negatives come from these instead of
    from the anchors; `self_index` (None, an int or an integer tensor `[n]`) is the candidate that is the anchor itself,
    as in `sn_ops.sn_loss`. With `group` they come from the batches of all ranks, and from `candidates`, which are then
    a bank of this rank.

    Args:
        normalize: L2-normalise rows first, anchors and candidates.

    Returns:
        (loss, statistics): the mean over anchors that have what the loss needs, 0-d, float32 (float64 for float64
        embeddings), 0 without such anchors; `Stats` with at least "valid_anchors".

    Raises:
        TypeError, ValueError: as `sn_ops.sn_loss` for candidates without labels and the reverse.
    """

    def __init__(self, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(
        self,
        feats: Tensor,
        labels: Tensor,
        *,
        candidates: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        self_index: int | Tensor | None = None,
        group: Any = None,
    ) -> tuple[Tensor, Stats]:
        if (candidates is None) != (candidate_labels is None):
            raise ValueError("sn_ops.reid: loss: expected candidates and candidate_labels together, got one of them")
        bank = None
        if candidates is not None and candidate_labels is not None:
            bank = Bank(self._prepared(candidates), candidate_labels, self_index)
        elif self_index is not None:
            raise ValueError("sn_ops.reid: loss: self_index: expected None without candidates, got one")
        # Without autocast: distances in half precision would change the order of neighbours.
        with torch.autocast(feats.device.type, enabled=False):
            return self.compute(self._prepared(feats), labels, bank, group)

    def _prepared(self, rows: Tensor) -> Tensor:
        rows = rows if rows.dtype is torch.float64 else rows.float()
        return F.normalize(rows) if self.normalize else rows

    @abstractmethod
    def compute(self, feats: Tensor, labels: Tensor, bank: Bank | None, group: Any) -> tuple[Tensor, Stats]:
        """The loss and statistics of float32 or float64 rows, normalised if asked."""


class Bank(NamedTuple):
    """The candidates that a loss was called with."""

    feats: Tensor
    labels: Tensor
    self_index: int | Tensor | None


class Pairs(NamedTuple):
    """The rows that anchors are compared with, and which of them are positive or negative."""

    candidates: Tensor  # [M, D]
    positive: Tensor  # bool [n, M]: the same label, but not the anchor itself
    negative: Tensor  # bool [n, M]


def pairs_of(feats: Tensor, labels: Tensor, bank: Bank | None, group: Any) -> Pairs:
    """The pairs of a batch: with the batches of all ranks of `group`, and with the bank."""
    rows = torch.arange(len(feats), device=feats.device)
    candidates, candidate_labels, own = [], [], []  # `own`: the column of each anchor itself, -1 for none
    columns = 0
    if group is not None or bank is None:
        batch, batch_labels, start = feats, labels, 0
        if group is not None:
            batch, start = all_gather_rows(feats, group)
            batch_labels, _ = all_gather_rows(labels, group)
        candidates, candidate_labels, own = [batch], [batch_labels], [rows + start]
        columns = len(batch)
    if bank is not None:
        candidates.append(bank.feats)
        candidate_labels.append(bank.labels)
        if isinstance(bank.self_index, Tensor):
            own.append(torch.where(bank.self_index >= 0, bank.self_index + columns, -1))
        elif bank.self_index is not None:
            own.append(rows + (bank.self_index + columns))
    same = labels[:, None] == torch.cat(candidate_labels)
    itself = torch.zeros_like(same)
    for column in own:
        itself |= torch.arange(same.shape[1], device=feats.device) == column[:, None]
    return Pairs(torch.cat(candidates), same & ~itself, ~same & ~itself)


def distances(anchors: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances `[n]` row by row, by direct sums, without a derivative where two rows are equal."""
    return (anchors - others).square().sum(1).clamp(min=_LEAST_SQUARE).sqrt()
