"""The SN loss written a second time, straight from its definition, to compare backends with.

NumPy, float64 (long double where the features are float64), one anchor at a time, direct sums of squared differences,
the gradient written out from c_ij. It shares no code with the package. It has two entry points:

* `select` chooses neighbours by itself; `check_selection` asserts that sums rounded in the accumulation type can lead
  to a given choice, and `select_in_documented_order` gives the only choice that the CPU backend may make;
* `evaluate` gives loss, gradients and statistics at a given selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FLOOR = 1e-12  # squared distances are clamped here, and carry no gradient below
SQUEEZES = ("span", "support", "nearest", "none")


@dataclass(frozen=True)
class Problem:
    """Anchors and candidates in a wide type, exactly, and the accumulation type."""

    anchors: Array  # [N, D] float64, or long double when the features are float64
    labels: Array  # [N] int64
    candidates: Array  # [M, D]
    candidate_labels: Array  # [M] int64
    self_of: Array  # [N] int64, -1 none
    symmetric: bool  # the candidates are the anchors, gradients of both land in one tensor
    accumulation: np.dtype[Any]  # float32 or float64

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, M, D."""
        return self.anchors.shape[0], self.candidates.shape[0], self.anchors.shape[1]


@dataclass(frozen=True)
class Selection:
    """The support set in order and the two extreme positives, -1 where there is none."""

    support: Array  # [N, K]
    nearest: Array  # [N]
    farthest: Array  # [N]


@dataclass(frozen=True)
class Evaluation:
    """Losses and edge coefficients at one selection; row r is of anchor rows[r]."""

    rows: list[int]
    losses: Array  # [rows], 0 for invalid anchors
    valid: Array  # [rows] bool
    largest_distance: Array  # [rows], over the pairs that anchor selected, 0 without any
    coefficients: list[dict[int, float]]  # of each row: candidate -> (dL_i/dd_ij) / d_ij
    stats: dict[str, float]
    squeeze_tied: Array  # [rows] bool: squeeze="support" has a choice of subgradients here

    def total(self, reduction: str) -> float:
        """The loss as "mean" or "sum" return it."""
        if reduction == "sum":
            return float(self.losses.sum())
        return float(self.losses.sum() / max(1, int(self.valid.sum())))


def squared_distances(problem: Problem, anchor: int) -> Array:
    """Direct sums of one anchor against every candidate, [M]."""
    difference = problem.candidates - problem.anchors[anchor]
    return (difference * difference).sum(axis=1)


def positives_of(problem: Problem, anchor: int) -> Array:
    """Candidates with the anchor's label, itself left out, ascending."""
    same = problem.candidate_labels == problem.labels[anchor]
    if problem.self_of[anchor] >= 0:
        same[problem.self_of[anchor]] = False
    return np.flatnonzero(same)


def _others(problem: Problem, anchor: int) -> Array:
    everyone = np.arange(problem.candidates.shape[0])
    return everyone[everyone != problem.self_of[anchor]]


def _ordered(indices: Array, keys: Array) -> Array:
    """`indices` by (key, index)."""
    return indices[np.lexsort((indices, keys))]


def _empty_selection(anchors: int, slots: int) -> Selection:
    return Selection(
        np.full((anchors, slots), -1, np.int64), np.full(anchors, -1, np.int64), np.full(anchors, -1, np.int64)
    )


def _choose(selection: Selection, row: int, others: Array, positives: Array, keys: Array) -> None:
    """Fill one row of `selection`; `keys` is indexed by candidate."""
    first = _ordered(others, keys[others])[: selection.support.shape[1]]
    selection.support[row, : len(first)] = first
    if len(positives):
        selection.nearest[row] = _ordered(positives, keys[positives])[0]
        selection.farthest[row] = _ordered(positives, -keys[positives])[0]


def select(problem: Problem, k: int) -> Selection:
    """The selection of exact distances."""
    anchors, candidates, _ = problem.sizes
    selection = _empty_selection(anchors, min(k, candidates))
    for i in range(anchors):
        keys = squared_distances(problem, i)
        _choose(selection, i, _others(problem, i), positives_of(problem, i), keys)
    return selection


# ---------------------------------------------------------------------------------------------------------------------
# What rounding allows


