"""First and second derivatives against finite differences, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import sn_ops
from support import oracle, problems
from support.backends import EMULATED
from support.problems import Case


def _case(kind: str, backend: str) -> Case:
    """Small, well separated: a step of 1e-6 changes no selection."""
    if kind == "self":
        return problems.self_case(9, 4, 3, 3, seed=8).to(torch.float64).on(backend)
    return problems.bank_case(5, 8, 4, 3, 3, self_kind=kind, seed=8).to(torch.float64).on(backend)


def _loss(case: Case, **options: Any) -> Callable[..., torch.Tensor]:
    def call(feats: torch.Tensor, candidates: torch.Tensor | None = None) -> torch.Tensor:
        moved = replace(case, feats=feats, candidates=candidates)
        return sn_ops.sn_loss(**moved.arguments(), alpha=3.0, weight=0.7, **options)

    return call


def gradcheck(case: Case, backend: str, **options: Any) -> None:
    """Gradients against finite differences: of every element, or along random directions where calls are slow.

    An error in one element is a small part of a direction: the tolerances are tighter there.
    """
    loss = _loss(case, backend=backend, **options)
    fast: dict[str, Any] = {"fast_mode": True, "rtol": 1e-6, "atol": 1e-8} if backend in EMULATED else {}
    assert torch.autograd.gradcheck(loss, tuple(case.inputs()), **fast)


@pytest.mark.parametrize(
    ("kind", "squeeze", "reduction"),
    [
        *itertools.product(["self", "tensor"], oracle.SQUEEZES, ["none"]),
        *itertools.product(["self", "none", "offset"], ["span", "support"], ["mean", "sum"]),
    ],
)
def test_gradcheck(backend: str, kind: str, squeeze: str, reduction: str) -> None:
    gradcheck(_case(kind, backend).leaves(), backend, squeeze=squeeze, reduction=reduction)


@pytest.mark.parametrize("k", [1, 2, 20])
def test_gradcheck_of_other_sizes_of_support(backend: str, k: int) -> None:
    """k = 1 leaves anchors whose nearest positive comes from outside; k = 20 takes everybody."""
    for kind in ("self", "tensor"):
        gradcheck(replace(_case(kind, backend), k=k).leaves(), backend)


@pytest.mark.parametrize("squeeze", oracle.SQUEEZES)
@pytest.mark.parametrize("kind", ["self", "tensor"])
def test_gradgradcheck_of_the_reference(kind: str, squeeze: str) -> None:
    case = _case(kind, "reference").leaves()
    assert torch.autograd.gradgradcheck(_loss(case, squeeze=squeeze, backend="reference"), tuple(case.inputs()))


@pytest.mark.parametrize("kind", ["self", "tensor"])
def test_second_derivatives_of_fused_backends_are_refused(fused_backend: str, kind: str) -> None:
    """A clear error that names the way out, never a wrong number."""
    case = _case(kind, fused_backend).leaves()
    loss = _loss(case, backend=fused_backend)(*case.inputs())
    first = torch.autograd.grad(loss, case.inputs(), create_graph=True)
    penalty = torch.stack([x.square().sum() for x in first]).sum()
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(penalty, case.inputs(), retain_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        penalty.backward()


def test_create_graph_does_not_change_the_gradient(backend: str) -> None:
    case = _case("self", backend).leaves()
    loss = _loss(case, backend=backend)
    plain = torch.autograd.grad(loss(case.feats), case.feats)[0]
    linked = torch.autograd.grad(loss(case.feats), case.feats, create_graph=True)[0]
    torch.testing.assert_close(plain, linked.detach(), rtol=1e-12, atol=1e-12)


def test_backward_twice_through_a_kept_graph(backend: str) -> None:
    case = _case("self", backend).leaves()
    loss = _loss(case, backend=backend)(case.feats)
    first = torch.autograd.grad(loss, case.feats, retain_graph=True)[0]
    assert torch.autograd.grad(loss, case.feats)[0].equal(first)


def test_an_input_changed_in_between_is_noticed(fused_backend: str) -> None:
    """Backward reads the features again: autograd must know of it."""
    case = _case("self", fused_backend)
    leaf = case.feats.clone().requires_grad_()
    feats = leaf * 1
    loss = _loss(case, backend=fused_backend)(feats)
    feats.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
