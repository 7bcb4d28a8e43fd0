"""What a forward works on and what it selects, as the kernels take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional
from torch import Tensor


def unit_stride(rows: Tensor) -> Tensor:
    """The rows with unit stride along D, which the kernels need; rows may lie anywhere."""
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def padded(rows: Tensor) -> Tensor:
    """Half-precision rows at multiples of 16 elements and bytes, zeros behind D: copied if they are not there already.

    Zeros change no squared distance. Elsewhere the compiler would load two bytes at a time. Rows of other types go
    4 bytes or 8 at a time at worst, and stay where they are.
    """
    if rows.element_size() != 2 or rows.numel() == 0:
        return rows
    odd = rows.shape[1] % 16
    if odd:
        return torch.nn.functional.pad(rows, (0, 16 - odd))
    return rows if rows.stride(0) % 16 == 0 and aligned(rows) else rows.clone(memory_format=torch.contiguous_format)


def aligned(rows: Tensor) -> bool:
    """Whether the first row starts at a multiple of 16 bytes, as Triton asks of a pointer."""
    return rows.data_ptr() % 16 == 0


class Batch(NamedTuple):
    """The arguments of a forward as the kernels take them."""

    feats: Tensor  # [N, D], D perhaps with zeros behind it
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


def row_facts(batch: Batch) -> tuple[Any, ...]:
    """What the arguments of a batch decide about the variants of the kernels that take them, see `launch.launch`."""
    feats, candidates = batch.feats, batch.candidates
    return (
        feats.device.index, feats.dtype, batch.labels.dtype, batch.candidate_labels.dtype, feats.shape[1],
        feats.stride(0), candidates.stride(0), aligned(feats), aligned(candidates),
        -1 << 31 <= batch.self_offset < 1 << 31,
    )  # fmt: skip


class Selection(NamedTuple):
    """What a forward selected; the support set is in columns 0 to K - 1 of the graph's indices, or in `Found.keys`,
    not merged yet.

    Entries are tensors or parts of a `launch.workspace`.
    """

    d2: Any  # [N, K] acc; not read where there are keys
    near_d2: Any  # [N, S] acc, of S segments of the candidates
    near: Any  # [N, S] int32, -1 for none
    far_d2: Any
    far: Any


class Found(NamedTuple):
    """A selection, and the rest of what `loss_kernel` and `reduce_kernel` take."""

    selection: Selection
    segments: int  # S
    keys: Any  # [N, S, KP] int64: the support sets, not merged yet; None where they are in the graph's indices
    flags: Any  # [F] int32: 1 where a NaN or Inf was seen
    flag_count: int  # F
    records: Any  # [programs of `loss_kernel`, RECORD_SIZE] float64
    memory: Any  # of the entries that are parts of a `launch.workspace`
