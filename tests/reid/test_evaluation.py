"""CMC, both average precisions, mINP, ties and the protocol's filter, against plain loops and by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sn_ops.reid.evaluation import (
    FeatureDistances,
    MatrixDistances,
    Protocol,
    Scores,
    evaluate,
    evaluate_matrix,
    evaluate_with_distractors,
    multi_query_features,
    ranked_lists,
)
from sn_ops.reid.evaluation.distances import Metric
from support import retrieval_oracle as oracle


@dataclass(frozen=True)
class Retrieval:
    """Arguments of `evaluate`."""

    query: Tensor
    query_ids: Tensor
    query_cameras: Tensor
    gallery: Tensor
    gallery_ids: Tensor
    gallery_cameras: Tensor

    def labels(self) -> list[Any]:
        """Identities and cameras as the oracle takes them."""
        return [
            self.query_ids.numpy(),
            self.query_cameras.numpy(),
            self.gallery_ids.numpy(),
            self.gallery_cameras.numpy(),
        ]

    def matrix(self) -> Tensor:
        """Squared distances in float64."""
        return torch.from_numpy(oracle.euclidean(self.query.double().numpy(), self.gallery.double().numpy()))


def make(seed: int, q: int = 23, g: int = 90, d: int = 7, people: int = 9, coarse: bool = False) -> Retrieval:
    """Noisy clusters with junk (-1), distractors (0) and, where coarse, many exactly equal distances."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(people + 2, d, generator=generator)
    ids = [torch.randint(low, people + 1, (n,), generator=generator) for low, n in ((1, q), (-1, g))]
    cameras = [torch.randint(0, 3, (n,), generator=generator) for n in (q, g)]
    rows = [centres[i + 1] + 0.9 * torch.randn(len(i), d, generator=generator) for i in ids]
    if coarse:
        rows = [r.round() for r in rows]
    return Retrieval(rows[0], ids[0], cameras[0], rows[1], ids[1], cameras[1])


def agree(ours: Scores, theirs: oracle.Result, tolerance: float = 1e-12) -> None:
    """Every number, and those of every query."""
    assert ours.cmc.tolist() == pytest.approx(theirs.cmc, abs=tolerance)
    assert ours.mAP_standard == pytest.approx(theirs.mean_ap, abs=tolerance)
    assert ours.mAP_market == pytest.approx(theirs.mean_ap_market, abs=tolerance)
    assert ours.mINP == pytest.approx(theirs.mean_inp, abs=tolerance)
    assert ours.skipped == sum(values is None for values in theirs.per_query)
    assert ours.queries == len(theirs.per_query) - ours.skipped
    each = ours.per_query
    for i, values in enumerate(theirs.per_query):
        mine = (
            float(each.average_precision[i]),
            float(each.average_precision_market[i]),
            float(each.inverse_negative_penalty[i]),
            int(each.first_rank[i]),
        )
        assert mine == pytest.approx((0, 0, 0, 0) if values is None else values, abs=tolerance)


# ---- by hand ----------------------------------------------------------------------------------------------------


def by_hand(hits: list[int], **options: Any) -> Scores:
    """One query whose list has these hits."""
    n = len(hits)
    return evaluate_matrix(
        torch.arange(n, dtype=torch.float32)[None],
        torch.tensor([5]),
        torch.tensor([0]),
        torch.tensor([5 if hit else 0 for hit in hits]),
        torch.ones(n, dtype=torch.int64),
        **options,
    )


def test_average_precision_in_both_definitions_by_hand() -> None:
    """[1, 0, 1, 0]: (1 + 2/3) / 2 = 0.8333, and ((1 + 1) / 2 + (2/3 + 1/2) / 2) / 2 = 0.7917."""
    scores = by_hand([1, 0, 1, 0])
    assert scores.mAP_standard == pytest.approx(5 / 6, abs=1e-15)
    assert scores.mAP_market == pytest.approx(19 / 24, abs=1e-15)
    assert scores.mINP == pytest.approx(2 / 3, abs=1e-15)
    assert scores.cmc[:4].tolist() == [1, 1, 1, 1]
    # [0, 1, 1]: (1/2 + 2/3) / 2; ((1/2 + 0/1) / 2 + (2/3 + 1/2) / 2) / 2; 2/3.
    scores = by_hand([0, 1, 1])
    assert scores.mAP_standard == pytest.approx(7 / 12, abs=1e-15)
    assert scores.mAP_market == pytest.approx((1 / 4 + 7 / 12) / 2, abs=1e-15)
    assert scores.mINP == pytest.approx(2 / 3, abs=1e-15)
    assert scores.cmc[:3].tolist() == [0, 1, 1]


