"""The rivals: ways to compute the Support Neighbor loss in plain PyTorch, without sn_ops.

Each rival is one function `(feats, labels, candidates, candidate_labels, recipe, reduction) -> (loss, indices)`:

    feats            [N, D]  anchors, any floating dtype; halves are computed in fp32, as autocast users would
    labels           [N]     int64 identities of the anchors
    candidates       [M, D]  or None: the anchors are their own candidates, and an anchor is never its own neighbour
    candidate_labels [M]     or None together with candidates
    recipe           k, alpha and weight; the squeeze term is the default one, "span"
    reduction        "mean" over valid anchors, or "none": [N], 0 for an anchor without a positive
    indices          [N, K]  int64, K = min(k, M): the support set that was used; in a batch of at most k anchors
                             the anchor itself fills it up

They all compute the same loss (the self check of `bench_loss.py` holds them to it), and differ in how well:

    eager      what one writes first: the distance matrix by |x|^2 + |z|^2 - 2 x.z, masks, topk, logsumexp, autograd
    cdist      the same with torch.cdist
    loop       a Python loop over anchors, the structure of the paper's released code, written here from its description
    blocked    row blocks that stay in cache, two-level topk, analytic gradient by one embedding_bag: no N x M buffer
    symmetric  as blocked, but with half the product (X X^T is symmetric) in exchange for an N x N buffer

The last two are the strongest plain PyTorch we know; the faster of them is the one to quote against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """The options of the loss that the rivals know. Defaults: the recipe of the paper's authors on Market-1501."""

    k: int = 10
    alpha: float = 50.0
    weight: float = 0.1


Rival = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None", Recipe, str], tuple[Tensor, Tensor]]

INF = float("inf")
# d = sqrt(max(d2, CLAMP)), as in sn_ops/reference.py.
CLAMP = 1e-12


def widen(x: Tensor) -> Tensor:
    """Half precision to fp32; fp32 and fp64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def reduce_loss(loss: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """[N] losses (0 where invalid) and [N] bool to the mean over valid anchors, or the losses themselves."""
    if reduction == "none":
        return loss
    return loss.sum() / valid.sum().clamp(min=1)


# --------------------------------------------------------------------------------------------------
# eager, cdist
# --------------------------------------------------------------------------------------------------


def expanded_distance(x: Tensor, z: Tensor) -> Tensor:
    """[N, M] Euclidean distances through one matrix product, the common way in re-identification code."""
    squared = x.square().sum(1, keepdim=True) + z.square().sum(1) - 2.0 * x @ z.T
    return squared.clamp(min=CLAMP).sqrt()


def loss_from_distances(
    distance: Tensor, labels: Tensor, candidate_labels: Tensor | None, recipe: Recipe, reduction: str
) -> tuple[Tensor, Tensor]:
    """The vectorised loss on a [N, M] distance matrix; differentiable through it."""
    n, m = distance.shape
    same = labels[:, None] == (labels if candidate_labels is None else candidate_labels)[None, :]
    ranked = distance
    if candidate_labels is None:
        own = torch.eye(n, dtype=torch.bool, device=distance.device)
        same = same & ~own
        ranked = distance.masked_fill(own, INF)
    support, indices = ranked.topk(min(recipe.k, m), dim=1, largest=False)
    positive = same.gather(1, indices)
    nearest = distance.masked_fill(~same, INF).min(dim=1).values
    farthest = distance.masked_fill(~same, -INF).max(dim=1).values
    valid = same.any(dim=1)

    logits = -recipe.alpha * support
    # The nearest positive joins where the support set has none.
    joins = valid & ~positive.any(dim=1)
    extra = torch.where(joins, -recipe.alpha * nearest, -INF)[:, None]
    everything = torch.cat([logits, extra], dim=1).logsumexp(dim=1)
    positives = torch.cat([logits.masked_fill(~positive, -INF), extra], dim=1).logsumexp(dim=1)
    loss = everything - positives + recipe.weight * (farthest - nearest)
    return reduce_loss(torch.where(valid, loss, 0.0), valid, reduction), indices


def eager(
    feats: Tensor,
    labels: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    recipe: Recipe,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Vectorised PyTorch as practitioners write it; the module docstring describes arguments and result."""
    x = widen(feats)
    z = x if candidates is None else widen(candidates)
    return loss_from_distances(expanded_distance(x, z), labels, candidate_labels, recipe, reduction)


