"""The support graph of one rank's anchors, from gathered rows or from batches that pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops, reference
from ..reference import Graph
from .collectives import gather_rows, travel
from .exchange import Call, Plan
from .rows import pack


def _local_reduction(call: Call) -> int:
    """A mean needs the number of valid anchors of all ranks: until then it is a sum."""
    none = call.reduction == reference.Reduction.NONE
    return int(reference.Reduction.NONE if none else reference.Reduction.SUM)


def gather_graph(call: Call, plan: Plan) -> tuple[Graph, Tensor]:
    """The graph by one gather, and the rows of all ranks `[M, bytes]`, which backward needs again."""
    mine = pack(call.feats, call.labels)
    everyone = mine.with_data(mine.data.new_empty((plan.total, mine.data.shape[1])))
    gather_rows(plan, mine.data, everyone.data)
    start, labels = plan.start(plan.rank), everyone.labels.contiguous()
    if call.bank is not None:
        gathered = _search(call, everyone.feats, labels, 0, None, start)
        return _finish(call, _merge(gathered, _search_bank(call, plan), call.k)), everyone.data
    graph = ops.forward(
        call.backend, call.feats.detach(), call.labels, everyone.feats, labels, None, start,
        call.k, call.alpha, call.weight, call.squeeze, _local_reduction(call), False,
    )  # fmt: skip
    return graph, everyone.data


def ring_graph(call: Call, plan: Plan) -> tuple[Graph, Tensor]:
    """The graph by passing batches on, and this rank's rows `[N, bytes]`."""
    mine = pack(call.feats, call.labels)
    found = None if call.bank is None else _search_bank(call, plan)
    for owner, data in travel(plan, mine.data):
        rows = mine.with_data(data)
        self_offset = 0 if owner == plan.rank else -1
        passing = _search(call, rows.feats, rows.labels.contiguous(), plan.start(owner), None, self_offset)
        found = passing if found is None else _merge(found, passing, call.k)
    assert found is not None  # a group has a rank
    return _finish(call, found), mine.data


# ---- parts of the candidates ----------------------------------------------------------------------
# The ordinary operator searches one part of the candidates and returns the squared distances that it ordered them by.
# What was found is merged by (squared distance, index over all parts); distances would not do, as the square root maps
# neighbouring floats to one. The order of candidates is total, so merging is exact, in any order of the parts.

_NOBODY = 2**31  # behind every candidate


class _Found(NamedTuple):
    """The neighbours of every anchor in the parts searched so far; _NOBODY and inf (farthest: -1) where none is."""

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
    # With the span as the squeeze the farthest positive is an edge, so its squared distance is returned.
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


def _search_bank(call: Call, plan: Plan) -> _Found:
    assert call.bank is not None and call.bank_labels is not None
    return _search(call, call.bank.detach(), call.bank_labels, plan.total, call.self_index, call.self_offset)


def _merge(a: _Found, b: _Found, k: int) -> _Found:
    """The neighbours in two parts together."""
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
    """The loss and the graph of a whole selection, by the reference, in float64 like the kernels' last stage."""

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
        value=(losses if none else losses.sum()).to(acc) + found.poison.to(acc),
        indices=edges.indices.int(),
        coefficients=reference.edge_coefficients(squared, edges, call.alpha, call.weight, call.squeeze).to(acc),
        nearest=selection.nearest.int(),
        farthest=selection.farthest.int(),
        squared=found.squared.new_empty(0),
        stats=reference.statistics(squared, edges, found.poison),
    )