def test_which_definition_a_number_is() -> None:
    """`mAP` follows the option, and the text names the definition."""
    standard, market = by_hand([1, 0, 1, 0]), by_hand([1, 0, 1, 0], average_precision="market")
    assert standard.mAP == standard.mAP_standard and market.mAP == market.mAP_market
    assert str(standard).startswith("mAP (standard) 83.33 %, mAP (market) 79.17 %")
    assert str(market).startswith("mAP (market) 79.17 %, mAP (standard) 83.33 %")
    assert standard.as_dict() == {
        "mAP_standard": standard.mAP_standard,
        "mAP_market": standard.mAP_market,
        "mINP": standard.mINP,
        **{f"rank{k}": 1.0 for k in (1, 5, 10, 20)},
        "queries": 1,
        "skipped": 0,
        "gallery": 4,
    }


def test_cmc_has_its_length_where_the_gallery_is_shorter() -> None:
    """Fewer kept images than max_rank do not make the curve ragged."""
    assert by_hand([0, 1], max_rank=50).cmc.tolist() == [0.0] + [1.0] * 49


def test_junk_same_camera_and_distractors() -> None:
    """Gallery: junk, the query's own camera, a distractor, then the match: it is at rank 2."""
    scores = evaluate_matrix(
        torch.tensor([[0.0, 1.0, 2.0, 3.0]]),
        torch.tensor([7]),
        torch.tensor([2]),
        torch.tensor([-1, 7, 0, 7]),
        torch.tensor([0, 2, 2, 1]),
    )
    assert scores.per_query.first_rank.tolist() == [2]
    assert scores.per_query.matches.tolist() == [1]
    assert scores.gallery == 3
    without = evaluate_matrix(
        torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([7]), None, torch.tensor([-1, 7, 0, 7]), None
    )
    assert without.per_query.first_rank.tolist() == [1] and without.per_query.matches.tolist() == [2]


def test_a_query_without_a_match() -> None:
    """Skipped, or 0 in every score as in the official Market-1501 code."""
    arguments: tuple[Any, ...] = (
        torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
        torch.tensor([1, 2]),
        torch.tensor([0, 0]),
        torch.tensor([1, 2]),
        torch.tensor([1, 0]),
    )
    skip, zero = evaluate_matrix(*arguments), evaluate_matrix(*arguments, unmatched="zero")
    assert (skip.queries, skip.skipped, skip.mAP, skip.rank1, skip.mINP) == (1, 1, 1, 1, 1)
    assert (zero.queries, zero.skipped, zero.mAP, zero.rank1, zero.mINP) == (2, 0, 0.5, 0.5, 0.5)
    assert zero.mAP_market == 0.5


def test_ties_go_to_the_lower_index() -> None:
    """Equal distances: the match counts behind the images with a lower index and before the others."""
    for place in range(5):
        ids = [0] * 5
        ids[place] = 3
        scores = evaluate_matrix(
            torch.ones(1, 5), torch.tensor([3]), torch.tensor([0]), torch.tensor(ids), torch.ones(5, dtype=torch.int64)
        )
        assert scores.per_query.first_rank.tolist() == [place + 1]


# ---- against plain loops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("coarse", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("seed", range(3))
def test_features_agree_with_plain_loops(seed: int, coarse: bool, dtype: torch.dtype) -> None:
    """All scores of all queries, for every type; half precision makes ties of its own."""
    case = make(seed, coarse=coarse)
    case = replace(case, query=case.query.to(dtype), gallery=case.gallery.to(dtype))
    metrics: tuple[tuple[Metric, Any], ...] = (("euclidean", oracle.euclidean), ("cosine", oracle.cosine))
    for metric, distance in metrics:
        if metric == "cosine" and coarse:
            continue  # whether two cosines are equal depends on how the quotient is rounded
        expected = oracle.score(
            oracle.hits(distance(case.query.double().numpy(), case.gallery.double().numpy()), *case.labels()), 20
        )
        agree(evaluate(**vars(case), max_rank=20, metric=metric), expected)