def rounding_interval(keys: Array, dims: int, accumulation: np.dtype[Any]) -> tuple[Array, Array]:
    """Where the sum of `dims` squares evaluated in the accumulation type can lie, given its exact value: lower, upper.

    A term meets one rounding in the difference (counted twice, it is squared), one in the product, and one in every
    addition above it. Every documented summation order splits D so that no term passes more than 128 additions.
    A product that underflows loses at most half of the least subnormal.
    """
    info = np.finfo(accumulation)
    roundoff = float(info.eps) / 2
    steps = min(dims, 128) + 4
    relative = steps * roundoff / (1 - steps * roundoff)
    absolute = dims * float(info.smallest_subnormal)
    largest = float(info.max)
    lower = np.maximum(keys * (1 - relative) - absolute, 0)
    upper = keys * (1 + relative) + absolute
    exact = keys == 0  # all differences are zero: no rounding at all
    lower, upper = np.where(exact, 0, lower), np.where(exact, 0, upper)
    return np.where(lower > largest, np.inf, lower), np.where(upper > largest, np.inf, upper)


def _identical_groups(candidates: Array) -> Array:
    """A number per candidate, the same for rows with the same values (0.0 and -0.0 are the same), [M]."""
    if candidates.shape[0] == 0:
        return np.zeros(0, np.int64)
    _, group = np.unique((candidates + 0.0).astype(np.float64), axis=0, return_inverse=True)
    return np.asarray(group).reshape(-1)


def check_selection(problem: Problem, k: int, selection: Selection, rows: Sequence[int] | None = None) -> None:
    """Assert that values within the rounding of exact distances exist that lead to exactly this selection.

    Candidates with identical rows have identical values whatever the rounding: among them the lower index goes first.
    With `rows`, row r of the selection belongs to anchor rows[r].
    """
    anchors, candidates, dims = problem.sizes
    slots = min(k, candidates)
    rows = range(anchors) if rows is None else rows
    assert selection.support.shape == (len(rows), slots)
    group_of = _identical_groups(problem.candidates)
    group_size = np.bincount(group_of)
    for row, i in enumerate(rows):
        lower, upper = rounding_interval(squared_distances(problem, i), dims, problem.accumulation)
        others, positives = _others(problem, i), positives_of(problem, i)
        support = selection.support[row]
        used = min(slots, len(others))
        where = f"anchor {i}, support {support.tolist()}"
        assert (support[:used] >= 0).all() and (support[used:] == -1).all(), f"{where}: wrong number of neighbours"
        chosen = support[:used]
        assert len(np.unique(chosen)) == used and np.isin(chosen, others).all(), (
            f"{where}: repeated, self or out of range"
        )

        # The smallest non-decreasing values that explain the order, strictly growing where the index falls.
        value, previous = -1.0, -1
        for j in chosen:
            needed = value if j > previous else np.nextafter(value, np.inf)
            value = max(float(lower[j]), float(needed))
            assert value <= upper[j], f"{where}: candidate {j} cannot come after {previous}"
            previous = int(j)
        rest = np.setdiff1d(others, chosen)
        if used:
            late = np.where(rest > previous, upper[rest] >= value, upper[rest] > value)
            assert late.all(), f"{where}: left out nearer candidates {rest[~late].tolist()}"
        for position in np.flatnonzero(group_size[group_of[chosen]] > 1):
            j = chosen[position]
            twins = others[(group_of[others] == group_of[j]) & (others < j)]
            assert np.isin(twins, chosen[:position]).all(), f"{where}: {j} before its identical twins {twins.tolist()}"

        near, far = int(selection.nearest[row]), int(selection.farthest[row])
        where += f", nearest {near}, farthest {far}"
        if len(positives) == 0:
            assert near == far == -1, f"{where}: there is no positive"
            continue
        assert near in positives and far in positives, f"{where}: positives are {positives.tolist()}"
        inside = chosen[np.isin(chosen, positives)]
        if len(inside):
            assert near == inside[0], f"{where}: the first positive in the support set is {inside[0]}"
        assert (lower[near] <= upper[positives]).all(), f"{where}: not the nearest positive"
        assert (upper[far] >= lower[positives]).all(), f"{where}: not the farthest positive"
        for extreme in (near, far):
            assert extreme == positives[group_of[positives] == group_of[extreme]].min(), (
                f"{where}: tie to a higher index"
            )


