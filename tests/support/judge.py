"""Runs a backend on a case and compares it with the oracle, within the bounds of CONTRIBUTING.md, "Numbers"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sn_ops
from support import oracle
from support.problems import Case, to_oracle

# What rounding once to the features' type costs: relative to an entry, and at least (half the least subnormal).
ROUNDING = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 2.0**-134)}


def numbers(x: Tensor) -> oracle.Array:
    """Any tensor as float64 or int64."""
    x = x.detach().cpu()
    return x.double().numpy() if x.is_floating_point() else x.long().numpy()


def assert_within(error: oracle.Array | float, bound: oracle.Array | float, what: str) -> None:
    """Asserts error <= bound everywhere; NaN fails."""
    error, bound = np.broadcast_arrays(np.asarray(error, np.float64), np.asarray(bound, np.float64))
    inside = error <= bound
    if not inside.all():
        ratio = np.where(inside, 0, error / np.maximum(bound, 1e-300))
        worst = np.unravel_index(int(np.argmax(np.where(np.isnan(ratio), np.inf, ratio))), ratio.shape)
        at = f" at {tuple(map(int, worst))}" if ratio.ndim else ""
        raise AssertionError(f"{what}: error {error[worst]:.3e} > bound {bound[worst]:.3e}{at}")


def loss_bound(largest_distance: oracle.Array, alpha: float, weight: float) -> oracle.Array:
    """CONTRIBUTING.md, "Numbers": the error of one anchor's loss."""
    return 1e-6 * (1 + (alpha + weight) * largest_distance)


def gradient_bound(
    gradient: oracle.Array, upstream: oracle.Array, largest: float, alpha: float, weight: float, dtype: torch.dtype
) -> float:
    """CONTRIBUTING.md, "Numbers": the error of a gradient in L2."""
    size = float(np.linalg.norm(gradient))
    relative, absolute = ROUNDING.get(dtype, (0.0, 0.0))
    rounding = relative * size + absolute * gradient.size**0.5
    bound = 2e-6 * (1 + alpha * largest) * size + 2e-6 * (alpha + weight) * float(np.linalg.norm(upstream))
    return bound + rounding


def selection_of(neighbors: sn_ops.SupportNeighbors) -> oracle.Selection:
    """A backend's selection, as the oracle takes it."""
    return oracle.Selection(
        numbers(neighbors.indices), numbers(neighbors.nearest_positive), numbers(neighbors.farthest_positive)
    )


def neighbors_of(case: Case, backend: str) -> sn_ops.SupportNeighbors:
    """`support_neighbors` of a case; the results are brought back to the CPU, where they are compared."""
    found = sn_ops.support_neighbors(**case.on(backend).arguments(), backend=backend)
    return sn_ops.SupportNeighbors(*(x.cpu() for x in found))


def check_neighbors(case: Case, backend: str) -> oracle.Selection:
    """Compares `support_neighbors` with exact distances; returns the selection."""
    problem = to_oracle(case)
    anchors, candidates, dims = problem.sizes
    slots = min(case.k, candidates)
    found = neighbors_of(case, backend)
    acc = torch.float64 if case.feats.dtype == torch.float64 else torch.float32
    assert (found.indices.dtype, found.distances.dtype, found.is_positive.dtype) == (torch.int64, acc, torch.bool)
    assert found.nearest_positive.dtype == found.farthest_positive.dtype == torch.int64
    assert found.indices.shape == found.distances.shape == found.is_positive.shape == (anchors, slots)
    assert found.nearest_positive.shape == found.farthest_positive.shape == (anchors,)
    assert not any(x.requires_grad for x in found)
    selection = selection_of(found)
    oracle.check_selection(problem, case.k, selection)

    distances, is_positive = numbers(found.distances), found.is_positive.numpy()
    for i in range(anchors):
        used = selection.support[i] >= 0
        chosen = selection.support[i][used]
        same = problem.candidate_labels[chosen] == problem.labels[i]
        assert (is_positive[i][used] == same).all() and not is_positive[i][~used].any()
        lower, upper = oracle.rounding_interval(
            oracle.squared_distances(problem, i)[chosen], dims, problem.accumulation
        )
        slack = 4 * np.finfo(problem.accumulation).eps  # of the square root and of storing it
        low, high = (np.sqrt(np.maximum(x, oracle.FLOOR)).astype(np.float64) for x in (lower, upper))
        ok = (distances[i][used] >= low * (1 - slack)) & (distances[i][used] <= high * (1 + slack))
        assert ok.all(), f"distances of anchor {i}: {distances[i]}"
        assert (distances[i][used][1:] >= distances[i][used][:-1]).all() and np.isposinf(distances[i][~used]).all()
    return selection