@given(st.data())
def test_matrices_agree_with_plain_loops(data: st.DataObject) -> None:
    """Any small matrix of few values, with infinities, in tiles of any size."""
    q, g = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    value = st.sampled_from([0.0, 0.5, 1.0, 2.0, float("inf")])
    matrix = torch.tensor(data.draw(st.lists(st.lists(value, min_size=g, max_size=g), min_size=q, max_size=q)))

    def integers(low: int, high: int, n: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n)))

    labels = (integers(0, 3, q), integers(0, 1, q), integers(-1, 3, g), integers(0, 1, g))
    lists = oracle.hits(matrix.numpy(), *(values.numpy() for values in labels))
    if not any(any(row) for row in lists):
        with pytest.raises(ValueError, match="expected at least one query with a match"):
            evaluate_matrix(matrix, *labels)
        return
    chunk = data.draw(st.integers(1, 2 * q * g))
    agree(evaluate_matrix(matrix, *labels, chunk=chunk, max_rank=8), oracle.score(lists, 8))


@pytest.mark.parametrize("chunk", [1, 37, 1 << 10, 1 << 20])
def test_ranks_do_not_depend_on_the_chunk(chunk: int) -> None:
    """The same scores for any tile, where ties abound."""
    case = make(11, coarse=True)
    one, other = evaluate(**vars(case)), evaluate(**vars(case), chunk=chunk)
    for mine, theirs in zip(vars(one.per_query).values(), vars(other.per_query).values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e6])
def test_near_duplicates_far_from_the_origin(scale: float) -> None:
    """|x|^2 + |z|^2 - 2xz has no correct digit here, also in float64: the direct sums decide, exact copies tie."""
    generator = torch.Generator().manual_seed(5)
    base = 1e4 * torch.randn(1, 16, generator=generator, dtype=torch.float64)
    step = 2.0**-36 * torch.randint(-3, 4, (70, 16), generator=generator)
    rows = scale * (base + step)
    rows[40:60] = rows[10:30]
    ids = torch.randint(1, 4, (70,), generator=generator)
    cameras = torch.randint(0, 2, (70,), generator=generator)
    case = Retrieval(rows[:10], ids[:10], cameras[:10], rows[10:], ids[10:], cameras[10:])
    direct = ((rows[:10, None] - rows[None, 10:]) ** 2).sum(2)
    product = (rows[:10] ** 2).sum(1)[:, None] + (rows[10:] ** 2).sum(1) - 2 * rows[:10] @ rows[10:].T
    assert (product - direct).abs().max() > direct.max(), "the input must defeat the product"
    agree(evaluate(**vars(case)), oracle.score(oracle.hits(case.matrix().numpy(), *case.labels()), 50))


def test_equal_features_tie_whatever_their_place() -> None:
    """All images equal: the list is the gallery's order, in every tile and at any width of the features."""
    for d in (1, 3, 130, 2048):
        row = torch.randn(1, d, generator=torch.Generator().manual_seed(d))
        ids = torch.arange(1, 100)
        scores = evaluate(
            row.expand(99, d), ids, torch.zeros_like(ids), row.expand(99, d), ids, torch.ones_like(ids), chunk=997
        )
        assert scores.per_query.first_rank.tolist() == list(range(1, 100))


def test_rows_of_zeros_under_the_cosine() -> None:
    """Their cosine to everything is 0, to another row of zeros as well."""
    case = make(3, d=4)
    case.query[2] = 0
    case.gallery[[5, 6, 50]] = 0
    expected = oracle.score(oracle.hits(oracle.cosine(case.query.numpy(), case.gallery.numpy()), *case.labels()), 50)
    agree(evaluate(**vars(case), metric="cosine"), expected)


def test_inputs_are_left_alone() -> None:
    """float64 features and matrices are not copied on the way in: nothing may write to them."""
    case = make(1)
    case = replace(case, query=case.query.double(), gallery=case.gallery.double())
    matrix = case.matrix()
    before = [x.clone() for x in (*vars(case).values(), matrix)]
    evaluate(**vars(case))
    evaluate_matrix(matrix, case.query_ids, case.query_cameras, case.gallery_ids, case.gallery_cameras)
    assert all(torch.equal(x, y) for x, y in zip((*vars(case).values(), matrix), before, strict=True))


