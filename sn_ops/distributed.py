"""The loss over the batches of all ranks of a process group: `sn_loss(..., group=...)`.

The definition: N_r anchors on rank r, and as candidates the batches of all ranks in rank order, M = sum of all N_r.
What one process that holds the concatenated batch computes, every rank computes for its own anchors; means and
statistics are over the valid anchors of all ranks. A bank (`candidates=`) is the rank's own and stands behind the
gathered rows.

Two ways lead there, and they select the same neighbours, bit for bit:

gather  one collective brings all rows, labels packed behind each, to every rank, which calls the ordinary operator with
        separate candidates; backward, one reduce-scatter takes the candidates' gradients home. Memory O(M D) a rank.
ring    the batches travel round the ring of ranks one after the other. Each is searched as it passes, and what was
        found is merged by (squared distance, index), which is exact because the order of the candidates of an anchor
        is a total one. Backward the batches travel again, their gradients behind them. Memory O(N D) a rank.

Collectives, in this order: terms (skipped with `sizes=`), rows (gather or ring), totals; backward one reduce-scatter
(or the ring). Every rank takes part in each: a rank without anchors too, and a rank whose features need no gradient
gets a loss that requires one if another rank's do, so that its backward() serves the others.

Gradient convention: a rank's feature gradient is world size times that of the one process, given the same upstream
gradient on every rank. DistributedDataParallel averages over ranks, which makes its parameter gradients exactly those
of the one process. Who sums gradients instead divides the loss by the world size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import ops, reference

MODES = ("auto", "gather", "ring")

RING_ABOVE = 4 << 30
"""Bytes of gathered rows and their gradients on one rank above which mode "auto" takes the ring."""

_MAX_ROWS = 2**31 - 1  # the support graph stores candidates as int32


@dataclass(frozen=True)
class Exchange:
    """A process group and how candidates travel in it; taken wherever `group=` is.

    Args:
        group: a `torch.distributed` process group that this process is a member of.
        mode: "gather" brings all rows to every rank, O(M D) memory; "ring" streams them, O(N D) memory, with a transfer
            and a search for every rank; "auto" takes the ring when the gathered rows and their gradients would need
            more than `ring_above` bytes on a rank.
        ring_above: bytes, see `mode`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
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
    """What `group=` may be, as an `Exchange`; raises as `Exchange` does."""
    return group if isinstance(group, Exchange) else Exchange(group)


def check_process_group(group: object) -> None:
    """Raise unless `group` is a process group of torch.distributed that this process is a member of.

    Raises:
        TypeError: something else.
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


class _Plan(NamedTuple):
    """What all ranks know alike."""

    group: Any
    rank: int  # of this process in the group
    sizes: tuple[int, ...]  # rows of every rank
    ring: bool
    joins: bool  # backward is a collective: somebody needs a gradient

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def start(self, rank: int) -> int:
        """The first candidate of a rank's batch."""
        return sum(self.sizes[:rank])


def _error(argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"sn_ops: {argument}: expected {expected}, got {got}")


# ---- collectives --------------------------------------------------------------------------------
# torch renamed the single-tensor collectives in 2.13 and warns about the old names, which are all that 2.10 has.

_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _backend_of(group: Any, device_type: str) -> str:
    """The communication backend that serves tensors of a device type in the group, "" if none does."""
    pairs = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return str(pairs.get(device_type, ""))


def _wire_device(group: Any) -> torch.device:
    """Where small host-side messages travel: on the host if the group can, which then needs no synchronisation."""
    if _backend_of(group, "cpu"):
        return torch.device("cpu")
    device_type = dist.get_backend_config(group).split(":")[0]
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def _gather_equal(group: Any, mine: Tensor, world: int) -> Tensor:
    """`[world, n]` of every rank's `[n]`."""
    everyone = mine.new_empty(world * mine.shape[0])
    _all_gather_single(everyone, mine, group=group)
    return everyone.view(world, -1)


