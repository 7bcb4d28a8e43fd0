"""The Support Neighbor loss in plain, dense PyTorch: read this file to learn what the package computes.

Li, Ding, Li, Zhang and Fu, "Support Neighbor Loss for Person Re-Identification", ACM MM 2018, arXiv 1808.06030.

An anchor's *support set* S_i is its k nearest candidates. Those with the anchor's label are its positives P_i, the
others its negatives N_i; without a positive in S_i, the nearest positive of all candidates becomes P_i. The loss of an
anchor is

    separation_i = -log( sum_{P_i} e^{-alpha d} / sum_{P_i + N_i} e^{-alpha d} )     positives nearer than negatives
    squeeze_i    = d(i, farthest positive) - d(i, nearest positive)                  positives equally near
    L_i          = separation_i + weight * squeeze_i

averaged over the anchors that have a positive at all. The steps below follow that text: `select` finds the neighbours,
`list_edges` names the pairs that matter (at most K + 2 an anchor), `anchor_losses` evaluates L_i on their distances.

Shapes: N anchors, M candidates, D dimensions, K = min(k, M) neighbours. "acc" is the accumulation dtype: float32, or
float64 for float64 features. Works on any device and for any floating dtype, and can be differentiated any number of
times. It is exempt from the fused backends' promises of speed and memory: it holds a few N x M matrices and one
[N, K + 2, D] tensor.

`forward` and `backward` take and return what the operators `sn_ops::forward` and `sn_ops::backward` of the fused
backends do: `ForwardArguments`, `Graph`, `BackwardArguments`. `loss` is the differentiable path behind
`sn_loss(backend="reference")`.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Distances are clamped from below so that sqrt has a finite derivative; no gradient flows where the clamp holds.
SQUARED_DISTANCE_FLOOR = 1e-12

# How many differences `squared_distances` holds at a time. On a CPU: few enough to stay in cache, and not to wake
# PyTorch's threads for each block. Elsewhere: enough to be worth a kernel launch.
_BLOCK_ELEMENTS_CPU = 1 << 14
_BLOCK_ELEMENTS = 1 << 24


class Squeeze(IntEnum):
    """The codes of `squeeze` in the operators' signatures (sn_types.h has the same)."""

    SPAN = 0
    SUPPORT = 1
    NEAREST = 2
    NONE = 3