# ---------------------------------------------------------------------------------------------------------------------
# The CPU backend's summation order, to the bit


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a * b and its rounding error (float64, far from overflow), by Veltkamp's splitting."""
    splitter = 134217729.0  # 2^27 + 1
    product = a * b
    ah = splitter * a - (splitter * a - a)
    bh = splitter * b - (splitter * b - b)
    al, bl = a - ah, b - bh
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def _round_to_odd(total: Array, error: Array) -> Array:
    """total + error (float64, error below half an ulp) rounded to odd, so that a second rounding is harmless."""
    bits = np.ascontiguousarray(total).view(np.int64)
    adjust = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(adjust, bits + step, bits).view(np.float64)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c with one rounding, elementwise; float32 or float64."""
    if a.dtype == np.float32:
        wide = a.astype(np.float64) * b.astype(np.float64)  # exact: 24 + 24 bits
        return _round_to_odd(*_two_sum(wide, c.astype(np.float64))).astype(np.float32)
    product, low = _two_product(a, b)
    high, tail = _two_sum(c, low)
    total, rest = _two_sum(product, high)
    return total + _round_to_odd(*_two_sum(tail, rest))


def sums_in_documented_order(anchor: Array, candidates: Array) -> Array:
    """Squared distances as the CPU backend promises to round them, [M], in the inputs' type (float32 or float64).

    D in segments of 64, zero-padded; in a segment lane l of 16 takes elements 16 t + l, t = 0..3, by fused multiply-add
    from 0; lanes are added as a tree, l with l + 8, + 4, + 2, + 1; segments are added one after the other.
    """
    rows, dims = candidates.shape
    segments = -(-dims // 64)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        difference = np.zeros((rows, segments * 64), candidates.dtype)
        difference[:, :dims] = anchor - candidates
        total = np.zeros(rows, candidates.dtype)
        for segment in difference.reshape(rows, segments, 4, 16).transpose(1, 2, 0, 3):
            lanes = np.zeros((rows, 16), candidates.dtype)
            for part in segment:
                lanes = fused_multiply_add(part, part, lanes)
            for half in (8, 4, 2, 1):
                lanes = lanes[:, :half] + lanes[:, half : 2 * half]
            total = total + lanes[:, 0]
    return total


def select_in_documented_order(problem: Problem, k: int, rows: Sequence[int]) -> Selection:
    """The selection of `sums_in_documented_order` for some anchors, row r for anchor rows[r].

    Exact distances decide who can matter at all (by `rounding_interval`); only those are summed the documented way.
    """
    _, candidates, dims = problem.sizes
    selection = _empty_selection(len(rows), min(k, candidates))
    narrow_anchors = problem.anchors.astype(problem.accumulation)
    narrow_candidates = problem.candidates.astype(problem.accumulation)
    for row, i in enumerate(rows):
        lower, upper = rounding_interval(squared_distances(problem, i), dims, problem.accumulation)
        others, positives = _others(problem, i), positives_of(problem, i)
        wanted = np.zeros(candidates, bool)
        if len(others):
            last = np.sort(upper[others])[min(k, len(others)) - 1]
            wanted[others[lower[others] <= last]] = True
        if len(positives):
            wanted[positives[lower[positives] <= upper[positives].min()]] = True
            wanted[positives[upper[positives] >= lower[positives].max()]] = True
        asked = np.flatnonzero(wanted)
        keys = np.full(candidates, np.nan)
        keys[asked] = sums_in_documented_order(narrow_anchors[i], narrow_candidates[asked])
        first = _ordered(others[wanted[others]], keys[others[wanted[others]]])[: selection.support.shape[1]]
        selection.support[row, : len(first)] = first
        able = positives[wanted[positives]]
        if len(able):
            selection.nearest[row] = _ordered(able, keys[able])[0]
            selection.farthest[row] = _ordered(able, -keys[able])[0]
    return selection


# ---------------------------------------------------------------------------------------------------------------------
# Loss and gradient at a selection


def evaluate(
    problem: Problem,
    selection: Selection,
    *,
    alpha: float,
    weight: float,
    squeeze: str,
    rows: Sequence[int] | None = None,
) -> Evaluation:
    """Losses, coefficients and statistics of `selection`. With `rows`, its row r belongs to anchor rows[r]."""
    assert squeeze in SQUEEZES
    rows = list(range(problem.sizes[0]) if rows is None else rows)
    count = len(rows)
    losses, largest = np.zeros(count), np.zeros(count)
    valid, tied = np.zeros(count, bool), np.zeros(count, bool)
    coefficients: list[dict[int, float]] = [{} for _ in rows]
    positive_distances: list[float] = []
    negative_distances: list[float] = []
    nearest_hits = positives_inside = 0

    for row, i in enumerate(rows):
        near, far = int(selection.nearest[row]), int(selection.farthest[row])
        if near < 0:
            continue
        valid[row] = True
        support = [int(j) for j in selection.support[row] if j >= 0]
        members = list(dict.fromkeys([*support, near, far] if squeeze == "span" else [*support, near]))
        difference = problem.candidates[members] - problem.anchors[i]
        square = dict(zip(members, (difference * difference).sum(axis=1), strict=True))
        distance = {j: float(np.sqrt(max(square[j], FLOOR))) for j in members}
        positives = [j for j in support if problem.candidate_labels[j] == problem.labels[i]]
        negatives = [j for j in support if problem.candidate_labels[j] != problem.labels[i]]
        nearest_hits += support[0] in positives
        positives_inside += len(positives)
        positives = positives or [near]

        # separation = log(1 + sum_N / sum_P), every sum relative to its nearest member
        slope = dict.fromkeys(members, 0.0)  # dL_i/dd_ij
        start_p = min(distance[j] for j in positives)
        terms_p = {j: np.exp(-alpha * (distance[j] - start_p)) for j in positives}
        sum_p = sum(terms_p.values())
        separation = 0.0
        if negatives:
            start_n = min(distance[j] for j in negatives)
            terms_n = {j: np.exp(-alpha * (distance[j] - start_n)) for j in negatives}
            sum_n = sum(terms_n.values())
            odds = alpha * (start_p - start_n) + np.log(sum_n) - np.log(sum_p)
            separation = float(np.logaddexp(0.0, odds))
            negative_share = np.exp(odds - separation)  # sum_N / (sum_P + sum_N)
            for j in positives:
                slope[j] += alpha * float(terms_p[j] / sum_p * negative_share)
            for j in negatives:
                slope[j] -= alpha * float(terms_n[j] / sum_n * negative_share)

        if squeeze == "span":
            value = distance[far] - distance[near]
            slope[far] += weight
            slope[near] -= weight
        elif squeeze == "support" and len(positives) > 1:
            top = max(positives, key=lambda j: (square[j], -j))
            bottom = min(positives, key=lambda j: (square[j], j))
            value = distance[top] - distance[bottom]
            slope[top] += weight
            slope[bottom] -= weight
            close = 1e-4 * (square[top] + FLOOR)
            tied[row] = any(abs(square[j] - square[e]) <= close for e in (top, bottom) for j in positives if j != e)
        elif squeeze in ("support", "nearest"):
            value = distance[near]
            slope[near] += weight
        else:
            value = 0.0

        losses[row] = separation + weight * value
        largest[row] = max(distance.values())
        coefficients[row] = {j: 0.0 if square[j] < FLOOR else slope[j] / distance[j] for j in members}
        positive_distances += [distance[j] for j in positives]
        negative_distances += [distance[j] for j in negatives]

    total_valid = int(valid.sum())
    stats = {
        "valid_anchors": float(total_valid),
        "positive_distance": float(np.mean(positive_distances)) if positive_distances else 0.0,
        "negative_distance": float(np.mean(negative_distances)) if negative_distances else 0.0,
        "nearest_is_positive": nearest_hits / max(1, total_valid),
        "support_positives": positives_inside / max(1, total_valid),
    }
    return Evaluation(rows, losses, valid, largest, coefficients, stats, tied)


def gradients(problem: Problem, result: Evaluation, upstream: Array) -> tuple[Array, Array]:
    """dX [N, D] and dZ [M, D] for upstream gradients of the rows' losses; in the symmetric case dX has both."""
    anchors, candidates, dims = problem.sizes
    grad_anchors, grad_candidates = np.zeros((anchors, dims)), np.zeros((candidates, dims))
    into_candidates = grad_anchors if problem.symmetric else grad_candidates
    for row, i in enumerate(result.rows):
        edges = [(j, w) for j, w in result.coefficients[row].items() if w != 0.0]  # 0 where the clamp holds
        if not edges:
            continue
        chosen = [j for j, _ in edges]
        factor = float(upstream[row]) * np.array([w for _, w in edges])
        shares = (factor[:, None] * (problem.anchors[i] - problem.candidates[chosen])).astype(np.float64)
        grad_anchors[i] += shares.sum(axis=0)
        into_candidates[chosen] -= shares
    return grad_anchors, grad_candidates