def check_loss(
    case: Case,
    backend: str,
    selection: oracle.Selection,
    *,
    alpha: float = 50.0,
    weight: float = 0.1,
    squeeze: str = "span",
    reductions: Sequence[str] = ("mean", "sum"),
) -> None:
    """Compares losses, both gradients and statistics with the oracle's at the backend's selection.

    Always with reduction "none", which shows most; then with `reductions`.
    """
    problem = to_oracle(case)
    options: dict[str, Any] = {"alpha": alpha, "weight": weight, "squeeze": squeeze}
    acc = torch.float64 if case.feats.dtype == torch.float64 else torch.float32
    case = case.on(backend)

    result = oracle.evaluate(problem, selection, **options)
    bound = loss_bound(result.largest_distance, alpha, weight)
    valid = int(result.valid.sum())

    leaves = case.leaves()
    loss, stats = sn_ops.sn_loss(**leaves.arguments(), **options, reduction="none", backend=backend, return_stats=True)
    assert loss.shape == (problem.sizes[0],) and loss.dtype == acc
    assert_within(np.abs(numbers(loss) - result.losses), bound, "loss of an anchor")
    assert (numbers(loss)[~result.valid] == 0).all(), "anchors without a positive contribute exactly 0"
    check_stats(stats, result)
    upstream = torch.randn(problem.sizes[0], generator=torch.Generator().manual_seed(1)).to(acc)
    upstream[torch.from_numpy(result.squeeze_tied)] = 0  # any subgradient would do there
    expected = oracle.gradients(problem, result, numbers(upstream))
    check_gradients(loss, leaves, upstream, expected, result, numbers(upstream), alpha, weight)

    ones = np.where(result.valid, 1.0, 0.0)
    expected = oracle.gradients(problem, result, ones)
    for reduction in reductions:
        leaves = case.leaves()
        loss = sn_ops.sn_loss(**leaves.arguments(), **options, reduction=reduction, backend=backend)
        assert loss.shape == () and loss.dtype == acc
        share = 1.0 / max(1, valid) if reduction == "mean" else 1.0
        error = abs(loss.item() - result.total(reduction))
        assert_within(error, share * bound[result.valid].sum(), f"loss, {reduction}")
        assert valid or loss.item() == 0.0
        if not result.squeeze_tied.any():
            share *= 0.75
            scaled = (share * expected[0], share * expected[1])
            check_gradients(loss, leaves, torch.tensor(0.75), scaled, result, share * ones, alpha, weight)


def check_gradients(
    loss: Tensor,
    leaves: Case,
    grad_loss: Tensor,
    expected: tuple[oracle.Array, oracle.Array],
    result: oracle.Evaluation,
    upstream: oracle.Array,
    alpha: float,
    weight: float,
) -> None:
    """Compares the gradients of `loss` with the oracle's; `grad_loss` gives each anchor the gradient `upstream`."""
    found = torch.autograd.grad(loss, leaves.inputs(), grad_loss.to(loss))
    largest = float(result.largest_distance.max(initial=0.0))
    for name, gradient, wanted, leaf in zip(("feats", "candidates"), found, expected, leaves.inputs(), strict=False):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
        bound = gradient_bound(wanted, upstream, largest, alpha, weight, leaf.dtype)
        assert_within(float(np.linalg.norm(numbers(gradient) - wanted)), bound, f"gradient of {name}")
        assert result.valid.any() or not gradient.any(), "no valid anchor, no gradient"


def check_stats(stats: sn_ops.SNStats, result: oracle.Evaluation) -> None:
    """Compares the statistics: each to the rounding of float32."""
    assert stats._fields == tuple(result.stats)
    for name, expected in result.stats.items():
        value = getattr(stats, name)
        assert value.shape == () and not value.requires_grad, name
        assert_within(abs(float(value) - expected), 2e-6 * abs(expected), f"stats.{name}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, so that a NaN equals itself and 0.0 is not -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Asserts that results agree bit for bit, wherever they live; the first that does not is named by its position."""
    for position, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(got.cpu(), wanted.cpu()), position