class Reduction(IntEnum):
    """The codes of `reduction` in the operators' signatures (sn_types.h has the same)."""

    MEAN = 0
    SUM = 1
    NONE = 2


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that distances, the loss and the coefficients have for features of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scalar_dtype(device: torch.device) -> torch.dtype:
    """The dtype of everything after the distances, [N, K + 2] values at most: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def distances_of(squared: Tensor) -> Tensor:
    """Clamped distances of squared ones, of any shape: rounded once, to the dtype they came in."""
    return squared.to(_scalar_dtype(squared.device)).clamp(min=SQUARED_DISTANCE_FLOOR).sqrt().to(squared.dtype)


# ---- the neighbours ------------------------------------------------------------------------------


class Selection(NamedTuple):
    """The neighbours of every anchor, int64, -1 where there is none."""

    support: Tensor  # [N, K] the support set in order
    nearest: Tensor  # [N] the first positive in the order of all candidates
    farthest: Tensor  # [N] the positive with the largest squared distance, the lower index on a tie


def squared_distances(anchors: Tensor, candidates: Tensor) -> Tensor:
    """`[N, M]` direct sums `sum_c (x_c - z_c)^2` of anchors `[N, D]` and candidates `[M, D]`.

    Never `|x|^2 + |z|^2 - 2 x.z`: for near-duplicates it has no correct digits left.
    """
    if torch.compiler.is_compiling():  # one expression, no loop over a symbolic N; a compiler fuses it
        return _direct_sums(anchors, candidates)
    block = _BLOCK_ELEMENTS_CPU if anchors.device.type == "cpu" else _BLOCK_ELEMENTS
    pairs = max(1, block // max(1, anchors.shape[1]))
    columns = candidates.split(pairs)
    rows = anchors.split(max(1, pairs // max(1, candidates.shape[0])))
    return torch.cat([torch.cat([_direct_sums(row, column) for column in columns], 1) for row in rows])


def _direct_sums(anchors: Tensor, candidates: Tensor) -> Tensor:
    return (anchors[:, None, :] - candidates).square().sum(-1)


@torch.no_grad()
def select(
    anchors: Tensor,  # [N, D] acc
    labels: Tensor,  # [N] integer
    candidates: Tensor,  # [M, D] acc
    candidate_labels: Tensor,  # [M] integer
    own_index: Tensor,  # [N] int64: which candidate the anchor itself is, anything outside [0, M) for none
    k: int,
) -> Selection:
    """The neighbours of every anchor, candidates ordered by (squared distance, index)."""
    n, m = anchors.shape[0], candidates.shape[0]
    if m == 0:
        nobody = labels.new_full((n,), -1, dtype=torch.int64)
        return Selection(nobody[:, None][:, :0], nobody, nobody)

    # An anchor itself is excluded by index, not by distance 0: a duplicate is a real neighbour.
    own = torch.arange(m, device=anchors.device) == own_index[:, None]
    positive = (labels[:, None] == candidate_labels) & ~own
    squared = squared_distances(anchors, candidates)

    # NaN sorts behind everything, infinity too, so the own row comes last whatever the distances are; a stable sort
    # leaves ties in the order of their indices.
    order = squared.masked_fill(own, math.nan).sort(dim=1, stable=True).indices
    # By index, not by slice: a slice of a symbolic length would tie torch.export to one side of k < M.
    # (torch.compile of torch 2.11 takes sym_min of nothing but symbols.)
    symbolic = isinstance(k, torch.SymInt) or isinstance(m, torch.SymInt)
    length = torch.sym_min(k, m) if symbolic else min(k, m)
    support = order[:, torch.arange(length, device=order.device)]
    support = support.masked_fill(own.gather(1, support), -1)

    # argmax returns the first of several maxima.
    first_positive = positive.gather(1, order).int().argmax(1, keepdim=True)
    nearest = order.gather(1, first_positive).squeeze(1)
    farthest = squared.masked_fill(~positive, -1).argmax(1)
    has_positive = positive.any(1)
    return Selection(support, nearest.where(has_positive, -1), farthest.where(has_positive, -1))


# ---- the pairs that matter -----------------------------------------------------------------------


class Edges(NamedTuple):
    """The pairs (anchor, candidate) that the loss is made of; the edges of an anchor are distinct.

    Columns 0 to K - 1 are the support set; column K is the nearest positive if the support set has no positive; column
    K + 1 the farthest positive if the squeeze needs it and no other column holds it.
    """

    indices: Tensor  # [N, K + 2] int64, -1 where a column is unused
    positive: Tensor  # [N, K + 2] bool: P_i
    negative: Tensor  # [N, K + 2] bool: N_i
    is_nearest: Tensor  # [N, K + 2] bool: the nearest positive's edge
    is_farthest: Tensor  # [N, K + 2] bool: the farthest positive's edge, none if the squeeze does not need it
    valid: Tensor  # [N] bool: the anchor has a positive among its candidates


@torch.no_grad()
def list_edges(selection: Selection, labels: Tensor, candidate_labels: Tensor, squeeze: int) -> Edges:
    """The edges of every anchor for a selection, labels `[N]` and candidate_labels `[M]`."""
    same_label = take(candidate_labels, selection.support).eq(labels[:, None])
    return edges_of(selection, same_label & (selection.support >= 0), squeeze)


@torch.no_grad()
def edges_of(selection: Selection, same_label: Tensor, squeeze: int) -> Edges:
    """The edges of every anchor for a selection; same_label, `[N, K]` bool: the positives of the support set."""
    support, nearest, farthest = (s if s.dim() == 2 else s[:, None] for s in selection)  # [N, K], [N, 1], [N, 1]
    valid = nearest >= 0
    used = support >= 0
    missing = valid & ~same_label.any(1, keepdim=True)
    near_edge = nearest.masked_fill(~missing, -1)
    if squeeze == Squeeze.SPAN:
        listed = (support == farthest).any(1, keepdim=True) | (near_edge == farthest)
        far_edge = farthest.masked_fill(listed, -1)
    else:
        far_edge = farthest = torch.full_like(farthest, -1)

    indices = torch.cat([support, near_edge, far_edge], 1)
    nothing = torch.zeros_like(missing)
    return Edges(
        indices=indices,
        positive=torch.cat([same_label, missing, nothing], 1),
        negative=torch.cat([used & ~same_label, nothing, nothing], 1),
        is_nearest=(indices == nearest) & (indices >= 0),
        is_farthest=(indices == farthest) & (indices >= 0),
        valid=valid.squeeze(1),
    )


def take(rows: Tensor, indices: Tensor) -> Tensor:
    """`rows[indices]` for rows `[M, ...]`: any row for index -1, zeros if there are no rows at all."""
    if rows.shape[0] == 0:
        return rows.new_zeros(indices.shape + rows.shape[1:])
    return rows[indices.clamp(min=0)]


def edge_squared_distances(anchors: Tensor, candidates: Tensor, edges: Edges) -> Tensor:
    """`[N, K + 2]` acc: the squared distances of the edges, 0 where a column is unused. Differentiable."""
    difference = anchors[:, None, :] - take(candidates, edges.indices)
    return difference.where(edges.indices[..., None] >= 0, 0.0).square().sum(-1)


# ---- the loss ------------------------------------------------------------------------------------


def _log_sum_exp(logits: Tensor, members: Tensor) -> Tensor:
    """`[N, 1]`: log sum exp over the members of each row; a huge negative finite number, not -inf, if there are none.

    -inf would turn the (unused) gradients of such rows into NaN.
    """
    return logits.where(members, torch.finfo(logits.dtype).min / 4).logsumexp(1, keepdim=True)


def _squeeze_signs(squared: Tensor, edges: Edges, squeeze: int) -> Tensor:
    """`[N, K + 2]` of -1, 0, 1: squeeze_i is the sum of sign * d over the edges of an anchor."""
    nearest = edges.is_nearest.to(squared.dtype)
    if squeeze == Squeeze.NEAREST:
        return nearest
    if squeeze == Squeeze.SPAN:
        return edges.is_farthest.to(squared.dtype) - nearest
    if squeeze == Squeeze.SUPPORT:
        # The nearest positive is the nearest of P_i. argmax: the lower index on a tie, as for the farthest positive.
        last = squared.masked_fill(~edges.positive, -1).argmax(1, keepdim=True)
        last_of_support = torch.zeros_like(nearest).scatter(1, last, 1.0)
        several = edges.positive.sum(1, keepdim=True) > 1
        return torch.where(several, last_of_support - nearest, nearest)
    return torch.zeros_like(nearest)


def _overflow(squared: Tensor, edges: Edges) -> Tensor:
    """`[N]` bool: a distance of a valid anchor is not finite."""
    return edges.valid & ~squared.detach().isfinite().all(1)


def anchor_losses(squared: Tensor, edges: Edges, alpha: float, weight: float, squeeze: int) -> Tensor:
    """`[N]`: L_i from the edges' squared distances `[N, K + 2]`, 0 for an anchor that is not valid. Differentiable."""
    distances = squared.clamp(min=SQUARED_DISTANCE_FLOOR).sqrt()
    logits = -alpha * distances

    # -log(p / (p + n)) in log space: 0 for an anchor without negatives, and no overflow for any alpha * d.
    separation = -logsigmoid(_log_sum_exp(logits, edges.positive) - _log_sum_exp(logits, edges.negative))
    signs = _squeeze_signs(squared.detach(), edges, squeeze)
    losses = separation.squeeze(1) + weight * (signs * distances).sum(1)

    # A negative at infinity would only vanish from the sum; a distance that overflowed must show in the loss.
    losses = losses * torch.where(_overflow(squared, edges), math.inf, 1.0)
    return losses.where(edges.valid, 0.0)


