"""Direct sums on emulated threads: every way to select from a row, about the lengths and numbers where one ends.

Features are integers on a line, so distances are exact, and ties abound.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from support import simt_build

simt_build.enable()
from support import simt  # noqa: E402

HOW = ("planned", "bounded", "whole", "searched")
"""cuda::Selection, where that may serve."""

GROUPS = 256
"""Candidates i and i + 256 belong to one group, whose least distance makes the bound."""


def spread(rows: int) -> Tensor:
    return torch.randint(-rows, rows + 1, (rows,), generator=torch.Generator().manual_seed(rows))


def equal(rows: int) -> Tensor:
    return torch.full((rows,), 7)


def rising(rows: int) -> Tensor:
    return torch.arange(rows) // 3


def falling(rows: int) -> Tensor:
    return torch.arange(rows, 0, -1)


def near_in_few_groups(rows: int) -> Tensor:
    """So many near candidates in each of 100 groups that the bound of 100 neighbours holds more than lists do."""
    near = torch.arange(rows) % GROUPS < 100
    return torch.where(near, torch.arange(rows) % 11, 3000 + spread(rows).abs())


def near_in_one_warp(rows: int) -> Tensor:
    near = torch.arange(rows) % GROUPS // 32 == 5
    return torch.where(near, torch.arange(rows) // GROUPS, 2000 + spread(rows).abs())


def overflowing(rows: int) -> Tensor:
    """Every fifth distance is finite; of the others, the lowest indices come first."""
    return torch.where(torch.arange(rows) % 5 == 3, spread(rows).double(), 1e30)


ROWS: list[Callable[[int], Tensor]] = [
    spread, equal, rising, falling, near_in_few_groups, near_in_one_warp, overflowing,
]  # fmt: skip


def check(values: Tensor, k: int, own: list[int], *, path: str = "direct", threads: int = 256,
          how: str = "planned", dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
    """Anchors: the rows `own` of the candidates, and one that is none of them; all are compared with a stable sort."""
    labels = torch.arange(len(values)) % 5
    feats = torch.cat([values[own], torch.tensor([1])])
    anchor_labels = torch.cat([labels[own], torch.tensor([2])])
    index = torch.tensor([*own, -1])
    with simt.using(path=path, select_threads=threads, selection=HOW.index(how), seed=k):
        _, indices, _, nearest, farthest, squared, _ = torch.ops.sn_simt.forward(
            feats.to(dtype)[:, None], anchor_labels, values.to(dtype)[:, None], labels, index, -1, k, 2.0, 0.5, 0, 0,
            True,
        )  # fmt: skip
    assert simt.last_report is not None and simt.last_report.path == path
    K = min(k, len(values))
    for row, feature in enumerate(feats):
        d2 = (feature.to(dtype) - values.to(dtype)) ** 2
        order = torch.sort(d2, stable=True).indices
        order = order[order != index[row]]
        chosen = order[:K]
        missing = K - len(chosen)
        assert indices[row, :K].tolist() == chosen.tolist() + [-1] * missing, (len(values), k, row)
        assert squared[row, :K].tolist() == d2[chosen].tolist() + [float("inf")] * missing
        positives = order[labels[order] == anchor_labels[row]]
        first = positives[:1].tolist() or [-1]
        last = positives[d2[positives] == d2[positives].amax()].amin() if len(positives) else torch.tensor(-1)
        assert (nearest[row].item(), farthest[row].item()) == (first[0], last.item())


def owners(rows: int) -> list[int]:
    return sorted({0, rows // 2, rows - 1})


@pytest.mark.parametrize("k", [1, 16, 17, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("path", ["cluster", "direct"])
def test_rows_of_one_tile(path: str, k: int) -> None:
    for rows in (1, 2, 31, 32, 33, 34, 63, 64):
        for values in (spread, equal, falling, overflowing):
            check(values(rows), k, owners(rows), path=path)


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize("k", [16, 17, 32, 33, 129, 300])
def test_rows_of_one_candidate_a_thread(k: int, threads: int) -> None:
    """Lists hold the whole row, of 128 threads, of 256, and of one or two candidates a thread; or what is within a
    bound, where a group has one candidate, or none."""
    for rows in (65, 127, 128, 129, 255, 256):
        for values in (spread, equal, falling):
            check(values(rows), k, owners(rows), threads=threads, how="whole")
            if rows > 128:
                check(values(rows), k, owners(rows), threads=threads, how="bounded")


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize("values", ROWS)
@pytest.mark.parametrize("rows", [257, 384, 385, 1023, 1024, 1025, 1026, 2048, 2049, 4097])
def test_rows_that_are_bounded(rows: int, values: Callable[[int], Tensor], threads: int) -> None:
    """Up to 224 neighbours; of more, the plan decides."""
    for k in {257: (10, 128, 256), 1025: (10, 33, 224, 225)}.get(rows, (16, 17, 100, 225)):
        check(values(rows), k, [rows - 1], threads=threads, how="bounded")


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize("values", ROWS)
@pytest.mark.parametrize("rows", [257, 385, 512, 1000, 1023, 1024])
def test_rows_that_are_sorted(rows: int, values: Callable[[int], Tensor], threads: int) -> None:
    """As a whole."""
    for k in (17, 224, 225, 300, rows):
        check(values(rows), k, [rows - 1], threads=threads, how="whole")


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize("values", ROWS)
@pytest.mark.parametrize("k", [17, 32, 225, 1000, 1023, 1024, 1025, 2000])
def test_rows_that_are_searched(k: int, values: Callable[[int], Tensor], threads: int) -> None:
    """Up to 1024 neighbours lists sort what the search finds. Of rows of 1024, an anchor has one neighbour less."""
    for rows in {17: (385, 1025), 32: (33, 64), 225: (226, 1500), 1025: (1026, 1600), 2000: (2500,)}.get(
        k, (1024, 1100)
    ):
        check(values(rows), k, [rows - 1], threads=threads, how="searched")


@pytest.mark.parametrize("k", [17, 225, 1024, 1025])
def test_wide_keys_that_are_searched(k: int) -> None:
    for values in (spread, near_in_few_groups):
        check(values(1100), k, owners(1100), how="searched", dtype=torch.float64)


@pytest.mark.parametrize("rows", [64, 385, 1025, 2047])
@pytest.mark.parametrize("k", [10, 32, 33, 64, 127, 128, 225])
def test_wide_keys(k: int, rows: int) -> None:
    for values in (spread, near_in_few_groups):
        for how in ("bounded", "whole"):
            check(values(rows), k, owners(rows), how=how, dtype=torch.float64)


@pytest.mark.parametrize("rows", [300, 1025])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_poisons_all(rows: int, value: float) -> None:
    bank = spread(rows).float()[:, None]
    bank[rows - 1] = value
    labels = torch.arange(rows) % 3
    with simt.using(path="direct"):
        found = torch.ops.sn_simt.forward(
            torch.zeros(2, 1), labels[:2], bank, labels, None, -1, 33, 2.0, 0.5, 0, 0, True
        )
    assert found[0].isnan().all() and (found[1] == -1).all()
