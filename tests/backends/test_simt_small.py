"""Small batches in one launch, on clusters and with tickets: off the boundaries of quads of anchors, columns of
candidates, chunks, slices and groups, the same bits as direct sums of two launches."""

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

ONE_LAUNCH = ("cluster", "tickets")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("path", ONE_LAUNCH)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 17, 63, 64, 65, 68, 69, 127, 128, 129, 192, 255, 256])
def test_rows_around_quads_and_groups(rows: int, path: str) -> None:
    """The last group has fewer anchors, of a quad some do not exist; candidates end within a column or with it."""
    check(problems.self_case(rows, 65 + rows % 7, max(1, rows // 4), seed=rows), path, seed=rows)


@pytest.mark.parametrize("path", ONE_LAUNCH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [1, 63, 65, 128, 200, 520, 2048, 2111, 4200])
def test_dimensions_around_chunks_and_sections(dims: int, dtype: torch.dtype, path: str) -> None:
    """D ends within a pack, a chunk, a slice or a section, or with it; blocks have one slice, several or none."""
    check(problems.self_case(37, dims, 9, seed=dims).to(dtype), path, seed=dims)


@pytest.mark.parametrize("path", ONE_LAUNCH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "kind"),
    [
        (1, 256, "none"),
        (5, 64, "offset"),
        (256, 1, "none"),
        (100, 129, "tensor"),
        (64, 255, "offset"),
        (200, 3, "none"),
    ],
)
def test_candidates_of_their_own(rows: int, columns: int, kind: str, dtype: torch.dtype, path: str) -> None:
    case = problems.bank_case(rows, columns, 150, 6, self_kind=kind, seed=columns).to(dtype)
    check(case, path, seed=rows)


@pytest.mark.parametrize("path", ONE_LAUNCH)
@pytest.mark.parametrize("k", [1, 16, 17, 33, 128, 129, 256, 1000])
def test_neighbours_extracted_and_sorted(k: int, path: str) -> None:
    """More than 16 are sorted, the row as a whole. And more than there are candidates."""
    for rows in (20, 130, 256):
        check(replace(problems.self_case(rows, 70, 7, seed=k), k=k), path, seed=k)


@pytest.mark.parametrize("path", ONE_LAUNCH)
@pytest.mark.parametrize("name", ["duplicate-groups", "all-identical", "clusters-1e-6", "norms-overflowing"])
@pytest.mark.parametrize("rows", [64, 131])
def test_ties_and_distances_that_overflow(rows: int, name: str, path: str) -> None:
    check(problems.adversarial_case(name, rows, 140), path)


@pytest.mark.parametrize("path", ["direct", *ONE_LAUNCH])
@pytest.mark.parametrize("rows", [16, 34, 80])
@pytest.mark.parametrize("k", [1, 10, 16])
def test_more_ties_than_a_list_holds(k: int, rows: int, path: str) -> None:
    """Where more than 32 candidates are within the bound, neighbours are taken one by one, the lowest index first."""
    case = replace(problems.adversarial_case("all-identical", rows, 20), k=k)
    with simt.using(path=path):
        judge.check_neighbors(case, "simt")


@pytest.mark.parametrize("path", ONE_LAUNCH)
@pytest.mark.parametrize("squeeze", oracle.SQUEEZES)
def test_options(squeeze: str, path: str) -> None:
    case = problems.self_case(130, 90, 30, seed=4)
    with simt.using(path=path):
        judge.check_loss(case, "simt", judge.check_neighbors(case, "simt"), squeeze=squeeze)


@pytest.mark.parametrize("path", ONE_LAUNCH)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("rows", "dims"), [(1, 1), (70, 64), (129, 200), (60, 2500)])
def test_a_value_that_is_not_finite_poisons_all(rows: int, dims: int, value: float, path: str) -> None:
    """Wherever it is: in the slice of any block, of an anchor or a candidate of any group. The next call knows nothing
    of it."""
    for in_anchors in (True, False):
        for row, column in {(0, 0), (rows - 1, dims - 1), (rows // 2, dims // 2), (rows - 1, 0)}:
            case = problems.bank_case(rows, rows, dims, 5, seed=3)
            assert case.candidates is not None
            (case.feats if in_anchors else case.candidates)[row, column] = value
            with simt.using(path=path, seed=row):
                loss = sn_ops.sn_loss(**case.leaves().arguments(), backend="simt")
                assert loss.isnan()
                healthy = problems.self_case(rows, dims, 5, seed=1)
                assert sn_ops.sn_loss(**healthy.leaves().arguments(), backend="simt").isfinite()


@pytest.mark.parametrize("path", ONE_LAUNCH)
def test_schedules_and_devices_do_not_show(path: str) -> None:
    """Blocks in any order, few multiprocessors or many, clusters of fewer blocks."""
    case = problems.self_case(150, 700, 20, seed=2)
    for seed in range(1, 7):
        check(case, path, seed=seed, multiprocessors=(132, 28, 400)[seed % 3], max_cluster=(8, 4, 2)[seed % 3])


@pytest.mark.parametrize("path", ONE_LAUNCH)
def test_rows_off_alignment(path: str) -> None:
    """Rows that do not begin at multiples of 16 bytes, and rows far apart."""
    wide = torch.randn(70, 263, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(70) % 9
    for feats in (wide[:, 1:200], wide[:, 4:260], wide.half()[:, 3:131], wide[::2, :64]):
        check(Case(feats, labels[: len(feats)], k=5), path)