def edge_coefficients(squared: Tensor, edges: Edges, alpha: float, weight: float, squeeze: int) -> Tensor:
    """`[N, K + 2]`: (dL_i / dd_ij) / d_ij of every edge, 0 where it is unused or its distance clamped."""
    distances = squared.clamp(min=SQUARED_DISTANCE_FLOOR).sqrt()
    logits = -alpha * distances
    log_positives = _log_sum_exp(logits, edges.positive)
    log_negatives = _log_sum_exp(logits, edges.negative)

    # separation = -log sigmoid(log_positives - log_negatives). Its slope is the probability of the negatives, divided
    # among the edges by their shares within P_i (nearer is better: +) and within N_i (farther is better: -).
    negatives_win = (log_negatives - log_positives).sigmoid()
    positive_share = (logits - log_positives).exp().where(edges.positive, 0.0)
    negative_share = (logits - log_negatives).exp().where(edges.negative, 0.0)
    slopes = alpha * negatives_win * (positive_share - negative_share)
    slopes = slopes + weight * _squeeze_signs(squared, edges, squeeze)

    active = edges.valid[:, None] & (edges.indices >= 0) & ~(squared < SQUARED_DISTANCE_FLOOR)
    coefficients = (slopes / distances).where(active, 0.0)
    return coefficients.masked_fill(_overflow(squared, edges)[:, None] & (edges.indices >= 0), math.nan)


