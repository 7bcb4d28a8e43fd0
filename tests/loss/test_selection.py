"""Exact selection on inputs that inexact methods get wrong, for every backend, against float64 direct sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import judge, oracle, problems

# Far apart within float32's range, so that the loss is finite and can be compared too.
JUDGED = [
    "unit-rows",
    "clusters-1e-3",
    "clusters-1e-4",
    "clusters-1e-6",
    "two-clusters",
    "collapsed",
    "outlier-in-clusters",
    "duplicate-groups",
    "bf16-exact-clusters",
    "zero-rows",
]


@pytest.mark.parametrize("name", problems.ADVERSARIAL)
def test_selection(backend: str, name: str) -> None:
    """Where it differs from the exact one, rounding in the accumulation type explains it."""
    judge.check_neighbors(problems.adversarial_case(name, 161, 72), backend)


@pytest.mark.parametrize("name", JUDGED)
def test_loss_and_gradients(backend: str, name: str) -> None:
    """For near-duplicates |x|^2 + |z|^2 - 2 x.z has no correct digit; sums of squared differences keep them all."""
    case = problems.adversarial_case(name, 120, 40, k=6)
    judge.check_loss(case, backend, judge.check_neighbors(case, backend), alpha=5.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["clusters-1e-3", "collapsed", "duplicate-groups", "small-integers", "zero-rows"])
def test_selection_in_other_types(backend: str, name: str, dtype: torch.dtype) -> None:
    """Half-precision rows of a cluster collapse to many exact ties."""
    judge.check_neighbors(problems.adversarial_case(name, 130, 65, dtype=dtype), backend)


def test_float64_resolves_what_float32_cannot(backend: str) -> None:
    """Distances that differ in the 12th digit: float64 features are not selected through float32."""
    feats = torch.zeros(30, 8, dtype=torch.float64)
    feats[1:, 0] = 1 + 1e-12 * torch.randperm(29, generator=torch.Generator().manual_seed(0)).double()
    case = problems.Case(feats, torch.arange(30) % 2, k=5)
    selection = judge.selection_of(judge.neighbors_of(case, backend))
    assert selection.support[0].tolist() == (1 + feats[1:, 0].argsort()[:5]).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "dims", "k"), [(40, 1, 6), (97, 3, 10), (130, 6, 33), (64, 70, 10), (200, 130, 128)])
def test_integer_features_are_selected_exactly(backend: str, rows: int, dims: int, k: int, dtype: torch.dtype) -> None:
    """Sums of small integers have no rounding in any order or type: one right answer, full of ties."""
    generator = torch.Generator().manual_seed(rows)
    feats = torch.randint(-2, 3, (rows, dims), generator=generator).to(dtype)
    case = problems.Case(feats, problems.random_labels(rows, 6, seed=1), k=k)
    for one in (case, replace(case, feats=feats[: rows // 3], labels=case.labels[: rows // 3],
                              candidates=feats, candidate_labels=case.labels, self_index=0)):  # fmt: skip
        found = judge.selection_of(judge.neighbors_of(one, backend))
        exact = oracle.select(problems.to_oracle(one), k)
        assert (found.support == exact.support).all()
        assert (found.nearest == exact.nearest).all() and (found.farthest == exact.farthest).all()


@pytest.mark.parametrize("dims", [100, 188])
def test_duplicates_are_ties_whatever_the_strides(backend: str, dims: int) -> None:
    """A pair's sum does not depend on where the pair stands: of two equal candidates the lower index is nearer."""
    rows = torch.randn(12, dims, generator=torch.Generator().manual_seed(dims))
    columns_first = torch.cat([rows, rows]).T.contiguous().T
    case = problems.Case(columns_first, torch.arange(24) % 3, k=23)
    places = judge.selection_of(judge.neighbors_of(case, backend)).support.argsort(1)  # the anchor itself is absent
    for anchor in range(24):
        others = [candidate for candidate in range(24) if candidate != anchor]
        place = dict(zip(others, places[anchor].tolist(), strict=True))
        assert all(place[c] < place[c + 12] for c in range(12) if anchor not in (c, c + 12)), anchor
