"""near and far of the Triton backend: the definition, and how many tiles of distances are summed for it.

Features are small integers: every sum is exact, whatever its order, and many distances are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sn_ops.triton import tuning
from support import judge
from support.backends import require
from support.problems import Case

ROWS, COLUMNS = 8, 16
"""Of a tile, in these tests."""

Labels = tuple[torch.Tensor, torch.Tensor]
"""Of the anchors and of the bank."""


def shuffled(labels: torch.Tensor, seed: int) -> torch.Tensor:
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def few() -> Labels:
    """The anchors have two of three identities, the first and the last."""
    return torch.arange(30) % 2 * 2, torch.arange(170) % 3


def many() -> Labels:
    """60 identities of four images; the anchors have every seventh of them."""
    return torch.arange(40) % 9 * 7, torch.arange(240) % 60


def uneven() -> Labels:
    """Identities of 1, 2, 4, ..., 64 images, negative ones and the largest there are among them."""
    values = torch.tensor([-(2**63), -(2**40), -3, 0, 7, 2**31, 2**63 - 1])
    return values[torch.arange(35) % 7], values.repeat_interleave(2 ** torch.arange(7))


def one() -> Labels:
    return torch.zeros(20).long(), torch.zeros(100).long()


def two() -> Labels:
    return torch.arange(20) // 19, torch.arange(120) // 60


def singletons() -> Labels:
    """Everybody has an identity of its own; an anchor that is not in the bank is its candidate's only positive."""
    return torch.arange(60), torch.arange(60).flip(0)


def absent() -> Labels:
    """No anchor has a candidate: their labels lie before, between and behind the bank's."""
    return torch.arange(40) * 2 - 11, torch.arange(120) % 30 * 2


def half_absent() -> Labels:
    return torch.arange(40) - 5, torch.arange(200) % 10 * 3


BANKS: list[Callable[[], Labels]] = [few, many, uneven, one, two, singletons, absent, half_absent]


def case_of(labels: Labels, self_kind: str, dims: int = 20) -> Case:
    """Anchors and a bank of small integers; with "self" the bank alone, against itself."""
    own, bank = (shuffled(each, seed) for seed, each in enumerate(labels))
    generator = torch.Generator().manual_seed(3)
    candidates = torch.randint(-2, 3, (len(bank), dims), generator=generator).float()
    if self_kind == "self":
        return Case(candidates, bank, k=1)
    feats = torch.randint(-2, 3, (len(own), dims), generator=generator).float()
    itself = {
        "none": None,
        "offset": min(3, len(bank) - len(own)),
        "tensor": torch.where(torch.arange(len(own)) % 3 > 0, torch.arange(len(own)) * 37 % len(bank), -1),
    }[self_kind]
    return Case(feats, own, candidates, bank, itself, k=1)


def own_indices(case: Case) -> np.ndarray[Any, Any]:
    """Which candidate each anchor is itself."""
    n = len(case.feats)
    if case.candidates is None:
        return np.arange(n)
    if isinstance(case.self_index, torch.Tensor):
        return case.self_index.numpy()
    return np.full(n, -1) if case.self_index is None else np.arange(n) + case.self_index


def expected(case: Case) -> list[np.ndarray[Any, Any]]:
    """near_d2, near, far_d2, far by the definition."""
    pool, labels = case.feats if case.candidates is None else case.candidates, case.labels.numpy()
    pool_labels = labels if case.candidate_labels is None else case.candidate_labels.numpy()
    n, m = len(labels), len(pool)
    own = own_indices(case)
    near_d2, far_d2 = np.full(n, np.inf, np.float32), np.full(n, -1, np.float32)
    near, far = np.full(n, -1), np.full(n, -1)
    for i in range(n):
        positives = np.flatnonzero((pool_labels == labels[i]) & (np.arange(m) != own[i]))
        if len(positives):
            d2 = ((case.feats[i] - pool[positives]) ** 2).sum(dim=1).numpy()
            near[i], far[i] = positives[d2.argmin()], positives[d2.argmax()]  # the first of equal ones
            near_d2[i], far_d2[i] = d2.min(), d2.max()
    return [near_d2, near, far_d2, far]


def tensors(device: torch.device, *parts: tuple[torch.dtype, tuple[int, ...]]) -> list[torch.Tensor | None]:
    """What the kernels write to, to be looked at."""
    return [*(torch.empty(shape, dtype=dtype, device=device) for dtype, shape in parts), None]


