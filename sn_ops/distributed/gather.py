"""`all_gather_rows`: the rows of all ranks on every rank, differentiable."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .collectives import gather_equal, gather_rows, reduce_scatter, wire_device
from .exchange import Plan, check_process_group


class _AllGatherRows(torch.autograd.Function):
    """Rows `[n, D]` of every rank, one behind the other; a gradient returns to the rank that owns the row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _gathered(rows, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(ctx.plan, gradient.contiguous()).to(gradient.dtype), None


def _gathered(rows: Tensor, plan: Plan) -> Tensor:
    rows = rows.detach().contiguous()
    everyone = rows.new_empty((plan.total, rows.shape[1]))
    if everyone.numel() > 0:
        # As bytes: a backend of torch.distributed need not know the dtype.
        gather_rows(plan, rows.view(torch.uint8), everyone.view(torch.uint8))
    return everyone


def all_gather_rows(rows: Tensor, group: Any) -> tuple[Tensor, int]:
    """The rows of all ranks of a process group on every rank, differentiable: for losses over the whole batch.

    Every rank of the group calls it, and backward() runs on every rank or on none. A rank's gradient is the sum of what
    all ranks give to its rows. So DistributedDataParallel, which averages over ranks, gets the gradients of one process
    with the whole batch if every rank computes the loss of the whole batch, or, with batches of one size, the mean loss
    of its own rows against all rows.

    Args:
        rows: `[n, ...]`, any dtype; n may differ between ranks and may be 0, the other sizes and the dtype may not.
        group: a `torch.distributed` process group that this process is a member of.

    Returns:
        The pair (everyone, start): everyone is `[sum of n, ...]`, the ranks' rows in rank order, and this rank's begin
            at start. Floating rows that require a gradient get it in their dtype; with gloo it is added in rank order.

    Raises:
        TypeError: rows is not a tensor, or group not a process group.
        ValueError: rows has no dimension, torch.distributed is not initialised, or this process is not a member.
        RuntimeError: a second derivative is asked for.

    Each call first gathers the number of rows, which waits for the GPU if the group serves no CPU tensors.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"sn_ops: rows: expected a tensor, got {type(rows).__name__}")
    if rows.dim() == 0:
        raise ValueError("sn_ops: rows: expected a tensor of at least one dimension, got a scalar")
    check_process_group(group)
    count = torch.tensor([rows.shape[0]], device=wire_device(group))
    counts = gather_equal(group, count, dist.get_world_size(group)).flatten().tolist()
    plan = Plan(group, dist.get_rank(group), tuple(counts), ring=False, joins=True)
    flat = rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))
    everyone: Tensor = _AllGatherRows.apply(flat, plan) if rows.is_floating_point() else _gathered(flat, plan)
    return everyone.view(plan.total, *rows.shape[1:]), plan.start(plan.rank)
