"""What a forward works on and what it selects, as the kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def unit_stride(rows: Tensor) -> Tensor:
    """The rows with unit stride along D, which the kernels need; rows may lie anywhere."""
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


class Batch(NamedTuple):
    """The arguments of a forward as the kernels take them."""

    feats: Tensor  # [N, D]
    labels: Tensor  # [N]
    candidates: Tensor  # [M, D]; feats in the self case
    candidate_labels: Tensor  # [M]
    self_index: Tensor | None  # [N]
    self_offset: int
    symmetric: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, M, D."""
        return self.feats.shape[0], self.candidates.shape[0], self.feats.shape[1]

    def self_arguments(self) -> tuple[Tensor, int]:
        """gSelf and self_offset; without an index another int64 tensor takes its place and is not read."""
        return self.labels if self.self_index is None else self.self_index, self.self_offset


class Selection(NamedTuple):
    """What a forward selected; the support set is in columns 0 to K - 1 of the graph's indices."""

    d2: Tensor  # [N, K] acc
    near_d2: Tensor  # [N] acc
    near: Tensor  # [N] int32, -1 for none
    far_d2: Tensor
    far: Tensor

    @staticmethod
    def empty(anchors: int, neighbours: int, like: Tensor, acc: torch.dtype) -> Selection:
        def new(*size: int, dtype: torch.dtype = acc) -> Tensor:
            return torch.empty(size, dtype=dtype, device=like.device)

        return Selection(
            new(anchors, neighbours),
            new(anchors), new(anchors, dtype=torch.int32), new(anchors), new(anchors, dtype=torch.int32),
        )  # fmt: skip