def find(case: Case) -> list[np.ndarray[Any, Any]]:
    from sn_ops.triton import positives
    from sn_ops.triton.batch import Batch

    require("triton")
    case = case.on("triton")
    if case.candidates is None or case.candidate_labels is None:
        batch = Batch(case.feats, case.labels, case.feats, case.labels, None, 0, True)
    else:
        tensor = case.self_index if isinstance(case.self_index, torch.Tensor) else None
        offset = case.self_index if isinstance(case.self_index, int) else -1
        batch = Batch(case.feats, case.labels, case.candidates, case.candidate_labels, tensor, offset, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positives, "workspace", tensors)
        near_d2, near, far_d2, far = (each.cpu().numpy() for each in positives.find(batch)[:4])
    # What the kernel of the loss makes of the segments.
    rows = np.arange(len(near))
    first = np.lexsort((np.where(near < 0, 2**31 - 1, near), near_d2), axis=1)[:, 0]
    last = np.lexsort((np.where(far < 0, 2**31 - 1, far), -far_d2), axis=1)[:, 0]
    return [near_d2[rows, first], near[rows, first], far_d2[rows, last], far[rows, last]]


def planned(monkeypatch: pytest.MonkeyPatch, segments: int) -> None:
    """Small tiles, and as many segments as given."""
    usual = tuning.positives_plan
    monkeypatch.setattr(
        tuning, "positives_plan", lambda *a: replace(usual(*a), rows=ROWS, columns=COLUMNS, segments=segments)
    )


def counted(patch: pytest.MonkeyPatch, distances: bool = True) -> Counter[int]:
    """How many tiles of distances each program sums from now on; without `distances` all are 0, which is quicker."""
    tiles: Counter[int] = Counter()
    if tuning.INTERPRETED:
        import triton.language as tl
        from triton.runtime import interpreter

        from sn_ops.triton import order, positives

        compute = order.tile_distances

        def count(*arguments: Any) -> Any:
            tiles[interpreter.interpreter_builder.grid_idx[0]] += 1
            if distances:
                return compute(*arguments)
            return tl.zeros((arguments[1].shape[0], arguments[4].shape[0]), tl.float32)

        patch.setattr(positives, "tile_distances", count)
    return tiles


def needed(case: Case, rows: int) -> list[int]:
    """How many candidates share an identity with one of the anchors of each group, by the definition."""
    labels = np.sort(case.labels.numpy())
    pool = labels if case.candidate_labels is None else case.candidate_labels.numpy()
    return [int(np.isin(pool, labels[first : first + rows]).sum()) for first in range(0, len(labels), rows)]


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("self_kind", ["self", "none", "offset", "tensor"])
@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: bank.__name__)
def test_near_and_far(
    monkeypatch: pytest.MonkeyPatch, bank: Callable[[], Labels], self_kind: str, segments: int
) -> None:
    """The definition, ties to the lower index within a segment and between segments; and no more tiles than full ones
    of candidates that some anchor of the group needs, in equal parts for the segments."""
    case = case_of(bank(), self_kind)
    planned(monkeypatch, segments)
    tiles = counted(monkeypatch)
    for found, wanted in zip(find(case), expected(case), strict=True):
        assert (found == wanted).all()
    for group, candidates in enumerate(needed(case, ROWS)):
        least = tuning.cdiv(candidates, COLUMNS)
        parts = [tiles[group * segments + segment] for segment in range(segments)]
        assert sum(parts) <= least and max(parts) <= tuning.cdiv(least, segments)
    if self_kind == "self" and bank is singletons:
        assert not tiles, "an anchor that is its identity's only candidate has no positive"


@pytest.mark.parametrize("self_kind", ["self", "none", "offset", "tensor"])
@pytest.mark.parametrize("bank", [few, uneven, singletons, half_absent], ids=lambda bank: bank.__name__)
def test_direct_sums_find_the_same(monkeypatch: pytest.MonkeyPatch, bank: Callable[[], Labels], self_kind: str) -> None:
    """All pairs, in segments: the definition of near and far, and of the support set, ties to the lower index."""
    case = replace(case_of(bank(), self_kind), k=9)
    usual = tuning.search_plan
    pool = len(case.feats) if case.candidates is None else len(case.candidates)

    def plan(*arguments: Any) -> tuning.SearchPlan:
        size = tuning.cdiv(pool, 3 * COLUMNS) * COLUMNS
        segments = tuning.cdiv(pool, size)
        return replace(usual(*arguments), rows=ROWS, columns=COLUMNS, segments=segments, segment_size=size)

    monkeypatch.setattr(tuning, "search_plan", plan)
    found = judge.neighbors_of(case, "triton")
    _, near, _, far = expected(case)
    assert (found.nearest_positive.cpu().numpy() == near).all() and (found.farthest_positive.cpu().numpy() == far).all()
    rows = case.feats if case.candidates is None else case.candidates
    own = own_indices(case)
    for i in range(0, len(case.feats), 3):
        d2 = ((case.feats[i] - rows) ** 2).sum(dim=1).numpy()
        order = [j for j in np.argsort(d2, kind="stable") if j != own[i]]
        assert found.indices[i].tolist() == order[: case.k]


