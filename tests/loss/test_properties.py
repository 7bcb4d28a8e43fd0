"""Properties of the definition, on inputs that hypothesis draws (the same ones every time)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import sn_ops
from support import judge, oracle, problems
from support.problems import Case

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def batches(draw: st.DrawFn, largest: int = 40) -> Case:
    """A batch of random rows: ties have probability next to nothing."""
    rows, dims = draw(st.integers(2, largest)), draw(st.integers(2, 70))
    identities, k, seed = draw(st.integers(1, 8)), draw(st.integers(1, 12)), draw(SEEDS)
    return problems.self_case(rows, dims, identities, k, seed=seed)


@st.composite
def grids(draw: st.DrawFn) -> Case:
    """Small integers, so that sums are exact in every type and order: ties all over, one right answer."""
    rows, dims = draw(st.integers(1, 24)), draw(st.integers(1, 5))
    values = draw(hnp.arrays(np.int64, (rows, dims), elements=st.integers(-2, 2)))
    labels = draw(hnp.arrays(np.int64, rows, elements=st.integers(0, 3)))
    return Case(torch.from_numpy(values).float(), torch.from_numpy(labels), k=draw(st.integers(1, 8)))


def has_clear_order(case: Case) -> bool:
    """No two of an anchor's distances are within rounding of each other."""
    problem = problems.to_oracle(case)
    for i in range(problem.sizes[0]):
        lower, upper = oracle.rounding_interval(
            np.sort(oracle.squared_distances(problem, i)), problem.sizes[2], problem.accumulation
        )
        if not (lower[1:] > upper[:-1]).all():
            return False
    return True


def anchor_losses(case: Case, backend: str) -> torch.Tensor:
    return sn_ops.sn_loss(**case.on(backend).arguments(), reduction="none", backend=backend).cpu()


@given(case=batches(), seed=SEEDS)
def test_permuting_the_batch_permutes_the_result(backend: str, case: Case, seed: int) -> None:
    """Without ties, indices are only names."""
    assume(has_clear_order(case))
    rows = case.feats.shape[0]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    moved = replace(case, feats=case.feats[order], labels=case.labels[order])
    before, after = judge.neighbors_of(case, backend), judge.neighbors_of(moved, backend)
    names = torch.cat([order, torch.tensor([-1])])  # new index -> old index; -1 stays
    assert names[after.indices].equal(before.indices[order])
    assert names[after.nearest_positive].equal(before.nearest_positive[order])
    assert names[after.farthest_positive].equal(before.farthest_positive[order])
    assert after.is_positive.equal(before.is_positive[order])
    torch.testing.assert_close(anchor_losses(moved, backend), anchor_losses(case, backend)[order])


@given(case=grids())
def test_ties_are_decided_by_index(backend: str, case: Case) -> None:
    found = judge.selection_of(judge.neighbors_of(case, backend))
    exact = oracle.select(problems.to_oracle(case), case.k)
    assert (found.support == exact.support).all()
    assert (found.nearest == exact.nearest).all() and (found.farthest == exact.farthest).all()


@given(case=grids())
def test_loss_with_ties_and_duplicates(backend: str, case: Case) -> None:
    selection = judge.selection_of(judge.neighbors_of(case, backend))
    judge.check_loss(case, backend, selection, alpha=1.5, squeeze="span")


@given(case=batches(), others=st.integers(1, 30), seed=SEEDS)
def test_adding_an_anchor_changes_no_other(backend: str, case: Case, others: int, seed: int) -> None:
    """With separate candidates anchors are independent of each other."""
    bank = problems.self_case(others, case.feats.shape[1], 8, seed=seed % 10_000)
    alone = replace(case, candidates=bank.feats, candidate_labels=bank.labels)
    more = replace(
        alone,
        feats=torch.cat([case.feats[:1] * 100, case.feats, case.feats[-1:]]),
        labels=torch.cat([case.labels[-1:], case.labels, case.labels[:1]]),
    )
    for found, expected in zip(judge.neighbors_of(more, backend), judge.neighbors_of(alone, backend), strict=True):
        assert judge.same_bits(found[1:-1], expected)
    torch.testing.assert_close(anchor_losses(more, backend)[1:-1], anchor_losses(alone, backend), rtol=1e-6, atol=1e-6)


