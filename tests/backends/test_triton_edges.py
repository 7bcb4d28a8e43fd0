"""What the Triton kernels do at the edges of memory: rows that 32-bit offsets do not reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import sn_ops
from sn_ops.triton import tuning
from support import judge, memory, problems
from support.backends import require
from support.problems import Case


def ordinary(case: Case) -> Case:
    return case


def wide(case: Case) -> Case:
    return case.to(torch.float64)


def half(case: Case) -> Case:
    return case.to(torch.bfloat16)


def huge(case: Case) -> Case:
    """Rows whose norm is above what is screened: all of them go to the fallback."""
    scale = 2.0**33
    candidates = None if case.candidates is None else case.candidates * scale
    return replace(case, feats=case.feats * scale, candidates=candidates)


def screened_from(monkeypatch: pytest.MonkeyPatch, candidates: int) -> None:
    """Batches of so many candidates are screened, with their own plan."""
    monkeypatch.setattr(tuning, "_LEAST_CANDIDATES", candidates)


PATHS = {
    "direct": (False, ordinary),
    "sorted": (False, wide),
    "screened": (True, ordinary),
    "screened-half": (True, half),
    "fallback": (True, huge),
}


@pytest.mark.parametrize(
    ("path", "bank", "stride"),
    [*((path, bank, 2**30 + 32) for path in PATHS for bank in (False, True)), ("direct", False, 2**31)],
)
def test_rows_that_32_bits_do_not_reach(monkeypatch: pytest.MonkeyPatch, path: str, bank: bool, stride: int) -> None:
    """Offsets of rows have 64 bits in every kernel, whether the stride alone fits 32 bits or not."""
    require("triton")
    if not tuning.INTERPRETED:
        pytest.skip("a GPU has no memory that does not exist")
    screened, made = PATHS[path]
    if screened:
        screened_from(monkeypatch, 64)
    case = made(problems.bank_case(5, 66, 64, 9, k=1, seed=2) if bank else problems.self_case(66, 64, 9, k=1, seed=1))
    pool = case.feats if case.candidates is None else case.candidates
    if not bank:  # rows that are all as far from each other, but one: everybody's neighbour, with chunks of edges
        pool.copy_(torch.nn.functional.normalize(torch.randn(pool.shape), dim=1) * pool[0].norm())
        pool[7] *= 2.0**-6
    plan = tuning.screen_plan(len(case.feats), len(pool), 64, 1, path == "sorted")
    assert (plan is not None) == screened
    apart = replace(
        case, feats=memory.far_apart(case.feats, stride),
        candidates=None if case.candidates is None else memory.far_apart(case.candidates, stride),
    )  # fmt: skip
    results: list[list[Tensor]] = []
    usual = tuning.gradient_plan
    for each in (case, apart):
        leaves = each.leaves()
        found = [*judge.neighbors_of(each, "triton")]
        for by_target in (False, True):
            rows = 4 if by_target else 1
            monkeypatch.setattr(
                tuning, "gradient_plan", lambda *a, r=rows: replace(usual(*a), sorted=r > 1, rows=r, chunk=16)
            )
            loss = sn_ops.sn_loss(**leaves.arguments(), backend="triton")
            found += [loss.detach(), *torch.autograd.grad(loss, leaves.inputs())]
        results.append(found)
    assert (results[0][-1] != 0).any()
    judge.assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("where", ["feats", "candidates"])
@pytest.mark.parametrize("path", ["direct", "sorted", "screened", "screened-half"])
def test_a_nan_that_32_bits_do_not_reach(monkeypatch: pytest.MonkeyPatch, path: str, where: str) -> None:
    """A loss without NaN would say that it was not seen in the last row."""
    require("triton")
    if not tuning.INTERPRETED:
        pytest.skip("a GPU has no memory that does not exist")
    screened, made = PATHS[path]
    if screened:
        screened_from(monkeypatch, 64)
    case = made(problems.bank_case(66, 66, 40, 9, k=1, seed=2))
    assert case.candidates is not None
    feats, candidates = case.feats.clone(), case.candidates.clone()
    (feats if where == "feats" else candidates)[-1, -1] = torch.nan
    stride = 2**30 + 32
    case = replace(case, feats=memory.far_apart(feats, stride), candidates=memory.far_apart(candidates, stride))
    assert sn_ops.sn_loss(**case.arguments(), backend="triton").isnan()


def test_listed_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges that every program looks through in parts give the gradient that sorted ones give, bit for bit."""
    case = problems.self_case(40, 20, 9, k=4)
    usual = tuning.gradient_plan
    found = []
    for by_target, chunk in ((True, 4096), (False, 16), (False, 256)):
        monkeypatch.setattr(
            tuning, "gradient_plan",
            lambda *a, s=by_target, c=chunk: replace(usual(*a), sorted=s, rows=4 if s else 1, chunk=c),
        )  # fmt: skip
        leaves = case.on("triton").leaves()
        found.append(torch.autograd.grad(sn_ops.sn_loss(**leaves.arguments(), backend="triton"), leaves.inputs()))
    for other in found[1:]:
        judge.assert_same_bits(other, found[0])
