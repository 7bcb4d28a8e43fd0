"""The forward and backward operators: the support graph between them, and PyTorch's own checks."""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
import pytest
import torch

import sn_ops
from sn_ops import ops
from support import judge, oracle, problems
from support.backends import EMULATED, OPERATORS, require
from support.problems import Case, on

SQUEEZE = {name: code for code, name in enumerate(oracle.SQUEEZES)}
REDUCTION = {"mean": 0, "sum": 1, "none": 2}
GRAPH_CASES = [
    "self-7x15-ids2-k10",
    "self-33x65-ids8-k10",
    "self-63x200-ids30-k10",
    "self-257x3-ids40-k1",
    "bank-33-65x100-k1-tensor",
    "bank-65-7x17-k10-none",
    "bank-7-193x128-k10-offset",
    "near-outside-support",
    "near-outside-support-k1",
    "duplicates",
    "no-positives",
    "none-anchors",
    "no-candidates",
]


def forward_arguments(
    case: Case, *, squeeze: str = "span", reduction: str = "mean", want_squared: bool = False
) -> tuple[Any, ...]:
    """The arguments of the forward operator."""
    tensor = case.self_index if isinstance(case.self_index, torch.Tensor) else None
    offset = 0 if case.candidates is None else case.self_index if isinstance(case.self_index, int) else -1
    return (
        case.feats, case.labels, case.candidates, case.candidate_labels, tensor, offset,
        case.k, 50.0, 0.1, SQUEEZE[squeeze], REDUCTION[reduction], want_squared,
    )  # fmt: skip


def backward_arguments(case: Case, outputs: tuple[torch.Tensor, ...], reduction: str) -> tuple[Any, ...]:
    """The arguments of the backward operator behind a forward's outputs."""
    loss, indices, coefficients, *_, stats = outputs
    grad_loss = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    banked = case.candidates is not None
    return grad_loss, case.feats, case.candidates, indices, coefficients, stats, REDUCTION[reduction], True, banked


