"""The collectives: rows and records to all ranks, gradients back to their owners, batches round the ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from .exchange import Plan

# torch renamed the single-tensor collectives in 2.13 and warns about the old names, which are all that 2.10 has.

_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _backend_of(group: Any, device_type: str) -> str:
    """The communication backend that serves tensors of a device type in the group, "" if none does."""
    pairs = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return str(pairs.get(device_type, ""))


def wire_device(group: Any) -> torch.device:
    """The device on which the host's small messages travel: the CPU if the group serves it, to wait for no GPU."""
    if _backend_of(group, "cpu"):
        return torch.device("cpu")
    device_type = dist.get_backend_config(group).split(":")[0]
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def gather_equal(group: Any, mine: Tensor, world: int) -> Tensor:
    """`[world, n]` of every rank's `[n]`."""
    everyone = mine.new_empty(world * mine.shape[0])
    _all_gather_single(everyone, mine, group=group)
    return everyone.view(world, -1)


def gather_rows(plan: Plan, mine: Tensor, everyone: Tensor) -> None:
    """Gathers every rank's rows `[N_r, bytes]` into `everyone` `[M, bytes]`, in rank order, without padding."""
    if len(set(plan.sizes)) == 1:
        _all_gather_single(everyone, mine, group=plan.group)
        return
    parts = everyone.split(plan.sizes)
    if _backend_of(plan.group, mine.device.type) != "gloo":
        dist.all_gather(list(parts), mine, group=plan.group)
        return
    # gloo gathers equal sizes only. Broadcasts need no padding, which would take a second copy of all rows.
    parts[plan.rank].copy_(mine)
    pending = [
        dist.broadcast(part, src=dist.get_global_rank(plan.group, rank), group=plan.group, async_op=True)
        for rank, part in enumerate(parts)
        if part.numel() > 0
    ]
    for work in pending:
        work.wait()


def reduce_scatter(plan: Plan, gradients: Tensor) -> Tensor:
    """This rank's rows `[N, D]` of the sum over ranks of `gradients` `[M, D]`.

    Half-precision gradients travel as they are. Where this code adds them up it does so in the accumulation type.
    """
    own = gradients.new_empty((plan.sizes[plan.rank], gradients.shape[1]))
    if _backend_of(plan.group, gradients.device.type) != "gloo":
        if len(set(plan.sizes)) == 1:
            _reduce_scatter_single(own, gradients, group=plan.group)
        else:
            dist.reduce_scatter(own, list(gradients.split(plan.sizes)), group=plan.group)
        return own
    # gloo reduces equal sizes only, in an order of its own. So the parts are exchanged, as bytes whatever their dtype,
    # and added here in rank order.
    received = own.new_empty((plan.world, *own.shape))
    if gradients.shape[1] > 0:
        flat = received.view(plan.world * own.shape[0], own.shape[1])
        sizes = [own.shape[0]] * plan.world
        dist.all_to_all_single(
            flat.view(torch.uint8), gradients.contiguous().view(torch.uint8), sizes, list(plan.sizes), group=plan.group
        )
    total = torch.zeros_like(own, dtype=reference.accumulation_dtype(own.dtype))
    for part in received:
        total += part
    return total


def gather_record(group: Any, record: bytes) -> Tensor:
    """`[world, len(record)]` uint8 on the host."""
    mine = torch.frombuffer(bytearray(record), dtype=torch.uint8).to(wire_device(group))
    return gather_equal(group, mine, dist.get_world_size(group)).cpu()


# ---- the ring ------------------------------------------------------------------------------------


def pass_on(plan: Plan, leaving: Tensor, arriving: Tensor) -> list[Any]:
    """Starts sending to the next rank and receiving from the previous one. Returns what to wait for."""
    if plan.world == 1:
        arriving.copy_(leaving)
        return []

    def peer(step: int) -> int:
        return int(dist.get_global_rank(plan.group, (plan.rank + step) % plan.world))

    def something(rows: Tensor) -> Tensor:
        """The rows, or one element if there are none: NCCL needs every rank in the first transfers of a group."""
        return rows if rows.numel() > 0 else rows.new_zeros(1)

    send = dist.P2POp(dist.isend, something(leaving), peer(1), plan.group)
    receive = dist.P2POp(dist.irecv, something(arriving), peer(-1), plan.group)
    return dist.batch_isend_irecv([send, receive])


def travel(plan: Plan, mine: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields (rank, its rows) for every rank, this one first. The next rows arrive while the caller uses these."""
    rows = mine
    for step in range(plan.world):
        pending: list[Any] = []
        arriving = rows
        if step + 1 < plan.world:
            arriving = mine.new_empty((plan.sizes[(plan.rank - step - 1) % plan.world], mine.shape[1]))
            pending = pass_on(plan, rows, arriving)
        yield (plan.rank - step) % plan.world, rows
        for work in pending:
            work.wait()
        rows = arriving
