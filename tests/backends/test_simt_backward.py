"""The gradient's kernels on emulated threads: the same sums in the same order, however a target's edges are found and
D is cut; and right sums over any graph, as a forward would never draw it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import sn_ops
from sn_ops import ops
from support import judge, memory, problems, simt_build

simt_build.enable()
from support import simt  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SUM, NONE = 1, 2


@pytest.mark.parametrize("partition", ["never", "always", "resident"])
@pytest.mark.parametrize(
    "name", ["self-127x100-ids30-k10", "bank-129-191x16-k33-offset", "all-identical", "duplicates"]
)
def test_backward_with_and_without_lists(name: str, partition: str) -> None:
    """Edges sorted by target first, or looked for among all, or in shared memory with all rows."""
    case = problems.CASES[name]()
    grads = []
    for chosen in ("auto", partition):
        leaves = case.leaves()
        with simt.using(partition=chosen):
            loss = sn_ops.sn_loss(**leaves.arguments(), backend="simt")
            grads.append(torch.autograd.grad(loss, leaves.inputs()))
            assert simt.last_report is not None and simt.last_report.partitioned == (chosen == "always")
            assert simt.last_report.launches == (5 if chosen == "always" else 1)
            assert chosen != "resident" or simt.last_report.resident > 0
    judge.assert_same_bits(*grads)


SEARCHES = [("never", 32, width) for width in (16, 24, 32)]
RESIDENT = [*(("resident", 32, 16 * packs) for packs in (1, 2, 4, 8)), ("resident", 16, 64), ("resident", 16, 128)]
"""Threads sum 1, 2, 4, 4, 2 and 2 packs."""
LISTS = [("always", 32, 16), ("always", 32, 32), *(("always", 16, width) for width in (16, 24, 32))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["bank", "hub", "wide"])
def test_slices_of_the_backward_do_not_show(name: str, dtype: torch.dtype) -> None:
    """Slices of D of 16, 24 and 32 bytes a lane, of a warp or half of one, or of resident rows of up to 8 packs: hubs
    and ragged ends included."""
    case = {
        "bank": problems.bank_case(30, 50, 301, 8, self_kind="offset"),
        "hub": problems.self_case(90, 260, 8, k=5),
        "wide": problems.self_case(40, 530, 8, k=35),
    }[name].to(dtype)
    if name == "hub":  # the first row is everyone's nearest
        case.feats[0] = 0
    grads = []
    for partition, lanes, width in SEARCHES + LISTS + RESIDENT:
        leaves = case.leaves()
        with simt.using(partition=partition, target_lanes=lanes, lane_bytes=width, seed=lanes + width):
            loss = sn_ops.sn_loss(**leaves.arguments(), backend="simt")
            grads.append(torch.autograd.grad(loss, leaves.inputs()))
            assert simt.last_report is not None
            report = simt.last_report
            if partition == "resident":
                assert 16 * report.resident == width
            else:
                assert (report.target_lanes, report.lane_bytes) == (lanes, width)
        assert all(bool((grad != 0).any(dim=0).all()) for grad in grads[-1])
    for other in grads[1:]:
        judge.assert_same_bits(other, grads[0])


# --------------------------------------------------------------------------------------------------
# Any graph
# --------------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """Features and a support graph between them."""

    feats: Tensor
    candidates: Tensor | None
    indices: Tensor
    coefficients: Tensor
    upstream: Tensor
    reduction: int

    def gradients(self) -> tuple[Tensor, Tensor]:
        stats = torch.tensor([len(self.feats), 0, 0, 0, 0, 0], dtype=torch.float64)
        return ops.backward(
            "simt", self.upstream, self.feats, self.candidates, self.indices, self.coefficients, stats,
            self.reduction, True, self.candidates is not None,
        )  # fmt: skip

    def expected(self) -> list[Tensor]:
        """The same in float64: over a dense matrix of weights, from anchors to candidates."""
        feats = self.feats.double()
        pool = feats if self.candidates is None else self.candidates.double()
        exists = (self.indices >= 0) & (self.indices < len(pool))
        upstream = self.upstream.double()[:, None] if self.reduction == NONE else self.upstream.double()
        values = torch.where(exists, self.coefficients.double() * upstream, 0.0)
        weights = torch.zeros(len(feats), len(pool), dtype=torch.float64)
        weights.scatter_add_(1, torch.where(exists, self.indices, 0).long(), values)
        own = weights.sum(1)[:, None] * feats - weights @ pool
        incoming = weights.sum(0)[:, None] * pool - weights.T @ feats
        return [own + incoming] if self.candidates is None else [own, incoming]


def drawn(kind: str, dtype: torch.dtype, dims: int) -> Drawn:
    """Rows of every kind of edge: none, beyond the candidates, without a weight, several to one candidate. Those of the
    kind "hub" select rows 5 and 6, up to three times each, so that reverses of one own edge lie in two chunks."""
    draw = torch.Generator().manual_seed(len(kind) + dims)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    anchors, candidates, edges = {
        "few": (43, 0, 12), "hub": (330, 0, 7), "bank": (210, 30, 9), "large": (60, 0, 32), "larger": (60, 0, 70),
        "many": (600, 0, 5), "few of many": (20, 700, 6),
    }[kind]  # fmt: skip
    columns = candidates or anchors
    indices = torch.randint(-2, columns + 2, (anchors, edges), generator=draw, dtype=torch.int32)
    indices[1::7, 2:4] = indices[1::7, :1]
    indices[2::11] = 2**31 - 1
    if kind == "hub":
        indices[:, 0] = 5
        indices[::3, 3:5] = 5
        indices[7:, 1] = 6
        indices[6] = torch.tensor([8, 330, 20, 8, 21, 22, 23])
        indices[5] = 9
        incoming = (indices == 5).nonzero()[:, 0].to(torch.int32)
        at = torch.arange(64, len(incoming) // 64 * 64 + 1, 64)
        at = at[at < len(incoming)]
        split = incoming[at][incoming[at] == incoming[at - 1]][:7]
        assert len(split) >= 2
        indices[5, : len(split)] = split
    coefficients = torch.randn(anchors, edges, generator=draw, dtype=acc)
    coefficients[torch.rand(anchors, edges, generator=draw) < 0.2] = 0
    rows = torch.randn(anchors + columns, dims + 3, generator=draw).to(dtype)[:, :dims]
    rows = rows if dims % 2 else rows.contiguous()
    return Drawn(
        feats=rows[:anchors],
        candidates=rows[anchors:] if candidates else None,
        indices=indices,
        coefficients=coefficients,
        upstream=torch.randn(anchors, generator=draw, dtype=acc) if kind == "few" else torch.tensor(0.7, dtype=acc),
        reduction=NONE if kind == "few" else SUM,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        ("few", 1), ("few", 272), ("few", 533), ("hub", 40), ("hub", 264), ("hub", 131), ("bank", 96), ("bank", 67),
        ("large", 136), ("large", 35), ("larger", 288), ("larger", 9), ("many", 16), ("few of many", 130),
    ],
)  # fmt: skip
def test_any_graph(kind: str, dims: int, dtype: torch.dtype) -> None:
    """Right, and the same bits with and without lists, from buckets of every size, in slices of every width, and of
    resident rows, where they fit: 600 targets are too many, and so are 720 rows of anchors and candidates."""
    graph = drawn(kind, dtype, dims)
    eps = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    first: list[Tensor] = []
    shifts = (0, 3, 10, 1, 0)  # of buckets
    ways = [("never", 32, 16, 0), *((*way, shift) for way, shift in zip(LISTS, shifts, strict=True))]
    ways += [("auto", 0, 0, 0), ("resident", 32, 16, 0)] if dims <= 96 else []
    ways += [("resident", 32, 64 if dims % 2 else 128, 0)]  # of repeated edges each block counts all, which takes time
    for seed, (partition, lanes, width, shift) in enumerate(ways):
        with simt.using(partition=partition, target_lanes=lanes, lane_bytes=width, bucket_shift=shift, seed=seed):
            found = list(graph.gradients())[: 1 if graph.candidates is None else 2]
            assert simt.last_report is not None
            fits = "many" not in kind
            assert partition != "resident" or (simt.last_report.resident > 0) == fits
        if first:
            judge.assert_same_bits(found, first)
            continue
        first = found
        for got, wanted in zip(found, graph.expected(), strict=True):
            bound = eps * (wanted.abs() + wanted.abs().mean() + 20)
            assert ((got.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "row_bytes", [272, 376, 384, 392, 400, 640, 648, 656, 768, 776, 784, 1280, 1296, 1304, 1328, 1536, 2304]
)
def test_slices_end_anywhere(row_bytes: int, dtype: torch.dtype) -> None:
    """24 bytes a lane are a pack of 16 and one of 8, apart: rows end within slices of 768 and of 384 bytes, among packs
    of either kind, or with them. Rows of broken packs are read element by element."""
    dims = row_bytes // dtype.itemsize
    graph = drawn("hub" if row_bytes % 32 == 16 else "bank", dtype, dims)
    first: list[Tensor] = []
    resident = RESIDENT[1::2] if row_bytes in (272, 400, 656, 1304) else []  # packs of 16 bytes alone, so fewer ends
    for seed, (partition, lanes, width) in enumerate(LISTS + SEARCHES + resident):
        with simt.using(partition=partition, target_lanes=lanes, lane_bytes=width, seed=seed):
            found = list(graph.gradients())[: 1 if graph.candidates is None else 2]
        first = first or found
        judge.assert_same_bits(found, first)
    eps = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for got, wanted in zip(first, graph.expected(), strict=True):
        assert ((got.double() - wanted).abs() <= eps * (wanted.abs() + wanted.abs().mean() + 20)).all()


@pytest.mark.parametrize("partition", ["never", "always"])
def test_rows_far_apart(partition: str) -> None:
    """Of rows 2^31 elements apart the gather finds each, where it has lists, too."""
    near = drawn("few", torch.float32, 16)
    near = replace(near, feats=near.feats[:4], indices=near.indices[:4] % 4, coefficients=near.coefficients[:4] + 1)
    near = replace(near, upstream=near.upstream[:4])
    apart = replace(near, feats=memory.far_apart(near.feats, 2**31))
    with simt.using(partition=partition):
        judge.assert_same_bits(apart.gradients()[:1], near.gradients()[:1])
