"""Tiny cases with the numbers worked out by hand: where each reading of the definition differs from its neighbours."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sn_ops
from support.problems import on

# Points on a line, two identities: 0, 1 and 6 belong together, 3 is alone.
#   anchor 0 (at 0): 1 at 1 +, 2 at 3 -, 3 at 6 +        anchor 2 (at 3): no positive; 1 at 2, 0 and 3 tied at 3
#   anchor 1 (at 1): 0 at 1 +, 2 at 2 -, 3 at 5 +        anchor 3 (at 6): 2 at 3 -, 1 at 5 +, 0 at 6 +
LINE = [0.0, 1.0, 3.0, 6.0]
LABELS = [7, 7, -2, 7]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def line(backend: str, points: list[float], labels: list[int]) -> tuple[Tensor, Tensor]:
    """Features of one dimension and their labels, where the backend takes them."""
    return on(backend, (torch.tensor(points, dtype=torch.float64)[:, None], torch.tensor(labels)))


def losses(backend: str, points: list[float], labels: list[int], **options: Any) -> list[float]:
    options = {"alpha": 1.0, "weight": 0.5, "k": 2, **options}
    return sn_ops.sn_loss(*line(backend, points, labels), reduction="none", backend=backend, **options).tolist()


def gradient(backend: str, points: list[float], labels: list[int], anchor: int, **options: Any) -> list[float]:
    """The derivative of one anchor's loss by every point."""
    options = {"alpha": 1.0, "weight": 0.5, "k": 2, **options}
    feats, identities = line(backend, points, labels)
    feats.requires_grad_()
    loss = sn_ops.sn_loss(feats, identities, reduction="none", backend=backend, **options)
    return torch.autograd.grad(loss[anchor], feats)[0].flatten().tolist()


def test_neighbors_of_the_line(backend: str) -> None:
    """k = 2; the tie of anchor 2 goes to candidate 0, not 3."""
    found = sn_ops.support_neighbors(*line(backend, LINE, LABELS), k=2, backend=backend)
    assert found.indices.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert found.distances.tolist() == [[1, 3], [1, 2], [2, 3], [3, 5]]
    assert found.is_positive.tolist() == [[True, False], [True, False], [False, False], [False, True]]
    assert found.nearest_positive.tolist() == [1, 0, -1, 1]
    assert found.farthest_positive.tolist() == [3, 3, -1, 0]


@pytest.mark.parametrize(
    ("squeeze", "squeezes"),
    [
        ("span", [5.0, 4.0, 1.0]),  # 6 - 1, 5 - 1, 6 - 5
        ("support", [1.0, 1.0, 5.0]),  # one positive each: its distance
        ("nearest", [1.0, 1.0, 5.0]),
        ("none", [0.0, 0.0, 0.0]),
    ],
)
def test_loss_of_the_line(backend: str, squeeze: str, squeezes: list[float]) -> None:
    """softplus(d_pos - d_neg) + squeeze / 2; the anchor without a positive is 0 and not counted in the mean."""
    separations = [softplus(1 - 3), softplus(1 - 2), softplus(5 - 3)]
    expected = [s + 0.5 * q for s, q in zip(separations, squeezes, strict=True)]
    found = losses(backend, LINE, LABELS, squeeze=squeeze)
    assert found == pytest.approx([*expected[:2], 0.0, expected[2]], rel=1e-12)
    arguments: dict[str, Any] = {"k": 2, "alpha": 1.0, "weight": 0.5, "squeeze": squeeze, "backend": backend}
    mean = sn_ops.sn_loss(*line(backend, LINE, LABELS), **arguments)
    total = sn_ops.sn_loss(*line(backend, LINE, LABELS), reduction="sum", **arguments)
    assert float(mean) == pytest.approx(sum(expected) / 3, rel=1e-12)
    assert float(total) == pytest.approx(sum(expected), rel=1e-12)


def test_first_loss_to_the_digit(backend: str) -> None:
    """log(1 + e^-2) + 0.5 * 5."""
    assert losses(backend, LINE, LABELS)[0] == pytest.approx(2.6269280110429725, rel=1e-14)


