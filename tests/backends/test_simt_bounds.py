"""Rows on which the bounds of the screening decide: whatever a bound leaves out, a neighbour is lost here.

Such rows lie on a line (`problems.line_rows`): the rounding of a copy is all in the direction of the distances, as is
the error of a product. Each path must select what direct sums do, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

import sn_ops
from support import judge, problems, simt_build
from support.problems import Case

simt_build.enable()
from support import simt  # noqa: E402

SEEDS = range(3)
FAR_SEEDS = range(8)
KINDS = ["self", "bank"]


@cache
def on_a_line(kind: str, k: int, seed: int, large: int = 0) -> tuple[Case, sn_ops.SupportNeighbors]:
    """150 rows, or 20 against 200 others (60, where one identity is large), and their neighbours by direct sums."""
    if kind == "self":
        case = problems.line_case(220 if large else 150, k=k, seed=seed, large=large)
    else:
        case = problems.line_case(60 if large else 20, 200, k=k, seed=seed, large=large)
    with simt.using(path="direct"):
        return case, judge.neighbors_of(case, "simt")


def check(kind: str, k: int, seed: int, path: str, mma_error: str, large: int = 0) -> None:
    case, expected = on_a_line(kind, k, seed, large)
    with simt.using(path=path, mma_error=mma_error):
        found = judge.neighbors_of(case, "simt")
    assert simt.last_report is not None and simt.last_report.path == path
    judge.assert_same_bits(found, expected)


@pytest.mark.parametrize("mma_error", ["none", "plus"])
@pytest.mark.parametrize("path", ["screen", "dense"])
@pytest.mark.parametrize("k", [30, 50, 65])
def test_support_of_rows_on_a_line(k: int, path: str, mma_error: str) -> None:
    """Residuals of both rows, and errors of the products, enter every threshold."""
    for seed in SEEDS:
        check("self", k, seed, path, mma_error)


@pytest.mark.parametrize("mma_error", ["none", "plus"])
@pytest.mark.parametrize("path", ["screen", "bank"])
@pytest.mark.parametrize("k", [40, 55, 75])
def test_support_among_a_bank_on_a_line(k: int, path: str, mma_error: str) -> None:
    """The bank's kernel finds residuals itself, by eight lanes a row."""
    for seed in SEEDS:
        check("bank", k, seed, path, mma_error)


@pytest.mark.parametrize("mma_error", ["none", "plus"])
@pytest.mark.parametrize(("kind", "path"), [("self", "screen"), ("bank", "screen"), ("bank", "bank")])
def test_farthest_of_a_large_identity_on_a_line(kind: str, path: str, mma_error: str) -> None:
    """More than 128 positives are not listed: the screening finds the farthest by a threshold of its own."""
    for seed in FAR_SEEDS:
        check(kind, 4, seed, path, mma_error, large=180)


@pytest.mark.parametrize("mma_error", ["none", "plus"])
@pytest.mark.parametrize("group", [8, 32])
@pytest.mark.parametrize("path", ["screen", "bank"])
def test_thresholds_of_groups_on_a_line(path: str, group: int, mma_error: str) -> None:
    """Of a large sample the least bound of each group is kept; the anchor itself may be one of them."""
    for seed in SEEDS:
        for k in (3, 9):
            if path == "screen":
                case = problems.line_case(700, k=k, seed=seed)
            else:
                case = problems.line_case(20, 700, k=k, seed=seed)
                case = replace(case, feats=case.candidates[5:25], self_index=5)  # type: ignore[index]
            with simt.using(path="direct"):
                expected = judge.neighbors_of(case, "simt")
            with simt.using(path=path, mma_error=mma_error, sample_group=group, sample_stride=1):
                found = judge.neighbors_of(case, "simt")
                assert simt.last_report is not None and simt.last_report.path == path
            judge.assert_same_bits(found, expected)


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("path", ["screen", "bank"])
def test_null_rows_beside_the_anchor(path: str, k: int) -> None:
    """Of the zeros behind the first row k + 1 are kept, of which one may be the anchor: nothing falls back."""
    own, labels = torch.arange(20) - 2, torch.arange(300) % 9
    bank = torch.where((torch.arange(300) % 50 == 0)[:, None], 1.0, torch.zeros(300, 16))
    case = Case(bank[:20] * 0, labels[:20], bank, labels, torch.where(own < 0, -1, own), k=k)
    with simt.using(path="direct"):
        expected = judge.neighbors_of(case, "simt")
    with simt.using(path=path, sample_stride=1):
        judge.assert_same_bits(judge.neighbors_of(case, "simt"), expected)
        assert simt.last_report is not None and simt.last_report.path == path
        assert simt.last_report.fallen_back == 0


@pytest.mark.parametrize("group", [8, 32])
@pytest.mark.parametrize("path", ["screen", "bank"])
def test_a_group_has_its_own_residual_and_may_be_the_anchors(path: str, group: int) -> None:
    """Beside the anchor, at 0: two rows at a distance of 1 and one of 1 + 2^-13, whose copies are exact, then some of
    1 + 2^-12 whose copies are at 1. A threshold that is too low by one of them keeps these and loses the third."""
    dims, k, rows = 64, 3, 640
    bank = 4.0 * torch.eye(dims)[torch.arange(rows) % dims]
    places = torch.arange(0, rows, 32)  # a group each
    bank[places[3]] = 0.0
    for at, place in enumerate(places[4:7]):
        bank[place] = torch.eye(dims)[at]
    bank[places[6], 40] = 2.0**-6
    signs = torch.randint(0, 2, (8, 16), generator=torch.Generator().manual_seed(1)) * 2.0 - 1.0
    bank[places[8:16]] = 0.0
    bank[places[8:16], 8:24] = 0.25 * (1 + 2.0**-12) * signs
    case = Case(bank[places[3:4]], torch.zeros(1).long(), bank, torch.arange(rows) % 7, int(places[3]), k=k)
    with simt.using(path="direct"):
        expected = judge.neighbors_of(case, "simt")
    assert expected.indices.tolist() == [places[4:7].tolist()]
    with simt.using(path=path, sample_stride=1, sample_group=group):
        judge.assert_same_bits(judge.neighbors_of(case, "simt"), expected)
        assert simt.last_report is not None and simt.last_report.path == path
        assert simt.last_report.fallen_back == 0


@pytest.mark.parametrize("group", [8, 32])
@pytest.mark.parametrize("path", ["screen", "bank"])
def test_what_pads_a_sample_is_no_candidate(path: str, group: int) -> None:
    """Every row is farther from all others than from the mean, where what fills the last tile would lie."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(200, 64, generator=generator), dim=1)
    case = Case(rows, torch.arange(200) % 90, k=3)
    if path == "bank":
        case = Case(rows[:20], case.labels[:20], rows, case.labels, 0, k=3)
    with simt.using(path="direct"):
        expected = judge.neighbors_of(case, "simt")
    with simt.using(path=path, sample_stride=1, sample_group=group, mma_error="none"):
        judge.assert_same_bits(judge.neighbors_of(case, "simt"), expected)
        assert simt.last_report is not None and simt.last_report.path == path
        assert simt.last_report.fallen_back == 0
