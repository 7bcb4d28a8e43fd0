"""Small batches in one launch that sums each pair once: off the boundaries of items, sides, clusters, chunks and
slices, the same bits as direct sums of two launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sn_ops
from support import judge, oracle, problems, simt_build
from support.problems import Case

simt_build.enable()
from support import simt  # noqa: E402
from support.one_launch import check  # noqa: E402

PATH = "square"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("rows", [1, 31, 33, 96, 129, 193, 255, 256])
def test_rows_around_sides_and_clusters(rows: int) -> None:
    """The last side has fewer rows, the last cluster fewer items; one cluster or several, of one tile or of parts."""
    check(problems.self_case(rows, 65 + rows % 7, max(1, rows // 4), seed=rows), PATH, seed=rows)


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [(1, F32), (63, F16), (65, BF16), (200, F32), (520, F16), (2048, F32), (2111, BF16), (4200, F32), (5000, F16)],
    ids=str,
)
def test_dimensions_around_chunks_and_sections(dims: int, dtype: torch.dtype) -> None:
    """D ends within a pack, a chunk, a slice or a section, or with it; blocks have one slice, several or none."""
    check(problems.self_case(40, dims, 9, seed=dims).to(dtype), PATH, seed=dims)


@pytest.mark.parametrize("k", [1, 16, 17, 129, 1000])
def test_neighbours_extracted_and_sorted(k: int) -> None:
    """More than 16 are sorted, the row as a whole. And more than there are candidates."""
    check(replace(problems.self_case(70, 70, 7, seed=k), k=k), PATH, seed=k)


@pytest.mark.parametrize("name", ["duplicate-groups", "all-identical", "clusters-1e-6", "norms-overflowing"])
def test_ties_and_distances_that_overflow(name: str) -> None:
    check(problems.adversarial_case(name, 131, 140), PATH)


@pytest.mark.parametrize("squeeze", oracle.SQUEEZES)
def test_options(squeeze: str) -> None:
    case = problems.self_case(70, 90, 15, seed=4)
    with simt.using(path=PATH):
        judge.check_loss(case, "simt", judge.check_neighbors(case, "simt"), squeeze=squeeze)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("rows", "dims"), [(1, 1), (131, 200)])
def test_a_value_that_is_not_finite_poisons_all(rows: int, dims: int, value: float) -> None:
    """Wherever it is: in the slice of any block, in a row of which one cluster sees a part. The next call knows nothing
    of it."""
    for row, column in {(0, 0), (rows - 1, dims - 1), (rows // 2, dims // 2)}:
        case = problems.self_case(rows, dims, 5, seed=3)
        case.feats[row, column] = value
        with simt.using(path=PATH, seed=row):
            assert sn_ops.sn_loss(**case.leaves().arguments(), backend="simt").isnan()
            assert simt.last_report is not None and simt.last_report.path == PATH
        healthy = problems.self_case(rows, dims, 5, seed=1)
        with simt.using(path=PATH):
            assert sn_ops.sn_loss(**healthy.leaves().arguments(), backend="simt").isfinite()


def test_schedules_do_not_show() -> None:
    """Any cluster may be the last."""
    case = problems.self_case(100, 150, 20, seed=2)
    for seed in range(1, 4):
        check(case, PATH, seed=seed)


def test_rows_off_alignment() -> None:
    """Rows that do not begin at multiples of 16 bytes, and rows far apart."""
    wide = torch.randn(40, 263, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(40) % 9
    for feats in (wide[:, 1:200], wide[:, 4:260], wide.half()[:, 3:131], wide[::2, :64]):
        check(Case(feats, labels[: len(feats)], k=5), PATH)


def test_a_device_without_wide_clusters() -> None:
    """Where clusters of 16 blocks are not held, the path does not serve."""
    case = problems.self_case(140, 64, 20, seed=1)
    with simt.using(path=PATH, max_cluster=8):
        judge.check_neighbors(case, "simt")
        assert simt.last_report is not None and simt.last_report.path == "cluster"