def test_gradient_of_the_line(backend: str) -> None:
    """Anchor 0: by d(0,1): sigmoid(-2) - 0.5, by d(0,2): -sigmoid(-2), by d(0,3): 0.5. All points lie to its right."""
    s = sigmoid(-2.0)
    assert s == pytest.approx(0.11920292202211755)
    expected = [-(s - 0.5) + s - 0.5, s - 0.5, -s, 0.5]
    assert gradient(backend, LINE, LABELS, 0) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    # The authors' reading: no pull on the far one, a pull on the near one.
    expected = [-(s + 0.5) + s, s + 0.5, -s, 0.0]
    assert gradient(backend, LINE, LABELS, 0, squeeze="nearest") == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_support_squeeze_spans_the_positives_in_the_support_set(backend: str) -> None:
    """Anchor at 0 with positives at 1, 2 and 9 and k = 3: 2 - 1, not 9 - 1."""
    points, labels = [0.0, 1.0, -1.5, 2.0, 9.0], [0, 0, 1, 0, 0]
    pulls = [math.exp(-1.0), math.exp(-2.0)]
    separation = math.log((sum(pulls) + math.exp(-1.5)) / sum(pulls))
    found = losses(backend, points, labels, k=3, squeeze="support")[0]
    assert found == pytest.approx(separation + 0.5 * (2 - 1), rel=1e-12)
    assert losses(backend, points, labels, k=3)[0] == pytest.approx(separation + 0.5 * (9 - 1), rel=1e-12)
    assert losses(backend, points, labels, k=3, squeeze="nearest")[0] == pytest.approx(separation + 0.5, rel=1e-12)
    slopes = gradient(backend, points, labels, 0, k=3, squeeze="support", weight=2.0)
    share = math.exp(-1.5) / (sum(pulls) + math.exp(-1.5))
    by_one, by_two = (share * p / sum(pulls) for p in pulls)
    assert slopes[1:] == pytest.approx([by_one - 2, share, by_two + 2, 0], rel=1e-12)


@pytest.mark.parametrize("squeeze", ["span", "support", "nearest"])
def test_a_nearest_positive_from_outside_joins_all_negatives(backend: str, squeeze: str) -> None:
    """k = 1: the support set of anchor 3 is the negative at distance 3; its positive at 5 is added to it."""
    value = {"span": 1.0, "support": 5.0, "nearest": 5.0}[squeeze]
    found = losses(backend, LINE, LABELS, k=1, squeeze=squeeze)[3]
    assert found == pytest.approx(softplus(5 - 3) + 0.5 * value, rel=1e-12)
    s = sigmoid(2.0)
    slope_near = s + {"span": -0.5, "support": 0.5, "nearest": 0.5}[squeeze]
    slope_far = 0.5 if squeeze == "span" else 0.0
    expected = [-slope_far, -slope_near, s, slope_near + slope_far - s]
    slopes = gradient(backend, LINE, LABELS, 3, k=1, squeeze=squeeze)
    assert slopes == pytest.approx(expected, rel=1e-12, abs=1e-15)
    # Anchor 0 has its positive inside: the support set is that alone, and there is nothing to separate from.
    assert losses(backend, LINE, LABELS, k=1, squeeze="none")[0] == 0.0


def test_statistics_of_the_line(backend: str) -> None:
    """k = 1: P = {1}, {1}, {5 from outside}; N = {}, {}, {3}."""
    _, stats = sn_ops.sn_loss(*line(backend, LINE, LABELS), k=1, backend=backend, return_stats=True)
    assert float(stats.valid_anchors) == 3
    assert float(stats.positive_distance) == pytest.approx((1 + 1 + 5) / 3)
    assert float(stats.negative_distance) == 3
    assert float(stats.nearest_is_positive) == pytest.approx(2 / 3)
    assert float(stats.support_positives) == pytest.approx(2 / 3)  # the one from outside does not count


