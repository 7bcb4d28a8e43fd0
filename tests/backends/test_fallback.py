"""Rows that no screening decides: the exact search by rows and by tiles, on emulated threads.

Every case says how many rows reach it, by the counts of the call, and every selection is held, bit for bit, against
direct sums.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import simt_build
from support.problems import Case

simt_build.enable()
from support import rungs, simt  # noqa: E402
from support.rungs import clusters  # noqa: E402

FEW = 16  # queued rows that are served one by one
SLICE = 256  # elements of D that a tile sums at once
SIDE = 64  # of a tile
LISTED = 128  # positives of a row that the screening sums itself


def check(case: Case, *, path: str = "screen", rescreen: bool = False, **settings: object) -> simt.Report:
    """What reaches the fallback is not screened again before, unless that is wanted."""
    return rungs.check(case, path=path, no_rescreen=int(not rescreen), **settings)


def overflowing(k: int) -> int:
    """Candidates of two clusters, of which each overflows the smallest buffer."""
    return 2 * 16 * (k + 2) * 5 // 4


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 64, 65, 200])
def test_numbers_of_queued_rows(rows: int) -> None:
    """A few are served one by one, more in tiles."""
    report = check(clusters(rows, 36, bank=overflowing(4), k=4))
    assert report.fallen_back == rows
    assert (report.slices_summed > 0) == (rows > FEW)


@pytest.mark.parametrize("ids", [1, 3, 7])
def test_tiles_end_within_a_label(ids: int) -> None:
    """Rows of one label have consecutive ranks, over all warps of the blocks that find them, and several tiles."""
    report = check(clusters(300, 36, bank=overflowing(4), k=4, ids=ids))
    assert report.fallen_back == 300


@pytest.mark.parametrize("k", [1, 10, 32, 33, 128])
def test_numbers_of_neighbors(k: int) -> None:
    assert check(clusters(40, 20, bank=overflowing(k), k=k)).fallen_back == 40


@pytest.mark.parametrize("dims", [1, 63, 65, 256, 257, 513, 1100, 2049, 4200])
def test_dimensions(dims: int) -> None:
    """Slices, the tree over them and sections."""
    report = check(clusters(20, dims, bank=overflowing(2), radius=1e-3 if dims > 1 else 1e-6, k=2))
    assert report.fallen_back == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [40, 67, 520])
def test_half_precision(dtype: torch.dtype, dims: int) -> None:
    """On the grid of half precision: aligned rows and others, several slices, many duplicates."""
    case = clusters(30, dims, bank=overflowing(3), k=3, radius=3e-3).to(dtype)
    assert check(case).fallen_back >= 20


@pytest.mark.parametrize("path", ["dense", "screen", "bank"])
def test_paths(path: str) -> None:
    """Rows at one distance, which no bound tells apart, and clusters."""
    rows, dims = 90, 70
    point = torch.nn.functional.normalize(torch.randn(dims, generator=torch.Generator().manual_seed(3)), dim=0)
    bank = point + 2.0**-9 * torch.eye(dims).repeat(9, 1)
    anchors = point.repeat(rows, 1)
    labels = torch.arange(rows) % 7
    case = Case(anchors, labels, k=5, candidates=bank, candidate_labels=torch.arange(len(bank)) % 7)
    assert check(case, path=path).fallen_back == rows


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_schedules_and_strips(seed: int) -> None:
    """The order of the queue, bounds that segments share: nothing of it shows. Rows of odd length."""
    case = clusters(230, 67, k=4)
    assert check(case, seed=seed, strip_rows=100).fallen_back == 230


@pytest.mark.parametrize("buffer", [1, 400])
def test_larger_buffers_have_more_segments(buffer: int) -> None:
    report = check(clusters(20, 36, bank=2500, k=4), buffer_capacity=buffer)
    assert report.fallen_back == 20


@pytest.mark.parametrize("rows", [12, 400])
def test_ties_and_signs_of_zero(rows: int) -> None:
    """Points of small integers around two far ones: most keys of a row are equal, and its index decides."""
    generator = torch.Generator().manual_seed(4)
    grid = torch.randint(-1, 2, (200, 5), generator=generator).repeat(2, 1)
    far = torch.where(torch.arange(400) % 2 == 0, 1.0, -1.0)
    zeros = torch.where(torch.rand(400, 3, generator=generator) < 0.5, 0.0, -0.0)
    feats = torch.cat([far[:, None] + 2.0**-12 * grid, zeros], dim=1)
    labels = torch.arange(400) % 11
    case = Case(feats, labels, k=5)
    if rows < 400:
        case = Case(feats[:rows], labels[:rows], k=5, candidates=feats[rows:], candidate_labels=labels[rows:])
    assert check(case).fallen_back == rows


@pytest.mark.parametrize("path", ["dense", "screen", "bank"])
def test_scales_that_no_cast_has(path: str) -> None:
    """Every row goes to the fallback, without a bound; squares are subnormal."""
    generator = torch.Generator().manual_seed(2)
    rows = 2e-19 * torch.randn(380, 30, generator=generator)
    labels = torch.arange(380) % 9
    case = Case(rows[:80], labels[:80], k=6, candidates=rows[80:], candidate_labels=labels[80:])
    assert check(case, path=path).fallen_back == 80


def test_scales_out_of_range() -> None:
    """Rows that have no bound at all, and rows whose distances overflow: far is a tie of infinities."""
    case = clusters(500, 40, k=3, ids=5)
    feats = case.feats.clone()
    feats[5::19] *= 1e12
    feats[6::23] *= 3e19
    assert check(replace(case, feats=feats)).fallen_back >= 40


@pytest.mark.parametrize("dims", [40, 300])
@pytest.mark.parametrize("rescreen", [False, True])
def test_large_identities_in_clusters(dims: int, rescreen: bool) -> None:
    """A cluster is an identity: the farthest positive is one of 200, as near as all others."""
    rows = 640 if dims < SLICE else 400  # of ten tiles a block joins segments
    report = check(clusters(rows, dims, ids=0), rescreen=rescreen, far_capacity=64)
    assert report.fallen_back == rows
    if rescreen:  # only the farthest is looked for: tiles see the rows of one identity, or two
        slices = -(-dims // SLICE)
        assert report.slices_summed <= slices * (rows // SIDE + 1) * (rows // SIDE + 10)


def test_a_positive_that_no_row_has_for_a_neighbor_stays() -> None:
    """Anchors in one point, among others too many for a buffer; most of their positives are in the opposite point, too
    many and too near to each other for a bound. After the first slice none of these is a neighbour of any row."""
    generator = torch.Generator().manual_seed(11)
    point = torch.nn.functional.normalize(torch.randn(300, generator=generator), dim=0)
    near, far = overflowing(4), 200
    sign = torch.ones(80 + near + far)
    sign[80 + near :] = -1
    feats = sign[:, None] * point + 1e-4 * torch.randn(len(sign), 300, generator=generator) / 300**0.5
    labels = torch.cat([torch.zeros(80).long(), 1 + torch.arange(near) % 50, torch.zeros(far).long()])
    case = Case(feats[:80], labels[:80], k=4, candidates=feats[80:], candidate_labels=labels[80:])
    report = check(case, far_capacity=16)
    assert report.fallen_back == 80
    assert report.slices_summed > 0


def test_identical_rows_of_large_identities_cost_no_sum() -> None:
    """The mean is exact, all distances are 0: the labels alone decide near and far."""
    rows = 500
    case = Case(torch.full((rows, 40), 0.37), torch.arange(rows) % 3, k=10)
    report = check(case)
    assert (report.fallen_back, report.slices_summed) == (rows, 0)
    assert report.refined == rows * case.k


def test_the_first_slice_drops_what_no_row_needs() -> None:
    """A tile has the rows of one label, which is a cluster, and their bounds drop the other three."""
    bank = 16 * 3 * SIDE  # three tiles a segment
    case = clusters(700, 3 * SLICE + 1, bank=bank, ids=0, centers=4, k=2)
    assert case.candidate_labels is not None
    of = [torch.nonzero(case.labels == label).flatten()[:SIDE] for label in (3, 8)]
    rows = torch.stack(of, dim=1).flatten()
    case = replace(case, feats=case.feats[rows], labels=case.labels[rows], candidate_labels=-case.candidate_labels)
    report = check(case)
    assert report.fallen_back == 2 * SIDE
    whole = 4 * 2 * bank // SIDE
    assert whole // 4 < report.slices_summed < whole * 3 // 4


def test_duplicates_end_the_search() -> None:
    """Two points, hundreds of times: the first rows of each are all that a row needs; the labels are alone."""
    rows = 640
    points = torch.nn.functional.normalize(torch.randn(2, 30, generator=torch.Generator().manual_seed(1)), dim=1)
    report = check(Case(points[torch.arange(rows) % 2], torch.arange(rows), k=2))
    assert report.fallen_back == rows
    assert 0 < report.slices_summed <= 10 * 16 * 2  # a tile or two a segment, of candidates that are few


@pytest.mark.parametrize("path", ["screen", "bank"])
def test_null_rows_among_others(path: str) -> None:
    """Most rows equal the mean; some of their label do not, all as far. Pairs of null rows alone go without a sum."""
    generator = torch.Generator().manual_seed(9)
    mean = torch.randn(24, generator=generator)
    rows = mean.repeat(560, 1)
    rows[::7] += torch.eye(24).repeat(4, 1)[:80]
    labels = torch.arange(560) % 3
    case = Case(rows[:80], labels[:80], k=4, candidates=rows[80:], candidate_labels=labels[80:])
    report = check(case, path=path, far_capacity=16)
    assert report.fallen_back >= 60


def test_null_candidates_of_other_rows() -> None:
    """A cluster that overflows its buffers, among rows that equal the mean: those are as far as their sums say."""
    feats = torch.full((500, 24), 0.37)
    feats[::5] += 1.0 + 1e-4 * torch.randn(100, 24, generator=torch.Generator().manual_seed(9))
    assert check(Case(feats, torch.arange(500) % 3, k=2), far_capacity=16).fallen_back >= 100


def test_a_bank_of_one_point() -> None:
    """Nothing is known of candidates that the scores have not read: they are summed."""
    case = Case(torch.full((90, 40), 0.37), torch.arange(90) % 2, k=3)
    bank = replace(case, candidates=torch.full((400, 40), 0.37), candidate_labels=torch.arange(400) % 2)
    report = check(bank, path="bank")
    assert report.fallen_back == 90 and report.slices_summed > 0
