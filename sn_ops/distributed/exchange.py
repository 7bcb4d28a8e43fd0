"""What a call over a process group works with: the group and how rows travel, one rank's arguments, the common plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist
from torch import Tensor

MODES = ("auto", "gather", "ring")

RING_ABOVE = 4 << 30
"""Bytes of gathered rows and their gradients on one rank above which mode "auto" takes the ring."""

MAX_ROWS = 2**31 - 1  # the support graph stores candidates as int32


@dataclass(frozen=True)
class Exchange:
    """A process group and how rows travel in it; `group=` takes it in place of a bare group.

    Args:
        group: a `torch.distributed` process group that this process is a member of.
        mode: "gather" brings all rows to every rank, O(M D) memory; "ring" passes them on, O(N D) memory, with a
            transfer and a search for every rank; "auto" takes the ring where the gathered rows and their gradients
            would need more than `ring_above` bytes on a rank. Both select the same neighbours.
        ring_above: bytes, an int >= 0, see `mode`.

    Raises:
        TypeError: group is not a process group.
        ValueError: this process is not a member of the group, torch.distributed is not initialised, or mode or
            ring_above has a value that is not allowed.
    """

    group: Any
    mode: str = "auto"
    ring_above: int = RING_ABOVE

    def __post_init__(self) -> None:
        check_process_group(self.group)
        if self.mode not in MODES:
            names = ", ".join(map(repr, MODES))
            raise ValueError(f"sn_ops: mode: expected one of {names}, got {self.mode!r}")
        if isinstance(self.ring_above, bool) or not isinstance(self.ring_above, int) or self.ring_above < 0:
            raise ValueError(f"sn_ops: ring_above: expected bytes, an int >= 0, got {self.ring_above!r}")


def check_group(group: object) -> Exchange:
    """The `Exchange` of what `group=` was given; raises as `Exchange` does."""
    return group if isinstance(group, Exchange) else Exchange(group)


def check_process_group(group: object) -> None:
    """Raises unless `group` is a process group of torch.distributed that this process is a member of.

    Raises:
        TypeError: it is something else.
        ValueError: torch.distributed is not initialised, or this process is not a member.
    """
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("sn_ops: group: expected a process group that this process is a member of, got another one")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "sn_ops: group: expected None, a torch.distributed process group or sn_ops.distributed.Exchange, got "
            f"{group!r} of type {type(group).__name__}"
        )
    if not dist.is_initialized() or dist.get_rank(group) < 0:
        raise ValueError(
            "sn_ops: group: expected a process group of an initialised torch.distributed that this process is a "
            "member of, got one that is not"
        )


class Call(NamedTuple):
    """One rank's arguments, validated."""

    want_stats: bool
    backend: str
    feats: Tensor  # [N, D]
    labels: Tensor  # [N] int64
    bank: Tensor | None  # [B, D]
    bank_labels: Tensor | None  # [B] int64
    self_index: Tensor | None  # [N] int64: which bank row an anchor is, -1 for none
    self_offset: int  # anchor i is bank row i + self_offset, -1 for none; not used with self_index
    k: int
    alpha: float
    weight: float
    squeeze: int
    reduction: int


class Plan(NamedTuple):
    """What every rank knows alike: the sizes of all batches and how they travel."""

    group: Any
    rank: int  # of this process in the group
    sizes: tuple[int, ...]  # rows of every rank
    ring: bool
    joins: bool  # some rank needs a gradient, so backward is a collective

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def start(self, rank: int) -> int:
        """The first candidate of a rank's batch."""
        return sum(self.sizes[:rank])


def refuse(argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"sn_ops: {argument}: expected {expected}, got {got}")
