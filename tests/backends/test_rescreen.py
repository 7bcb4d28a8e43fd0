"""Rows that the first screening cannot decide: clusters tighter than its bound and larger than a buffer.

The CUDA kernels on emulated threads. Every case says which rung serves its rows, by the counts of the call, and every
selection is held, bit for bit, against direct sums.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support import simt_build
from support.problems import Case, adversarial_case, line_rows

simt_build.enable()
from support import simt  # noqa: E402
from support.rungs import check, clusters  # noqa: E402


def assert_decided(report: simt.Report, rows: int) -> None:
    """The second screening has decided all rows, and left few sums to the refinement."""
    assert (report.rescreened, report.certified, report.fallen_back) == (rows, rows, 0)
    assert report.refined <= 40 * rows


def test_loose_clusters_are_decided_by_the_first_screening() -> None:
    report = check(clusters(400, 40, 2, 0.5))
    assert (report.rescreened, report.fallen_back) == (0, 0)


@pytest.mark.parametrize("radius", [1e-3, 1e-6, 0.0])
def test_tight_clusters_are_decided_by_the_second(radius: float) -> None:
    """However tight they are, duplicates included."""
    assert_decided(check(clusters(400, 70, 2, radius), seed=2), 400)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The grid of half precision makes many duplicates of few points. (Which entries a full buffer has depends on the
    schedule: after some, a dozen rows have a leader of their own, too few for a tile.)"""
    assert_decided(check(clusters(400, 72, 2, 3e-3).to(dtype), seed=2), 400)


@pytest.mark.parametrize("path", ["screen", "bank"])
def test_banks(path: str) -> None:
    """Groups of few anchors."""
    report = check(clusters(60, 68, 2, 1e-4, bank=600), path=path)
    assert report.rescreened == report.certified and report.rescreened + report.fallen_back == 60
    assert report.rescreened >= 16


def test_strips_and_unaligned_rows() -> None:
    """Rows of odd length; leaders of other strips."""
    case = clusters(400, 67, 2, 1e-4)
    report = check(case, strip_rows=150)
    assert report.certified == report.rescreened >= 350


@pytest.mark.parametrize("k", [1, 40])
def test_numbers_of_neighbors(k: int) -> None:
    """Buffers that are large enough: many survivors in them make a row wait, too."""
    report = check(clusters(480, 20, 2, 1e-4, k=k), buffer_capacity=0)
    assert (report.rescreened, report.certified, report.fallen_back) == (480, 480, 0)


def test_very_many_neighbors() -> None:
    """Half of a cluster are neighbours: the groups of bounds are few, and their threshold loose."""
    report = check(clusters(120, 12, 2, 1e-5, k=128, bank=1040), seed=3)
    assert (report.rescreened, report.certified, report.fallen_back) == (120, 120, 0)


def test_rows_of_dense_scores_are_left_to_the_fallback() -> None:
    """Of a tight cluster; those of a loose one are not, although the refinement looks at every score."""
    report = check(clusters(400, 40, 2, 1e-4), path="dense")
    assert report.fallen_back == 400
    assert report.refined <= 400 * 20
    report = check(clusters(400, 40, 2, 0.5), path="dense")
    assert report.fallen_back == 0


def test_few_rows_go_to_the_fallback() -> None:
    """A tile of rows is not worth it for less than a group."""
    report = check(clusters(10, 40, 2, 1e-4, bank=600))
    assert (report.rescreened, report.fallen_back) == (0, 10)


def test_small_groups_take_no_places_of_others() -> None:
    """Ten points, each of 60 equal candidates: four have 30 anchors, the others 10, which are not worth a tile."""
    generator = torch.Generator().manual_seed(9)
    points = torch.nn.functional.normalize(torch.randn(10, 40, generator=generator), dim=1)
    of = torch.cat([torch.arange(100) % 10, torch.arange(80) % 4, torch.arange(600) % 10])
    feats = points[of]
    labels = torch.arange(780) % 77
    case = Case(feats[:180], labels[:180], k=1, candidates=feats[180:], candidate_labels=labels[180:])
    report = check(case, buffer_capacity=512)  # all that see a point see it whole, and agree on its first candidate
    # The point of candidate 0 is done before; anchors without a group keep their entries and are refined from those.
    assert (report.rescreened, report.certified, report.fallen_back) == (90, 90, 0)


