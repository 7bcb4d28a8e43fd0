"""The oracle is compared with things simpler than itself."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from support import oracle
from support.problems import bank_case, self_case, to_oracle


def _round(value: Fraction, dtype: type[np.floating]) -> np.floating:
    """Correct rounding of a fraction: the nearer of the neighbours, the even one when halfway."""
    guess = dtype(float(value))
    around = [np.nextafter(guess, dtype(-np.inf)), guess, np.nextafter(guess, dtype(np.inf))]
    integer = np.dtype(f"i{np.dtype(dtype).itemsize}")
    return min(around, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(integer)) & 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_multiply_add_rounds_once(dtype: type[np.floating]) -> None:
    """Against exact fractions, halfway cases of the second rounding included."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(3000).astype(dtype) for _ in range(3))
    c[:1000] *= dtype(2.0**20)
    c[1000:2000] *= dtype(2.0**-20)
    c[::7] = -(a * b)[::7]
    if dtype == np.float32:  # 1 + 2^-24 + tiny: float64 drops the tiny part and then rounds a tie to even
        a[:4] = b[:4] = [1 + 2**-12, 1 - 2**-12, 3, 2.0**-30]
        c[:4] = [1, 2.0**30, 2.0**25, 1 + 2**-23]
        a[4], b[4], c[4] = 2.0**-40, 2.0**-40, 1 + 2**-23
        a[5], b[5], c[5] = 1 + 2.0**-23, 2.0**-24, 1
    found = oracle.fused_multiply_add(a, b, c)
    for x, y, z, value in zip(a, b, c, found, strict=True):
        assert value == _round(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), dtype)


def test_fused_multiply_add_differs_from_two_roundings() -> None:
    """A product and a sum rounded apart, or through float64, are not the same thing."""
    a, one = np.full(1, 1 + 2**-12, np.float32), np.ones(1, np.float32)
    assert oracle.fused_multiply_add(a, a, -one) != a * a - one
    # 1 + 2^-23 + 2^-24 (1 - 2^-46) is just below a middle of two float32, which float64 rounds it to: then up, to even.
    above, below = (np.full(1, (1 + x) * 2.0**-12, np.float32) for x in (2**-23, -(2**-23)))
    start = np.full(1, 1 + 2**-23, np.float32)
    assert oracle.fused_multiply_add(above, below, start) == start
    assert (above.astype(np.float64) * below + start).astype(np.float32) == np.float32(1 + 2**-22)


def test_documented_order_of_a_short_row() -> None:
    """17 elements: lane 0 holds the first and the last, the others one each; rounding tells the order apart."""
    row = np.zeros((1, 17), np.float32)
    row[0, 0], row[0, 16], row[0, 8] = 1.0, 2.0**-12, 2.0**-12
    # Lane 0 rounds 1 + 2^-24 to 1 (tie to even), then adds lane 8's 2^-24 and rounds to 1 again.
    assert oracle.sums_in_documented_order(np.zeros(17, np.float32), row)[0] == 1.0
    row[0, 0], row[0, 1] = 0.0, 1.0
    # Lanes 0 and 8 meet first (2^-23), and that survives beside lane 1.
    assert oracle.sums_in_documented_order(np.zeros(17, np.float32), row)[0] == np.float32(1 + 2**-23)
    far = np.zeros((1, 65), np.float32)
    far[0, 64], far[0, 0] = 1.0, 2.0**-12
    assert oracle.sums_in_documented_order(np.zeros(65, np.float32), far)[0] == 1.0


@pytest.mark.parametrize("dims", [1, 15, 64, 65, 200, 2048])
def test_documented_order_is_a_sum(dims: int) -> None:
    rng = np.random.default_rng(dims)
    anchor, candidates = rng.standard_normal(dims), rng.standard_normal((50, dims))
    exact = ((candidates - anchor) ** 2).sum(axis=1)
    assert np.allclose(oracle.sums_in_documented_order(anchor, candidates), exact, rtol=1e-14)
    narrow = oracle.sums_in_documented_order(anchor.astype(np.float32), candidates.astype(np.float32))
    assert narrow.dtype == np.float32 and np.allclose(narrow, exact, rtol=1e-5)


