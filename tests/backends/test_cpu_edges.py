"""Where the CPU backend's worst cases are: rows that its bounds are made for, and lists too long for one strip."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from types import ModuleType

import pytest
import torch

import sn_ops
from support import judge, oracle, problems
from support.problems import Case

SCREENED = ("screen", "tiles", "forms", "bytes", "byte-rows")


def lopsided_case(dims: int, k: int, middle: float = 131.0, step: float = 1.0, first: float = 96.0) -> Case:
    """Rows whose columns are alike, so that the screening's copy errs the same way in each of them.

    Values are whole multiples of 2^-7. An anchor of `middle` in each column is as far from candidates `step` below as
    from those `step` above but for the change of a few columns, which is far less than the error of the copy: a part of
    a step in every column. Each row has a negative, so that there is nothing to centre.
    """
    sizes = ((6, middle), (k, middle - step), (3 * k, middle + step))
    anchors, near, far = (torch.full((rows, dims), value) for rows, value in sizes)
    # No two rows are alike. One more in four columns more and more: all of `far` behind all of `near`.
    for i in range(len(anchors)):
        anchors[i, 8 + i] = middle + 1
    for i in range(len(near)):
        near[i, 40 + i] = middle - step - 1
    for i in range(len(far)):
        far[i, 40 + 4 * i : 40 + 4 * i + 4] = middle + step + 1
    both = [torch.cat([rows, -rows]) / 128.0 for rows in (anchors, torch.cat([near, far]))]
    for rows in both:
        rows[:, 0] = torch.sign(rows[:, 0]) * first
    feats, candidates = (rows.to(torch.bfloat16) for rows in both)
    assert torch.equal(feats.float(), both[0])
    assert torch.equal(candidates.float(), both[1])
    labels, candidate_labels = torch.arange(len(feats)) % 3, torch.arange(len(candidates)) % 3
    return Case(feats, labels, candidates, candidate_labels, k=k)


@pytest.mark.parametrize("dims", [2048, 4096])
def test_copies_that_all_round_one_way(core: ModuleType, dims: int) -> None:
    """The bound has to cover the rounding of the copy here, which would decide the selection."""
    case = lopsided_case(dims, k=10)
    rows = list(range(case.feats.shape[0]))
    expected = oracle.select_in_documented_order(problems.to_oracle(case), case.k, rows)
    for capability, path in product(core.cpu_capabilities(), ("direct", *SCREENED)):
        core.set_cpu_capability(capability)
        core.set_cpu_path(path)
        chosen = judge.selection_of(judge.neighbors_of(case, "cpu"))
        for name in ("support", "nearest", "farthest"):
            assert (getattr(chosen, name) == getattr(expected, name)).all(), (capability, path, name)


@pytest.mark.parametrize("path", ["bytes", "byte-rows"])
@pytest.mark.parametrize("dims", [128, 192, 1024])
def test_bytes_that_all_round_one_way(core: ModuleType, dims: int, path: str) -> None:
    """The same for 8-bit integers, of which the first column is 127 and the others 19.375, 20 and 20.625 before."""
    case = lopsided_case(dims, k=10, middle=160.0, step=5.0, first=127.0 / 16.0)
    rows = list(range(case.feats.shape[0]))
    expected = oracle.select_in_documented_order(problems.to_oracle(case), case.k, rows)
    core.set_cpu_path(path)
    chosen = judge.selection_of(judge.neighbors_of(case, "cpu"))
    for name in ("support", "nearest", "farthest"):
        assert (getattr(chosen, name) == getattr(expected, name)).all(), name


def long_anchors_case(dims: int, unit: int, first: float, k: int = 10) -> Case:
    """Anchors twice as long as their candidates: most of a pair's error is the anchor's part of the bound.

    In units of a candidate's integers, columns of near candidates are `unit` and 3/8. Those of far ones are 5/8 above
    or, every fourth and a few more, 3/8 below: farther by what these few add, and rounded the other way. The second
    column gives all candidates one norm. `first` is the first column, which 8-bit integers are scaled by.
    """
    anchors = torch.full((6, dims), 2.0 * unit, dtype=torch.float64)
    near = torch.full((k, dims), unit + 0.375, dtype=torch.float64)
    far = torch.full((3 * k, dims), unit + 0.625, dtype=torch.float64)
    far[:, ::4] -= 1.0
    for rows, step, least in ((anchors, 1.0, 0), (near, 1.0, 0), (far, -1.0, 8)):  # no two rows are alike
        for i, row in enumerate(rows):
            row[5 : 5 + 4 * (least + i) : 4] += step
        rows[:, 0], rows[:, 1] = first, 0.0
    candidates = torch.cat([near, far])
    squares = candidates.square().sum(dim=1)
    norm = max(30500.0**2 if first == 0.0 else 0.0, float(squares.max()) + 1.0)  # of 16-bit integers
    candidates[:, 1] = (norm - squares).sqrt()
    feats, candidates = (torch.cat([rows, -rows]).float() for rows in (anchors, candidates))
    return Case(feats, torch.arange(len(feats)) % 3, candidates, torch.arange(len(candidates)) % 3, k=k)


@pytest.mark.parametrize(("dims", "unit", "first"), [(2048, 673, 0.0), (1024, 19, 127.0), (192, 19, 127.0)])
def test_anchors_longer_than_candidates(core: ModuleType, dims: int, unit: int, first: float) -> None:
    """A threshold needs the anchor's error beside those of the candidates: of 16-bit integers, then of 8-bit ones."""
    case = long_anchors_case(dims, unit, first)
    rows = list(range(case.feats.shape[0]))
    expected = oracle.select_in_documented_order(problems.to_oracle(case), case.k, rows)
    for capability, path in product(core.cpu_capabilities(), SCREENED):
        core.set_cpu_capability(capability)
        core.set_cpu_path(path)
        chosen = judge.selection_of(judge.neighbors_of(case, "cpu"))
        for name in ("support", "nearest", "farthest"):
            assert (getattr(chosen, name) == getattr(expected, name)).all(), (capability, path, name)


