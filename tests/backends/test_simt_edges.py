"""The CUDA kernels on emulated threads, where something ends: memory, lists, grids, strips, 32 bits of an offset."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import sn_ops
from sn_ops import ops
from support import fresh_python, judge, memory, problems, simt_build
from support.cuda_paths import AGAINST_OTHERS, PATHS
from support.problems import Case

simt_build.enable()
from support import simt  # noqa: E402

SCREENED = ["dense", "screen", "bank"]


def direct_sums(case: Case) -> sn_ops.SupportNeighbors:
    with simt.using(path="direct"):
        return judge.neighbors_of(case, "simt")


def with_self(case: Case, index: Tensor | None, offset: int) -> tuple[Tensor, ...]:
    """The forward operator, which takes any index: on a GPU nobody has looked at its values."""
    return ops.forward(
        "simt", case.feats, case.labels, case.candidates, case.candidate_labels, index, offset, case.k, 50.0, 0.1, 0, 0,
        True,
    )  # fmt: skip


@pytest.mark.parametrize("path", AGAINST_OTHERS)
def test_a_self_index_that_is_no_candidate_means_none(path: str) -> None:
    """The first index that does not exist is M; behind the bank lies a row that would count, if it were one."""
    case = problems.bank_case(12, 40, 30, 3, k=50, seed=4)
    assert case.candidates is not None and case.candidate_labels is not None
    bank, labels = torch.cat([case.candidates, case.feats]), torch.cat([case.candidate_labels, case.labels])
    case = replace(case, candidates=bank[:40], candidate_labels=labels[:40])
    with simt.using(path=path):
        expected = with_self(case, None, -1)
        beyond = torch.tensor([40, 41, 51, 2**31, 2**32, 2**40, -1, -2, -(2**31), -(2**40), 40, 40])
        for found in (with_self(case, beyond, -1), with_self(case, None, 40), with_self(case, None, 2**33)):
            judge.assert_same_bits(found, expected)
        some = with_self(case, torch.where(torch.arange(12) < 2, torch.tensor(38) + torch.arange(12), -1), -1)
        judge.assert_same_bits(with_self(case, None, 38), some)


@pytest.mark.parametrize("path", ["direct", *SCREENED])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strips_hand_on_that_something_is_not_finite(path: str, reduction: str) -> None:
    """The first anchor alone is NaN, and the strip that sums up is another one."""
    case = problems.bank_case(60, 90, 40, 9, seed=2)
    feats = case.feats.clone()
    feats[0, 3] = float("nan")
    leaves = replace(case, feats=feats).leaves()
    with simt.using(path=path, strip_rows=17):
        loss = sn_ops.sn_loss(**leaves.arguments(), reduction=reduction, backend="simt")
        assert simt.last_report is not None and simt.last_report.path == path
        assert loss.isnan().all()
        for gradient in torch.autograd.grad(loss, leaves.inputs(), torch.ones_like(loss)):
            assert gradient.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("score_tile", "strip_rows", "rows"), [(64, 0, 100), (64, 64, 150), (128, 0, 200), (256, 0, 300)]
)
def test_nothing_is_kept_for_rows_that_a_tile_has_beyond_the_matrix(
    score_tile: int, strip_rows: int, rows: int, dtype: torch.dtype
) -> None:
    """A product with NaN or Inf passes every test, whoever the anchor would be: rows and columns behind the last ones
    have no buffer."""
    case = problems.self_case(rows, 40, 9, seed=2).to(dtype)
    feats = case.feats.clone()
    feats[[3, rows - 60, rows - 2], [5, 0, 1]] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    case = Case(feats, case.labels, k=5)
    with simt.using(path="screen", score_tile=score_tile, strip_rows=strip_rows):
        judge.assert_same_bits(judge.neighbors_of(case, "simt"), direct_sums(case))


@cache
def about_the_length_of_the_list(bank: bool) -> tuple[Case, sn_ops.SupportNeighbors]:
    """Identities of 127 to 130 images, and their neighbours by direct sums."""
    sizes = torch.tensor([127, 128, 129, 130])
    labels = torch.arange(4).repeat_interleave(sizes)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
    feats = problems.embeddings(len(labels), 24, labels, seed=5)
    case = Case(feats, labels, k=10)
    if bank:  # anchors: some of the bank's own rows, at their places, and some that are not in it
        own = torch.where(torch.arange(60) % 3 == 0, torch.arange(60) * 8, -1)
        others = problems.embeddings(60, 24, torch.arange(60) % 4, seed=6)
        anchors = torch.where((own >= 0)[:, None], feats[own], others)
        case = Case(anchors, torch.where(own >= 0, labels[own], torch.arange(60) % 4), feats, labels, own, k=10)
    return case, direct_sums(case)


@pytest.mark.parametrize(("path", "bank"), [("dense", False), ("screen", False), *((path, True) for path in SCREENED)])
@pytest.mark.parametrize("seed", [1, 2])
def test_identities_as_large_as_the_list_of_positives(path: str, bank: bool, seed: int) -> None:
    """128 positives are listed, of 129 images where the anchor is one of them; a list that lacks one shows."""
    case, expected = about_the_length_of_the_list(bank)
    with simt.using(path=path, seed=seed):
        judge.assert_same_bits(judge.neighbors_of(case, "simt"), expected)
        assert simt.last_report is not None and simt.last_report.path == path


@pytest.mark.parametrize("path", SCREENED)
@pytest.mark.parametrize(("identities", "anchors"), [(64, 64), (150, 64), (200, 256)])
def test_labels_that_meet_in_the_table(path: str, identities: int, anchors: int) -> None:
    """As many labels as a block has anchors, of every magnitude, and as many again that are no anchor's: some have the
    same place in a hash table, whatever the hash is, and some of those meet at every place there is."""
    generator = torch.Generator().manual_seed(identities)
    labels = torch.randint(-(2**63), 2**63 - 1, (2 * identities,), generator=generator)
    labels = torch.where(torch.arange(2 * identities) % 3 == 0, torch.arange(2 * identities) << 40, labels)
    case = Case(
        torch.randn(identities, 8, generator=generator), labels[:identities],
        torch.randn(4 * identities, 8, generator=generator), labels.repeat(2), k=2,
    )  # fmt: skip
    with simt.using(path=path, positive_anchors=anchors, positive_segments=3):
        judge.assert_same_bits(judge.neighbors_of(case, "simt"), direct_sums(case))


def test_many_anchors_of_a_small_bank() -> None:
    """Kernels take more anchors a block where there are many; those of the last block are not forgotten."""
    generator = torch.Generator().manual_seed(1)
    rows, few = 16385, 40
    case = Case(
        torch.randn(rows, 1, generator=generator), torch.arange(rows) % 3,
        torch.randn(4, 1, generator=generator), torch.arange(4) % 2, k=1,
    )  # fmt: skip
    # What an anchor selects does not depend on the others.
    expected = direct_sums(replace(case, feats=case.feats[-few:], labels=case.labels[-few:]))
    with simt.using(path="dense"):
        found = judge.neighbors_of(case, "simt")
        assert simt.last_report is not None and simt.last_report.path == "dense"
    judge.assert_same_bits([x[-few:] for x in found], expected)
    assert ((found.nearest_positive < 0) == (case.labels == 2)).all()


@pytest.mark.parametrize("anchors", [12, 20])  # one by one, and in a tile
@pytest.mark.parametrize("path", ["screen", "bank"])
def test_ties_in_the_fallback(path: str, anchors: int) -> None:
    """Everything as far from the anchors, and too near for the screening to have a scale: the lowest indices win, also
    where positives of higher ones have been summed before."""
    rows = 2.0**-62 * torch.eye(16)[torch.arange(300) % 16]
    case = Case(torch.zeros(anchors, 16), torch.zeros(anchors).long(), rows, (torch.arange(300) // 5 + 1) % 2, k=4)
    expected = direct_sums(case)
    assert (expected.indices == torch.arange(4)).all()
    with simt.using(path=path):
        judge.assert_same_bits(judge.neighbors_of(case, "simt"), expected)
        assert simt.last_report is not None and simt.last_report.fallen_back == anchors


@pytest.mark.parametrize("partition", ["never", "always"])
def test_hubs_over_several_windows(partition: str) -> None:
    """Ten rows that nearly all others select: neighbours in a group of targets, each with chunks of edges and a rest in
    every window of 2048 edges."""
    generator = torch.Generator().manual_seed(7)
    feats = torch.nn.functional.normalize(torch.randn(420, 5, generator=generator), dim=1)
    feats[20:30] *= 0.05
    case = Case(feats, torch.arange(420) % 60, k=10)
    with simt.using(path="direct", partition=partition):
        judge.check_loss(case, "simt", judge.check_neighbors(case, "simt"), alpha=2.0, reductions=("mean",))


def far_apart(x: Tensor) -> Tensor:
    return memory.far_apart(x, 2**31)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_rows_that_32_bits_do_not_reach(path: str, dtype: torch.dtype) -> None:
    """Offsets of rows have 64 bits in every kernel. Rows are so many that a screening decides between them."""
    near = [problems.self_case(40, 64, 9, k=2, seed=1), problems.bank_case(3, 40, 64, 9, k=2, seed=2)]
    for case in (each.to(dtype) for each in near):
        candidates = None if case.candidates is None else far_apart(case.candidates)
        apart = replace(case, feats=far_apart(case.feats), candidates=candidates)
        seen = []
        for each in (case, apart):
            leaves = each.leaves()
            for partition in ("never", "always"):
                with simt.using(path=path, partition=partition):
                    found = judge.neighbors_of(each, "simt")
                    loss = sn_ops.sn_loss(**leaves.arguments(), backend="simt")
                    seen.append([loss.detach(), *torch.autograd.grad(loss, leaves.inputs()), *found])
        assert (seen[0][1] != 0).any()
        for other in seen[1:]:
            judge.assert_same_bits(other, seen[0])


def test_nothing_is_read_behind_an_input() -> None:
    """Inputs at the end of a page, before one that cannot be read: such a read ends the process."""
    done = fresh_python.run("-m", "support.guarded_call")
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr}"
    assert "read nothing behind" in done.stdout
