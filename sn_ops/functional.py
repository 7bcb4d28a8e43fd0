"""`sn_loss` and `support_neighbors`: the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import ops, reference
from .checks import check_batch, check_options, reject
from .dispatch import BACKEND_DEVICES, choose_backend
from .reference import LossArguments

# The default loss options, the authors' recipe for Market-1501.
K = 10
ALPHA = 50.0
WEIGHT = 0.1


class SNStats(NamedTuple):
    """What the loss saw in a batch: detached scalars (0-d tensors) on the device of feats, computed without a sync.

    `valid_anchors` is int64; the other entries are float32, or float64 for float64 features. Distances are Euclidean.
    An entry that is undefined (a mean of nothing) is 0. If the features hold a NaN or Inf the loss is NaN and these
    entries mean nothing. With `group` the entries cover the anchors of all ranks. P_i and N_i: see `sn_loss`.
    """

    valid_anchors: Tensor
    """How many anchors have a positive among their candidates."""
    positive_distance: Tensor
    """Mean distance of all members of the P_i of valid anchors."""
    negative_distance: Tensor
    """Mean distance of all members of the N_i of valid anchors."""
    nearest_is_positive: Tensor
    """Fraction of valid anchors whose nearest neighbour is a positive."""
    support_positives: Tensor
    """Mean number of positives in the support set of a valid anchor; a positive added from outside does not count."""


class SupportNeighbors(NamedTuple):
    """The support set of every anchor: detached tensors on the device of feats, N anchors, K = min(k, M) neighbours."""

    indices: Tensor
    """int64 `[N, K]`: candidates, nearest first, the lower index first on a tie; -1 where unused."""
    distances: Tensor
    """`[N, K]`, float32 (float64 for float64 features): Euclidean distances, not below 1e-6; inf where unused."""
    is_positive: Tensor
    """bool `[N, K]`: the candidate has the anchor's label; False where unused."""
    nearest_positive: Tensor
    """int64 `[N]`: the nearest positive among all candidates, -1 where the anchor has none."""
    farthest_positive: Tensor
    """int64 `[N]`: the farthest positive among all candidates, -1 where the anchor has none."""


@overload
def sn_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    k: int = ...,
    alpha: float = ...,
    weight: float = ...,
    squeeze: str = ...,
    candidates: Tensor | None = ...,
    candidate_labels: Tensor | None = ...,
    self_index: int | Tensor | None = ...,
    reduction: str = ...,
    backend: str = ...,
    group: Any = ...,
    sizes: Sequence[int] | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def sn_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    k: int = ...,
    alpha: float = ...,
    weight: float = ...,
    squeeze: str = ...,
    candidates: Tensor | None = ...,
    candidate_labels: Tensor | None = ...,
    self_index: int | Tensor | None = ...,
    reduction: str = ...,
    backend: str = ...,
    group: Any = ...,
    sizes: Sequence[int] | None = ...,
    return_stats: bool,
) -> Tensor | tuple[Tensor, SNStats]: ...
def sn_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    k: int = K,
    alpha: float = ALPHA,
    weight: float = WEIGHT,
    squeeze: str = "span",
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    self_index: int | Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    group: Any = None,
    sizes: Sequence[int] | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SNStats]:
    """The Support Neighbor loss of a batch of embeddings.

    With d the Euclidean distance, S_i the `k` nearest candidates of anchor i (the anchor itself excluded), P_i the
    members of S_i that share its label (the nearest positive of all candidates if S_i has none) and N_i the others:

        L_i = -log( sum_{P_i} exp(-alpha d) / sum_{P_i + N_i} exp(-alpha d) ) + weight * squeeze_i

    Anchors without a positive among their candidates contribute 0 and are not counted. With no valid anchor the loss
    and every gradient are 0. A NaN or Inf anywhere in the features makes the loss and every gradient NaN.

    Args:
        feats: `[N, D]` embeddings of the anchors, float64, float32, float16 or bfloat16, any strides. L2-normalise
            them, as the paper does: `alpha=50` saturates otherwise.
        labels: `[N]` identities, any integer dtype, on the device of feats.
        k: size of the support set, an int >= 1; may exceed the number of candidates.
        alpha: inverse temperature, in 1 / distance, a finite number > 0.
        weight: factor of the squeeze, a finite number >= 0.
        squeeze: "span", d(farthest positive) - d(nearest positive) over all candidates (the paper's abstract);
            "support", the same within P_i, or d(nearest positive) if P_i has one member; "nearest", d(nearest positive)
            (the authors' released code); "none", 0.
        candidates: `[M, D]` embeddings in which neighbours are looked for, of the dtype and on the device of feats.
            None: the anchors themselves. Gradients flow to both.
        candidate_labels: `[M]` identities of the candidates, any integer dtype, on the device of feats; given with
            candidates, and only then.
        self_index: with candidates only: which candidate an anchor is itself. None: no anchor is a candidate; an int
            o: anchor i is candidate o + i; an integer tensor `[N]`: anchor i is candidate self_index[i], -1 for none.
        reduction: "mean" over the valid anchors, "sum", or "none" for the anchors' losses `[N]`.
        backend: "auto" or a name in `backends()`; a named backend that cannot serve raises. "reference" is plain
            PyTorch; the others are fused: fast, deterministic, and without N x M matrices for large batches.
        group: a `torch.distributed` process group, or `sn_ops.distributed.Exchange` to choose how rows travel.
            Every rank passes its own batch, of any size. Neighbours are looked for in the batches of all ranks, in rank
            order; the loss and the statistics are those of one process that holds them all ("none": this rank's
            anchors). A rank's gradients are world size times that process's, so DistributedDataParallel's average is
            exact. `candidates` are then a bank of this rank alone, behind the gathered rows, and self_index says where
            an anchor is in that bank too. Options must be the same on every rank, and backward() must run on every
            rank or on none.
        sizes: with group only: the rows of every rank in rank order, if they are known. Ranks then agree on nothing
            beforehand, which saves a collective and, on a GPU, a wait for it. In return nobody notices that sizes or
            options differ, and when one rank raises on bad input the others wait for the group's timeout.
        return_stats: also return `SNStats`.

    Returns:
        The loss, 0-d (or `[N]`), float32, or float64 for float64 features; gradients have the dtype of the features.
            With return_stats a pair (loss, `SNStats`). Second derivatives, forward-mode derivatives and torch.func
            transforms need `backend="reference"`; the fused backends raise a RuntimeError that says so.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, a named backend that cannot serve, or ranks whose options differ.
        RuntimeError: another rank of the group was given bad input, which the message quotes; or a transform of
            torch.func around a fused backend.

    Source: Li, Ding, Li, Zhang and Fu, "Support Neighbor Loss for Person Re-Identification", ACM MM 2018,
    arXiv 1808.06030. `sn_ops/reference.py` is the definition in plain PyTorch.
    """

    if group is not None:
        # They import torch.distributed, which most processes do not need.
        from .distributed.exchange import Call
        from .distributed.loss import loss as group_loss

        # Checked inside: what is wrong with this rank's arguments must reach the other ranks, which wait for it.
        def prepare() -> Call:
            options = check_options(k, alpha, weight, squeeze, reduction, backend, BACKEND_DEVICES)
            batch = check_batch(feats, labels, candidates, candidate_labels, self_index)
            return Call(bool(return_stats), choose_backend(backend, feats), *batch, *options)

        loss, stats = group_loss(group, sizes, prepare)
    else:
        if sizes is not None:
            reject("sizes", "None without a group", sizes)
        options = check_options(k, alpha, weight, squeeze, reduction, backend, BACKEND_DEVICES)
        batch = check_batch(feats, labels, candidates, candidate_labels, self_index)
        chosen = choose_backend(backend, feats)
        if chosen == "reference":
            loss, stats = reference.loss(LossArguments(*batch, *options))
        else:
            loss, stats = ops.loss(chosen, batch + options, bool(return_stats))
    if not return_stats:
        return loss
    assert stats is not None
    return loss, SNStats(stats[0].long(), *stats[1:5].to(loss.dtype).unbind())