# ---- lists ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 7, 200])
def test_ranked_lists(top: int) -> None:
    """The kept images in order (distance, index), with their distances, filled up where the list ends."""
    case = make(2, coarse=True)
    protocol = Protocol(case.query_ids, case.query_cameras, case.gallery_ids, case.gallery_cameras, torch.device("cpu"))
    matrix = case.matrix()
    for distances, readable in (
        (FeatureDistances(case.query, case.gallery), matrix.sqrt()),
        (MatrixDistances(matrix), matrix),
    ):
        lists = ranked_lists(distances, protocol, top=top, chunk=500)
        for i in range(len(case.query)):
            same = (case.gallery_ids == case.query_ids[i]) & (case.gallery_cameras == case.query_cameras[i])
            kept = [j for j in range(len(case.gallery)) if case.gallery_ids[j] >= 0 and not same[j]]
            order = sorted(kept, key=lambda j: (float(matrix[i, j]), j))[:top]
            assert lists.indices[i].tolist() == order + [-1] * (top - len(order))
            assert lists.distances[i, : len(order)].tolist() == pytest.approx(readable[i, order].tolist(), rel=1e-12)
            assert lists.distances[i, len(order) :].isinf().all()
            assert torch.equal(lists.matches[i, : len(order)], case.gallery_ids[order] == case.query_ids[i])
            assert not lists.matches[i, len(order) :].any()


# ---- distractors and multiple query -----------------------------------------------------------------------------


def test_distractors_in_one_pass_equal_galleries_one_by_one() -> None:
    """Each size is what `evaluate` says of that gallery, and accuracy cannot rise."""
    case = make(4)
    extra = torch.randn(60, 7, generator=torch.Generator().manual_seed(9))
    counts = [0, 1, 13, 60]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    curve = evaluate_with_distractors(**vars(case), distractors=extra, counts=counts, seed=3, chunk=400)
    for count, scores in zip(counts, curve, strict=True):
        bigger = replace(
            case,
            gallery=torch.cat([case.gallery, extra[order[:count]]]),
            gallery_ids=torch.cat([case.gallery_ids, torch.zeros(count, dtype=torch.int64)]),
            gallery_cameras=torch.cat([case.gallery_cameras, torch.zeros(count, dtype=torch.int64)]),
        )
        alone = evaluate(**vars(bigger))
        assert scores.as_dict() == alone.as_dict() and torch.equal(scores.cmc, alone.cmc)
    assert [s.mAP for s in curve] == sorted((s.mAP for s in curve), reverse=True) and curve[0].mAP > curve[-1].mAP
    given_order = evaluate_with_distractors(**vars(case), distractors=extra[order], counts=counts, seed=None)
    assert [s.mAP for s in given_order] == [s.mAP for s in curve]
    assert [s.gallery - curve[0].gallery for s in evaluate_with_distractors(**vars(case), distractors=extra)] == [0, 60]


def test_sizes_of_the_gallery_that_nobody_chose() -> None:
    """By default 1, 2 and 5 times the powers of ten from 100, and all."""
    case = make(4)
    extra = torch.randn(1500, 7, generator=torch.Generator().manual_seed(9))
    curve = evaluate_with_distractors(**vars(case), distractors=extra)
    assert [s.gallery - curve[0].gallery for s in curve] == [0, 100, 200, 500, 1000, 1500]


def test_a_distractor_matches_nobody() -> None:
    """Also where 0 is a person."""
    case = make(6)
    case = replace(case, query_ids=case.query_ids - 1, gallery_ids=(case.gallery_ids - 1).clamp(min=-1))
    base, more = evaluate_with_distractors(**vars(case), distractors=case.query, counts=[0, len(case.query)])
    assert torch.equal(base.per_query.matches, more.per_query.matches)
    assert more.rank1 == 0


