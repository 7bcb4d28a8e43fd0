"""How right a contestant is: loss, gradient and selection against a direct evaluation in fp64, on sampled anchors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines import CLAMP, INF, Recipe
from inputs import Batch

# Most products (sampled anchors x M x D) of the fp64 evaluation; of larger batches fewer anchors are sampled.
SAMPLED_PRODUCTS = 1 << 29
# Differences held at a time, in elements.
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Exact:
    """The loss in fp64 on S sampled anchors."""

    anchors: Tensor  # [S] int64
    loss: Tensor  # [S], 0 where invalid
    support: Tensor  # [S, K] int64, ascending index, -1 where unused
    edges: Tensor  # [S, K + 2] int64: support set in order, nearest and farthest positive
    coefficients: Tensor  # [S, K + 2] (dL_i / dd) / d, 0 where there is no edge
    bound: Tensor  # [S]: the largest error of a loss that is allowed


@dataclass(frozen=True)
class Accuracy:
    """What the table shows. The gradient is that of the anchors whose selection is the exact one."""

    loss_error: float  # largest |loss - exact| of an anchor
    loss_error_over_bound: float  # the same in units of the bound for that anchor
    gradient_error: float | None  # |gradient - exact| / |exact| (absolute where that is 0); None: no anchor to compare
    same_selection: float  # fraction of sampled anchors whose support set is the exact one
    sampled: int


def exact(batch: Batch, recipe: Recipe) -> Exact:
    """Direct fp64 sums of (x - z)^2, a stable sort, the loss term by term. CPU."""
    x, z = batch.feats.double().cpu(), batch.pool.double().cpu()
    labels, pool_labels = batch.labels.cpu(), batch.pool_labels.cpu()
    count = max(1, min(batch.n, SAMPLED_PRODUCTS // max(1, batch.m * batch.d)))
    anchors = torch.linspace(0, batch.n - 1, count).round().long().unique()
    k = min(recipe.k, batch.m)
    rows = []
    for i in anchors.tolist():
        d2 = torch.cat([(part - x[i]).square_().sum(1) for part in z.split(max(1, _CHUNK // batch.d))])
        own = i if batch.candidates is None else -1
        rows.append(_anchor(d2, pool_labels == labels[i], own, k, recipe))
    loss, support, edges, coefficients, bound = (torch.stack(column) for column in zip(*rows, strict=True))
    return Exact(anchors, loss, support, edges, coefficients, bound)


def _anchor(d2: Tensor, same: Tensor, own: int, k: int, recipe: Recipe) -> tuple[Tensor, ...]:
    """One anchor from its squared distances [M]: a row of each field of Exact after `anchors`."""
    m = d2.numel()
    others = torch.ones(m, dtype=torch.bool)
    if own >= 0:
        others[own] = False
    order = d2.sort(stable=True).indices
    order = order[others[order]]
    chosen = order[:k]
    support = torch.full((k,), -1)
    support[: chosen.numel()] = chosen
    edges, slopes = torch.full((k + 2,), -1), torch.zeros(k + 2, dtype=torch.float64)
    edges[:k] = support
    positives = order[same[order]]
    loss = bound = d2.new_zeros(())
    if positives.numel() > 0:
        near = positives[0]
        members = same & others
        far = torch.where(members, d2, -1.0).argmax()
        edges[k], edges[k + 1] = near, far
        used = edges[: k + 1] >= 0
        is_positive = torch.where(used, same[edges[: k + 1].clamp(min=0)], False)
        joins = not bool(is_positive[:k].any())
        used[k] = is_positive[k] = joins
        d = torch.where(edges >= 0, d2[edges.clamp(min=0)].clamp(min=CLAMP).sqrt(), INF)
        logits = torch.where(used, -recipe.alpha * d[: k + 1], -INF)
        positive_logits = torch.where(is_positive, logits, -INF)
        loss = logits.logsumexp(0) - positive_logits.logsumexp(0) + recipe.weight * (d[k + 1] - d[k])
        slopes[: k + 1] = recipe.alpha * (positive_logits.softmax(0) - logits.softmax(0))
        slopes[k] -= recipe.weight
        slopes[k + 1] += recipe.weight
        slopes = torch.where((edges >= 0) & (d2[edges.clamp(min=0)] >= CLAMP), slopes / d, 0.0)
        bound = 1e-6 * (1 + (recipe.alpha + recipe.weight) * d[edges >= 0].max())
    return loss, support.sort().values, edges, slopes, bound


def gradient(batch: Batch, truth: Exact, chosen: Tensor) -> Tensor:
    """[N, D] fp64: the gradient to feats of the sum of the losses of `chosen` [S] bool sampled anchors."""
    x, z = batch.feats.double().cpu(), batch.pool.double().cpu()
    result = torch.zeros_like(x)
    for row in torch.nonzero(chosen).flatten().tolist():
        i, edges, weights = truth.anchors[row], truth.edges[row], truth.coefficients[row]
        pull = weights[:, None] * (x[i] - z[edges.clamp(min=0)])
        result[i] += pull.sum(0)
        if batch.candidates is None:
            result.index_add_(0, edges.clamp(min=0), pull, alpha=-1.0)
    return result


def judge(batch: Batch, truth: Exact, run: Callable[[Tensor, str], Tensor], support: Tensor | None) -> Accuracy:
    """Compare a contestant: `run(feats, reduction)` its loss, `support` [N, K] its selection (None: taken as exact)."""
    count = truth.anchors.numel()
    agrees = torch.ones(count, dtype=torch.bool)
    if support is not None:
        mine = support.detach().cpu().long()[truth.anchors]
        if batch.candidates is None:
            mine = torch.where(mine == truth.anchors[:, None], -1, mine)
        agrees = (mine.sort(dim=1).values == truth.support).all(dim=1)
    feats = batch.feats.detach().clone().requires_grad_()
    loss = run(feats, "none")
    upstream = torch.zeros_like(loss)
    upstream[truth.anchors[agrees].to(loss.device)] = 1.0
    (mine_gradient,) = torch.autograd.grad(loss, feats, upstream)
    expected = gradient(batch, truth, agrees)
    norm = float(expected.norm())
    error = float((mine_gradient.double().cpu() - expected).norm())
    deviation = (loss.detach().double().cpu()[truth.anchors] - truth.loss).abs()
    return Accuracy(
        loss_error=float(deviation.max()),
        loss_error_over_bound=float((deviation / truth.bound.clamp(min=1e-6)).max()),
        gradient_error=(error / norm if norm > 0 else error) if bool(agrees.any()) else None,
        same_selection=float(agrees.double().mean()),
        sampled=count,
    )
