"""The processes of a run: one, or the ranks that torchrun started, with gloo on CPUs and NCCL on GPUs.

`torchrun --nproc-per-node 4 -m sn_ops.reid train` gives the run of one process with the same configuration. Each rank
takes its share of the batch of `data.identities` identities, the losses see the whole batch by `group=`, and
DistributedDataParallel averages gradients. Batch norm takes the statistics of the whole batch if `run.sync_batchnorm`;
those of a rank's share are faster and give another result.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sn_ops.distributed import all_gather_rows

from .sync_batchnorm import sync_batchnorm

Value = TypeVar("Value")

# Ranks wait while rank 0 evaluates, which takes long on large galleries.
PATIENCE = timedelta(hours=3)


@dataclass(frozen=True)
class Parallel:
    """This process's place among those of the run."""

    rank: int
    """From 0."""
    world: int
    """How many processes there are."""
    device: torch.device
    """The device of this process."""
    group: Any = None
    """The process group of all ranks; None for one process."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0

    def wrap(self, model: nn.Module, *, sync: bool) -> nn.Module:
        """Moves a network to the device; with several ranks, wraps it in DistributedDataParallel.

        Args:
            model: the network to train.
            sync: batch norm takes the statistics of all ranks' batches.
        """
        model = model.to(self.device)
        if self.device.type == "cuda":  # the fastest layout for convolutions in half precision
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # it takes it by name
        if self.group is None:
            return model
        if sync:
            model = sync_batchnorm(model, self.group)
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, process_group=self.group)

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over ranks."""
        if self.group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """`[sum of n, ...]`: the rows `[n, ...]` of all ranks in rank order, without gradients."""
        return rows.detach() if self.group is None else all_gather_rows(rows.detach(), self.group)[0]

    def all_gather_object(self, value: Value) -> list[Value]:
        """The values of all ranks, in rank order; any object that pickles."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Waits until all ranks have called it."""
        if self.group is not None:
            dist.barrier(self.group)


def pick_device(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:<index>", or "auto", which is a GPU if there is one.

    Raises:
        ValueError: another name, or a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]{0,5}))?", name)
    if known is None:  # PyTorch has others, such as meta, with which training would fail later
        raise ValueError(f"sn_ops.reid: device: expected auto, cpu, cuda or cuda:<index>, got {name!r}")
    # Checked here, since PyTorch keeps the index in a byte.
    if name != "cpu" and int(known[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"sn_ops.reid: device: expected a device that is here, got {name!r}")
    return torch.device(name)


@contextmanager
def processes(device: str) -> Iterator[Parallel]:
    """This process's place: of the default process group if there is one, otherwise from torchrun's environment
    (RANK, WORLD_SIZE, LOCAL_RANK).

    A group that this makes lives until the process ends, since torchrun's store serves one group only.

    Args:
        device: as `run.device`. With several ranks on GPUs, each takes the GPU of its LOCAL_RANK.

    Raises:
        ValueError: a device that this machine lacks, or fewer GPUs than local ranks.
    """
    chosen = pick_device(device)
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if chosen.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", "0"))
            chosen = pick_device(f"cuda:{local}")
            torch.cuda.set_device(chosen)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(_leave)
    if dist.is_initialized() and dist.get_world_size() > 1:
        yield Parallel(dist.get_rank(), dist.get_world_size(), chosen, dist.group.WORLD)
    else:
        yield Parallel(0, 1, chosen)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