def test_multiple_query_is_the_mean_over_a_persons_images_of_a_camera() -> None:
    """By hand, and with one row for each query where several ask for the same."""
    images = torch.tensor([[1.0, 0.0], [0.0, 4.0], [3.0, 2.0], [9.0, 9.0]])
    ids, cameras = torch.tensor([4, 7, 4, 4]), torch.tensor([1, 1, 1, 2])
    means = multi_query_features(torch.tensor([7, 4, 4, 4]), torch.tensor([1, 1, 2, 1]), images, ids, cameras)
    assert means.tolist() == [[0, 4], [2, 1], [9, 9], [2, 1]] and means.dtype == images.dtype
    with pytest.raises(ValueError, match=r"got none for 1 queries, the first \(7, 2\)"):
        multi_query_features(torch.tensor([4, 7]), torch.tensor([1, 2]), images, ids, cameras)


# ---- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(23, 7, dtype=torch.int64)}, TypeError, "query: expected a floating point tensor"),
        ({"query": torch.zeros(23)}, ValueError, r"query: expected shape \[rows, D\] with D >= 1, got \[23\]"),
        ({"gallery": torch.zeros(90, 8)}, ValueError, r"gallery: expected \[G, 7\] on cpu like query, got \[90, 8\]"),
        ({"gallery": torch.full((90, 7), torch.nan)}, ValueError, "expected finite features, got 90 rows"),
        ({"query_ids": torch.zeros(23)}, TypeError, "query_ids: expected a 1-D integer tensor, got torch.float32"),
        ({"query_ids": torch.ones(22, dtype=torch.int64)}, ValueError, "query_cameras: expected 22 entries, got 23"),
        (
            {"gallery_cameras": torch.ones(5, dtype=torch.int64)},
            ValueError,
            "gallery_cameras: expected 90 entries, got 5",
        ),
        ({"query_ids": torch.full((23,), -1)}, ValueError, "query_ids: expected none below 0"),
        ({"gallery_ids": torch.full((90,), 99)}, ValueError, "expected at least one query with a match"),
        ({"query_cameras": None}, ValueError, "expected them for query and gallery or for neither"),
        ({"metric": "manhattan"}, ValueError, "metric: expected one of"),
        ({"average_precision": "voc"}, ValueError, "average_precision: expected one of"),
        ({"unmatched": "half"}, ValueError, "unmatched: expected one of"),
        ({"max_rank": 0}, ValueError, "max_rank: expected an int >= 1, got 0"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The message names the bad argument."""
    with pytest.raises(error, match=message):
        evaluate(**(vars(make(0)) | change))


def test_errors_of_the_other_entries() -> None:
    """Matrices, lists and distractors."""
    case = make(0)
    labels = (case.query_ids, case.query_cameras, case.gallery_ids, case.gallery_cameras)
    with pytest.raises(ValueError, match="expected numbers or \\+inf, got NaN or -inf"):
        evaluate_matrix(torch.full((23, 90), torch.nan), *labels)
    with pytest.raises(TypeError, match=r"distances: expected a floating point tensor \[Q, G\]"):
        evaluate_matrix(torch.zeros(23, 90, dtype=torch.int32), *labels)
    with pytest.raises(ValueError, match="query_ids: expected 22 entries, one a feature row, got 23"):
        evaluate_matrix(torch.zeros(22, 90), *labels)
    with pytest.raises(ValueError, match="counts: expected ascending numbers up to 3 distractors"):
        evaluate_with_distractors(**vars(case), distractors=torch.zeros(3, 7), counts=[0, 4])


def test_memory_does_not_grow_with_queries_times_gallery() -> None:
    """No tensor that a run makes is larger than a few chunks, though the whole matrix would be."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // 8)
            return out

    case = make(8, q=400, g=6000, d=4, people=600)
    chunk = 1 << 14
    with Largest() as seen:
        evaluate(**vars(case), chunk=chunk)
    assert seen.elements <= max(2 * chunk, 1 << 17) < len(case.query) * len(case.gallery) // 10


def test_numpy_matrices_by_reference() -> None:
    """`torch.from_numpy` is enough: read-only views are not written to."""
    case = make(1)
    matrix = case.matrix().numpy().astype(np.float32)
    ours = evaluate_matrix(torch.from_numpy(matrix), *(torch.from_numpy(x) for x in case.labels()))
    agree(ours, oracle.score(oracle.hits(matrix, *case.labels()), 50))