@given(case=batches(24), copies=st.integers(2, 4))
def test_copies_of_the_candidates_follow_their_originals(backend: str, case: Case, copies: int) -> None:
    """Every neighbour comes `copies` times in a row, in the order of the index."""
    assume(has_clear_order(case))
    rows = case.feats.shape[0]
    bank = replace(case, candidates=case.feats, candidate_labels=case.labels)
    repeated = replace(
        bank, candidates=case.feats.repeat(copies, 1), candidate_labels=case.labels.repeat(copies), k=case.k * copies
    )
    before, after = judge.neighbors_of(bank, backend), judge.neighbors_of(repeated, backend)
    expected = before.indices[:, :, None] + rows * torch.arange(copies)
    assert after.indices.equal(expected.reshape(rows, -1))
    assert after.nearest_positive.equal(before.nearest_positive)
    assert after.farthest_positive.equal(before.farthest_positive)


@given(case=batches(), strangers=st.integers(1, 20))
def test_far_strangers_change_nothing(backend: str, case: Case, strangers: int) -> None:
    """Rows of new identities beyond every anchor's k-th neighbour have no effect."""
    rows, dims = case.feats.shape
    far = torch.full((strangers, dims), 40.0) + torch.arange(strangers)[:, None]
    crowd = replace(
        case, feats=torch.cat([case.feats, far]), labels=torch.cat([case.labels, torch.arange(strangers) + 1000])
    )
    few = replace(case, k=min(case.k, rows - 1))
    crowd = replace(crowd, k=few.k)
    for found, expected in zip(judge.neighbors_of(crowd, backend), judge.neighbors_of(few, backend), strict=True):
        assert judge.same_bits(found[:rows], expected)
    torch.testing.assert_close(anchor_losses(crowd, backend)[:rows], anchor_losses(few, backend), rtol=1e-6, atol=1e-6)


@given(case=batches(), shift=st.integers(-(2**62), 2**62))
def test_labels_are_only_names(backend: str, case: Case, shift: int) -> None:
    """An injective renaming of the identities changes no bit."""
    renamed = replace(case, labels=case.labels * 3 + shift)
    for found, expected in zip(judge.neighbors_of(renamed, backend), judge.neighbors_of(case, backend), strict=True):
        assert judge.same_bits(found, expected)
    assert judge.same_bits(anchor_losses(renamed, backend), anchor_losses(case, backend))


@given(case=batches(), power=st.integers(-4, 20))
def test_scaling_by_a_power_of_two(backend: str, case: Case, power: int) -> None:
    """Exact in floating point (above the clamp): selection stays, and alpha times distance is what counts."""
    scaled = replace(case, feats=case.feats * 2.0**power)
    before, after = judge.neighbors_of(case, backend), judge.neighbors_of(scaled, backend)
    assert after.indices.equal(before.indices) and after.farthest_positive.equal(before.farthest_positive)
    options: dict[str, Any] = {"reduction": "none", "squeeze": "none", "backend": backend}
    a = sn_ops.sn_loss(**case.on(backend).arguments(), **options, alpha=8.0)
    b = sn_ops.sn_loss(**scaled.on(backend).arguments(), **options, alpha=8.0 * 2.0**-power)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@given(case=batches(), seed=SEEDS)
def test_gradients_of_the_self_case_sum_to_zero(backend: str, case: Case, seed: int) -> None:
    """The loss depends on differences only, so the gradients cancel."""
    leaves = case.to(torch.float64).on(backend).leaves()
    loss = sn_ops.sn_loss(**leaves.arguments(), alpha=5.0, reduction="none", backend=backend)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=loss.dtype)
    (gradient,) = torch.autograd.grad(loss, leaves.feats, upstream.to(loss))
    assert float(gradient.sum(dim=0).abs().max()) <= 1e-12 * (1 + float(gradient.abs().sum()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@given(case=batches())
def test_calls_repeat_to_the_bit(fused_backend: str, reduction: str, case: Case) -> None:
    def call() -> list[torch.Tensor]:
        leaves = case.on(fused_backend).leaves()
        loss = sn_ops.sn_loss(**leaves.arguments(), reduction=reduction, backend=fused_backend)
        return [loss.detach(), *torch.autograd.grad(loss, leaves.inputs(), torch.ones_like(loss))]

    assert all(judge.same_bits(a, b) for a, b in zip(call(), call(), strict=True))
