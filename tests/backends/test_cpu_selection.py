"""The CPU backend's selection is that of its documented summation order, bit for bit.

The number of threads, the instruction set, the path and the rest of the batch change nothing.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sn_ops
from support import judge, oracle, problems
from support.problems import Case

BYTES = ("bytes", "byte-rows")
PATHS = ("direct", "screen", "tiles", "forms", *BYTES)


def assert_selected(case: Case, rows: list[int], expected: oracle.Selection, what: object) -> sn_ops.SupportNeighbors:
    """`support_neighbors` gives exactly the expected rows."""
    found = judge.neighbors_of(case, "cpu")
    chosen = judge.selection_of(found)
    for name in ("support", "nearest", "farthest"):
        got, wanted = getattr(chosen, name)[rows], getattr(expected, name)
        wrong = [rows[r] for r in range(len(rows)) if (got[r] != wanted[r]).any()]
        assert not wrong, f"{what}: {name} of anchors {wrong[:5]} and {len(wrong)} in all: {got} != {wanted}"
    return found


def outputs(case: Case, reduction: str = "none") -> list[Tensor]:
    """All results of a call: loss, statistics, gradients, neighbours."""
    leaves = case.leaves()
    loss, stats = sn_ops.sn_loss(**leaves.arguments(), reduction=reduction, backend="cpu", return_stats=True)
    grads = torch.autograd.grad(loss, leaves.inputs(), torch.ones_like(loss))
    return [loss.detach(), *stats, *grads, *judge.neighbors_of(case, "cpu")]


def every_way(core: ModuleType) -> list[tuple[str, str]]:
    ways = product(core.cpu_capabilities(), PATHS)
    return [way for way in ways if way[1] not in BYTES or way[0] == "avx512_vnni"]  # others have no such products


@pytest.mark.parametrize("name", problems.ADVERSARIAL)
def test_documented_order_on_every_way(core: ModuleType, name: str) -> None:
    """Brute force in that order against each instruction set on each path; distances have the same bits too."""
    case = problems.adversarial_case(name, 331, 100, k=10)
    rows = list(range(0, 331, 3))
    expected = oracle.select_in_documented_order(problems.to_oracle(case), 10, rows)
    distances: list[Tensor] = []
    for capability, path in every_way(core):
        core.set_cpu_capability(capability)
        core.set_cpu_path(path)
        distances.append(assert_selected(case, rows, expected, (capability, path)).distances)
        assert judge.same_bits(distances[0], distances[-1]), (capability, path)


@pytest.mark.parametrize("members", [6, 30])
@pytest.mark.parametrize("name", ["clusters-1e-3", "duplicate-groups"])
def test_documented_order_where_pairs_are_shared(core: ModuleType, name: str, members: int) -> None:
    """Long rows compute the distance of two that list each other once, and so do the members of a small identity.

    Near-duplicates and equal rows are among them. An identity of 30 has blocks of pairs of its own.
    """
    case = problems.adversarial_case(name, 150, 1030, k=10)
    case = replace(case, labels=torch.arange(150) // members)
    rows = list(range(0, 150, 5))
    expected = oracle.select_in_documented_order(problems.to_oracle(case), 10, rows)
    core.set_cpu_path("screen")
    for capability in core.cpu_capabilities():
        core.set_cpu_capability(capability)
        assert_selected(case, rows, expected, capability)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["clusters-1e-3", "collapsed", "unit-rows", "duplicate-groups", "outlier-in-clusters"])
def test_documented_order_in_other_types(core: ModuleType, name: str, dtype: torch.dtype) -> None:
    """float64 sums in the same order; half types are summed in float32."""
    case = problems.adversarial_case(name, 200, 129, k=7, dtype=dtype)
    rows = list(range(0, 200, 4))
    expected = oracle.select_in_documented_order(problems.to_oracle(case), 7, rows)
    for capability, path in every_way(core):
        core.set_cpu_capability(capability)
        core.set_cpu_path(path)
        assert_selected(case, rows, expected, (capability, path))


@pytest.mark.parametrize(
    ("rows", "dims", "k"),
    [(2, 1, 1), (17, 15, 3), (49, 16, 10), (64, 63, 33), (65, 64, 10), (97, 65, 128), (129, 257, 10), (193, 2048, 10)],
)
def test_documented_order_beside_tiles(core: ModuleType, rows: int, dims: int, k: int) -> None:
    """Sizes off every tile, lane and segment."""
    case = problems.adversarial_case("clusters-1e-4" if rows > 16 else "random", rows, dims, k=k)
    every = list(range(rows))
    expected = oracle.select_in_documented_order(problems.to_oracle(case), k, every)
    for capability, path in every_way(core):
        core.set_cpu_capability(capability)
        core.set_cpu_path(path)
        assert_selected(case, every, expected, (capability, path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(
    name=st.sampled_from(sorted(problems.ADVERSARIAL)),
    pool=st.integers(30, 400),
    anchors=st.integers(1, 400),
    dims=st.one_of(st.integers(1, 140), st.sampled_from([192, 255, 256, 257, 511, 700])),
    k=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    kind=st.sampled_from(["self", "none", "offset"]),
    threads=st.integers(1, 3),
)
def test_any_shape_on_every_way(
    core: ModuleType,
    name: str,
    pool: int,
    anchors: int,
    dims: int,
    k: int,
    dtype: torch.dtype,
    kind: str,
    threads: int,
) -> None:
    """Random sizes: all ways agree in every bit, and sampled anchors are right."""
    whole = problems.adversarial_case(name, pool, dims, k=k, dtype=dtype)
    if not whole.feats.isfinite().all():  # beyond the range of half precision
        return
    case = whole
    if kind != "self":
        part = slice(0, min(anchors, pool))
        feats, labels = whole.feats[part], whole.labels[part]
        case = Case(feats, labels, whole.feats, whole.labels, 0 if kind == "offset" else None, k)
    rows = sorted({0, case.feats.shape[0] // 2, case.feats.shape[0] - 1})
    expected = oracle.select_in_documented_order(problems.to_oracle(case), k, rows)
    torch.set_num_threads(threads)
    first: sn_ops.SupportNeighbors | None = None
    for capability, path in every_way(core):
        core.set_cpu_capability(capability)
        core.set_cpu_path(path)
        found = assert_selected(case, rows, expected, (capability, path))
        first = first or found
        assert all(judge.same_bits(a, b) for a, b in zip(found, first, strict=True)), (capability, path)


@pytest.mark.parametrize("kind", ["none", "offset", "tensor"])
@pytest.mark.parametrize("name", ["clusters-1e-4", "collapsed", "unit-rows", "duplicate-groups", "norms-1e-20-to-1e18"])
def test_documented_order_with_a_bank(core: ModuleType, name: str, kind: str) -> None:
    """Anchors among other candidates, with and without themselves."""
    pool = problems.adversarial_case(name, 420, 65)
    feats, labels = pool.feats[:111], pool.labels[:111]
    self_index = {"none": None, "offset": 0, "tensor": torch.where(torch.arange(111) % 4 == 0, -1, torch.arange(111))}
    start = 111 if kind == "none" else 0
    case = Case(feats, labels, pool.feats[start:], pool.labels[start:], self_index[kind], k=12)
    rows = list(range(0, 111, 2))
    expected = oracle.select_in_documented_order(problems.to_oracle(case), 12, rows)
    for capability, path in every_way(core):
        core.set_cpu_capability(capability)
        core.set_cpu_path(path)
        assert_selected(case, rows, expected, (capability, path))


@pytest.mark.parametrize("name", ["clusters-1e-6", "two-clusters", "outlier-in-clusters", "unit-rows", "all-identical"])
def test_large_clusters_are_exact(core: ModuleType, name: str) -> None:
    """8 clusters of 256 and their like at N = 2048, sampled anchors, as the backend would choose to run it."""
    case = problems.adversarial_case(name, 2048, 96, k=10)
    rows = list(range(0, 2048, 73))
    expected = oracle.select_in_documented_order(problems.to_oracle(case), 10, rows)
    for capability in core.cpu_capabilities():
        core.set_cpu_capability(capability)
        for path in ("auto", "screen"):
            core.set_cpu_path(path)
            assert_selected(case, rows, expected, (capability, path))


@pytest.mark.parametrize("name", ["unit-rows", "clusters-1e-4", "collapsed", "duplicate-groups"])
def test_an_anchor_alone_selects_what_it_selects_in_the_batch(core: ModuleType, name: str) -> None:
    """Batches of 1 and of 7 anchors against the same candidates: same neighbours, same bits of their distances."""
    whole = problems.adversarial_case(name, 600, 65, k=10)
    together = judge.neighbors_of(whole, "cpu")
    for path in ("auto", *PATHS):
        core.set_cpu_path(path)
        for size, start in ((1, 0), (1, 299), (1, 599), (7, 64), (7, 593)):
            part = slice(start, start + size)
            alone = Case(whole.feats[part], whole.labels[part], whole.feats, whole.labels, start, k=10)
            for field, found, expected in zip(
                together._fields, judge.neighbors_of(alone, "cpu"), together, strict=True
            ):
                assert judge.same_bits(found, expected[part]), (path, size, start, field)


def test_other_rows_do_not_matter(core: ModuleType) -> None:
    """The scale and the mean of the other rows may affect the screening, never the selection."""
    case = problems.adversarial_case("clusters-1e-4", 500, 64, k=5)
    own = judge.neighbors_of(case, "cpu")
    for far in (1e6 * problems.ADVERSARIAL["random"](40, 64, 8), 1e4 + problems.ADVERSARIAL["random"](40, 64, 9)):
        for path in PATHS:
            core.set_cpu_path(path)
            feats = torch.cat([case.feats, far.float()])
            labels = torch.cat([case.labels, torch.arange(40) + 10_000])
            found = judge.neighbors_of(Case(feats, labels, k=5), "cpu")
            assert all(judge.same_bits(a[:500], b) for a, b in zip(found, own, strict=True)), path


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["unit-rows", "clusters-1e-4", "all-identical", "duplicate-groups"])
def test_same_bits_for_any_number_of_threads(core: ModuleType, name: str, path: str, reduction: str) -> None:
    """Selection, loss, gradients, statistics; also when repeated. 3 threads are more than some machines have cores."""
    case = problems.adversarial_case(name, 700, 130, k=10)
    core.set_cpu_path(path)
    torch.set_num_threads(1)
    expected = outputs(case, reduction)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        for got, wanted in zip(outputs(case, reduction), expected, strict=True):
            assert judge.same_bits(got, wanted), threads


def test_same_bits_for_any_number_of_threads_with_a_bank(core: ModuleType) -> None:
    """Few anchors, many candidates, and the reverse: what is split between threads differs."""
    pool = problems.adversarial_case("unit-rows", 900, 130, k=10)
    few = Case(pool.feats[:9], pool.labels[:9], pool.feats[9:], pool.labels[9:], k=10)
    many = Case(pool.feats[9:], pool.labels[9:], pool.feats[:9], pool.labels[:9], k=10)
    for case in (few, many):
        for path in PATHS:
            core.set_cpu_path(path)
            torch.set_num_threads(1)
            expected = outputs(case)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert all(judge.same_bits(a, b) for a, b in zip(outputs(case), expected, strict=True)), threads


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_instruction_set_is_right(core: ModuleType, dtype: torch.dtype) -> None:
    """Loss and gradients within the bounds on each, not only the selection."""
    for case in (problems.self_case(97, 129, 20), problems.bank_case(33, 65, 100, 9, 5, self_kind="tensor")):
        for capability, path in every_way(core):
            core.set_cpu_capability(capability)
            core.set_cpu_path(path)
            judge.check_loss(case.to(dtype), "cpu", judge.check_neighbors(case.to(dtype), "cpu"), reductions=())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["unit-rows", "clusters-1e-4", "collapsed", "duplicate-groups"])
def test_same_bits_on_every_way(core: ModuleType, name: str, dtype: torch.dtype) -> None:
    """Loss, statistics and gradients too: a result can be reproduced on another machine."""
    case = problems.adversarial_case(name, 300, 100, dtype=dtype)
    expected: list[Tensor] = []
    for capability, path in every_way(core):
        core.set_cpu_capability(capability)
        core.set_cpu_path(path)
        found = outputs(case)
        expected = expected or found
        assert all(judge.same_bits(a, b) for a, b in zip(found, expected, strict=True)), (capability, path)


def test_misaligned_and_strided_rows(core: ModuleType) -> None:
    """Rows that start anywhere, at any distance from each other, select as contiguous ones do."""
    case = problems.adversarial_case("clusters-1e-4", 150, 67, k=5)
    expected = outputs(case)
    for offset, padding in ((1, 0), (3, 5), (0, 61)):
        store = torch.full((150, offset + 67 + padding), float("nan"))
        feats = store[:, offset : offset + 67]
        feats.copy_(case.feats)
        for capability, path in every_way(core):
            core.set_cpu_capability(capability)
            core.set_cpu_path(path)
            found = outputs(replace(case, feats=feats))
            assert all(judge.same_bits(a, b) for a, b in zip(found[-5:], expected[-5:], strict=True))