def _reduce(losses: Tensor, valid: Tensor, reduction: int) -> Tensor:
    if reduction == Reduction.NONE:
        return losses
    total = losses.sum()
    return total / valid.sum().clamp(min=1) if reduction == Reduction.MEAN else total


def _poison(*feats: Tensor) -> Tensor:
    """0-d: 0, or NaN if any value is NaN or infinite."""
    return torch.stack([(f.detach() * 0).sum() for f in feats]).sum()


def statistics(squared: Tensor, edges: Edges, poison: Tensor) -> Tensor:
    """`[6]`: the entries of `SNStats`, 0 where they are undefined, and the poison."""
    distances = squared.clamp(min=SQUARED_DISTANCE_FLOOR).sqrt()
    positive = edges.positive & edges.valid[:, None]
    negative = edges.negative & edges.valid[:, None]
    in_support = positive[:, :-2]

    def mean(values: Tensor, count: Tensor) -> Tensor:
        return values.sum() / count.sum().clamp(min=1)

    columns = (
        edges.valid.sum().to(squared.dtype),
        mean(distances.where(positive, 0.0), positive),
        mean(distances.where(negative, 0.0), negative),
        mean(in_support[:, :1].to(squared.dtype), edges.valid),
        mean(in_support.to(squared.dtype), edges.valid),
        poison.to(squared.dtype),
    )
    return torch.stack(columns)


# ---- the operators -------------------------------------------------------------------------------


class ForwardArguments(NamedTuple):
    """The arguments of the operator `forward` of every backend, in its order."""

    feats: Tensor  # [N, D]
    labels: Tensor  # [N] integer
    candidates: Tensor | None  # [M, D], None: the anchors
    candidate_labels: Tensor | None  # [M]
    self_index: Tensor | None  # [N] int64, -1 for none
    self_offset: int  # anchor i is candidate i + self_offset, -1 for none; not used with self_index
    k: int
    alpha: float
    weight: float
    squeeze: int  # a code of `Squeeze`
    reduction: int  # a code of `Reduction`
    want_squared: bool = False  # whether `Graph.squared` is wanted


class Graph(NamedTuple):
    """What the operator `forward` returns: the loss and its support graph, the edges with their coefficients."""

    value: Tensor  # acc, 0-d or [N]: the loss
    indices: Tensor  # [N, K + 2] int32, see `Edges`; -1 where a column is unused
    coefficients: Tensor  # [N, K + 2] acc, before the reduction's factor
    nearest: Tensor  # [N] int32: the nearest positive, -1 for none
    farthest: Tensor  # [N] int32
    squared: Tensor  # [N, K + 2] acc: squared distances, not clamped, inf where unused; [0] if they are not wanted
    stats: Tensor  # [6]: the entries of `SNStats`, then the poison: 0, or NaN for a NaN or Inf in the inputs