def support_neighbors(
    feats: Tensor,
    labels: Tensor,
    *,
    k: int = K,
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    self_index: int | Tensor | None = None,
    backend: str = "auto",
) -> SupportNeighbors:
    """The support set, the nearest and the farthest positive of every anchor: what `sn_loss` is computed from.

    The paper's abstract can also be read as squeezing `|| x_near - x_far ||`, the distance between the two positives,
    in place of the difference of their distances. With `s = support_neighbors(feats, labels)` that is one line,
    differentiable in feats (index candidates if there are any). The mask leaves out anchors without a positive, whose
    indices are -1 and would mean the last row:

        (feats[s.nearest_positive] - feats[s.farthest_positive])[s.nearest_positive >= 0].norm(dim=1).mean()

    The norm has no derivative where near and far are the same sample; `.square().sum(1)` has.

    Args:
        feats: `[N, D]` embeddings of the anchors, float64, float32, float16 or bfloat16, any strides.
        labels: `[N]` identities, any integer dtype, on the device of feats.
        k: size of the support set, an int >= 1; may exceed the number of candidates.
        candidates: `[M, D]` embeddings in which neighbours are looked for, as in `sn_loss`. None: the anchors.
        candidate_labels: `[M]` identities of the candidates, given with candidates, and only then.
        self_index: which candidate an anchor is itself, as in `sn_loss`.
        backend: "auto" or a name in `backends()`; a named backend that cannot serve raises.

    Returns:
        `SupportNeighbors`, detached.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, or a named backend that cannot serve.
        RuntimeError: a transform of torch.func around a fused backend.

    Source: as `sn_loss`; the order of candidates is (squared distance, index).
    """
    k, alpha, weight, squeeze, reduction = check_options(k, ALPHA, WEIGHT, "none", "sum", backend, BACKEND_DEVICES)
    batch = check_batch(feats, labels, candidates, candidate_labels, self_index)
    _, labels, _, candidate_labels, _, _ = batch
    with torch.no_grad():
        graph = ops.forward(choose_backend(backend, feats), *batch, k, alpha, weight, squeeze, reduction, True)
        distances = reference.distances_of(graph.squared[:, :-2])
        support = graph.indices[:, :-2].long()
        neighbour_labels = reference.take(labels if candidate_labels is None else candidate_labels, support)
        is_positive = (neighbour_labels == labels[:, None]) & (support >= 0)
    return SupportNeighbors(support, distances, is_positive, graph.nearest.long(), graph.farthest.long())