def test_means_of_statistics_are_over_pairs(backend: str) -> None:
    """Anchor 0 has two positives in its support set, anchor 3 one: three anchors, but seven pairs of positives."""
    points, labels = [0.0, 1.0, 2.0, 10.0, 11.5], [0, 0, 0, 1, 1]
    _, stats = sn_ops.sn_loss(*line(backend, points, labels), k=2, backend=backend, return_stats=True)
    positives = [1, 2, 1, 1, 1, 2, 1.5, 1.5]
    assert float(stats.positive_distance) == pytest.approx(sum(positives) / len(positives))
    assert float(stats.negative_distance) == pytest.approx((8 + 9.5) / 2)
    assert float(stats.support_positives) == pytest.approx(len(positives) / 5)
    assert float(stats.nearest_is_positive) == 1


def test_exact_duplicates_are_neighbors(backend: str) -> None:
    """Self is left out by index: the copy at the same place is the nearest neighbour, at the clamp's 1e-6."""
    points, labels = [2.0, 2.0, 5.0], [0, 0, 1]
    found = sn_ops.support_neighbors(*line(backend, points, labels), k=1, backend=backend)
    assert found.indices.tolist() == [[1], [0], [0]]
    assert found.distances.flatten().tolist() == pytest.approx([1e-6, 1e-6, 3.0], rel=1e-12)
    assert found.nearest_positive.tolist() == [1, 0, -1]
    # The clamp holds there and no gradient flows; the copy's other pairs still carry theirs.
    assert gradient(backend, points, labels, 0, k=1, squeeze="nearest") == [0.0, 0.0, 0.0]
    s = sigmoid(-3.0)
    assert gradient(backend, points, labels, 0, k=2, squeeze="none") == pytest.approx([s, 0.0, -s], rel=1e-5)


def test_order_is_of_unclamped_distances(backend: str) -> None:
    """Candidates at 3e-8, 1e-8 and 2e-8 are all clamped to 1e-6, and still ordered by their own distance."""
    points, labels = [0.0, 3e-8, -1e-8, 2e-8], [0, 0, 1, 0]
    found = sn_ops.support_neighbors(*line(backend, points, labels), k=3, backend=backend)
    assert found.indices[0].tolist() == [2, 3, 1]
    assert (int(found.nearest_positive[0]), int(found.farthest_positive[0])) == (3, 1)
    assert found.distances[0].tolist() == pytest.approx([1e-6] * 3)


def test_ties_go_to_the_lower_index(backend: str) -> None:
    """Candidates at -1, 1, -1, 1 and at -4, 4: nearest and farthest alike are the lower index."""
    points, labels = [0.0, -4.0, 4.0, 1.0, -1.0, 1.0], [0, 0, 0, 0, 0, 1]
    found = sn_ops.support_neighbors(*line(backend, points, labels), k=2, backend=backend)
    assert found.indices[0].tolist() == [3, 4]
    assert (int(found.nearest_positive[0]), int(found.farthest_positive[0])) == (3, 1)
    assert gradient(backend, points, labels, 0, k=2)[1:3] == [-0.5, 0.0]


def test_only_positive_is_both_nearest_and_farthest(backend: str) -> None:
    """Span of one positive is 0, and so is its gradient."""
    points, labels = [0.0, 2.0, 3.0], [0, 0, 1]
    assert losses(backend, points, labels, k=1) == pytest.approx([0.0, softplus(2 - 1), 0.0])
    assert gradient(backend, points, labels, 0, k=1) == [0.0, 0.0, 0.0]


def test_large_alpha_neither_overflows_nor_vanishes(backend: str) -> None:
    """alpha * d in the tens of thousands: the loss is alpha (d_pos - d_neg), the gradient exactly alpha."""
    points, labels = [0.0, 900.0, 300.0], [0, 0, 1]
    assert losses(backend, points, labels, alpha=50.0, squeeze="none")[0] == pytest.approx(50.0 * 600, rel=1e-12)
    assert gradient(backend, points, labels, 0, alpha=50.0, squeeze="none") == pytest.approx([0.0, 50.0, -50.0])
    swapped = gradient(backend, [0.0, 300.0, 900.0], labels, 0, alpha=50.0, squeeze="none")
    assert swapped == [0.0, 0.0, 0.0]