def check_squared(problem: oracle.Problem, anchor: int, edges: oracle.Array, squared: oracle.Array) -> None:
    """Squared distances of an anchor's edges: not clamped, exact to the rounding of their sums, inf without an edge."""
    used = edges >= 0
    low, high = oracle.rounding_interval(
        oracle.squared_distances(problem, anchor)[edges[used]], problem.sizes[2], problem.accumulation
    )
    assert ((squared[used] >= low) & (squared[used] <= high)).all(), f"squared distances of anchor {anchor}: {squared}"
    assert np.isposinf(squared[~used]).all()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("banked", [False, True], ids=["self", "bank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_backward_of_repeated_edges(name: str, banked: bool, dtype: torch.dtype) -> None:
    """The backward takes any graph: anchors that list a candidate several times, which lists them back as often or
    less, with a weight or without one. Against a dense matrix of weights in fp64, by autograd."""
    draw = torch.Generator().manual_seed(11)
    anchors, candidates, edges, dims = 48, 20 if banked else 48, 7, 33
    partner = (torch.arange(anchors) ^ 1) % candidates
    other = torch.randint(candidates, (anchors, edges), generator=draw)
    indices = torch.where(torch.rand(anchors, edges, generator=draw) < 0.4, partner[:, None], other)
    indices[torch.rand(anchors, edges, generator=draw) < 0.1] = -1
    weights = torch.randn(anchors, edges, generator=draw, dtype=dtype)
    weights[torch.rand(anchors, edges, generator=draw) < 0.3] = 0
    x, z = (torch.randn(rows, dims, generator=draw, dtype=dtype) for rows in (anchors, candidates))
    tensors = (x, z if banked else None, indices.int(), weights, torch.ones((), dtype=dtype))
    feats, bank, graph, coefficients, upstream = on(require(name), tensors)
    stats = torch.tensor([anchors, 0, 0, 0, 0, 0], dtype=torch.float64, device=feats.device)
    found = ops.backward(name, upstream, feats, bank, graph, coefficients, stats, REDUCTION["sum"], True, banked)

    dense = torch.zeros(anchors, candidates, dtype=torch.float64)
    for i, e in itertools.product(range(anchors), range(edges)):
        if indices[i, e] >= 0:
            dense[i, indices[i, e]] += weights[i, e].double()
    wide = x.double().requires_grad_()
    pool = z.double().requires_grad_() if banked else wide
    energy = (dense[:, :, None] * (wide[:, None] - pool[None]) ** 2).sum() / 2
    expected = torch.autograd.grad(energy, (wide, pool) if banked else (wide,))
    for got, wanted in zip(found, expected, strict=False):
        bound = (1e-5 if dtype == torch.float32 else 1e-13) * (1 + wanted.abs())
        assert ((got.cpu().double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("banked", [False, True])
def test_a_row_that_everybody_selects(fused_backend: str, banked: bool) -> None:
    """Thousands of equal terms for one row, as of a batch that has collapsed: their rounding does not add up."""
    rows = 300 if fused_backend in EMULATED else 4000
    point = torch.nn.functional.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)))
    many, labels = point.repeat(rows, 1), torch.zeros(rows, dtype=torch.int64)
    many[0] = -point
    case = Case(many[1:], labels[1:], many[:1], labels[:1], k=2) if banked else Case(many, labels, k=2)

    def gradients(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = case.to(dtype).on(backend).leaves()
        loss = sn_ops.sn_loss(**leaves.arguments(), alpha=0.01, weight=1.0, reduction="sum", backend=backend)
        return [part.double().cpu() for part in torch.autograd.grad(loss, leaves.inputs())]

    wanted = gradients("reference", torch.float64)
    for found, expected in zip(gradients(fused_backend, torch.float32), wanted, strict=True):
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())  # 2e-6 is what is promised


@pytest.mark.parametrize("squeeze", oracle.SQUEEZES)
@pytest.mark.parametrize("name", GRAPH_CASES)
def test_support_graph(backend: str, name: str, squeeze: str) -> None:
    """Distinct edges in their columns, with the oracle's coefficients, and 0 where no gradient flows."""
    case = problems.CASES[name]().on(backend)
    problem = problems.to_oracle(case)
    n, m, _ = problem.sizes
    slots = min(case.k, m)
    outputs = ops.forward(backend, *forward_arguments(case, squeeze=squeeze, want_squared=True))
    loss, indices, coefficients, nearest, farthest, squared, stats = outputs
    acc = loss.dtype
    assert [x.dtype for x in outputs] == [acc, torch.int32, acc, torch.int32, torch.int32, acc, torch.float64]
    assert indices.shape == coefficients.shape == squared.shape == (n, slots + 2)
    assert nearest.shape == farthest.shape == (n,) and stats.shape == (6,)
    assert stats[5] == 0  # nothing is poisoned

    found, weights = judge.numbers(indices), judge.numbers(coefficients)
    selection = oracle.Selection(found[:, :slots], judge.numbers(nearest), judge.numbers(farthest))
    oracle.check_selection(problem, case.k, selection)
    result = oracle.evaluate(problem, selection, alpha=50.0, weight=0.1, squeeze=squeeze)
    for i in range(n):
        inside = set(found[i, :slots].tolist())
        near, far = int(selection.nearest[i]), int(selection.farthest[i])
        assert found[i, slots] == (-1 if near in inside else near)
        wants_far = squeeze == "span" and far not in inside and far != near
        assert found[i, slots + 1] == (far if wants_far else -1)
        assert (weights[i][found[i] < 0] == 0).all()
        check_squared(problem, i, found[i], judge.numbers(squared)[i])
        if not result.valid[i]:
            assert (weights[i] == 0).all()
            continue
        if result.squeeze_tied[i]:
            continue
        used = found[i] >= 0
        wanted = np.array([result.coefficients[i].get(int(j), 0.0) for j in found[i][used]])
        nearest_distance = max(squared[i, 0].item(), oracle.FLOOR) ** 0.5
        bound = 2e-6 * (1 + 50 * result.largest_distance[i]) * (np.abs(wanted) + 50.1 / nearest_distance)
        judge.assert_within(np.abs(weights[i][used] - wanted), bound, f"coefficients of anchor {i}")
    short = ops.forward(backend, *forward_arguments(case, squeeze=squeeze))
    assert short[5].shape == (0,) and short[1].equal(indices) and judge.same_bits(short[0], loss)


@pytest.mark.parametrize("reduction", REDUCTION)
@pytest.mark.parametrize("name", GRAPH_CASES)
@pytest.mark.parametrize(("ahead", "behind"), list(itertools.product(OPERATORS, repeat=2)))
def test_any_forward_with_any_backward(ahead: str, behind: str, name: str, reduction: str) -> None:
    """Every backend's backward takes every backend's support graph."""
    case = problems.CASES[name]()
    problem = problems.to_oracle(case)
    n, m, _ = problem.sizes
    slots = min(case.k, m)
    require(ahead), require(behind)
    outputs = ops.forward(ahead, *forward_arguments(case.on(ahead), reduction=reduction))
    arguments = backward_arguments(case.on(behind), on(behind, outputs), reduction)
    grads = ops.backward(behind, *arguments)

    selection = oracle.Selection(*(judge.numbers(x) for x in (outputs[1][:, :slots], outputs[3], outputs[4])))
    result = oracle.evaluate(problem, selection, alpha=50.0, weight=0.1, squeeze="span")
    factor = 1 / max(1, result.valid.sum()) if reduction == "mean" else 1.0
    upstream = np.where(result.valid, factor * np.broadcast_to(judge.numbers(arguments[0]), n), 0)
    largest = float(result.largest_distance.max(initial=0))
    for gradient, expected, exists in zip(
        grads, oracle.gradients(problem, result, upstream), (True, case.candidates is not None), strict=True
    ):
        if not exists:
            assert gradient.shape == (0,)
            continue
        bound = judge.gradient_bound(expected, upstream, largest, 50.0, 0.1, torch.float32)
        judge.assert_within(float(np.linalg.norm(judge.numbers(gradient) - expected)), bound, "gradient")


def test_backward_computes_only_what_is_needed(backend: str) -> None:
    """A gradient that is not needed comes back empty; the other one is the same."""
    case = problems.CASES["bank-33-65x100-k1-tensor"]().on(backend)
    outputs = ops.forward(backend, *forward_arguments(case))
    *arguments, _, _ = backward_arguments(case, outputs, "mean")
    both = ops.backward(backend, *arguments, True, True)
    left, nothing = ops.backward(backend, *arguments, True, False)
    assert left.equal(both[0]) and nothing.shape == (0,)
    nothing, right = ops.backward(backend, *arguments, False, True)
    assert right.equal(both[1]) and nothing.shape == (0,)


def test_backward_skips_unused_and_zero_edges(backend: str) -> None:
    """An edge without a coefficient is not multiplied: infinite features stay out of it."""
    feats = torch.tensor([[0.0, 1.0], [1.0, 0.0], [float("inf"), 2.0], [float("nan"), 0.0]])
    indices = torch.tensor([[1, 2, -1], [0, -1, 3], [-1, -1, -1], [0, -1, -1]], dtype=torch.int32)
    coefficients = torch.tensor([[0.5, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    stats = torch.tensor([2.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    feats, indices, coefficients, stats, one = on(backend, (feats, indices, coefficients, stats, torch.tensor(1.0)))
    gradient, _ = ops.backward(backend, one, feats, None, indices, coefficients, stats, REDUCTION["sum"], True, False)
    assert gradient.tolist() == [[-2.5, 2.5], [2.5, -2.5], [0.0, 0.0], [0.0, 0.0]]
    gradient, _ = ops.backward(backend, one, feats, None, indices, coefficients, stats, REDUCTION["mean"], True, False)
    assert gradient.tolist() == [[-1.25, 1.25], [1.25, -1.25], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("reduction", REDUCTION)
def test_poison_reaches_every_gradient(backend: str, reduction: str) -> None:
    """The forward's flag alone decides it."""
    case = problems.CASES["bank-33-65x100-k1-tensor"]().on(backend)
    outputs = ops.forward(backend, *forward_arguments(case, reduction=reduction))
    outputs[6][5] = float("nan")
    grads = ops.backward(backend, *backward_arguments(case, outputs, reduction))
    assert all(x.isnan().all() and x.numel() for x in grads)


OPCHECK_CASES = [
    ("self-33x65-ids8-k10", torch.float32, "span", "mean"),
    ("self-7x15-ids2-k10", torch.float64, "support", "none"),
    ("bank-33-65x100-k1-tensor", torch.float32, "nearest", "sum"),
    ("bank-7-193x128-k10-offset", torch.bfloat16, "none", "none"),
    ("bank-65-7x17-k10-none", torch.float16, "span", "mean"),
    ("columns-strided", torch.float32, "span", "mean"),
    ("none-anchors", torch.float32, "span", "mean"),
    ("no-candidates", torch.float32, "span", "none"),
]


@pytest.mark.parametrize(("name", "dtype", "squeeze", "reduction"), OPCHECK_CASES)
def test_opcheck_forward(fused_backend: str, name: str, dtype: torch.dtype, squeeze: str, reduction: str) -> None:
    case = problems.CASES[name]().to(dtype).on(fused_backend).leaves()
    for want_squared in (False, True):
        torch.library.opcheck(
            cast(Any, ops.OPERATORS[fused_backend].forward),
            forward_arguments(case, squeeze=squeeze, reduction=reduction, want_squared=want_squared),
        )


@pytest.mark.parametrize(("name", "dtype", "squeeze", "reduction"), OPCHECK_CASES)
def test_opcheck_backward(fused_backend: str, name: str, dtype: torch.dtype, squeeze: str, reduction: str) -> None:
    case = problems.CASES[name]().to(dtype).on(fused_backend)
    outputs = ops.forward(fused_backend, *forward_arguments(case, squeeze=squeeze, reduction=reduction))
    torch.library.opcheck(
        cast(Any, ops.OPERATORS[fused_backend].backward), backward_arguments(case, outputs, reduction)
    )