def test_what_no_bound_can_tell_apart_goes_to_the_fallback() -> None:
    """Rows at one distance from each other: the index decides, which no score shows."""
    rows = 230
    point = torch.nn.functional.normalize(torch.randn(rows, generator=torch.Generator().manual_seed(3)), dim=0)
    feats = torch.cat([point + 2.0**-9 * torch.eye(rows), -point + 2.0**-9 * torch.eye(rows)[:60]])
    report = check(Case(feats, torch.arange(290) % 70, k=10))
    assert report.rescreened >= 180 and report.fallen_back == 230


def test_duplicates_of_several_points() -> None:
    """Behind the first k + 1 of a point none counts: their buffers hold the sample's share of them."""
    generator = torch.Generator().manual_seed(5)
    points = torch.nn.functional.normalize(torch.randn(3, 48, generator=generator), dim=1)
    of = torch.randint(3, (780,), generator=generator)
    report = check(Case(points[of], torch.randint(100, (780,), generator=generator), k=4))
    assert (report.rescreened, report.certified, report.fallen_back) == (780, 780, 0)
    assert report.refined <= 780 * 100  # a point has 260


def with_outliers(feats: Tensor) -> Tensor:
    """Row 0 far outside of the copies' range, row 1 outside of a frame's."""
    feats = feats.clone()
    feats[0] *= 1e9
    feats[1] *= 3e3
    return feats


def test_outliers_lead_no_group() -> None:
    """A row without bounds is among the nearest of all as far as bounds can tell."""
    case = clusters(400, 40, 2, 1e-4)
    report = check(replace(case, feats=with_outliers(case.feats)))
    assert report.certified >= 390
    assert report.fallen_back <= 10


@pytest.mark.parametrize("k", [30, 55])
def test_rows_on_a_line(k: int) -> None:
    """The residuals of two rows point the same way, the worst that the bound allows."""
    point = torch.randn(64, generator=torch.Generator().manual_seed(2))
    sides = torch.where(torch.arange(600) < 300, 1.0, -1.0)
    feats = sides[:, None] * point + 2.0**-13 * line_rows(600, 1)
    report = check(Case(feats, torch.arange(600) % 90, k=k))
    assert report.rescreened >= 590


@pytest.mark.parametrize("mma_error", ["extreme", "plus", "minus"])
def test_no_error_within_the_bound_shows(mma_error: str) -> None:
    """Products as wrong as the bound allows."""
    assert_decided(check(clusters(400, 70, 2, 1e-3), mma_error=mma_error, mma_seed=3), 400)


@pytest.mark.parametrize("model", ["hopper", "ampere"])
def test_models_of_real_tensor_cores(model: str) -> None:
    assert_decided(check(clusters(400, 70, 2, 1e-4), mma_model=model), 400)


def test_larger_errors_are_noticed() -> None:
    """Ten times the bound changes selections: the checks above are not idle."""
    with pytest.raises(AssertionError):
        check(clusters(400, 70, 2, 1e-3), mma_error="plus", mma_error_scale=10.0)


@pytest.mark.parametrize("path", ["screen", "bank"])
def test_the_second_refinement_sums_few_of_many_entries(path: str) -> None:
    """One candidate in 16 makes the thresholds: some 170 entries a row, of which its own bounds leave few."""
    report = check(clusters(60, 40, 2, 1e-4, bank=8500, ids=2000), path=path, buffer_capacity=0)
    assert_decided(report, 60)


def test_identical_rows_are_finished_by_the_first_refinement() -> None:
    """As the cost model has it: nothing is scored, and nothing waits. Ten sums a row, and its listed positives."""
    case = adversarial_case("all-identical", 300, 40)
    report = check(case)
    listed = int((case.labels[:, None] == case.labels[None, :]).sum()) - 300
    assert (report.rescreened, report.fallen_back) == (0, 0)
    assert report.refined == 300 * case.k + listed
