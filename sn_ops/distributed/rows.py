"""Rows as they travel: features and label packed together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A row is its features, padding, and its label in the last 8 bytes, so labels need no collective of their own. Its size
# is a multiple of 16 bytes, which keeps every row aligned for wide loads.

_ROW_ALIGNMENT = 16


def row_bytes(feats: Tensor) -> int:
    needed = feats.shape[1] * feats.element_size() + 8
    return -(-needed // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


class Rows(NamedTuple):
    """`[n, row bytes]` uint8 and how to read it."""

    data: Tensor
    dims: int
    dtype: torch.dtype

    @property
    def feats(self) -> Tensor:
        """`[n, D]`, a view."""
        return self.data[:, : self.dims * self.dtype.itemsize].view(self.dtype)

    @property
    def labels(self) -> Tensor:
        """`[n]` int64, a view."""
        return self.data[:, -8:].view(torch.int64).squeeze(1)

    def with_data(self, data: Tensor) -> Rows:
        return self._replace(data=data)


def pack(feats: Tensor, labels: Tensor) -> Rows:
    rows = Rows(
        torch.empty((feats.shape[0], row_bytes(feats)), dtype=torch.uint8, device=feats.device),
        feats.shape[1],
        feats.dtype,
    )
    rows.data[:, feats.shape[1] * feats.element_size() : -8] = (
        0  # padding travels too; zeros make it the same every time
    )
    rows.feats.copy_(feats.detach())
    rows.labels.copy_(labels)
    return rows