def _gather_rows(plan: _Plan, mine: Tensor, everyone: Tensor) -> None:
    """Every rank's `[N_r, bytes]` into `everyone`, one behind the other and without padding."""
    if len(set(plan.sizes)) == 1:
        _all_gather_single(everyone, mine, group=plan.group)
        return
    parts = everyone.split(plan.sizes)
    if _backend_of(plan.group, mine.device.type) != "gloo":
        dist.all_gather(list(parts), mine, group=plan.group)
        return
    # gloo gathers equal sizes only. Broadcasts in place of padding, which would need a second copy of everything.
    parts[plan.rank].copy_(mine)
    pending = [
        dist.broadcast(part, src=dist.get_global_rank(plan.group, rank), group=plan.group, async_op=True)
        for rank, part in enumerate(parts)
        if part.numel() > 0
    ]
    for work in pending:
        work.wait()


def _reduce_scatter(plan: _Plan, gradients: Tensor) -> Tensor:
    """This rank's rows `[N, D]` of the sum over ranks of `gradients` `[M, D]`.

    Half-precision contributions travel as they are; where the sum is formed here it is formed in the accumulation type.
    """
    own = gradients.new_empty((plan.sizes[plan.rank], gradients.shape[1]))
    if _backend_of(plan.group, gradients.device.type) != "gloo":
        if len(set(plan.sizes)) == 1:
            _reduce_scatter_single(own, gradients, group=plan.group)
        else:
            dist.reduce_scatter(own, list(gradients.split(plan.sizes)), group=plan.group)
        return own
    # gloo reduces equal sizes only, and in an order of its own. Each rank's part comes as it is, any type as bytes, and
    # is added in rank order.
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


# ---- terms: what ranks agree on before any row travels -------------------------------------------

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


def _gather_record(group: Any, record: bytes) -> Tensor:
    """`[world, len(record)]` uint8 on the host."""
    mine = torch.frombuffer(bytearray(record), dtype=torch.uint8).to(_wire_device(group))
    return _gather_equal(group, mine, dist.get_world_size(group)).cpu()


def _raise_everywhere(group: Any, failed: list[int], error: Exception | None) -> NoReturn:
    """On a failing rank its own error, on the others one that quotes the first of those; called on all ranks."""
    message = "" if error is None else f"{type(error).__name__}: {error}"
    messages = _gather_record(group, _as_bytes(message, _MESSAGE))
    if error is not None:
        raise error
    raise RuntimeError(f"sn_ops: group: rank {failed[0]} was given bad input: {_as_text(messages[failed[0]])}")


def _refuse_difference(texts: list[str]) -> NoReturn:
    table = [dict(line.split("=", 1) for line in text.split("\n")) for text in texts]
    for name, value in table[0].items():
        for rank, terms in enumerate(table):
            if terms.get(name) != value:
                _error(
                    "group", f"the same {name} on every rank", f"{value} on rank 0, {terms.get(name)} on rank {rank}"
                )
    _error("group", "the same options on every rank", texts)