class BackwardArguments(NamedTuple):
    """The arguments of the operator `backward` of every backend, in its order."""

    grad_loss: Tensor  # acc, 0-d or [N]
    feats: Tensor  # [N, D]
    candidates: Tensor | None  # [M, D]
    indices: Tensor  # [N, K + 2] int32
    coefficients: Tensor  # [N, K + 2] acc
    stats: Tensor  # [6]
    reduction: int
    need_feats: bool
    need_candidates: bool


class LossArguments(NamedTuple):
    """The arguments of the operator `loss` of every fused backend, in its order: those of `forward`, all wanted."""

    feats: Tensor
    labels: Tensor
    candidates: Tensor | None
    candidate_labels: Tensor | None
    self_index: Tensor | None
    self_offset: int
    k: int
    alpha: float
    weight: float
    squeeze: int
    reduction: int


class LossOutputs(NamedTuple):
    """What the operator `loss` returns: what training needs, and nothing else."""

    value: Tensor  # as in `Graph`
    graph: Tensor  # [W] int32: the parts of a `Graph` in one buffer, see `GraphLayout`
    stats: Tensor  # as in `Graph`


class LossBackwardArguments(NamedTuple):
    """The arguments of the operator `loss_backward`, in its order; it returns the gradients that are needed."""

    grad_loss: Tensor
    feats: Tensor
    candidates: Tensor | None
    graph: Tensor  # [W] int32
    stats: Tensor
    k: int
    reduction: int
    need_feats: bool
    need_candidates: bool


