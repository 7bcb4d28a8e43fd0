"""The Triton backend's small batches: lists merged from segments, edges listed instead of sorted, NaN found by the
search itself, half-precision rows at aligned places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sn_ops import ops
from sn_ops.triton import tuning
from sn_ops.triton.batch import padded
from support import fresh_python, judge, problems
from support.problems import Case

ROOT = Path(__file__).resolve().parents[2]


def graph_of(case: Case, reduction: int = 0) -> Any:
    case = case.on("triton")
    offset = 0 if case.candidates is None else -1
    return ops.forward(
        "triton", case.feats, case.labels, case.candidates, case.candidate_labels, None, offset,
        case.k, 5.0, 0.1, 0, reduction, True,
    )  # fmt: skip


def gradients_of(case: Case, graph: Any, upstream: torch.Tensor, reduction: int) -> tuple[torch.Tensor, torch.Tensor]:
    case = case.on("triton")
    return ops.backward(
        "triton", upstream.to(graph.value), case.feats, case.candidates, graph.indices, graph.coefficients,
        graph.stats, reduction, True, case.candidates is not None,
    )  # fmt: skip


def planned(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any]) -> None:
    """Plans of this name are changed before they are used."""
    usual = getattr(tuning, name)
    monkeypatch.setattr(tuning, name, lambda *arguments, **named: change(usual(*arguments, **named)))


# ---- selections -----------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [2, 3, 7, 16])
def test_lists_of_segments_are_merged(monkeypatch: pytest.MonkeyPatch, segments: int) -> None:
    """Duplicates lie in different segments: the lower index comes first, of the support set, near and far."""
    rows = torch.nn.functional.normalize(torch.randn(17, 24, generator=torch.Generator().manual_seed(5)), dim=1)
    case = Case(rows[torch.arange(140) % 17], torch.arange(140) % 17 % 5, k=11)
    expected = graph_of(case, 2)

    def cut(plan: tuning.SearchPlan) -> tuning.SearchPlan:
        size = tuning.cdiv(tuning.cdiv(140, segments), 16) * 16
        return replace(plan, rows=4, columns=16, segments=tuning.cdiv(140, size), segment_size=size)

    planned(monkeypatch, "search_plan", cut)
    for name, a, b in zip(expected._fields, graph_of(case, 2), expected, strict=True):
        assert judge.same_bits(a, b), name


def test_plans_of_small_batches() -> None:
    """Tiles fit the lists and the registers, every candidate has one segment, and no GPU is left idle."""
    compiled = fresh_python.run(
        "-c",
        """
from sn_ops.triton.tuning import cdiv, search_plan
for n in (1, 8, 64, 100, 128, 256, 500, 1000):
    for m in (0, 1, 63, n, 1023, 8191):
        for k in (1, 2, 3, 10, 16, 17, 33, 64, 65, 128):
            for one_section in (True, False):
                plan = search_plan(n, m, min(k, max(m, 1)), False, False, one_section)
                pairs = plan.rows * plan.columns
                assert plan.columns % plan.list_size == 0 and pairs <= 64 * plan.warps, plan
                assert plan.segments * plan.segment_size >= m > (plan.segments - 1) * plan.segment_size or m == 0, plan
                assert plan.segments * plan.list_size <= 2048 and plan.segments <= 32, "what the loss kernel merges"
                if n >= 64 and m >= 100 and k <= 16:
                    assert cdiv(n, plan.rows) * plan.segments >= 64, plan
""",
        TRITON_INTERPRET="0",
    )
    assert compiled.returncode == 0, compiled.stderr


# ---- NaN and Inf ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dense", [False, True])
def test_one_bad_value_anywhere_poisons(monkeypatch: pytest.MonkeyPatch, dense: bool, value: float) -> None:
    """In the first and last anchor and candidate, column, segment and strip; every anchor's loss is NaN."""
    if dense:
        monkeypatch.setattr(tuning, "MAX_LISTED_K", 0)
        monkeypatch.setattr(tuning, "DENSE_PAIRS", 1000)
    planned(
        monkeypatch, "search_plan",
        lambda plan: replace(plan, rows=4, columns=16, segments=5, segment_size=16, list_size=min(16, plan.list_size)),
    )  # fmt: skip
    case = problems.bank_case(37, 70, 21, 9, 6, self_kind="none")
    assert graph_of(case, 2).value.isfinite().all()
    assert case.candidates is not None
    for row in (0, 36):
        feats = case.feats.clone()
        feats[row, 20 * (row > 0)] = value
        found = graph_of(replace(case, feats=feats), 2)
        assert found.value.isnan().all() and found.stats[5].isnan()
    for row in (0, 15, 16, 69):
        pool = case.candidates.clone()
        pool[row, 20 * (row > 0)] = value
        found = graph_of(replace(case, candidates=pool), 2)
        assert found.value.isnan().all() and found.stats[5].isnan()


def test_rows_that_meet_nobody_poison() -> None:
    """Candidates without anchors, and anchors without candidates."""
    none, labels, one = torch.zeros(0, 4), torch.zeros(1, dtype=torch.int64), torch.full((1, 4), float("nan"))
    for anchors, pool in ((one, none), (none, one)):
        case = Case(anchors, labels[: len(anchors)], pool, labels[: len(pool)], k=2)
        assert graph_of(case).value.isnan()


def test_far_rows_poison_nothing() -> None:
    """Finite rows whose distance overflows look as NaN does until their values are looked at."""
    case = problems.self_case(24, 8, 5, k=4)
    feats = case.feats.clone()
    feats[3] = 3e38
    found = graph_of(replace(case, feats=feats), 2)
    assert found.stats[5] == 0 and not found.value.isnan().any()