def _agree(exchange: Exchange, prepare: Callable[[], Call]) -> tuple[Call, _Plan]:
    """This rank's validated call and the common plan; if any rank's input is bad, all ranks raise."""
    group = exchange.group
    call, error, text, counts = None, None, "", [1, 0, 0, _NO_GRAD]
    try:
        call = prepare()
        text = _terms_text(call, exchange)
        counts = [0, call.feats.shape[0], 0 if call.bank is None else call.bank.shape[0], _gradient_need(call)]
    except Exception as caught:  # whatever it is, the other ranks wait for this one
        error = caught
    record = b"".join(count.to_bytes(8, "little") for count in counts) + _as_bytes(text, _TEXT)
    table = _gather_record(group, record)

    failed, sizes, banks, needs = table[:, : 8 * _COUNTS].contiguous().view(torch.int64).T.tolist()
    if any(failed) or call is None:
        _raise_everywhere(group, [rank for rank, flag in enumerate(failed) if flag], error)
    options = table[:, 8 * _COUNTS :]
    if not bool((options == options[0]).all()):
        _refuse_difference([_as_text(row) for row in options])
    if sum(sizes) + max(banks) > _MAX_ROWS:
        _error("group", f"at most {_MAX_ROWS} candidates on a rank", sum(sizes) + max(banks))
    if _GRAD_NEEDED in needs and _NO_GRAD in needs:
        _error(
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


def _take_on_trust(exchange: Exchange, call: Call, sizes: Sequence[int]) -> _Plan:
    """The plan from a `sizes=` hint, without asking anybody."""
    rank, world = dist.get_rank(exchange.group), dist.get_world_size(exchange.group)
    try:
        rows = tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(f"sn_ops: sizes: expected one int for each rank, got {sizes!r}") from None
    if len(rows) != world or min(rows) < 0:
        _error("sizes", f"{world} ints >= 0, one for each rank of the group", list(rows))
    if rows[rank] != call.feats.shape[0]:
        _error("sizes", f"{call.feats.shape[0]} at position {rank}, the rows of this rank's feats", list(rows))
    # Nobody was asked who needs a gradient, so that everybody whose grad mode is on is ready to take part.
    return _plan(exchange, call, rows, torch.is_grad_enabled())


def _plan(exchange: Exchange, call: Call, sizes: tuple[int, ...], joins: bool) -> _Plan:
    gathered = sum(sizes) * (_row_bytes(call.feats) + call.feats.shape[1] * call.feats.element_size())
    ring = exchange.mode == "ring" or (exchange.mode == "auto" and gathered > exchange.ring_above)
    return _Plan(exchange.group, dist.get_rank(exchange.group), sizes, ring, joins)


# ---- rows as they travel ------------------------------------------------------------------------
# A row is its features, padding, and its label in the last 8 bytes: labels need no collective of their own, and a
# multiple of 16 bytes keeps every row aligned for wide loads where the features' own size is one.

_ROW_ALIGNMENT = 16


def _row_bytes(feats: Tensor) -> int:
    needed = feats.shape[1] * feats.element_size() + 8
    return -(-needed // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


class _Rows(NamedTuple):
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

    def with_data(self, data: Tensor) -> _Rows:
        return self._replace(data=data)


def _pack(feats: Tensor, labels: Tensor) -> _Rows:
    rows = _Rows(
        torch.empty((feats.shape[0], _row_bytes(feats)), dtype=torch.uint8, device=feats.device),
        feats.shape[1],
        feats.dtype,
    )
    rows.data[:, feats.shape[1] * feats.element_size() : -8] = 0  # padding travels too: let it be the same every time
    rows.feats.copy_(feats.detach())
    rows.labels.copy_(labels)
    return rows


# ---- what one rank finds --------------------------------------------------------------------------


class Graph(NamedTuple):
    """The loss and the support graph of a rank's anchors; candidates counted over all ranks, the bank behind them."""

    value: Tensor  # acc: the sum over this rank's anchors, or [N] with reduction "none"
    indices: Tensor  # [N, K + 2] int32
    coefficients: Tensor  # [N, K + 2] acc
    nearest: Tensor  # [N] int32
    farthest: Tensor  # [N] int32
    stats: Tensor  # [6], of this rank


def _local_reduction(call: Call) -> int:
    """A mean needs the number of valid anchors of all ranks: until then it is a sum."""
    none = call.reduction == reference.Reduction.NONE
    return int(reference.Reduction.NONE if none else reference.Reduction.SUM)


def _gather_graph(call: Call, plan: _Plan) -> tuple[Graph, Tensor]:
    """The graph by one gather, and the rows of all ranks `[M, bytes]`, which backward needs again."""
    mine = _pack(call.feats, call.labels)
    everyone = mine.with_data(mine.data.new_empty((plan.total, mine.data.shape[1])))
    _gather_rows(plan, mine.data, everyone.data)
    start, labels = plan.start(plan.rank), everyone.labels.contiguous()
    if call.bank is not None:
        gathered = _search(call, everyone.feats, labels, 0, None, start)
        return _finish(call, _merge(gathered, _search_bank(call, plan), call.k)), everyone.data
    value, indices, coefficients, nearest, farthest, _, stats = ops.forward(
        call.backend, call.feats.detach(), call.labels, everyone.feats, labels, None, start,
        call.k, call.alpha, call.weight, call.squeeze, _local_reduction(call), False,
    )  # fmt: skip
    return Graph(value, indices, coefficients, nearest, farthest, stats), everyone.data


def _ring_graph(call: Call, plan: _Plan) -> tuple[Graph, Tensor]:
    """The graph by passing batches on, and this rank's rows `[N, bytes]`."""
    mine = _pack(call.feats, call.labels)
    found = None if call.bank is None else _search_bank(call, plan)
    for owner, data in _travel(plan, mine.data):
        rows = mine.with_data(data)
        self_offset = 0 if owner == plan.rank else -1
        passing = _search(call, rows.feats, rows.labels.contiguous(), plan.start(owner), None, self_offset)
        found = passing if found is None else _merge(found, passing, call.k)
    assert found is not None  # a group has a rank
    return _finish(call, found), mine.data


# ---- parts of the candidates ----------------------------------------------------------------------
# A part is searched by the ordinary operator, which also returns the squared distances its choice was made by. Found
# is kept by (squared distance, index over all parts); distances would not do, since the square root of a float merges
# neighbouring values. Merging is exact and in any order of the parts: the order of candidates is total.

_NOBODY = 2**31  # behind every candidate


class _Found(NamedTuple):
    """What the parts searched so far hold for every anchor; _NOBODY and inf (farthest: -1) where there is nobody."""

    support: Tensor  # [N, at most k] int64, in order
    squared: Tensor  # [N, at most k] acc
    positive: Tensor  # [N, at most k] bool
    near: Tensor  # [N] int64
    near_squared: Tensor  # [N] acc
    far: Tensor  # [N] int64
    far_squared: Tensor  # [N] acc
    poison: Tensor  # 0-d float64


def _search(
    call: Call,
    candidates: Tensor,  # [m, D]
    candidate_labels: Tensor,  # [m]
    first: int,  # the index of the part's first candidate over all parts
    self_index: Tensor | None,
    self_offset: int,
) -> _Found:
    """The neighbours of every anchor in one part."""
    # With the span as the squeeze the farthest positive is among the edges, and so is its squared distance.
    _, indices, _, nearest, farthest, squared, stats = ops.forward(
        call.backend, call.feats.detach(), call.labels, candidates, candidate_labels, self_index, self_offset,
        call.k, call.alpha, call.weight, int(reference.Squeeze.SPAN), int(reference.Reduction.NONE), True,
    )  # fmt: skip
    used = indices >= 0
    squared = squared.where(used, torch.inf)
    positive = used & (reference.take(candidate_labels, indices.long()) == call.labels[:, None])

    def squared_of(candidate: Tensor, nobody: float) -> Tensor:
        slot = (used & (indices == candidate[:, None])).int().argmax(1, keepdim=True)
        return squared.gather(1, slot).squeeze(1).where(candidate >= 0, nobody)

    def everywhere(index: Tensor) -> Tensor:
        return torch.where(index >= 0, index.long() + first, _NOBODY)

    return _Found(
        everywhere(indices[:, :-2]), squared[:, :-2], positive[:, :-2],
        everywhere(nearest), squared_of(nearest, torch.inf), everywhere(farthest), squared_of(farthest, -1.0), stats[5],
    )  # fmt: skip


def _search_bank(call: Call, plan: _Plan) -> _Found:
    assert call.bank is not None and call.bank_labels is not None
    return _search(call, call.bank.detach(), call.bank_labels, plan.total, call.self_index, call.self_offset)


def _merge(a: _Found, b: _Found, k: int) -> _Found:
    """What two parts hold together."""
    support, squared, positive = (torch.cat(pair, 1) for pair in zip(a[:3], b[:3], strict=True))
    order = support.argsort(dim=1, stable=True)
    order = order.gather(1, squared.gather(1, order).argsort(dim=1, stable=True))[:, :k]

    def lower(index: Tensor, other: Tensor, tied: Tensor) -> Tensor:
        return tied & (index < other)

    nearer = (b.near_squared < a.near_squared) | lower(b.near, a.near, b.near_squared == a.near_squared)
    farther = (b.far_squared > a.far_squared) | lower(b.far, a.far, b.far_squared == a.far_squared)
    return _Found(
        support.gather(1, order), squared.gather(1, order), positive.gather(1, order),
        torch.where(nearer, b.near, a.near), torch.where(nearer, b.near_squared, a.near_squared),
        torch.where(farther, b.far, a.far), torch.where(farther, b.far_squared, a.far_squared),
        a.poison + b.poison,
    )  # fmt: skip


def _finish(call: Call, found: _Found) -> Graph:
    """The loss and the graph of a whole selection, by the definition, in float64 like the kernels' last stage."""

    def or_none(index: Tensor) -> Tensor:
        return index.where(index != _NOBODY, -1)

    selection = reference.Selection(or_none(found.support), or_none(found.near), or_none(found.far))
    edges = reference.edges_of(selection, found.positive, call.squeeze)
    squared = torch.cat([found.squared, found.near_squared[:, None], found.far_squared[:, None]], 1)
    acc = squared.dtype
    squared = squared.where(edges.indices >= 0, 0.0).double()
    losses = reference.anchor_losses(squared, edges, call.alpha, call.weight, call.squeeze)
    none = call.reduction == reference.Reduction.NONE
    return Graph(
        (losses if none else losses.sum()).to(acc) + found.poison.to(acc),
        edges.indices.int(),
        reference.edge_coefficients(squared, edges, call.alpha, call.weight, call.squeeze).to(acc),
        selection.nearest.int(),
        selection.farthest.int(),
        reference.statistics(squared, edges, found.poison),
    )


# ---- the ring -------------------------------------------------------------------------------------


def _pass_on(plan: _Plan, leaving: Tensor, arriving: Tensor) -> list[Any]:
    """Starts sending to the next rank and receiving from the previous one; what to wait for."""
    if plan.world == 1:
        arriving.copy_(leaving)
        return []

    def peer(step: int) -> int:
        return int(dist.get_global_rank(plan.group, (plan.rank + step) % plan.world))

    def something(rows: Tensor) -> Tensor:
        """The rows, or one element in place of none: NCCL wants every rank in the first transfers of a group."""
        return rows if rows.numel() > 0 else rows.new_zeros(1)

    send = dist.P2POp(dist.isend, something(leaving), peer(1), plan.group)
    receive = dist.P2POp(dist.irecv, something(arriving), peer(-1), plan.group)
    return dist.batch_isend_irecv([send, receive])


def _travel(plan: _Plan, mine: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(rank, its rows) for every rank, this one first; the next rows arrive while those at hand are worked on."""
    rows = mine
    for step in range(plan.world):
        pending: list[Any] = []
        arriving = rows
        if step + 1 < plan.world:
            arriving = mine.new_empty((plan.sizes[(plan.rank - step - 1) % plan.world], mine.shape[1]))
            pending = _pass_on(plan, rows, arriving)
        yield (plan.rank - step) % plan.world, rows
        for work in pending:
            work.wait()
        rows = arriving


# ---- gradients ------------------------------------------------------------------------------------


class _Backward(NamedTuple):
    """What a gradient is made of."""

    backend: str
    upstream: Tensor  # the loss's gradient, times world size
    feats: Tensor  # [N, D]
    indices: Tensor  # [N, K + 2] int32
    coefficients: Tensor  # [N, K + 2] acc
    stats: Tensor  # [6], global
    reduction: int
    need_feats: bool

    def through(self, candidates: Tensor, first: int, need_candidates: bool) -> tuple[Tensor, Tensor]:
        """The gradients of the anchors and of a part's candidates `[m, D]` by the edges between them."""
        inside = (self.indices >= first) & (self.indices < first + candidates.shape[0])
        return ops.backward(
            self.backend, self.upstream, self.feats, candidates,
            (self.indices - first).where(inside, -1), self.coefficients.where(inside, 0.0),
            self.stats, self.reduction, self.need_feats, need_candidates,
        )  # fmt: skip


def _gather_gradient(plan: _Plan, job: _Backward, rows: _Rows) -> Tensor:
    """`[N, D]` acc: the gradient of this rank's features but for what a bank adds."""
    acc = reference.accumulation_dtype(job.feats.dtype)
    own, pushed = job.through(rows.feats, 0, True)
    returned = _reduce_scatter(plan, pushed).to(acc)
    return own.to(acc) + returned if job.need_feats else returned


def _ring_gradient(plan: _Plan, job: _Backward, rows: _Rows) -> Tensor:
    """The same from batches that travel. The gradient of a batch travels behind it and arrives at home with the sum of
    all ranks, added in the order of the ring and in the accumulation type."""
    acc = reference.accumulation_dtype(job.feats.dtype)
    job = job._replace(feats=job.feats.to(acc))
    own = torch.zeros_like(job.feats)
    gradient = None
    pending: list[Any] = []
    for owner, data in _travel(plan, rows.data):
        mine, pushed = job.through(rows.with_data(data).feats.to(acc), plan.start(owner), True)
        if job.need_feats:
            own += mine
        for work in pending:
            work.wait()
        if gradient is not None:
            pushed += gradient
        gradient = pushed.new_empty((plan.sizes[(owner - 1) % plan.world], pushed.shape[1]))
        pending = _pass_on(plan, pushed, gradient)
    for work in pending:
        work.wait()
    assert gradient is not None  # a group has a rank
    return own + gradient


# ---- totals over ranks ----------------------------------------------------------------------------


def _local_totals(call: Call, graph: Graph) -> Tensor:
    """`[9]` float64: what a rank adds to the loss and to the statistics, and its poison."""
    stats = graph.stats.double()
    valid, positive_mean, negative_mean, nearest_is_positive, support_positives, poison = stats.unbind()
    none = call.reduction == reference.Reduction.NONE
    loss_sum = torch.zeros_like(valid) if none else graph.value.double()
    positives = negatives = torch.zeros_like(valid)
    if call.want_stats:
        # The operator gives means; the counts behind them are in the graph.
        inside = valid * support_positives
        outside = (graph.indices[:, -2] >= 0).sum()
        positives = inside + outside
        negatives = ((graph.indices[:, :-2] >= 0) & (graph.nearest >= 0)[:, None]).sum() - inside
    return torch.stack([
        loss_sum, valid, positives, positives * positive_mean, negatives, negatives * negative_mean,
        valid * nearest_is_positive, valid * support_positives, poison,
    ])  # fmt: skip


def _globalise(call: Call, plan: _Plan, graph: Graph) -> tuple[Tensor, Tensor]:
    """The loss over all ranks (with "none", of the own anchors) and the global statistics `[6]`."""
    totals = _gather_equal(plan.group, _local_totals(call, graph), plan.world).sum(0)
    loss_sum, valid, positives, positive_sum, negatives, negative_sum, nearest, inside, poison = totals.unbind()

    def ratio(total: Tensor, count: Tensor) -> Tensor:
        return total / count.clamp(min=1)

    stats = torch.stack([
        valid, ratio(positive_sum, positives), ratio(negative_sum, negatives),
        ratio(nearest, valid), ratio(inside, valid), poison,
    ])  # fmt: skip
    acc = graph.value.dtype
    if call.reduction == reference.Reduction.NONE:
        return graph.value + poison.to(acc), stats
    return (ratio(loss_sum, valid) if call.reduction == reference.Reduction.MEAN else loss_sum).to(acc), stats


# ---- autograd ---------------------------------------------------------------------------------------


class _OneDerivative(torch.autograd.Function):
    """The identity, whose derivative is refused."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *reasons: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(
            "sn_ops: second derivatives are not available with group=. Gather the features yourself "
            "(torch.distributed.nn.functional.all_gather) and pass them as candidates with backend='reference'."
        )


class _GroupLoss(torch.autograd.Function):
    """`token` needs a gradient whenever backward is a collective, so that a rank whose features need none has a loss
    that does, and takes part."""

    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, bank: Tensor | None, token: Tensor, call: Call, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        graph, rows = (_ring_graph if plan.ring else _gather_graph)(call, plan)
        value, stats = _globalise(call, plan, graph)
        ctx.save_for_backward(feats, bank, rows, graph.indices, graph.coefficients, stats)
        ctx.plan, ctx.backend, ctx.reduction = plan, call.backend, call.reduction
        ctx.mark_non_differentiable(stats)
        return value, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        feats, bank, data, indices, coefficients, stats = ctx.saved_tensors
        plan: _Plan = ctx.plan
        need_feats, need_bank = ctx.needs_input_grad[:2]
        grad_bank = None
        with torch.no_grad():
            upstream = grad_loss.detach() * plan.world
            job = _Backward(
                ctx.backend, upstream, feats.detach(), indices, coefficients, stats, ctx.reduction, need_feats
            )
            rows = _Rows(data, feats.shape[1], feats.dtype)
            gradient = (_ring_gradient if plan.ring else _gather_gradient)(plan, job, rows)
            if bank is not None:
                own, pushed = job.through(bank.detach(), plan.total, need_bank)
                gradient = gradient + own if need_feats else gradient
                grad_bank = pushed if need_bank else None
            grad_feats = gradient.to(feats.dtype) if need_feats else None
        return (*_once((grad_feats, grad_bank), grad_loss, feats), None, None, None)


def _once(gradients: tuple[Tensor | None, ...], *reasons: Tensor) -> list[Tensor | None]:
    """The gradients; under create_graph=True, gradients that cannot be differentiated again."""
    if not torch.is_grad_enabled():
        return list(gradients)
    return [None if gradient is None else _OneDerivative.apply(gradient, *reasons) for gradient in gradients]


@torch.compiler.disable(reason="sn_ops: group= runs collectives whose sizes the ranks agree on as they run")
def loss(group: Any, sizes: Sequence[int] | None, prepare: Callable[[], Call]) -> tuple[Tensor, Tensor]:
    """The loss over all ranks and the global statistics `[6]`, as `reference.loss` returns them.

    Args:
        group: a process group or `Exchange`.
        sizes: the rows of every rank in rank order: nothing is agreed on and nothing waits for the host. Options,
            dtypes, columns and the sizes themselves are then not compared between ranks, a rank that raises leaves the
            others waiting for the group's timeout, and with grad mode on the loss always requires a gradient.
        prepare: validates this rank's arguments; called here, so that what it raises reaches the other ranks.

    Raises:
        TypeError, ValueError: from `prepare`, or for a bad group or sizes.
        ValueError: the ranks' options differ (on every rank).
        RuntimeError: another rank was given bad input (it raises the error itself).
    """
    exchange = check_group(group)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("sn_ops: group= is not available in the transforms of torch.func (vmap, grad, jvp, ...)")
    if sizes is None:
        call, plan = _agree(exchange, prepare)
    else:
        call = prepare()
        plan = _take_on_trust(exchange, call, sizes)
    token = torch.empty((), requires_grad=plan.joins)
    pair: tuple[Tensor, Tensor] = _GroupLoss.apply(call.feats, call.bank, token, call, plan)
    return pair