class GraphLayout(NamedTuple):
    """Where the operator `loss` keeps a support graph, in int32 words: `graph_layout` of sn_types.h says the same.

    The coefficients are at the start, then come the indices, the nearest and the farthest positives, without gaps.
    """

    edges: int  # K + 2
    indices: int
    nearest: int
    farthest: int
    words: int

    @classmethod
    def of(cls, n: int, m: int, k: int, acc: torch.dtype) -> GraphLayout:
        """The layout for N anchors and M candidates; k as it was asked for. Sizes may be symbols."""
        symbolic = isinstance(k, torch.SymInt) or isinstance(m, torch.SymInt)
        edges = (torch.sym_min(k, m) if symbolic else min(k, m)) + 2
        indices = n * edges * (acc.itemsize // 4)
        nearest = indices + n * edges
        return cls(edges, indices, nearest, nearest + n, nearest + 2 * n)

    def unpack(self, graph: Tensor, n: int, acc: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`Graph.indices`, `coefficients`, `nearest` and `farthest` as views of the buffer."""
        count = n * self.edges
        coefficients = graph[: count * (acc.itemsize // 4)].view(acc)
        indices = graph[self.indices : self.indices + count]
        return (
            indices.view(n, self.edges),
            coefficients.view(n, self.edges),
            graph[self.nearest : self.nearest + n],
            graph[self.farthest : self.farthest + n],
        )


def _own_index(args: ForwardArguments | LossArguments) -> Tensor:
    """`[N]` int64: which candidate each anchor is itself, -1 for none."""
    if args.self_index is not None:
        return args.self_index
    n, device = args.feats.shape[0], args.feats.device
    offset = 0 if args.candidates is None else args.self_offset
    if offset < 0:
        return torch.full((n,), -1, dtype=torch.int64, device=device)
    return torch.arange(n, device=device) + offset


def _find_edges(args: ForwardArguments | LossArguments) -> tuple[Tensor, Tensor, Selection, Edges]:
    """Anchors `[N, D]` and candidates `[M, D]` in acc, and what was selected."""
    # Row by row: sums over other strides round each pair by its place, and exact duplicates would not be ties.
    anchors = args.feats.to(accumulation_dtype(args.feats.dtype)).contiguous()
    if args.candidates is None or args.candidate_labels is None:
        pool, pool_labels = anchors, args.labels
    else:
        pool, pool_labels = args.candidates.to(anchors.dtype).contiguous(), args.candidate_labels
    selection = select(anchors, args.labels, pool, pool_labels, _own_index(args), args.k)
    return anchors, pool, selection, list_edges(selection, args.labels, pool_labels, args.squeeze)


def loss(args: LossArguments) -> tuple[Tensor, Tensor]:
    """The loss (acc, 0-d or `[N]`), differentiable any number of times, and the statistics `[6]`, detached."""
    anchors, pool, _, edges = _find_edges(args)
    squared = edge_squared_distances(anchors, pool, edges).to(_scalar_dtype(anchors.device))
    losses = anchor_losses(squared, edges, args.alpha, args.weight, args.squeeze)
    value = _reduce(losses, edges.valid, args.reduction).to(anchors.dtype)

    # Adds 0 to the loss and to every gradient, or NaN to all of them. It also ties the loss to features that no edge
    # reaches, so that their gradient is 0 instead of missing.
    inputs = (anchors,) if args.candidates is None else (anchors, pool)
    poison = _poison(*inputs)
    for tensor in inputs:
        value = value + (tensor * poison).sum()
    return value, statistics(squared.detach(), edges, poison)


@torch.no_grad()
def forward(*arguments: Any) -> Graph:
    """`sn_ops::forward`: `ForwardArguments`, one by one, to the loss and its support graph. No autograd."""
    args = ForwardArguments(*arguments)
    anchors, pool, selection, edges = _find_edges(args)
    acc = anchors.dtype
    poison = _poison(anchors, pool)
    squared = edge_squared_distances(anchors, pool, edges).to(_scalar_dtype(anchors.device))
    losses = anchor_losses(squared, edges, args.alpha, args.weight, args.squeeze)
    return Graph(
        value=_reduce(losses, edges.valid, args.reduction).to(acc) + poison,
        indices=edges.indices.int(),
        coefficients=edge_coefficients(squared, edges, args.alpha, args.weight, args.squeeze).to(acc),
        nearest=selection.nearest.int(),
        farthest=selection.farthest.int(),
        squared=squared.where(edges.indices >= 0, math.inf).to(acc) if args.want_squared else anchors.new_empty(0),
        stats=statistics(squared, edges, poison),
    )


@torch.no_grad()
def backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`sn_ops::backward`: `BackwardArguments`, one by one, to the gradients of features and candidates, in their dtype.

    Every edge pulls its two ends with `g_i w_ij (x_i - z_j)`. When the candidates are the anchors both ends are rows of
    grad_feats. A gradient that is not needed is an empty `[0]` tensor.
    """
    args = BackwardArguments(*arguments)
    feats, coefficients, symmetric = args.feats, args.coefficients, args.candidates is None
    anchors = feats.to(coefficients.dtype)
    pool = anchors if args.candidates is None else args.candidates.to(anchors.dtype)

    upstream = args.grad_loss
    if args.reduction == Reduction.MEAN:
        valid = args.stats[0].to(anchors.dtype)
        upstream = torch.where(valid > 0, args.grad_loss / valid, 0.0)
    factors = upstream.reshape(-1, 1) * coefficients

    # An edge that is unused or clamped contributes 0, not 0 * inf.
    active = (args.indices >= 0) & (coefficients != 0)
    difference = anchors[:, None, :] - take(pool, args.indices.long())
    pull = (factors[..., None] * difference).where(active[..., None], 0.0)  # [N, K + 2, D]

    def finish(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(args.stats[5].isnan(), math.nan).to(feats.dtype)

    push = torch.zeros_like(pool)
    if pool.shape[0] > 0:
        push = push.index_add(0, args.indices.long().clamp(min=0).flatten(), pull.flatten(0, 1), alpha=-1)
    own = pull.sum(1)
    if symmetric:
        own = own + push
    return (
        finish(own) if args.need_feats else feats.new_empty(0),
        finish(push) if args.need_candidates and not symmetric else feats.new_empty(0),
    )