def test_pruned_documented_selection_is_the_whole_one() -> None:
    """Leaving out candidates that cannot matter does not change the selection."""
    problem = to_oracle(self_case(90, 33, 12, seed=4))
    rows = range(90)
    pruned = oracle.select_in_documented_order(problem, 7, rows)
    anchors = problem.anchors.astype(np.float32)
    for i in rows:
        keys = oracle.sums_in_documented_order(anchors[i], anchors)
        order = [j for j in np.lexsort((np.arange(90), keys)) if j != i]
        positives = [j for j in order if problem.labels[j] == problem.labels[i]]
        assert pruned.support[i].tolist() == order[:7]
        assert pruned.nearest[i] == (positives[0] if positives else -1)
        if positives:
            assert pruned.farthest[i] == min(j for j in positives if keys[j] == keys[positives].max())


@pytest.mark.parametrize("squeeze", oracle.SQUEEZES)
@pytest.mark.parametrize("kind", ["self", "none", "tensor"])
def test_gradient_is_the_derivative_of_the_loss(squeeze: str, kind: str) -> None:
    """Central differences at a fixed selection."""
    case = self_case(12, 5, 4, 4, seed=2) if kind == "self" else bank_case(6, 9, 5, 3, 4, self_kind=kind, seed=2)
    problem = to_oracle(case)
    selection = oracle.select(problem, 4)
    upstream = np.random.default_rng(0).standard_normal(problem.sizes[0])
    options: dict[str, Any] = {"alpha": 4.0, "weight": 0.7, "squeeze": squeeze}
    expected = oracle.gradients(problem, oracle.evaluate(problem, selection, **options), upstream)

    def loss(name: str, at: tuple[int, int], step: float) -> float:
        moved = np.array(getattr(problem, name))
        moved[at] += step
        values: dict[str, Any] = {name: moved} if not problem.symmetric else {"anchors": moved, "candidates": moved}
        shifted = oracle.evaluate(replace(problem, **values), selection, **options)
        return float(shifted.losses @ upstream)

    for name, gradient in zip(("anchors", "candidates"), expected, strict=True):
        if name == "candidates" and problem.symmetric:
            assert not gradient.any()
            continue
        for at in np.ndindex(*gradient.shape):
            slope = (loss(name, at, 1e-5) - loss(name, at, -1e-5)) / 2e-5
            assert abs(slope - gradient[at]) < 1e-6


def test_check_selection_refuses_wrong_ones() -> None:
    """Every single change to a right selection is noticed."""
    problem = to_oracle(self_case(20, 16, 4, 5, seed=1))
    right = oracle.select(problem, 5)
    oracle.check_selection(problem, 5, right)
    for change in range(6):
        support, nearest, farthest = right.support.copy(), right.nearest.copy(), right.farthest.copy()
        if change == 0:
            support[3, :2] = support[3, 1::-1]
        elif change == 1:
            support[3, 4] = next(j for j in range(20) if j not in support[3] and j != 3)
        elif change == 2:
            support[3, 0] = 3
        elif change == 3:
            support[3, 4] = -1
        elif change == 4:
            nearest[3], farthest[3] = farthest[3], nearest[3]
        else:
            farthest[3] = -1
        with pytest.raises(AssertionError):
            oracle.check_selection(problem, 5, oracle.Selection(support, nearest, farthest))


def test_check_selection_demands_the_lower_of_twins() -> None:
    case = self_case(6, 8, 1, 2, seed=1)
    problem = to_oracle(replace(case, feats=case.feats[[0, 1, 1, 1, 2, 2]]))
    right = oracle.select(problem, 2)
    assert right.support[1].tolist() == [2, 3]
    for wrong in ([3, 2], [2, 0]):
        support = right.support.copy()
        support[1] = wrong
        with pytest.raises(AssertionError):
            oracle.check_selection(problem, 2, oracle.Selection(support, right.nearest, right.farthest))
    far = right.farthest.copy()
    far[far == 4] = 5
    assert (far != right.farthest).any()
    with pytest.raises(AssertionError, match="tie to a higher index"):
        oracle.check_selection(problem, 2, oracle.Selection(right.support, right.nearest, far))