# ---- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("banked", [False, True])
def test_listed_and_sorted_edges_give_one_gradient(
    monkeypatch: pytest.MonkeyPatch, banked: bool, dtype: torch.dtype
) -> None:
    """To the bit, where no chunk of sorted edges ends within a row's: the sums come in one order."""
    # Every anchor lists every candidate of the bank.
    case = problems.bank_case(30, 41, 19, 6, 41, self_kind="none") if banked else problems.self_case(40, 19, 6, k=5)
    feats = case.feats.clone()
    feats[7] = feats.mean(dim=0)
    case = replace(case, feats=feats).to(dtype)
    upstream = torch.linspace(-2, 3, case.feats.shape[0])
    for reduction in (0, 1, 2):
        graph = graph_of(case, reduction)
        factor = upstream if reduction == 2 else torch.tensor(1.7)
        found = []
        for listed in (True, False):
            with monkeypatch.context() as patch:
                change = partial(replace, rows=1, chunk=64 if listed else 4096, sorted=not listed)
                planned(patch, "gradient_plan", change)
                found.append(gradients_of(case, graph, factor, reduction))
        for a, b in zip(*found, strict=True):
            assert judge.same_bits(a, b)
            assert a.isfinite().all() and (a.numel() == 0 or a.abs().sum() > 0)


def test_many_edges_are_sorted() -> None:
    """Looking through all edges for each row grows with their number times the rows."""
    compiled = fresh_python.run(
        "-c",
        """
from sn_ops.triton.tuning import gradient_plan
assert not gradient_plan(128, 128, 2048, 12, 4).sorted and not gradient_plan(256, 256, 2048, 12, 4).sorted
assert gradient_plan(1000, 1000, 16384, 3, 4).sorted
assert gradient_plan(1024, 1024, 2048, 12, 4).sorted and gradient_plan(64, 65536, 2048, 12, 4).sorted
for anchors, candidates, edges in ((256, 256, 32), (340, 340, 12), (700, 700, 12), (8, 5000, 130), (1000, 300, 12)):
    plan = gradient_plan(anchors, candidates, 512, edges, 2)
    few = anchors * edges <= 8192 and 2 * candidates * anchors * edges <= 1 << 24
    assert plan.sorted or (few and plan.rows == 1), plan
""",
        TRITON_INTERPRET="0",
    )
    assert compiled.returncode == 0, compiled.stderr


# ---- half precision off 16 elements -----------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 15, 48, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_where_half_precision_rows_lie_changes_no_bit(dtype: torch.dtype, dims: int) -> None:
    """Packed, apart, and off 16 bytes: copied or not, the same selection, loss and gradient."""
    case = problems.self_case(45, dims, 9, k=6).to(dtype)
    memory = torch.zeros(45 * 128 + 8, dtype=dtype)
    found = []
    for stride, offset in ((dims, 0), (128, 0), (113, 0), (128, 3)):
        feats = memory[offset:].as_strided((45, dims), (stride, 1))
        feats.copy_(case.feats)
        there = padded(feats)
        assert there.stride(0) % 16 == there.data_ptr() % 16 == there.shape[1] % 16 == 0
        assert (stride, offset, dims % 16) != (128, 0, 0) or there is feats, "copied for nothing"
        moved = replace(case, feats=feats)
        graph = graph_of(moved)
        found.append((*graph, *gradients_of(moved, graph, torch.tensor(0.7), 0)))
    for other in found[1:]:
        assert all(judge.same_bits(a, b) for a, b in zip(other, found[0], strict=True))


def test_half_precision_is_never_read_two_bytes_at_a_time() -> None:
    """Whatever D and the strides are, each kernel that reads half-precision rows is told that 16 divides both."""
    compiled = fresh_python.run(
        "-c",
        f"""
import sys
sys.path.insert(0, {str(ROOT / ".ci")!r})
import torch, triton_launches
from sn_ops.triton import operators
launches = {{}}
with triton_launches.recorded(launches):
    for n, m, d, apart in ((128, 0, 100, 0), (128, 0, 112, 5), (90, 300, 200, 0), (8192, 0, 1000, 0), (64, 8192, 77, 3)
                           ):
        for dtype in (torch.float16, torch.bfloat16):
            def rows(n):
                return torch.empty((n, d + apart), dtype=dtype, device="meta")[:, :d]
            def labels(n):
                return torch.empty(n, dtype=torch.int64, device="meta")
            bank = (rows(m), labels(m)) if m else (None, None)
            out = operators.forward(rows(n), labels(n), *bank, None, 0, 10, 50.0, 0.1, 0, 0, False)
            operators.backward(out[0], rows(n), bank[0], out[1], out[2], out[6], 0, True, m > 0)
readers = 0
for launch in launches:
    signature = dict(launch.signature)
    halves = [name for name in ("gX", "gZ", "gA", "gB") if signature.get(name) in ("*fp16", "*bf16")]
    if halves:
        readers += 1
        strides = ("x_stride", "z_stride", "a_stride", "b_stride")
        lengths = [name for name in signature if name in ("D", "depth", *strides)]
        lengths = [name for name in lengths if name != "D" or "depth" not in signature]
        assert set(halves + lengths) <= set(launch.aligned), launch
assert readers > 20, readers
""",
        TRITON_INTERPRET="0",
    )
    assert compiled.returncode == 0, compiled.stderr
