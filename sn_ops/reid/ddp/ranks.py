"""The processes of a run: one, or the ranks that torchrun started, with gloo on CPUs and NCCL on GPUs.

`torchrun --nproc-per-node 4 -m sn_ops.reid train` is the same run as one process with the same configuration:
`data.identities` is the number of the whole batch, of which each rank takes its share; `group=` lets the losses see all
of it; DistributedDataParallel averages gradients. Batch norm takes the statistics of the whole batch
(`run.sync_batchnorm`; without it, those of a rank's share, which is faster and another result).
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

from .collectives import gather
from .sync_batchnorm import sync_batchnorm

Value = TypeVar("Value")

# Ranks wait for rank 0 while it evaluates, which takes long on large galleries.
PATIENCE = timedelta(hours=3)


@dataclass(frozen=True)
class Parallel:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device
    group: Any = None
    """The process group of all ranks; None for one process."""

    @property
    def is_main(self) -> bool:
        """The rank that writes files and shows progress."""
        return self.rank == 0

    def wrap(self, model: nn.Module, *, sync: bool) -> nn.Module:
        """The network on the device; with several ranks one whose backward() averages gradients over them.

        Args:
            model: to be trained.
            sync: batch norm over the batches of all ranks.
        """
        model = model.to(self.device)
        if self.device.type == "cuda":  # the layout that convolutions in half precision are fastest in
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
        return rows.detach() if self.group is None else gather(rows.detach(), self.group)[0]

    def all_gather_object(self, value: Value) -> list[Value]:
        """The value of each rank: anything that pickles, between processes of one run."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Returns when all ranks have come here."""
        if self.group is not None:
            dist.barrier(self.group)


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]{0,5}))?", name)
    if known is None:  # PyTorch has more, such as meta, which would run into errors of its own
        raise ValueError(f"sn_ops.reid: device: expected auto, cpu, cuda or cuda:<index>, got {name!r}")
    # Before PyTorch reads the index, which it keeps in a byte.
    if name != "cpu" and int(known[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"sn_ops.reid: device: expected a device that is here, got {name!r}")
    return torch.device(name)


@contextmanager
def processes(device: str) -> Iterator[Parallel]:
    """This process's place, from torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK), or from the default process
    group where there is one already. A group that is made here stays for the process's next run, since torchrun's
    store serves one, and ends with the process.

    Args:
        device: as `run.device`. With several ranks on GPUs each takes the one of its LOCAL_RANK.

    Raises:
        ValueError: a device that is not here, or fewer GPUs than local ranks.
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