def test_authors_defaults(backend: str) -> None:
    """k = 10, alpha = 50, weight = 0.1, span, mean."""
    points = [0.0, 0.10, 0.13, 0.30] + [9.0 + i for i in range(9)]
    feats, labels = line(backend, points, [0, 0, 1, 0] + [9] * 9)
    found = sn_ops.sn_loss(feats, labels, backend=backend)
    expected = sn_ops.sn_loss(
        feats, labels, k=10, alpha=50.0, weight=0.1, squeeze="span", reduction="mean", backend=backend
    )
    assert found.item() == expected.item()
    pulls = math.exp(-50 * 0.10) + math.exp(-50 * 0.30)
    first = math.log1p(math.exp(-50 * 0.13) / pulls) + 0.1 * (0.30 - 0.10)
    assert float(sn_ops.sn_loss(feats, labels, reduction="none", backend=backend)[0]) == pytest.approx(first, rel=1e-12)


def test_candidates_by_hand(backend: str) -> None:
    """Anchor at 0 against 1 (negative), -2 (positive), 5 (positive): both gradients."""
    feats, labels = line(backend, [0.0], [4])
    candidates, candidate_labels = line(backend, [1.0, -2.0, 5.0], [5, 4, 4])
    feats.requires_grad_(), candidates.requires_grad_()
    loss = sn_ops.sn_loss(
        feats, labels, candidates=candidates, candidate_labels=candidate_labels,
        k=2, alpha=1.0, weight=0.5, backend=backend,
    )  # fmt: skip
    assert loss.item() == pytest.approx(softplus(2 - 1) + 0.5 * (5 - 2), rel=1e-12)
    loss.backward()
    s = sigmoid(1.0)
    assert candidates.grad is not None and feats.grad is not None
    assert candidates.grad.flatten().tolist() == pytest.approx([-s, -(s - 0.5), 0.5], rel=1e-12)
    assert feats.grad.item() == pytest.approx(s + (s - 0.5) - 0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("self_index", "indices", "nearest"),
    [
        (None, [[0, 1], [1, 0]], [0, 1]),  # no candidate is an anchor: the copy at distance 0 is a neighbour
        (0, [[1, 2], [0, 2]], [2, -1]),
        (torch.tensor([0, -1]), [[1, 2], [1, 0]], [2, 1]),
        (torch.tensor([-1, 1]), [[0, 1], [0, 2]], [0, -1]),
    ],
)
def test_self_index_by_hand(
    backend: str, self_index: int | Tensor | None, indices: list[list[int]], nearest: list[int]
) -> None:
    candidates, candidate_labels = line(backend, [0.0, 1.0, 4.0], [3, 4, 3])
    found = sn_ops.support_neighbors(
        *line(backend, [0.0, 1.0], [3, 4]), k=2, candidates=candidates,
        candidate_labels=candidate_labels, self_index=on(backend, self_index), backend=backend,
    )  # fmt: skip
    assert found.indices.tolist() == indices
    assert found.nearest_positive.tolist() == nearest


def test_self_at_an_offset_may_fall_on_a_later_candidate(backend: str) -> None:
    """self_index = 1: anchor i is candidate i + 1, whatever lies there."""
    candidates, candidate_labels = line(backend, [0.0, 1.0, 4.0], [3, 4, 3])
    found = sn_ops.support_neighbors(
        *line(backend, [0.0, 1.0], [3, 4]), k=3, candidates=candidates,
        candidate_labels=candidate_labels, self_index=1, backend=backend,
    )  # fmt: skip
    assert found.indices.tolist() == [[0, 2, -1], [1, 0, -1]]
    assert found.distances.tolist() == [[pytest.approx(1e-6), 4.0, math.inf], [pytest.approx(1e-6), 1.0, math.inf]]
    assert found.is_positive.tolist() == [[True, True, False], [True, False, False]]


def test_fewer_candidates_than_k(backend: str) -> None:
    """K = min(k, M); in the self case the last slot stays empty."""
    found = sn_ops.support_neighbors(*line(backend, [0.0, 1.0], [0, 0]), k=5, backend=backend)
    assert found.indices.tolist() == [[1, -1], [0, -1]]
    assert found.distances.tolist() == [[1.0, math.inf], [1.0, math.inf]]
    alone = sn_ops.support_neighbors(*line(backend, [0.0], [0]), k=5, backend=backend)
    assert alone.indices.tolist() == [[-1]] and alone.nearest_positive.tolist() == [-1]
