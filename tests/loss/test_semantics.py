"""The definition on one list of cases: all results of every backend against the oracle."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

import sn_ops
from support import judge, oracle, problems
from support.problems import Case, on

HALVES = (torch.float16, torch.bfloat16)


@functools.cache
def case_of(name: str) -> Case:
    return problems.CASES[name]()


@functools.cache
def selection_of(name: str, backend: str) -> oracle.Selection:
    return judge.check_neighbors(case_of(name), backend)


@pytest.mark.parametrize("name", problems.CASES)
def test_selection(backend: str, name: str) -> None:
    """The support set and its order, distances, labels, nearest and farthest positives."""
    selection_of(name, backend)


@pytest.mark.parametrize("squeeze", oracle.SQUEEZES)
@pytest.mark.parametrize("name", problems.CASES)
def test_loss_gradients_and_statistics(backend: str, name: str, squeeze: str) -> None:
    """At the backend's own selection; reductions follow the squeeze, so one squeeze is enough to check them."""
    reductions = ("mean", "sum") if squeeze == "span" else ()
    judge.check_loss(case_of(name), backend, selection_of(name, backend), squeeze=squeeze, reductions=reductions)


@pytest.mark.parametrize(("alpha", "weight"), [(1e-3, 0.0), (1.0, 10.0), (500.0, 0.1), (50.0, 0.0), (2, 1)])
@pytest.mark.parametrize("name", ["self-63x200-ids30-k10", "bank-33-65x100-k1-tensor", "duplicates"])
def test_options(backend: str, name: str, alpha: float, weight: float) -> None:
    """Temperatures and weights, integers among them."""
    for squeeze in ("span", "support"):
        judge.check_loss(
            case_of(name),
            backend,
            selection_of(name, backend),
            alpha=alpha,
            weight=weight,
            squeeze=squeeze,
            reductions=("mean",),
        )


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "self-33x65-ids8-k10",
        "self-65x2048-ids16-k10",
        "self-97x64-ids20-k128",
        "self-257x3-ids40-k1",
        "bank-49-129x15-k128-tensor",
        "bank-129-191x16-k33-offset",
        "near-outside-support",
        "duplicates",
        "grid-5d",
        "columns-strided",
        "columns-misaligned",
        "no-positives",
        "none-anchors",
        "no-candidates",
    ],
)
def test_types(backend: str, name: str, dtype: torch.dtype) -> None:
    """The accumulation type is float64 for float64 and float32 otherwise; gradients come in the input's type."""
    case = case_of(name).to(dtype)
    if name.startswith("columns"):  # `to` has made them contiguous
        wide = torch.zeros(case.feats.shape[0], 2 * case.feats.shape[1] + 1, dtype=dtype)
        wide[:, 1::2] = case.feats
        case = replace(case, feats=wide[:, 1::2])
    selection = judge.check_neighbors(case, backend)
    judge.check_loss(case, backend, selection)
    judge.check_loss(case, backend, selection, squeeze="support", reductions=())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_gradients_are_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """Every entry is half a unit in the last place from the float64 gradient, and 1e-5 of the largest entry."""
    case = case_of("self-64x257-ids16-k2").to(dtype).on(backend)
    problem = problems.to_oracle(case)
    selection = judge.selection_of(judge.neighbors_of(case, backend))
    result = oracle.evaluate(problem, selection, alpha=5.0, weight=0.1, squeeze="span")
    expected, _ = oracle.gradients(problem, result, result.valid / result.valid.sum())
    leaves = case.leaves()
    loss = sn_ops.sn_loss(**leaves.arguments(), alpha=5.0, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaves.inputs())
    relative, absolute = judge.ROUNDING[dtype]
    bound = relative * abs(expected) + absolute + 1e-5 * abs(expected).max()
    judge.assert_within(abs(judge.numbers(gradient) - expected), bound, "entry of the gradient")