def cdist(
    feats: Tensor,
    labels: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    recipe: Recipe,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """As eager, with the distance matrix from torch.cdist."""
    x = widen(feats)
    z = x if candidates is None else widen(candidates)
    return loss_from_distances(torch.cdist(x, z).clamp(min=CLAMP**0.5), labels, candidate_labels, recipe, reduction)


# --------------------------------------------------------------------------------------------------
# loop
# --------------------------------------------------------------------------------------------------


def loop(
    feats: Tensor,
    labels: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    recipe: Recipe,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """One anchor at a time over the rows of the distance matrix, autograd through every step.

    Its structure is that of the paper's code, without its accidents: dropped ties, overflow, equal identity sizes.
    """
    x = widen(feats)
    z = x if candidates is None else widen(candidates)
    t = labels if candidate_labels is None else candidate_labels
    distance = expanded_distance(x, z)
    k = min(recipe.k, z.shape[0])
    losses, supports, count = [], [], 0
    for i in range(x.shape[0]):
        row, same = distance[i], t == labels[i]
        if candidates is None:
            same[i] = False
        ranked = row.detach().clone()
        if candidates is None:
            ranked[i] = INF
        order = ranked.argsort()[:k]
        supports.append(order)
        positive_rows = row[same]
        if positive_rows.numel() == 0:
            losses.append(row.new_zeros(()))
            continue
        count += 1
        if candidates is None:
            order = order[order != i]
        near, far = positive_rows.min(), positive_rows.max()
        logits = -recipe.alpha * row[order]
        in_support = same[order]
        if bool(in_support.any()):
            positives, everything = logits[in_support], logits
        else:
            positives = -recipe.alpha * near[None]
            everything = torch.cat([logits, positives])
        separation = everything.logsumexp(0) - positives.logsumexp(0)
        losses.append(separation + recipe.weight * (far - near))
    indices = torch.stack(supports)
    stacked = torch.stack(losses)
    return (stacked if reduction == "none" else stacked.sum() / max(count, 1)), indices


# --------------------------------------------------------------------------------------------------
# blocked, symmetric
# --------------------------------------------------------------------------------------------------

# torch.topk on a CPU has a fast path (partial sort) for rows of at least this many times k entries; chunk minima are
# sized to keep it.
TOPK_FAST_RATIO = 64
# Entries of one block of scores: it should stay in cache while it is searched, and be tall enough for the product to
# run at full speed.
BLOCK_ELEMENTS = 1 << 20
# Up to this many pairs, positives are found with a dense mask; above, through lists of each identity's members.
DENSE_MASK_PAIRS = 1 << 16


class Positives:
    """Where each anchor's positives are: a padded table of each identity's members, so that no [N, M] mask is needed.

    Built once a call. `table` [labels, P] holds candidate indices, -1 beyond the identity's size; `row` [N] is the
    anchor's row in it.
    """

    def __init__(self, labels: Tensor, candidate_labels: Tensor | None) -> None:
        t = labels if candidate_labels is None else candidate_labels
        ordered, order = t.sort(stable=True)
        identities, counts = torch.unique_consecutive(ordered, return_counts=True)
        starts = counts.cumsum(0) - counts
        slots = torch.arange(int(counts.max()), device=t.device)
        filled = slots < counts[:, None]
        self.table = torch.where(filled, order[(starts[:, None] + slots).clamp(max=t.numel() - 1)], -1)
        self.row = torch.searchsorted(identities, labels)
        if candidate_labels is not None:
            # Anchors whose identity does not occur among the candidates point at an empty row of their own.
            inside = self.row.clamp(max=identities.numel() - 1)
            known = identities[inside] == labels
            self.table = torch.cat([self.table, self.table.new_full((1, self.table.shape[1]), -1)])
            self.row = torch.where(known, inside, identities.numel())

    def ends(self, scores: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nearest and farthest positive of a block of anchors: scores and candidates, each [B, 1].

        `scores` [B, M] are of the anchors from `start` on, with inf for the anchor itself.
        """
        members = self.table[self.row[start : start + scores.shape[0]]]
        values = scores.gather(1, members.clamp(min=0))
        values.masked_fill_(members < 0, INF)
        near, near_slot = values.min(dim=1, keepdim=True)
        far, far_slot = values.masked_fill_(values == INF, -INF).max(dim=1, keepdim=True)
        return near, members.gather(1, near_slot), far, members.gather(1, far_slot)


def dense_ends(scores: Tensor, labels: Tensor, candidate_labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As Positives.ends for all anchors at once, with a dense mask: fewer operations when everything is small."""
    same = labels[:, None] == candidate_labels
    near, near_index = torch.where(same, scores, INF).min(dim=1, keepdim=True)
    far, far_index = torch.where(same & (scores < INF), scores, -INF).max(dim=1, keepdim=True)
    return near, near_index, far, far_index


def smallest(scores: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row of scores [B, W], W divisible by chunk, in order, with their columns.

    The k smallest entries lie in the k chunks with the smallest minima. Chunks are strided (columns c, c + W/chunk and
    so on), so that the minimum runs over whole vectors.
    """
    if chunk == 1:
        values, columns = scores.topk(k, dim=1, largest=False)
        return values, columns
    rows, width = scores.shape
    lanes = width // chunk
    best = scores.view(rows, chunk, lanes).amin(dim=1).topk(k, dim=1, largest=False, sorted=False).indices
    offsets = torch.arange(0, width, lanes, device=scores.device)
    columns = (best[:, None, :] + offsets[:, None]).view(rows, chunk * k)
    values, slots = scores.gather(1, columns).topk(k, dim=1, largest=False)
    return values, columns.gather(1, slots)


def search(
    x: Tensor, z: Tensor, labels: Tensor, candidate_labels: Tensor | None, k: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Edges of every anchor: squared distances [N, k + 2], candidates [N, k + 2], and which anchors are valid [N].

    The columns are the support set, the nearest and the farthest positive. Squared distances are inf where there is no
    candidate, and -inf for the farthest positive of an anchor without one.
    """
    n, m = x.shape[0], z.shape[0]
    own = candidate_labels is None
    t = labels if candidate_labels is None else candidate_labels
    small = n * m <= DENSE_MASK_PAIRS
    positives = None if small else Positives(labels, candidate_labels)
    chunk = max(1, min(m // (TOPK_FAST_RATIO * k), 16))
    width = -(-m // chunk) * chunk
    block = n if small or symmetric else max(32, min(n, BLOCK_ELEMENTS // m))

    squared, indices = x.new_empty(n, k + 2), torch.empty(n, k + 2, dtype=torch.int64, device=x.device)
    if symmetric:
        scores, bias = symmetric_scores(x, width)
    else:
        scores, bias = x.new_empty(block, width), squared_norms(z)
    if width > m:
        scores[:, m:] = INF
    # Searching in blocks is faster even where the product is computed whole.
    step = max(32, min(n, BLOCK_ELEMENTS // m)) if not small else n
    for start in range(0, n, step):
        stop = min(start + step, n)
        if symmetric:
            view = scores[start:stop]
        else:
            view = scores[: stop - start]
            torch.addmm(bias, x[start:stop], z.T, alpha=-2.0, out=view[:, :m])
        if own:
            view[:, start:].fill_diagonal_(INF)
        squared[start:stop, :k], indices[start:stop, :k] = smallest(view, k, chunk)
        near, near_index, far, far_index = (
            dense_ends(view[:, :m], labels, t) if positives is None else positives.ends(view[:, :m], start)
        )
        squared[start:stop, k : k + 1], indices[start:stop, k : k + 1] = near, near_index
        squared[start:stop, k + 1 :], indices[start:stop, k + 1 :] = far, far_index
    valid = squared[:, k] < INF
    # Add |x|^2, left out of the scores because it does not change the order.
    squared += (bias if z is x else squared_norms(x))[:, None]
    return squared, indices, valid


def squared_norms(x: Tensor) -> Tensor:
    """[N] sums of squares, without a temporary of the size of x."""
    return torch.linalg.vector_norm(x, dim=1).square_()


def symmetric_scores(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Scores |x_j|^2 - 2 x_i.x_j [N, width] and |x_j|^2 [N], from the block upper triangle of the product.

    The lower triangle is its transpose.
    """
    n = x.shape[0]
    block = max(64, n // 8)
    scores = x.new_empty(n, width)
    for start in range(0, n, block):
        stop = min(start + block, n)
        torch.mm(x[start:stop], x[start:].T, out=scores[start:stop, start:n])
    for start in range(0, n, block):
        stop = min(start + block, n)
        scores[stop:n, start:stop] = scores[start:stop, stop:n].T
    norms = scores.diagonal()[:n].clone()
    torch.add(norms, scores[:, :n], alpha=-2.0, out=scores[:, :n])
    return scores, norms


def shifted_exp_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place e = exp(logits - their row's maximum), with logsumexp [N, 1] and the row sums of e [N, 1].

    The loss and its gradient share them.
    """
    top = logits.amax(dim=1, keepdim=True)
    e = logits.sub_(top).exp_()
    total = e.sum(dim=1, keepdim=True)
    return e, total.log().add_(top), total


class AnalyticLoss(torch.autograd.Function):
    """Search and loss without autograd, the gradient of the at most k + 2 edges of each anchor in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        labels: Tensor,
        candidates: Tensor | None,
        candidate_labels: Tensor | None,
        recipe: Recipe,
        reduction: str,
        symmetric: bool,
    ) -> tuple[Tensor, Tensor]:
        x = widen(feats)
        z = x if candidates is None else widen(candidates)
        k = min(recipe.k, z.shape[0])
        squared, indices, valid = search(x, z, labels, candidate_labels, k, symmetric)
        d = squared.clamp(min=CLAMP).sqrt_()
        t = labels if candidate_labels is None else candidate_labels
        positive = t[indices[:, : k + 1]] == labels[:, None]
        # In a batch of at most k candidates the anchor itself fills up the support set, at distance inf.
        positive[:, :k] &= squared[:, :k] < INF
        # Column k is the nearest positive: it joins the terms only where the support set has none.
        positive[:, k] &= valid & ~positive[:, :k].any(dim=1)
        logits = d[:, : k + 1] * -recipe.alpha
        logits[:, k].masked_fill_(~positive[:, k], -INF)
        positive_logits = logits.masked_fill(~positive, -INF)
        everything, all_log, all_sum = shifted_exp_(logits)
        positives, positive_log, positive_sum = shifted_exp_(positive_logits)
        loss = (all_log - positive_log).squeeze(1).add_(d[:, k + 1] - d[:, k], alpha=recipe.weight)
        loss = loss.masked_fill_(~valid, 0.0)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(indices)
            return reduce_loss(loss, valid, reduction), indices[:, :k]

        coefficients = torch.empty_like(squared)
        torch.sub(positives.div_(positive_sum), everything.div_(all_sum), out=coefficients[:, : k + 1])
        coefficients[:, : k + 1] *= recipe.alpha
        coefficients[:, k] -= recipe.weight
        coefficients[:, k + 1] = recipe.weight
        dead = (squared < CLAMP) | (squared == INF)
        dead |= ~valid[:, None]
        coefficients.div_(d).masked_fill_(dead, 0.0)
        if reduction == "mean":
            coefficients /= valid.sum().clamp(min=1)
        support = indices[:, :k]
        ctx.mark_non_differentiable(support)
        ctx.save_for_backward(feats, candidates, indices.clamp_(min=0), coefficients)
        return reduce_loss(loss, valid, reduction), support

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        feats, candidates, indices, coefficients = ctx.saved_tensors
        grad_loss = upstream[0]
        weights = coefficients * (grad_loss if grad_loss.dim() == 0 else grad_loss[:, None])
        x = widen(feats)
        if candidates is None:
            gradient = self_gradient(x, indices, weights)
        else:
            total = weights.sum(1, keepdim=True)
            gradient = total * x - torch.nn.functional.embedding_bag(
                indices, widen(candidates), mode="sum", per_sample_weights=weights
            )
        return gradient.to(feats.dtype), None, None, None, None, None, None


def self_gradient(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """[N, D]: over own and incoming edges, sum of w (x_i - x_j), as one weighted sum of rows per anchor.

    indices, weights [N, E]. Every edge appears at both of its ends, and each anchor once more with the total of its
    weights; sorted by the anchor that receives, that is what embedding_bag computes without forming [N, E, D].
    """
    n, e = indices.shape
    anchors = torch.arange(n, device=x.device)
    flat, flat_weights = indices.reshape(-1), weights.reshape(-1)
    sources = anchors[:, None].expand(n, e).reshape(-1)
    total = weights.sum(1).index_add_(0, flat, flat_weights)
    receivers = torch.cat([sources, flat, anchors])
    senders = torch.cat([flat, sources, anchors])
    values = torch.cat([flat_weights, flat_weights, total.neg_()]).neg_()
    ordered, order = receivers.sort(stable=True)
    offsets = torch.searchsorted(ordered, anchors)
    return torch.nn.functional.embedding_bag(senders[order], x, offsets, mode="sum", per_sample_weights=values[order])


def blocked(
    feats: Tensor,
    labels: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    recipe: Recipe,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Strongest plain PyTorch without an N x M buffer; the module docstring describes arguments and result."""
    loss, indices = AnalyticLoss.apply(feats, labels, candidates, candidate_labels, recipe, reduction, False)
    return loss, indices


def symmetric(
    feats: Tensor,
    labels: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    recipe: Recipe,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """As blocked, with half the product and an N x N buffer. Self case only: raises ValueError with candidates."""
    if candidates is not None:
        raise ValueError("symmetric: candidates must be None (the product with other candidates has no symmetry)")
    loss, indices = AnalyticLoss.apply(feats, labels, None, None, recipe, reduction, True)
    return loss, indices


RIVALS: dict[str, Rival] = {"eager": eager, "cdist": cdist, "loop": loop, "blocked": blocked, "symmetric": symmetric}
