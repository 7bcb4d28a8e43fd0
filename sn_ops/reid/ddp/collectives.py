"""What ranks of a process group compute together, with gradients as DistributedDataParallel wants them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """The rows of all ranks, in rank order; gradients return to the rank that owns the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, sizes: list[int]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return _gather_rows(rows, group, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.sizes)[dist.get_rank(ctx.group)], None, None


def _gather_rows(rows: Tensor, group: Any, sizes: list[int]) -> Tensor:
    # Every rank sends the most rows that any has: collectives want equal shapes.
    sent = rows.detach().new_zeros((max(sizes), *rows.shape[1:]))
    sent[: len(rows)] = rows.detach()
    received = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(received, sent, group=group)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])


def gather(rows: Tensor, group: Any) -> tuple[Tensor, int]:
    """The rows of all ranks and where this rank's begin.

    Args:
        rows: `[n, ...]`, n may differ between ranks, the other sizes and the dtype may not.
        group: the process group.

    Returns:
        `[sum of n, ...]` in rank order, differentiable for floating rows: a rank's gradient is the sum of what all
        ranks' backward() gives its rows. And the offset of this rank's rows.
    """
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device), group=group)
    sizes = [int(count) for count in counts]
    gathered = _Gather.apply(rows, group, sizes) if rows.is_floating_point() else _gather_rows(rows, group, sizes)
    return gathered, sum(sizes[: dist.get_rank(group)])


def global_mean(values: Tensor, valid: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """The mean of `values [n]` where `valid [n]`, 0 of nothing, over all ranks, and how many there are."""
    total, count = values.masked_fill(~valid, 0).sum(), valid.sum()
    if group is None:
        return total / count.clamp(min=1), count
    sums = torch.stack([total.detach().double(), count.double()])
    dist.all_reduce(sums, group=group)
    many = sums[1].clamp(min=1)
    share = total * (dist.get_world_size(group) / many).to(total.dtype)
    mean = (sums[0] / many).to(total.dtype)
    # The global mean's value, the gradient of this rank's share. (Not share + (mean - share): that would round.)
    return share - share.detach() + mean, sums[1].long()