@pytest.mark.parametrize("wanted", ["feats", "candidates", "both", "neither"])
def test_gradient_goes_where_it_is_asked_for(backend: str, wanted: str) -> None:
    """Asking for one gradient does not change it, and nothing else receives one."""
    case = case_of("bank-33-65x100-k1-tensor").on(backend)
    assert case.candidates is not None
    both = case.leaves()
    expected = torch.autograd.grad(sn_ops.sn_loss(**both.arguments(), backend=backend), both.inputs())
    feats = case.feats.clone().requires_grad_(wanted in ("feats", "both"))
    candidates = case.candidates.clone().requires_grad_(wanted in ("candidates", "both"))
    loss = sn_ops.sn_loss(**replace(case, feats=feats, candidates=candidates).arguments(), backend=backend)
    assert loss.requires_grad == (wanted != "neither")
    if loss.requires_grad:
        loss.backward()
    for leaf, gradient in zip((feats, candidates), expected, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            assert leaf.grad.equal(gradient)


def test_bank_that_is_the_batch_itself(backend: str) -> None:
    """feats also passed as candidates with self_index=0 is the self case, both halves of the gradient adding up."""
    case = case_of("self-63x200-ids30-k10").on(backend)
    feats = case.feats.clone().requires_grad_()
    own = sn_ops.sn_loss(feats, case.labels, backend=backend)
    banked = sn_ops.sn_loss(
        feats, case.labels, candidates=feats, candidate_labels=case.labels, self_index=0, backend=backend
    )
    assert own.item() == pytest.approx(banked.item(), rel=1e-6)
    (a,), (b,) = torch.autograd.grad(own, feats), torch.autograd.grad(banked, feats)
    assert float((a - b).norm()) <= 1e-5 * float(a.norm())


def test_no_grad(backend: str) -> None:
    """Under no_grad and inference_mode: the same value, no graph."""
    case = case_of("self-33x65-ids8-k10").on(backend).leaves()
    loss = sn_ops.sn_loss(**case.arguments(), backend=backend)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            quiet = sn_ops.sn_loss(**case.arguments(), backend=backend)
        assert not quiet.requires_grad and quiet.equal(loss.detach())


def test_statistics_do_not_change_the_loss(backend: str) -> None:
    case = case_of("self-33x65-ids8-k10").on(backend).leaves()
    loss = sn_ops.sn_loss(**case.arguments(), backend=backend)
    beside, stats = sn_ops.sn_loss(**case.arguments(), backend=backend, return_stats=True)
    assert isinstance(stats, sn_ops.SNStats) and beside.equal(loss)
    (a,), (b,) = (torch.autograd.grad(x, case.inputs()) for x in (loss, beside))
    assert a.equal(b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["no-positives", "none-anchors", "no-candidates", "none-anchors-but-candidates"])
def test_without_valid_anchors_everything_is_zero(backend: str, name: str, reduction: str) -> None:
    """Zero, never NaN, with a graph that can be run backward; statistics are 0 where undefined."""
    case = case_of(name).on(backend).leaves()
    loss, stats = sn_ops.sn_loss(**case.arguments(), reduction=reduction, backend=backend, return_stats=True)
    assert not loss.any() and loss.shape == ((case.feats.shape[0],) if reduction == "none" else ())
    assert [float(x) for x in stats] == [0.0] * 5
    loss.sum().backward()
    for leaf in case.inputs():
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any()


def test_gradients_accumulate_through_a_network(backend: str) -> None:
    """The chain rule: a linear map and a normalisation in front, a factor behind."""
    case = case_of("self-33x65-ids8-k10").to(torch.float64).on(backend)
    matrix = on(backend, torch.randn(65, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    matrix.requires_grad_()

    def loss(m: torch.Tensor) -> torch.Tensor:
        feats = torch.nn.functional.normalize(case.feats @ m, dim=1)
        return 3 * sn_ops.sn_loss(feats, case.labels, alpha=5.0, backend=backend) ** 2

    (slope,) = torch.autograd.grad(loss(matrix), matrix)
    direction = on(backend, torch.randn(65, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    with torch.no_grad():
        difference = (loss(matrix + 1e-6 * direction) - loss(matrix - 1e-6 * direction)) / 2e-6
    # In relation to the largest slope of any direction: along one that happens to be flat, only rounding is left.
    steepest = float(slope.norm() * direction.norm())
    assert float((slope * direction).sum()) == pytest.approx(float(difference), rel=0, abs=1e-7 * steepest)
    assert abs(float(difference)) > 1e-3 * steepest


def test_inputs_are_left_alone(backend: str) -> None:
    """No argument is written to."""
    case = case_of("bank-33-65x100-k1-tensor").on(backend)
    before: dict[str, Any] = {
        name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in case.arguments().items()
    }
    leaves = case.leaves()
    sn_ops.sn_loss(**leaves.arguments(), backend=backend).backward()
    for name, x in case.arguments().items():
        assert x.equal(before[name]) if isinstance(x, torch.Tensor) else x == before[name]
