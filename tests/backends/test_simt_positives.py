"""The search for positives on emulated threads: however it is cut, every anchor knows all of its positives."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import sn_ops
from support import judge, problems, simt_build
from support.problems import Case

simt_build.enable()
from support import simt  # noqa: E402

SCREENED = ("dense", "screen", "bank")
LISTED = 128
"""Positives of an anchor that are listed; beyond, only the farthest is looked for."""


def direct_sums(case: Case) -> sn_ops.SupportNeighbors:
    """Neighbours by the direct path, which needs no lists, held against the oracle."""
    with simt.using(path="direct"):
        judge.check_neighbors(case, "simt")
        return judge.neighbors_of(case, "simt")


def check(case: Case, expected: sn_ops.SupportNeighbors, path: str, **settings: int) -> None:
    """The path takes the case and selects as direct sums do, bit for bit."""
    with simt.using(path=path, **settings):
        found = judge.neighbors_of(case, "simt")
    assert simt.last_report is not None and simt.last_report.path == path
    judge.assert_same_bits(found, expected)


@cache
def antipodes(images: int, own: str) -> tuple[Case, sn_ops.SupportNeighbors]:
    """An identity of so many images among others, each of which is the farthest positive of some anchor: if one is
    missing in a list, or the anchor's own row takes its place, that anchor shows it.

    own: "offset" (the anchors are the first candidates), "none" (all candidates count, an anchor's double as well), or
    "stale" (the anchors' rows in the bank are old: their antipodes, which are farther than any positive).
    """
    generator = torch.Generator().manual_seed(images)
    half = torch.randn(images // 2 + 1, 24, generator=generator)
    feats = torch.stack([half, -half], dim=1).reshape(-1, 24)[:images]
    feats = feats / feats.norm(dim=1, keepdim=True) * (1 + 0.01 * torch.rand(images, 1, generator=generator))
    others = torch.randn(45, 24, generator=generator)
    bank = torch.cat([feats, others])
    labels = torch.cat([torch.full((images,), -7), torch.arange(45) % 9])
    order = torch.randperm(images + 20, generator=generator)
    order = torch.cat([order, torch.arange(images + 20, images + 45)])
    bank, labels = bank[order], labels[order]
    anchors = images + 20
    feats = -bank[:anchors] if own == "stale" else bank[:anchors].clone()
    case = Case(feats, labels[:anchors].clone(), bank, labels, None if own == "none" else 0, k=3)
    return case, direct_sums(case)


@pytest.mark.parametrize("path", SCREENED)
@pytest.mark.parametrize("own", ["offset", "none", "stale"])
@pytest.mark.parametrize("images", range(LISTED - 1, LISTED + 4))
def test_identities_about_as_large_as_a_list(images: int, own: str, path: str) -> None:
    """The list has room for 128 positives and the anchor's own row: all are found, and no one else."""
    check(*antipodes(images, own), path, positive_anchors=256, positive_segments=3, seed=images)
    # An old row in the sample that bounds the farthest would leave none but the fallback to find it.
    assert own != "stale" or simt.last_report is None or simt.last_report.fallen_back == 0


@cache
def uneven() -> tuple[Case, sn_ops.SupportNeighbors]:
    """Identities of 1 to 150 images, some of anchors alone, some of candidates alone; own rows by index."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.cat(
        [torch.full((150,), 2**62), torch.full((129,), -(2**62)), torch.arange(61) // 3, torch.arange(30)]
    )
    labels = labels[torch.randperm(370, generator=generator)]
    bank = torch.randn(370, 9, generator=generator)
    own = torch.randperm(370, generator=generator)[:205]
    own[::5] = -1
    mine = torch.where(own >= 0, labels[own], labels[torch.arange(205)])
    mine[::11] = 1000 + torch.arange(19)
    feats = torch.where((own >= 0)[:, None], bank[own], torch.randn(205, 9, generator=generator))
    case = Case(feats, mine, bank, labels, own, k=4)
    return case, direct_sums(case)


@pytest.mark.parametrize("path", SCREENED)
@pytest.mark.parametrize(("group", "segments"), [(32, 1), (64, 370), (256, 7), (1024, 1)])
def test_however_the_search_is_cut(group: int, segments: int, path: str) -> None:
    """Groups of anchors and segments of candidates, whole and in part; a candidate a segment."""
    check(*uneven(), path, positive_anchors=group, positive_segments=segments, seed=group + segments)


def slot_of(label: int, bits: int) -> int:
    """The slot of a label in the hash table, as positives.cu computes it."""
    factor, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    mixed = (label & mask) * factor & mask
    mixed ^= mixed >> 32
    return (mixed * factor & mask) >> (64 - bits)


@pytest.mark.parametrize("slot", [0, 254])
def test_labels_of_one_slot(slot: int) -> None:
    """Many identities that ask for the same slot: each goes on to one of its own, around the end of the table."""
    group, bits = 64, 8
    same = [label for label in range(-20000, 20000) if slot_of(label, bits) == slot]
    assert len(same) > 60
    labels = torch.tensor(same[:60]).repeat(3)
    labels = labels[torch.randperm(180, generator=torch.Generator().manual_seed(1))]
    case = Case(problems.embeddings(180, 12, labels, seed=1), labels, k=3)
    check(case, direct_sums(case), "screen", positive_anchors=group)
