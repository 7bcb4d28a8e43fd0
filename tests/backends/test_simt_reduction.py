"""The sum over anchors on emulated threads: one order of additions, alone or shared out over blocks, on every path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from support import judge, problems, simt_build
from support.problems import Case

simt_build.enable()
from support import simt  # noqa: E402

MEAN, SUM, NONE = range(3)
SPAN = 0
PARTIALS = 256
FLOOR = 1e-12


class Outputs(NamedTuple):
    loss: Tensor
    indices: Tensor
    coefficients: Tensor
    nearest: Tensor
    farthest: Tensor
    squared: Tensor
    stats: Tensor


def forward(case: Case, reduction: int, path: str, **settings: Any) -> Outputs:
    own = case.self_index if isinstance(case.self_index, Tensor) else None
    offset = case.self_index if isinstance(case.self_index, int) else -1
    with simt.using(path=path, **settings):
        found = torch.ops.sn_simt.forward(
            case.feats, case.labels, case.candidates, case.candidate_labels, own, offset, case.k, 1.5, 0.3, SPAN,
            reduction, True,
        )  # fmt: skip
    assert simt.last_report is not None and simt.last_report.path == path
    return Outputs(*found)


def few_candidates(anchors: int, dtype: torch.dtype) -> Case:
    """Anchors on a line against 20 candidates; some anchors have no positive."""
    generator = torch.Generator().manual_seed(anchors)
    feats = torch.randn(anchors, 1, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 9, (anchors,), generator=generator)
    bank = torch.linspace(-4, 4, 20, dtype=torch.float64)[:, None]
    return Case(feats.to(dtype), labels, bank.to(dtype), torch.arange(20) % 7, k=2)


def in_order(values: Sequence[float]) -> float:
    """Partial sums of each 256th value, one after the other; then halves of the partial sums are added."""
    partials = []
    for p in range(PARTIALS):
        total = 0.0
        for i in range(p, len(values), PARTIALS):
            total += values[i]
        partials.append(total)
    while len(partials) > 1:
        half = len(partials) // 2
        partials = [a + b for a, b in zip(partials[:half], partials[half:], strict=True)]
    return partials[0]


def statistics_of(case: Case, found: Outputs) -> list[float]:
    """The statistics by their definition, from every anchor's neighbours and squared distances."""
    assert case.candidate_labels is not None
    squared, indices = found.squared.double().tolist(), found.indices.tolist()
    labels, bank_labels = case.labels.tolist(), case.candidate_labels.tolist()
    positive_sums, negative_sums = [], []
    positives = negatives = support = valid = first = 0
    for i, near in enumerate(found.nearest.tolist()):
        positive_sum = negative_sum = 0.0
        if near >= 0:
            valid += 1
            kinds = [bank_labels[j] == labels[i] for j in indices[i][: case.k]]
            distances = [math.sqrt(max(d2, FLOOR)) for d2 in squared[i]]
            for kind, distance in zip(kinds, distances, strict=False):
                if kind:
                    positive_sum += distance
                else:
                    negative_sum += distance
            support += sum(kinds)
            first += kinds[0]
            positives += max(1, sum(kinds))
            negatives += len(kinds) - sum(kinds)
            if not any(kinds):
                positive_sum = distances[case.k]
        positive_sums.append(positive_sum)
        negative_sums.append(negative_sum)
    return [
        float(valid),
        in_order(positive_sums) / positives if positives else 0.0,
        in_order(negative_sums) / negatives if negatives else 0.0,
        first / valid if valid else 0.0,
        support / valid if valid else 0.0,
        0.0,
    ]


def paths_of(dtype: torch.dtype, anchors: int) -> list[str]:
    if dtype == torch.float64:
        return ["direct"]
    return ["direct", "dense", "screen"] + (["bank"] if anchors <= 256 else [])


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("anchors", [1, 255, 256, 257, 513])
def test_sums_by_their_definition(anchors: int, dtype: torch.dtype, shared: int) -> None:
    """Loss and statistics, bit for bit, around the numbers where partials and blocks end."""
    case = few_candidates(anchors, dtype)
    single = forward(case, NONE, "direct")
    statistics = statistics_of(case, single)
    seen = []
    for path in paths_of(dtype, anchors):
        for reduction in (MEAN, SUM):
            found = forward(case, reduction, path, shared_reduction=shared, seed=anchors)
            assert found.stats.tolist() == statistics
            if reduction == SUM:
                seen.append(found.loss.item())
            if dtype == torch.float64:
                total = in_order(single.loss.tolist())
                expected = total if reduction == SUM else total / max(1.0, statistics[0])
                assert found.loss.item() == expected
    assert len(set(seen)) == 1


@pytest.mark.parametrize(("anchors", "path"), [(2049, "direct"), (8193, "direct"), (2049, "screen"), (16401, "dense")])
def test_sums_over_many_anchors(anchors: int, path: str) -> None:
    """As planned: more anchors than one block sums alone, more than one group of the search for positives."""
    case = few_candidates(anchors, torch.float64 if path == "direct" else torch.float32)
    found = forward(case, SUM, path)
    assert found.stats.tolist() == statistics_of(case, found)
    if path == "direct":
        assert simt.last_report is not None and simt.last_report.launches == 3
        assert found.loss.item() == in_order(forward(case, NONE, path).loss.tolist())


def test_more_records_than_a_block_has_room_for() -> None:
    """Partials of 257 records, one more than a block holds at once."""
    case = few_candidates(PARTIALS * 257, torch.float64)
    assert case.candidates is not None and case.candidate_labels is not None
    case = Case(case.feats, case.labels, case.candidates[:2], case.candidate_labels[:2], k=1)
    found = forward(case, SUM, "direct")
    assert found.stats.tolist() == statistics_of(case, found)


@pytest.mark.parametrize("strip_rows", [0, 200])
def test_queued_rows_are_summed_as_well(strip_rows: int) -> None:
    """A block of the merge serves the queued rows of its partial before it sums it, in the last strip, too."""
    case = problems.adversarial_case("clusters-1e-6", 530, 24)
    expected = forward(case, SUM, "direct")
    for shared, seed in ((0, 7), (1, 8), (1, 9), (1, 10)):
        settings = {"shared_reduction": shared, "strip_rows": strip_rows, "no_rescreen": 1, "buffer_capacity": 1}
        found = forward(case, SUM, "screen", seed=seed, **settings)
        judge.assert_same_bits(found, expected)
        assert simt.last_report is not None and simt.last_report.fallen_back > 300


@pytest.mark.parametrize("reduction", [MEAN, SUM, NONE])
@pytest.mark.parametrize("path", ["direct", "dense", "screen", "bank"])
@pytest.mark.parametrize("shared", [0, 1])
def test_nothing_finite_comes_out_of_what_is_not(path: str, reduction: int, shared: int) -> None:
    """Every output of every anchor, whichever block writes it."""
    case = problems.bank_case(250, 140, 9, 12)
    case.feats[133, 4] = math.nan
    found = forward(case, reduction, path, shared_reduction=shared, strip_rows=90)
    for values in (found.loss, found.squared, found.stats):
        assert values.isnan().all()
    for values in (found.indices, found.nearest, found.farthest):
        assert (values == -1).all()
    assert (found.coefficients == 0).all()
