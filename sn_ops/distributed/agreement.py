"""What ranks agree on before any row travels: options, sizes, and whether backward is a collective."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from .collectives import gather_record
from .exchange import MAX_ROWS, Call, Exchange, Plan, refuse
from .rows import row_bytes

_COUNTS = 4  # failed, rows, bank rows, gradient
_TEXT = 384  # bytes of options, compared as they are
_MESSAGE = 2048  # bytes of a failing rank's error

_NO_GRAD, _GRAD_NOT_NEEDED, _GRAD_NEEDED = range(3)


def _terms_text(call: Call, exchange: Exchange) -> str:
    """The options that must be the same on every rank, as `name=value` pairs."""
    terms = {
        "columns of feats": call.feats.shape[1],
        "dtype of feats": str(call.feats.dtype),
        "device of feats": call.feats.device.type,
        "k": call.k,
        "alpha": call.alpha,
        "weight": call.weight,
        "squeeze": reference.Squeeze(call.squeeze).name.lower(),
        "reduction": reference.Reduction(call.reduction).name.lower(),
        "backend": call.backend,
        "return_stats": call.want_stats,
        "mode": exchange.mode,
        "ring_above": exchange.ring_above,
    }
    return "\n".join(f"{name}={value}" for name, value in terms.items())


def _as_bytes(text: str, length: int) -> bytes:
    return text.encode()[:length].ljust(length, b"\0")


def _as_text(values: Tensor) -> str:
    return bytes(values.tolist()).rstrip(b"\0").decode(errors="ignore")


def _raise_everywhere(group: Any, failed: list[int], error: Exception | None) -> NoReturn:
    """Raises on a failing rank its own error, on the others one that quotes the first of those. All ranks call it."""
    message = "" if error is None else f"{type(error).__name__}: {error}"
    messages = gather_record(group, _as_bytes(message, _MESSAGE))
    if error is not None:
        raise error
    raise RuntimeError(f"sn_ops: group: rank {failed[0]} was given bad input: {_as_text(messages[failed[0]])}")


def _refuse_difference(texts: list[str]) -> NoReturn:
    table = [dict(line.split("=", 1) for line in text.split("\n")) for text in texts]
    for name, value in table[0].items():
        for rank, terms in enumerate(table):
            if terms.get(name) != value:
                refuse(
                    "group", f"the same {name} on every rank", f"{value} on rank 0, {terms.get(name)} on rank {rank}"
                )
    refuse("group", "the same options on every rank", texts)


def agree(exchange: Exchange, prepare: Callable[[], Call]) -> tuple[Call, Plan]:
    """This rank's validated call and the common plan; if any rank's input is bad, all ranks raise."""
    group = exchange.group
    call, error, text, counts = None, None, "", [1, 0, 0, _NO_GRAD]
    try:
        call = prepare()
        text = _terms_text(call, exchange)
        counts = [0, call.feats.shape[0], 0 if call.bank is None else call.bank.shape[0], _gradient_need(call)]
    except Exception as caught:  # whatever it is: the other ranks wait for this one
        error = caught
    record = b"".join(count.to_bytes(8, "little") for count in counts) + _as_bytes(text, _TEXT)
    table = gather_record(group, record)

    failed, sizes, banks, needs = table[:, : 8 * _COUNTS].contiguous().view(torch.int64).T.tolist()
    if any(failed) or call is None:
        _raise_everywhere(group, [rank for rank, flag in enumerate(failed) if flag], error)
    options = table[:, 8 * _COUNTS :]
    if not bool((options == options[0]).all()):
        _refuse_difference([_as_text(row) for row in options])
    if sum(sizes) + max(banks) > MAX_ROWS:
        refuse("group", f"at most {MAX_ROWS} candidates on a rank", sum(sizes) + max(banks))
    if _GRAD_NEEDED in needs and _NO_GRAD in needs:
        refuse(
            "group",
            "gradients to be recorded on every rank or on none (backward is a collective)",
            f"torch.no_grad on rank {needs.index(_NO_GRAD)} and features that require one on rank "
            f"{needs.index(_GRAD_NEEDED)}",
        )
    return call, _plan(exchange, call, tuple(sizes), _GRAD_NEEDED in needs)


def _gradient_need(call: Call) -> int:
    if not torch.is_grad_enabled():
        return _NO_GRAD
    needs = call.feats.requires_grad or (call.bank is not None and call.bank.requires_grad)
    return _GRAD_NEEDED if needs else _GRAD_NOT_NEEDED


def take_on_trust(exchange: Exchange, call: Call, sizes: Sequence[int]) -> Plan:
    """The plan from a `sizes=` hint, without a collective."""
    rank, world = dist.get_rank(exchange.group), dist.get_world_size(exchange.group)
    try:
        rows = tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(f"sn_ops: sizes: expected one int for each rank, got {sizes!r}") from None
    if len(rows) != world or min(rows) < 0:
        refuse("sizes", f"{world} ints >= 0, one for each rank of the group", list(rows))
    if rows[rank] != call.feats.shape[0]:
        refuse("sizes", f"{call.feats.shape[0]} at position {rank}, the rows of this rank's feats", list(rows))
    # Who needs a gradient is not known, so every rank whose grad mode is on is ready to take part in backward.
    return _plan(exchange, call, rows, torch.is_grad_enabled())


def _plan(exchange: Exchange, call: Call, sizes: tuple[int, ...], joins: bool) -> Plan:
    gathered = sum(sizes) * (row_bytes(call.feats) + call.feats.shape[1] * call.feats.element_size())
    ring = exchange.mode == "ring" or (exchange.mode == "auto" and gathered > exchange.ring_above)
    return Plan(exchange.group, dist.get_rank(exchange.group), sizes, ring, joins)
