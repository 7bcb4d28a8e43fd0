"""Tiles of scores of which most rows or columns do not exist: a warp without a pair multiplies nothing, in every mode
of the score kernel and for every tile, and what direct sums find is found."""

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

TILES = [64, 128, 256]


@cache
def partial(rows: int, columns: int | None, dtype: torch.dtype, finite: bool) -> tuple[Case, sn_ops.SupportNeighbors]:
    """Anchors, their candidates, of which most are one identity, too large to list, and the neighbours by direct sums.
    Else than finite: the last anchor and one of the last candidates pass every test."""
    if columns is None:
        case = problems.self_case(rows, 200, 9, seed=rows)
        case = replace(case, labels=torch.where(torch.arange(rows) % 8 != 3, 0, case.labels))
    else:
        case = problems.bank_case(rows, columns, 200, 9, seed=rows)
        assert case.candidate_labels is not None
        large = torch.where(torch.arange(columns) % 8 != 3, 0, case.candidate_labels)
        case = replace(case, labels=case.labels % 3, candidate_labels=large)
    case = case.to(dtype)
    if not finite:
        feats = case.feats.clone()
        feats[-1, 5] = torch.nan
        case = replace(case, feats=feats)
        if case.candidates is not None:
            candidates = case.candidates.clone()
            candidates[-2:, 64] = torch.inf
            case = replace(case, candidates=candidates)
    with simt.using(path="direct"):
        return case, judge.neighbors_of(case, "simt")


@pytest.mark.parametrize("path", ["dense", "screen"])
@pytest.mark.parametrize("score_tile", TILES)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 257), (63, 193), (64, 129), (65, 192), (129, 65), (191, 255), (192, 191), (193, 64), (256, 63), (257, 256)],
)
def test_rows_and_columns_around_those_of_warps(rows: int, columns: int, score_tile: int, path: str) -> None:
    for dtype, finite in ((torch.float16, True), (torch.float32, False)):
        case, expected = partial(rows, columns, dtype, finite)
        with simt.using(path=path, score_tile=score_tile, seed=rows):
            judge.assert_same_bits(judge.neighbors_of(case, "simt"), expected)
            assert simt.last_report is not None and simt.last_report.path == path


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("score_tile", TILES)
@pytest.mark.parametrize("rows", [191, 193, 257, 321])
def test_the_square_of_a_partial_batch(rows: int, score_tile: int, finite: bool) -> None:
    """Warps below the diagonal and behind the last row, where the farthest positives are searched, too."""
    case, expected = partial(rows, None, torch.float16, finite)
    with simt.using(path="screen", score_tile=score_tile, seed=rows):
        judge.assert_same_bits(judge.neighbors_of(case, "simt"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_last_tile_of_a_sample_is_not_skipped(dtype: torch.dtype) -> None:
    """Columns of a sample are spread over its tiles: 260 candidates fill two thirds of each of three tiles, though of
    the third only the first four have a number below 260. What is near is there. A threshold of far candidates would
    let all 54 near ones pass, more than the buffers hold."""
    generator = torch.Generator().manual_seed(1)
    candidates = 4 * torch.randn(260, 64, generator=generator)
    near = (torch.arange(260) % 3 == 2) & (torch.arange(260) >= 98)
    candidates[near] *= 0.05
    assert near.sum() == 54
    case = Case(
        0.2 * torch.randn(65, 64, generator=generator), torch.arange(65) % 5, candidates, torch.arange(260) % 130, k=1
    ).to(dtype)
    with simt.using(path="direct"):
        expected = judge.neighbors_of(case, "simt")
    settings = {"score_tile": 128, "sample_stride": 1, "sample_group": 8, "buffer_capacity": 48, "no_rescreen": 1}
    with simt.using(path="screen", **settings):
        judge.assert_same_bits(judge.neighbors_of(case, "simt"), expected)
        assert simt.last_report is not None and simt.last_report.path == "screen"
        assert simt.last_report.fallen_back == 0
