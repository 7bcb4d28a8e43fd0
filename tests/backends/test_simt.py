"""The CUDA kernels on emulated threads: every path against the oracle and, bit for bit, against the others.

The backend "simt" runs the whole semantic suite on the path that the plan chooses; small problems end on two of them.
Here every path is forced, under several schedules of threads, errors of the tensor core's products and models of real
tensor cores.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import sn_ops
from support import judge, oracle, problems, simt_build
from support.cuda_paths import AGAINST_OTHERS, PATHS
from support.problems import Case

simt_build.enable()
from support import simt  # noqa: E402

ADVERSARIAL = [name for name in problems.ADVERSARIAL if name not in ("random", "signs", "bf16-exact")]


def direct_sums(case: Case) -> sn_ops.SupportNeighbors:
    """Neighbours by the direct path, which the suite of all backends holds against the oracle."""
    with simt.using(path="direct"):
        return judge.neighbors_of(case, "simt")


@cache
def of_the_suite(name: str) -> tuple[Case, sn_ops.SupportNeighbors]:
    """A case of the semantic suite, and its neighbours by direct sums."""
    case = problems.CASES[name]()
    return case, direct_sums(case)


@cache
def adversarial(name: str, rows: int, dims: int) -> tuple[Case, sn_ops.SupportNeighbors]:
    """An adversarial batch, and its neighbours by direct sums."""
    case = problems.adversarial_case(name, rows, dims)
    return case, direct_sums(case)


def check_path(case: Case, path: str) -> None:
    """The last call took the path, unless the path cannot serve the case."""
    assert simt.last_report is not None
    if simt.last_report.path == path:
        return
    n, d = case.feats.shape
    m = n if case.candidates is None else case.candidates.shape[0]
    empty = min(n, m, d) == 0
    wide = path in ("dense", "screen", "bank") and (case.feats.dtype == torch.float64 or min(case.k, m) > 128)
    tall = path in ("cluster", "tickets", "square") and (max(n, m) > 256 or case.feats.dtype == torch.float64)
    foreign = path == "bank" and (case.candidates is None or n > 256 or case.feats.dtype != torch.float32)
    square = path == "square" and case.candidates is not None
    assert empty or wide or tall or foreign or square, f"{path} did not serve {n} x {m} x {d}"


def check(case: Case, expected: sn_ops.SupportNeighbors, path: str, **settings: Any) -> simt.Report:
    """The path takes the case if it can, and selects as direct sums do, bit for bit. What it counted is returned."""
    with simt.using(path=path, **settings):
        found = judge.neighbors_of(case, "simt")
        check_path(case, path)
    judge.assert_same_bits(found, expected)
    assert simt.last_report is not None
    return simt.last_report


@pytest.mark.parametrize("path", [path for path in PATHS if path != "direct"])
@pytest.mark.parametrize("name", problems.CASES)
def test_every_path_selects_what_direct_sums_do(name: str, path: str) -> None:
    """All cases of the semantic suite."""
    check(*of_the_suite(name), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("squeeze", oracle.SQUEEZES)
@pytest.mark.parametrize("name", ["self-33x65-ids8-k10", "bank-33-65x100-k1-tensor", "duplicates", "one-identity"])
def test_loss_on_every_path(name: str, squeeze: str, path: str) -> None:
    """Loss, gradients and statistics against the oracle."""
    case = problems.CASES[name]()
    with simt.using(path=path):
        judge.check_loss(case, "simt", judge.check_neighbors(case, "simt"), squeeze=squeeze, reductions=("mean",))


@pytest.mark.parametrize("mma_error", ["none", "random", "plus", "minus", "extreme"])
@pytest.mark.parametrize("path", ["dense", "screen"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_no_error_within_the_bound_shows(name: str, path: str, mma_error: str) -> None:
    """Products as wrong as the bound allows, on inputs made to defeat it."""
    report = check(*adversarial(name, 150, 70), path, mma_error=mma_error, seed=3, mma_seed=5)
    assert report.path == path


def faint(case: Case, dtype: torch.dtype) -> Case:
    """The case with rows of four sizes: ordinary ones, faint ones, such as have subnormal elements beside normal ones,
    and subnormal ones (of bfloat16, or of the half-precision copies of float)."""
    scales = {torch.float16: (0, -7, -14, -18), torch.bfloat16: (0, -9, -22, -129), torch.float32: (0, -8, -24, -32)}

    def scaled(feats: torch.Tensor) -> torch.Tensor:
        exponents = torch.tensor(scales[dtype], dtype=torch.float64)[torch.arange(len(feats)) % 4]
        return (feats.double() * torch.exp2(exponents)[:, None]).to(dtype)

    candidates = None if case.candidates is None else scaled(case.candidates)
    return replace(case, feats=scaled(case.feats), candidates=candidates)


FAINT = {
    "float16": faint(problems.self_case(150, 70, 30, seed=5), torch.float16),
    "bfloat16": faint(problems.self_case(150, 70, 30, seed=6), torch.bfloat16),
    "float32": faint(problems.self_case(150, 70, 30, seed=7), torch.float32),
    "float16-bank": faint(problems.bank_case(30, 170, 40, 30, seed=8), torch.float16),
    "float32-bank": faint(problems.bank_case(30, 170, 40, 30, seed=9), torch.float32),
    "one-sided": replace(
        problems.bank_case(30, 170, 40, 30, seed=10).to(torch.float16),
        feats=(problems.embeddings(30, 40, problems.random_labels(30, 30, seed=10), seed=10) * 2.0**-18).half(),
    ),
}
faint_sums = cache(lambda name: direct_sums(FAINT[name]))
ARITHMETIC = {
    "hopper": {"mma_model": "hopper"},
    "ampere": {"mma_model": "ampere"},
    "plus": {"mma_error": "plus"},
    "minus": {"mma_error": "minus"},
}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("path", ["dense", "screen", "bank"])
@pytest.mark.parametrize("name", FAINT)
def test_subnormal_rows(name: str, path: str, arithmetic: str) -> None:
    """A tensor core aligns products of subnormal numbers by exponents larger than theirs: that may not show either."""
    check(FAINT[name], faint_sums(name), path, seed=4, **ARITHMETIC[arithmetic])


@pytest.mark.parametrize("model", ["hopper", "ampere"])
@pytest.mark.parametrize("path", ["dense", "screen"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_models_of_real_tensor_cores(name: str, path: str, model: str) -> None:
    """What the devices compute, as far as it is known, instead of injected errors."""
    assert check(*adversarial(name, 150, 70), path, mma_model=model, seed=6).path == path


def test_large_batch_takes_the_screening() -> None:
    """Where a sample bounds what is kept, few candidates are summed exactly, and no row is left for the fallback."""
    case = problems.self_case(1300, 64, 325, seed=4)
    report = check(case, direct_sums(case), "screen")
    assert report.path == "screen"
    assert report.fallen_back == 0
    assert 1300 * 10 <= report.refined <= 1300 * 40


@pytest.mark.parametrize("name", ["clusters-1e-6", "collapsed-to-rounding", "all-identical", "norms-overflowing"])
def test_the_fallback_serves_what_the_screening_cannot(name: str) -> None:
    """Where the bound tells candidates of a row apart no more, the row is summed directly."""
    check(*adversarial(name, 700, 40), "screen")


@cache
def partly_listed() -> tuple[Case, sn_ops.SupportNeighbors]:
    """A batch of which half is one identity, and its neighbours by direct sums, held against the oracle."""
    case = problems.self_case(301, 130, 12, seed=8)
    labels = torch.where(torch.arange(301) % 2 == 0, 0, case.labels)
    case = Case(case.feats, labels, k=10)
    with simt.using(path="direct"):
        judge.check_neighbors(case, "simt")
    return case, direct_sums(case)


@pytest.mark.parametrize(
    "cut",
    [
        {"path": "direct", "strip_rows": 64},
        {"path": "direct", "strip_rows": 128},
        {"path": "direct", "slice_elements": 128},
        {"path": "dense", "strip_rows": 40},
        {"path": "dense", "score_tile": 128},
        {"path": "screen", "strip_rows": 70},
        {"path": "screen", "score_tile": 128},
        {"path": "screen", "score_tile": 128, "strip_rows": 150},
        {"path": "screen", "score_tile": 64, "strip_rows": 64},
        {"path": "screen", "score_tile": 128, "strip_rows": 128},
        {"path": "dense", "score_tile": 256},
        {"path": "screen", "score_tile": 256},
        {"path": "screen", "score_tile": 256, "strip_rows": 150},
        {"path": "screen", "score_tile": 256, "strip_rows": 256},
        {"path": "screen", "sample_stride": 3, "sample_group": 8},
        {"path": "screen", "far_capacity": 1},
    ],
    ids=str,
)
def test_however_the_work_is_cut(cut: dict[str, Any]) -> None:
    """Strips, tiles, slices and samples of large problems; one identity is too large to list."""
    assert check(*partly_listed(), **cut).path == cut["path"]


def everything_kept(rows: int, columns: int | None, dtype: torch.dtype) -> Case:
    """Rows that differ by less than their scores may err, so that no pair can be ruled out."""
    generator = torch.Generator().manual_seed(rows)

    def nearly_ones(count: int) -> torch.Tensor:
        feats = torch.ones(count, 64, dtype=dtype)
        last_bits = torch.randint(0, 2, (count, 16), generator=generator)
        feats[:, ::4] += last_bits * torch.finfo(dtype).eps
        return feats

    labels = problems.random_labels(rows, max(4, rows // 80), seed=1)  # identities that are listed whole
    if columns is None:
        return Case(nearly_ones(rows), labels, k=10)
    return Case(nearly_ones(rows), labels, nearly_ones(columns), problems.random_labels(columns, 4, seed=2), k=10)


EDGES = [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 383, 384, 385]  # of rows and columns, around those of tiles


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score_tile", [64, 128, 256])
@pytest.mark.parametrize("rows", EDGES)
def test_each_pair_is_appended_once(rows: int, score_tile: int, dtype: torch.dtype) -> None:
    """Where nothing can be ruled out every pair reaches the refinement, which sums what it is given: tiles of the self
    case serve both triangles, and tiles of other shapes meet the diagonal elsewhere."""
    case = everything_kept(rows, None, dtype)
    report = check(case, direct_sums(case), "screen", score_tile=score_tile, seed=rows, no_rescreen=1)
    assert report.refined == rows * (rows - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("score_tile", "strip_rows", "rows"),
    [
        # Strips before and behind; one row left over; one row missing; more than one tile of a strip.
        *((64, 64, 193), (64, 128, 255), (64, 192, 400)),
        *((128, 128, 257), (128, 128, 383), (128, 256, 600)),
        *((256, 256, 257), (256, 256, 600), (256, 512, 513)),
        # Strips that do not begin with tiles share nothing.
        *((64, 100, 250), (256, 128, 385)),
    ],
)
def test_each_pair_of_strips_is_appended_once(score_tile: int, strip_rows: int, rows: int, dtype: torch.dtype) -> None:
    """As many pairs as of one strip: of each strip's own square half of the tiles serve both triangles, columns before
    and behind it are ordinary ones."""
    case = everything_kept(rows, None, dtype)
    settings = {"score_tile": score_tile, "strip_rows": strip_rows, "seed": rows, "no_rescreen": 1}
    assert check(case, direct_sums(case), "screen", **settings).refined == rows * (rows - 1)


@pytest.mark.parametrize("score_tile", [64, 128, 256])
@pytest.mark.parametrize(("rows", "columns"), [(1, 385), (129, 257), (130, 63), (257, 129), (300, 1), (65, 256)])
def test_each_foreign_pair_is_appended_once(rows: int, columns: int, score_tile: int) -> None:
    """The same against candidates of their own."""
    case = everything_kept(rows, columns, torch.float16)
    report = check(case, direct_sums(case), "screen", score_tile=score_tile, seed=rows, no_rescreen=1)
    assert report.refined == rows * columns


@pytest.mark.parametrize("rows", [20, 128, 129])
def test_a_bank_is_certified_as_it_is_read(rows: int) -> None:
    """Few anchors against many candidates: no row is left for the fallback, few sums are exact."""
    case = problems.bank_case(rows, 3000, 70, 300, self_kind="offset", seed=3)
    report = check(case, direct_sums(case), "bank")
    assert report.path == "bank"
    assert report.fallen_back == 0
    assert report.refined <= rows * 60


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 129), (63, 385), (64, 127), (65, 128), (128, 130), (129, 63), (256, 257)]
)
def test_tiles_of_a_bank(rows: int, columns: int) -> None:
    """Around the edges of the tiles for few anchors, for half and for all of them; one identity is too large to list,
    one row is not finite."""
    case = problems.bank_case(rows, columns, 130, 9, seed=rows)
    assert case.candidates is not None and case.candidate_labels is not None
    labels = torch.where(torch.arange(columns) % 2 == 0, 0, case.candidate_labels)
    case = Case(case.feats, case.labels % 3, case.candidates, labels, k=10)
    assert check(case, direct_sums(case), "bank", seed=columns).path == "bank"
    assert case.candidates is not None
    candidates = case.candidates.clone()
    candidates[columns - 1, 64] = torch.inf
    case = replace(case, candidates=candidates)
    assert check(case, direct_sums(case), "bank", seed=columns).path == "bank"


@cache
def nearly_empty_bank(k: int) -> tuple[Case, sn_ops.SupportNeighbors]:
    """A bank of zeros but for a few rows, anchors of zeros among others, and their neighbours by direct sums."""
    case = problems.bank_case(20, 2600, 40, 30, k=k, seed=9)
    assert case.candidates is not None and case.candidate_labels is not None
    written = (torch.arange(2600) % 130 == 3)[:, None]
    feats = torch.where((torch.arange(20) < 6)[:, None], 0.0, case.feats)
    own = torch.where(torch.arange(20) < 12, torch.arange(20), -1)
    case = Case(feats, case.labels, case.candidates * written, case.candidate_labels, own, k=k)
    return case, direct_sums(case)


@pytest.mark.parametrize(
    "cut",
    [
        {"path": "bank"},
        {"path": "bank", "sample_stride": 7, "sample_group": 8},
        {"path": "screen", "sample_stride": 7, "sample_group": 8},
        {"path": "screen", "sample_stride": 7, "sample_group": 8, "strip_rows": 9},
        {"path": "screen", "score_tile": 128},
        {"path": "screen", "score_tile": 256},
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 10, 40])
def test_rows_of_zeros_tie_by_thousands(k: int, cut: dict[str, Any]) -> None:
    """A bank of them but for a few rows: the first k + 1 stand for all, and one of those may be the anchor itself."""
    report = check(*nearly_empty_bank(k), **cut)
    assert report.path == cut["path"] and report.fallen_back == 0


@pytest.mark.parametrize("path", ["bank", "screen"])
def test_rows_that_only_underflow_to_zeros(path: str) -> None:
    """The first of the bank are so small that nothing of them is left in the copy; their keys tell them from zeros."""
    case = problems.bank_case(20, 2600, 40, 30, seed=9)
    assert case.candidates is not None and case.candidate_labels is not None
    feats = torch.where((torch.arange(20) < 6)[:, None], 0.0, case.feats * 2.0**40)
    bank = torch.where((torch.arange(2600) < 500)[:, None], 2.0**-60 * case.candidates.sign(), 0.0)
    case = Case(feats, case.labels, bank, case.candidate_labels, k=10)
    expected = direct_sums(case)
    assert (expected.indices[:6] >= 500).all()
    assert check(case, expected, path).path == path


@pytest.mark.parametrize("score_tile", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_of_zeros_among_the_anchors(dtype: torch.dtype, score_tile: int) -> None:
    """Anchors are candidates here: tiles serve both triangles."""
    case = problems.self_case(1100, 40, 200, seed=9)
    feats = case.feats * (torch.arange(1100) % 40 == 3)[:, None]
    case = Case(feats, case.labels, k=10).to(dtype)
    report = check(case, direct_sums(case), "screen", score_tile=score_tile)
    assert report.path == "screen" and report.fallen_back == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("max_cluster", "dims", "path"),
    [(8, 900, "cluster"), (4, 900, "cluster"), (4, 2500, "tickets"), (0, 900, "tickets")],
)
def test_a_device_cut_down(max_cluster: int, dims: int, path: str, dtype: torch.dtype) -> None:
    """A cluster that the device does not hold is never launched, asked for or not: the same bits with fewer blocks,
    which keep more planes, or on another path. The harness refuses one that is too large."""
    case = problems.self_case(30, dims, 8).to(dtype)
    expected = direct_sums(case)
    for asked in ("auto", "cluster"):
        with simt.using(max_cluster=max_cluster, path=asked):
            found = judge.neighbors_of(case, "simt")
        assert simt.last_report is not None and simt.last_report.launches == 1
        assert simt.last_report.path == path or (asked == "cluster" and simt.last_report.path == "cluster")
        judge.assert_same_bits(found, expected)


@pytest.mark.parametrize("path", AGAINST_OTHERS)
def test_schedule_and_device_do_not_show(path: str) -> None:
    """The same bits whatever order threads run in, and on a device of other size."""
    case = problems.bank_case(40, 60, 90, 8, self_kind="offset", seed=2)
    seen = []
    for seed, multiprocessors in ((1, 132), (2, 132), (3, 28), (4, 200)):
        leaves = case.leaves()
        with simt.using(path=path, seed=seed, multiprocessors=multiprocessors):
            neighbours = judge.neighbors_of(case, "simt")
            loss = sn_ops.sn_loss(**leaves.arguments(), backend="simt")
            seen.append([loss.detach(), *torch.autograd.grad(loss, leaves.inputs()), *neighbours])
    for other in seen[1:]:
        judge.assert_same_bits(other, seen[0])