@pytest.mark.parametrize("columns", [[0], [0, 32], [0, 32, 64, 96], [0, 16, 32, 48, 64, 80, 96, 112]])
def test_spikes_in_rows_of_forms(core: ModuleType, columns: list[int]) -> None:
    """Columns that hold most of a row's norm meet in forms, where they must not exceed 16 bits."""
    generator = torch.Generator().manual_seed(len(columns))
    feats = 0.05 * torch.randn(200, 128, generator=generator)
    feats[:, columns] += torch.randint(0, 2, (200, len(columns)), generator=generator) * 2.0 - 1.0
    case = Case(feats, torch.arange(200) % 40, k=10)
    rows = list(range(0, 200, 3))
    expected = oracle.select_in_documented_order(problems.to_oracle(case), case.k, rows)
    core.set_cpu_path("forms")
    for capability in core.cpu_capabilities():
        core.set_cpu_capability(capability)
        chosen = judge.selection_of(judge.neighbors_of(case, "cpu"))
        for name in ("support", "nearest", "farthest"):
            assert (getattr(chosen, name)[rows] == getattr(expected, name)).all(), (capability, name)


@pytest.fixture
def flushing() -> Iterator[None]:
    """Tells this thread to take subnormal numbers for 0."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


def test_bounds_of_a_thread_that_flushes(core: ModuleType, flushing: None) -> None:
    """What the copy leaves out of a row, squared, may be subnormal, and yet decide between two candidates.

    In units of u = 2^-63, with an anchor at (a, 0): candidate 1 is at (u, 0), candidate 2 is farther by what its second
    column, 2^-49.9, adds, and 350,000 u^2. The copy of such rows has no digit of the difference.
    """
    unit, second = 2.0**-63, 2.0**-49.9
    slack = 1.01 * (2.0**-20 + (4 + 2 / 16 + 10 + 2 * (2 / 64 + 13) + 32) * 2.0**-24)  # relative, of D = 2
    feats, candidates = torch.zeros(2, 64, 2, dtype=torch.float64)
    feats[1, 1] = 1.0
    feats[2, 0] = anchor = 0.98 * unit / (2 * slack)
    candidates[1, 0] = 0.98 * unit
    candidates[2] = torch.tensor([(second * second + 350e3 * unit * unit) / (2 * anchor), second])
    case = Case(feats.float(), torch.arange(64), candidates.float(), torch.arange(64) + 99, k=1)
    found = []
    for path in ("direct", "screen", "tiles"):
        core.set_cpu_path(path)
        found.append(judge.neighbors_of(case, "cpu").indices)
    assert found[0].equal(found[1])


def test_lists_of_edges_in_several_strips() -> None:
    """12000 rows with 128 neighbours each: the edges of all rows are not listed at once. Against the definition."""
    alpha = 5.0
    feats = torch.randn(12000, 4, generator=torch.Generator().manual_seed(5)).requires_grad_()
    labels = torch.arange(12000) // 4
    loss = sn_ops.sn_loss(feats, labels, k=128, alpha=alpha, squeeze="none", reduction="sum", backend="cpu")
    (grad,) = torch.autograd.grad(loss, feats)

    found = sn_ops.support_neighbors(feats, labels, k=128, backend="cpu")
    wide = feats.detach().double().requires_grad_()
    scores = -alpha * (wide[:, None] - wide[found.indices]).norm(dim=2)
    outside = -alpha * (wide - wide[found.nearest_positive]).norm(dim=1)
    none = torch.tensor(-torch.inf, dtype=torch.float64)
    outside = torch.where(found.is_positive.any(dim=1), none, outside)[:, None]
    positive = torch.cat([torch.where(found.is_positive, scores, none), outside], dim=1)
    every = torch.cat([scores, outside], dim=1)
    (expected,) = torch.autograd.grad((every.logsumexp(dim=1) - positive.logsumexp(dim=1)).sum(), wide)
    assert ((grad.double() - expected).norm(dim=1) <= 1e-4 * (1 + expected.norm(dim=1))).all()


def test_several_strips_of_gathered_columns() -> None:
    """3000 rows with 250 neighbours each, long enough for their columns to be gathered. Against fp64."""
    feats = torch.randn(3000, 256, generator=torch.Generator().manual_seed(6))
    labels = torch.arange(3000) // 4
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = feats.to(dtype).requires_grad_()
        loss = sn_ops.sn_loss(leaf, labels, k=250, alpha=1.0, reduction="sum", backend="cpu")
        grads.append(torch.autograd.grad(loss, leaf)[0].double())
    error = (grads[0] - grads[1]).norm(dim=1)
    assert (error <= 1e-3 * (1 + grads[1].norm(dim=1))).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_one_value_that_is_not_finite(core: ModuleType, value: float) -> None:
    """Wherever it lies, on the path that looks for it while it copies the rows."""
    core.set_cpu_path("direct")
    case = problems.adversarial_case("random", 208, 70, k=5)
    labels = case.labels[:96]
    for capability in core.cpu_capabilities():
        core.set_cpu_capability(capability)
        for column in range(70):
            feats = case.feats.clone()
            row = 37 * column % 96
            feats[row, column] = value
            loss = sn_ops.sn_loss(feats[:96], labels, k=5, backend="cpu")
            assert loss.isnan(), (capability, row, column)
            bank = (case.feats[96:], case.labels[96:], feats[:96], labels)
            assert sn_ops.sn_loss(*bank[:2], candidates=bank[2], candidate_labels=bank[3], k=5, backend="cpu").isnan()