@pytest.mark.parametrize("self_kind", ["self", "tensor"])
def test_segments_reach_the_loss(monkeypatch: pytest.MonkeyPatch, self_kind: str) -> None:
    """near and far of a screened forward, merged over segments."""
    monkeypatch.setattr(tuning, "_LEAST_CANDIDATES", 64)
    planned(monkeypatch, 3)
    case = case_of(two(), self_kind)
    found = judge.neighbors_of(case, "triton")
    _, near, _, far = expected(case)
    assert (found.nearest_positive.cpu().numpy() == near).all()
    assert (found.farthest_positive.cpu().numpy() == far).all()


def test_infinitely_far_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances beyond float32: the first is near and far, and no anchor is without a positive for it."""
    planned(monkeypatch, 3)
    case = case_of(two(), "none")
    near_d2, near, far_d2, far = find(replace(case, feats=case.feats + 1e30))
    assert (near_d2 == np.inf).all() and (far_d2 == np.inf).all()
    pool = case.candidate_labels
    assert pool is not None
    first = np.array([np.flatnonzero(pool.numpy() == label)[0] for label in case.labels.numpy()])
    assert (near == first).all() and (far == first).all()


@pytest.mark.parametrize(
    ("anchors", "candidates", "identities", "most"),
    [(256, 65536, 64, 2), (32, 16384, 1, 8), (128, 20000, 751, 1), (256, 4096, 2, 1), (600, 0, 150, 1)],
)
def test_slowest_program(
    monkeypatch: pytest.MonkeyPatch, anchors: int, candidates: int, identities: int, most: int
) -> None:
    """Tiles of the slowest program, as a GPU is given them: few or large identities leave no multiprocessor behind."""
    if not tuning.INTERPRETED:
        pytest.skip("only the interpreter tells what a program does")
    case = Case(torch.zeros(anchors, 1), torch.arange(anchors) % identities, k=1)
    if candidates:
        labels = torch.arange(candidates) % identities
        case = replace(case, candidates=torch.zeros(candidates, 1), candidate_labels=labels)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "INTERPRETED", False)
        plan = tuning.positives_plan(anchors, candidates or anchors)
    monkeypatch.setattr(tuning, "positives_plan", lambda *_: plan)
    tiles = counted(monkeypatch, distances=False)
    find(case)
    assert max(tiles.values()) <= most
    assert sum(tiles.values()) <= sum(tuning.cdiv(each, plan.columns) for each in needed(case, plan.rows))


def test_the_plan() -> None:
    """Powers of two where kernels need them, and enough programs for a GPU where a few anchors meet a large bank."""
    for anchors, candidates in [(1, 1024), (128, 65536), (256, 10**6), (8192, 8192), (65536, 65536), (10**6, 10**6)]:
        for interpreted in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tuning, "INTERPRETED", interpreted)
                plan = tuning.positives_plan(anchors, candidates)
            for number in (plan.rows, plan.columns, plan.block, plan.warps):
                assert number == tuning.power_of_two(number)
            if not interpreted:
                assert 16 * plan.rows * plan.columns * 2 <= 64 * 32 * plan.warps, "registers of the sums"
                programs = tuning.cdiv(anchors, plan.rows) * plan.segments
                assert programs >= 512 or plan.segments == min(64, candidates // plan.columns)


def test_labels_of_every_size() -> None:
    """Bisections of 0 to 70 labels: as many steps as the number of labels has bits."""
    for m in [*range(1, 18), 31, 32, 33, 63, 64, 70]:
        case = Case(torch.zeros(12, 2), torch.arange(12) - 1, torch.zeros(m, 2), torch.arange(m) * 10 // m, k=1)
        for found, wanted in zip(find(case), expected(case), strict=True):
            assert (found == wanted).all()
