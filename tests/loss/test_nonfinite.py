"""NaN or Inf anywhere in the input never gives a finite loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sn_ops
from support import problems
from support.backends import forced
from support.cuda_paths import AGAINST_OTHERS
from support.problems import Case, on

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def poisoned(x: Tensor, at: tuple[int, int], value: float) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


def assert_everything_nan(case: Case, backend: str, reduction: str = "mean", **options: Any) -> None:
    leaves = case.on(backend).leaves()
    loss = sn_ops.sn_loss(**leaves.arguments(), reduction=reduction, backend=backend, **options)
    assert loss.shape == ((case.feats.shape[0],) if reduction == "none" else ())
    assert loss.isnan().all(), loss
    for gradient in torch.autograd.grad(loss, leaves.inputs(), torch.ones_like(loss)):
        assert gradient.isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("at", [(0, 0), (16, 63), (32, 64)], ids=str)
@pytest.mark.parametrize("squeeze", ["span", "none"])
def test_in_feats(backend: str, at: tuple[int, int], value: float, reduction: str, squeeze: str) -> None:
    """First, middle and last element."""
    case = problems.self_case(33, 65, 8)
    assert_everything_nan(replace(case, feats=poisoned(case.feats, at, value)), backend, reduction, squeeze=squeeze)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("rows", [2, 17, 129])
def test_in_every_type(backend: str, dtype: torch.dtype, value: float, rows: int) -> None:
    case = problems.self_case(rows, 70, 1, k=3).to(dtype)
    assert_everything_nan(replace(case, feats=poisoned(case.feats, (rows - 1, 69), value)), backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("where", ["feats", "candidates"])
def test_with_a_bank(backend: str, where: str, value: float, reduction: str) -> None:
    """In the anchors or in the bank; the gradients of both show it."""
    case = problems.bank_case(9, 33, 20, 4, k=3)
    assert case.candidates is not None
    if where == "feats":
        case = replace(case, feats=poisoned(case.feats, (8, 19), value))
    elif case.candidates is not None:
        case = replace(case, candidates=poisoned(case.candidates, (32, 0), value))
    assert_everything_nan(case, backend, reduction)


DEGENERATE = {
    "zeros": lambda rows, _: rows.zero_(),
    "constant": lambda rows, constant: rows.copy_(constant.expand_as(rows)),
    "subnormal": lambda rows, _: rows.mul_(1e-40),
    "enormous": lambda rows, _: rows.mul_(1e25),
    "ordinary": lambda rows, _: rows,
}
"""What a bank may hold at the start of training, or at its end: the scale that screening takes from a sample."""
PLACES = [(0, 0), (31, 63), (32, 64), (127, 65), (128, 127), (255, 128), (256, 1), (299, 129)]
"""First and last row of a bank and of its tiles of 32, 64 and 128; first and last column, and of stages of 64."""


def degenerate_case(bank: str, *, rows: int = 300, anchors: str = "ordinary") -> Case:
    case = problems.bank_case(5, rows, 130, 3, k=3, seed=6)
    assert case.candidates is not None
    constant = case.candidates[7].clone()
    return replace(
        case,
        feats=DEGENERATE[anchors](case.feats.clone(), constant),
        candidates=DEGENERATE[bank](case.candidates.clone(), constant),
    )


@pytest.mark.parametrize("path", AGAINST_OTHERS)
@pytest.mark.parametrize(
    ("bank", "anchors"),
    [(bank, a) for bank in DEGENERATE for a in ("ordinary", "zeros") if (bank, a) != ("ordinary", "zeros")],
)
def test_in_a_degenerate_bank(kernels: str, bank: str, anchors: str, path: str) -> None:
    """Every path checks every row of the bank, whether or not the bank has a scale to screen by."""
    case = degenerate_case(bank, rows=200 if path in ("cluster", "tickets") else 300, anchors=anchors)
    assert case.candidates is not None
    last = len(case.candidates) - 1
    with forced(kernels, path):
        for place, value in zip(PLACES, (NAN, INF, -INF, NAN, INF, -INF, NAN, NAN), strict=True):
            at = (min(place[0], last), place[1])
            assert_everything_nan(replace(case, candidates=poisoned(case.candidates, at, value)), kernels)
        everywhere = replace(case, candidates=torch.full_like(case.candidates, NAN))
        assert_everything_nan(everywhere, kernels, "none")
        for at in ((0, 0), (4, 129)):
            assert_everything_nan(replace(case, feats=poisoned(case.feats, at, NAN)), kernels)


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_in_a_candidate_nobody_selects(backend: str, value: float) -> None:
    """k = 1 and every positive is near: the poisoned row is in no support set, and is nobody's positive."""
    feats = torch.tensor([[0.0, 0.0], [0.1, 0.0], [9.0, 9.0]])
    assert_everything_nan(Case(poisoned(feats, (2, 1), value), torch.tensor([0, 0, 1]), k=1), backend)
    case = Case(feats[:2], torch.tensor([0, 0]), feats, torch.tensor([0, 0, 1]), k=1)
    assert_everything_nan(replace(case, candidates=poisoned(feats, (2, 1), value)), backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_valid_anchors(backend: str, reduction: str) -> None:
    """Nothing is summed, and still the loss is not 0."""
    feats = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    assert_everything_nan(Case(poisoned(feats, (3, 3), NAN), labels), backend, reduction)
    assert_everything_nan(Case(poisoned(feats[:1], (0, 3), INF), labels[:1]), backend, reduction)
    apart = Case(feats, labels, poisoned(feats, (4, 6), INF), labels + 10)
    assert_everything_nan(apart, backend, reduction)
    assert_everything_nan(replace(apart, feats=poisoned(feats, (0, 0), NAN), candidates=feats), backend, reduction)


def test_with_nobody_on_the_other_side(backend: str) -> None:
    """No candidate, or no anchor: a non-finite value on the other side still counts."""
    one, none, labels = torch.full((1, 3), NAN), torch.empty(0, 3), torch.tensor([1])
    assert_everything_nan(Case(one, labels, none, labels[:0]), backend)
    assert_everything_nan(Case(none, labels[:0], one, labels), backend)


@pytest.mark.parametrize("wanted", ["feats", "candidates"])
@pytest.mark.parametrize("where", ["feats", "candidates"])
def test_one_gradient(backend: str, where: str, wanted: str) -> None:
    """A single requested gradient is NaN too, wherever the value is."""
    case = problems.bank_case(9, 33, 20, 4, k=3).on(backend)
    assert case.candidates is not None
    tensors: dict[str, Any] = {"feats": case.feats, "candidates": case.candidates}
    tensors[where] = poisoned(tensors[where], (2, 2), NAN)
    leaf = tensors[wanted] = tensors[wanted].clone().requires_grad_()
    loss = sn_ops.sn_loss(**replace(case, **tensors).arguments(), backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.isnan() and gradient.isnan().all()


def test_a_nan_upstream_is_not_lost(backend: str) -> None:
    """Finite inputs under a NaN gradient: anchors with edges pass it on."""
    case = problems.self_case(33, 65, 8).on(backend).leaves()
    loss = sn_ops.sn_loss(**case.arguments(), backend=backend)
    (gradient,) = torch.autograd.grad(loss, case.feats, torch.full_like(loss, NAN))
    assert gradient.isnan().any()


@pytest.mark.parametrize("upstream", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("bank", [False, True])
def test_edges_without_a_coefficient_stay_without_a_gradient(fused_backend: str, bank: bool, upstream: float) -> None:
    """The first identity is one row three times: with k = 2 its anchors know nobody but copies, at distance 0."""
    case = problems.self_case(21, 20, 4, k=2, seed=3)
    feats = torch.where((torch.arange(21) < 3)[:, None], case.feats[0], case.feats)
    case = replace(case, feats=feats, labels=torch.where(torch.arange(21) < 3, 77, case.labels))
    if bank:
        case = replace(case, candidates=case.feats, candidate_labels=case.labels, self_index=0)
    seen = []
    for value in (0.0, upstream):
        leaves = case.on(fused_backend).leaves()
        losses = sn_ops.sn_loss(**leaves.arguments(), reduction="none", backend=fused_backend)
        from_above = torch.linspace(1, 2, 21, device=losses.device)
        from_above[:3] = value
        seen.append(torch.autograd.grad(losses, leaves.inputs(), from_above))
    for zero, gradient in zip(*seen, strict=True):
        assert (gradient == zero).all() and (gradient != 0).any()


@pytest.mark.parametrize("squeeze", ["span", "support", "nearest", "none"])
@pytest.mark.parametrize("scale", [1e30, 3e38])
def test_overflow_of_a_positive(backend: str, scale: float, squeeze: str) -> None:
    """Finite inputs whose squared distance overflows float32 (at 3e38 the very difference does)."""
    feats, labels = on(backend, (torch.tensor([[scale, 0.0], [-scale, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])))
    loss = sn_ops.sn_loss(feats, labels, k=2, squeeze=squeeze, backend=backend)
    assert not loss.isfinite()


@pytest.mark.parametrize("squeeze", ["span", "none"])
def test_overflow_of_a_selected_negative(backend: str, squeeze: str) -> None:
    """A negative infinitely far is selected, as there is nobody else: e^-inf is 0, and the loss still not finite."""
    feats, labels = on(backend, (torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e30, 0.0]]), torch.tensor([0, 0, 1])))
    loss = sn_ops.sn_loss(feats, labels, k=2, squeeze=squeeze, backend=backend)
    assert not loss.isfinite()


def test_overflow_of_the_farthest_positive(backend: str) -> None:
    feats, labels = on(backend, (torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e30, 0.0]]), torch.tensor([0, 0, 0])))
    loss = sn_ops.sn_loss(feats, labels, k=1, reduction="none", backend=backend)
    assert not loss[:2].isfinite().any()


def test_overflow_of_an_unselected_candidate_is_harmless(backend: str) -> None:
    """k = 1: the far row is in nobody's support set but its own, and it is no valid anchor."""
    feats, labels = on(backend, (torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e30, 0.0]]), torch.tensor([0, 0, 1])))
    feats.requires_grad_()
    loss = sn_ops.sn_loss(feats, labels, k=1, squeeze="nearest", weight=1.0, backend=backend)
    assert loss.item() == 1.0
    (gradient,) = torch.autograd.grad(loss, feats)
    assert gradient.tolist() == [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_no_overflow_in_float64(backend: str) -> None:
    """What overflows float32 does not overflow float64."""
    feats, labels = on(
        backend, (torch.tensor([[1e30, 0.0], [-1e30, 0.0], [0.0, 1.0]], dtype=torch.float64), torch.tensor([0, 0, 1]))
    )
    loss = sn_ops.sn_loss(feats, labels, k=1, squeeze="nearest", weight=1.0, backend=backend)
    assert loss.item() == pytest.approx(52e30)  # separation 50 (2e30 - 1e30), nearest positive 2e30
