"""The trainer's losses against slow loops in float64, and across ranks against one process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sn_ops
from sn_ops.reid.config import LossConfig
from sn_ops.reid.losses import (
    IdentityLoss,
    NoMetric,
    SNMetric,
    SupConMetric,
    TripletMetric,
    build_losses,
)
from support import reid_on_ranks
from support.ranks import Ranks
from support.tiny_runs import one_thread

SN = LossConfig(metric="sn", k=4, alpha=7.0, weight=0.3)
CONFIGS = {
    **{f"sn-{squeeze}": replace(SN, squeeze=squeeze) for squeeze in ("span", "support", "nearest", "none", "pair")},
    "triplet": LossConfig(metric="triplet", margin=0.4),
    "triplet-soft": LossConfig(metric="triplet", margin=None),
    "supcon": LossConfig(metric="supcon", temperature=0.2),
}


def problem(n: int = 17, d: int = 5, identities: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings and labels; one identity has one row alone, and two rows are the same."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, identities, (n,), generator=generator)
    labels[3] = 1000
    feats = torch.randn(n, d, generator=generator, dtype=torch.float64) + 1.5 * labels[:, None] % 3
    labels[1], feats[1] = labels[0], feats[0]
    return feats, labels


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- slow implementations -------------------------------------------------------------------------


def slow_sn(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, t: np.ndarray, own: Sequence[set[int]], c: LossConfig
) -> float:
    losses = []
    for i in range(len(x)):
        others = [j for j in range(len(z)) if j not in own[i]]
        d = {j: math.sqrt(max(float(((x[i] - z[j]) ** 2).sum()), 1e-12)) for j in others}
        order = sorted(others, key=lambda j: (float(((x[i] - z[j]) ** 2).sum()), j))
        positives = [j for j in order if t[j] == y[i]]
        if not positives:
            continue
        near = positives[0]
        far = max(positives, key=lambda j: (d[j], -j))
        support = order[: c.k]
        inside = [j for j in support if t[j] == y[i]] or [near]
        outside = [j for j in support if t[j] != y[i]]
        up = sum(math.exp(-c.alpha * d[j]) for j in inside)
        separation = -math.log(up / (up + sum(math.exp(-c.alpha * d[j]) for j in outside)))
        reach = [d[j] for j in inside]
        squeeze = {
            "span": d[far] - d[near],
            "support": max(reach) - min(reach) if len(reach) > 1 else d[near],
            "nearest": d[near],
            "none": 0.0,
            "pair": math.sqrt(max(float(((z[near] - z[far]) ** 2).sum()), 1e-12)),
        }[c.squeeze]
        losses.append(separation + c.weight * squeeze)
    return sum(losses) / len(losses) if losses else 0.0


def slow_triplet(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, t: np.ndarray, own: Sequence[set[int]], c: LossConfig
) -> float:
    losses = []
    for i in range(len(x)):
        distance = [math.sqrt(max(float(((x[i] - row) ** 2).sum()), 1e-12)) for row in z]
        positive = [distance[j] for j in range(len(z)) if t[j] == y[i] and j not in own[i]]
        negative = [distance[j] for j in range(len(z)) if t[j] != y[i] and j not in own[i]]
        if positive and negative:
            gap = max(positive) - min(negative)
            losses.append(math.log1p(math.exp(gap)) if c.margin is None else max(0.0, gap + c.margin))
    return sum(losses) / len(losses) if losses else 0.0


def slow_supcon(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, t: np.ndarray, own: Sequence[set[int]], c: LossConfig
) -> float:
    losses = []
    for i in range(len(x)):
        others = [j for j in range(len(z)) if j not in own[i]]
        positive = [j for j in others if t[j] == y[i]]
        if positive:
            total = sum(math.exp(float(x[i] @ z[j]) / c.temperature) for j in others)
            terms = [-math.log(math.exp(float(x[i] @ z[j]) / c.temperature) / total) for j in positive]
            losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses) if losses else 0.0


SLOW = {"sn": slow_sn, "triplet": slow_triplet, "supcon": slow_supcon}


def slow(
    config: LossConfig,
    feats: Tensor,
    labels: Tensor,
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    self_index: int | Tensor | None = None,
) -> float:
    def rows(values: Tensor) -> np.ndarray:
        array = values.detach().numpy()
        return array / np.linalg.norm(array, axis=1, keepdims=True) if config.normalize else array

    own: list[set[int]] = [set() for _ in feats]
    if candidates is None or candidate_labels is None:
        candidates, candidate_labels, self_index = feats, labels, 0
    for i in range(len(feats)):
        if isinstance(self_index, Tensor):
            own[i] = {int(self_index[i])} - {-1}
        elif self_index is not None:
            own[i] = {self_index + i}
    return SLOW[config.metric](rows(feats), labels.numpy(), rows(candidates), candidate_labels.numpy(), own, config)


def close(found: Tensor, expected: Tensor | float, tolerance: float = 1e-6) -> None:
    """In L2, relative; not-a-number fails."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    error = float((found.detach().double() - wanted.detach()).norm())
    assert error <= tolerance * max(float(wanted.detach().norm()), 1e-9), f"error {error}, size {wanted}"


# ---- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_loops(name: str, normalize: bool) -> None:
    for seed in range(4):
        feats, labels = problem(seed=seed)
        if not normalize:
            feats = feats / 8
        config = replace(CONFIGS[name], normalize=normalize)
        loss, stats = build_losses(config).metric(feats, labels)
        close(loss, slow(config, feats, labels))
        assert loss.dtype == torch.float64 and loss.dim() == 0
        assert all(value.dim() == 0 and not value.requires_grad for value in stats.values())
        same = (labels[:, None] == labels).sum(1) > 1
        assert int(stats["valid_anchors"]) == int(same.sum())


@pytest.mark.parametrize("self_index", ["none", "offset", "rows"])
@pytest.mark.parametrize("name", CONFIGS)
def test_candidates_equal_loops(name: str, self_index: str) -> None:
    feats, labels = problem(9)
    generator = torch.Generator().manual_seed(5)
    bank = torch.randn(21, 5, generator=generator, dtype=torch.float64)
    bank_labels = torch.randint(0, 6, (21,), generator=generator)
    own: int | Tensor | None = None
    if self_index == "offset":
        own = 4
        bank[4:13], bank_labels[4:13] = feats, labels
    elif self_index == "rows":
        own = torch.tensor([3, -1, 0, 20, -1, 7, 8, 1, 2])
        bank[own[own >= 0]], bank_labels[own[own >= 0]] = feats[own >= 0], labels[own >= 0]
    loss, _ = build_losses(CONFIGS[name]).metric(
        feats, labels, candidates=bank, candidate_labels=bank_labels, self_index=own
    )
    close(loss, slow(CONFIGS[name], feats, labels, bank, bank_labels, own))


@pytest.mark.parametrize("name", CONFIGS)
def test_derivatives(name: str) -> None:
    """Gradients of embeddings and of candidates against finite differences."""
    feats, labels = problem(9, 4, 3, seed=1)
    feats[1] += 0.3  # no two rows the same: a distance has no derivative there
    config = replace(CONFIGS[name], backend="reference", margin=None)
    metric = build_losses(config).metric
    generator = torch.Generator().manual_seed(2)
    bank = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    bank_labels = torch.tensor([0, 1, 2, 0, 1, 1])
    x = feats.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: metric(a, labels)[0], (x,), eps=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda a, b: metric(a, labels, candidates=b, candidate_labels=bank_labels)[0], (x, bank), eps=1e-6, atol=1e-6
    )


def test_statistics_of_triplet_and_supcon() -> None:
    feats = torch.tensor([[0.0], [1.0], [3.0], [3.5], [20.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2])
    _, stats = TripletMetric(0.3, normalize=False)(feats, labels)
    # Farthest positives 1, 1, 0.5, 0.5; nearest negatives 3, 2, 2, 2.5; the last row has no positive.
    assert {name: float(value) for name, value in stats.items()} == pytest.approx(
        {"valid_anchors": 4, "positive_distance": 0.75, "negative_distance": 2.375, "violations": 0.0}
    )
    _, stats = SupConMetric(1.0, normalize=False)(feats, labels)
    products = [0, 0, 0, 0], [0, 3, 3.5, 20], [0, 3, 10.5, 60], [0, 3.5, 10.5, 70]
    positives = [products[0][0], products[1][0], products[2][2], products[3][2]]
    negatives = [*products[0][1:], *products[1][1:], 0, 3, 60, 0, 3.5, 70]
    assert float(stats["positive_similarity"]) == pytest.approx(sum(positives) / 4)
    assert float(stats["negative_similarity"]) == pytest.approx(sum(negatives) / 12)
    _, stats = TripletMetric(0.3, normalize=False)(torch.tensor([[0.0], [5.0], [1.0]]), torch.tensor([0, 0, 1]))
    assert float(stats["violations"]) == 1.0


def test_triplet_needs_a_negative() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    loss, stats = TripletMetric(0.3)(x, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0.0 and int(stats["valid_anchors"]) == 0
    assert x.grad is not None and torch.equal(x.grad, torch.zeros(4, 3))


def test_sn_is_that_of_sn_ops() -> None:
    feats, labels = problem()
    rows = torch.nn.functional.normalize(feats.float())
    loss, stats = SNMetric(alpha=30.0, k=6, weight=0.2, squeeze="support")(feats.float(), labels)
    expected, figures = sn_ops.sn_loss(rows, labels, alpha=30.0, k=6, weight=0.2, squeeze="support", return_stats=True)
    assert torch.equal(loss, expected)
    assert list(stats) == list(figures._fields)
    assert all(torch.equal(a, b) for a, b in zip(stats.values(), figures, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_normalised_rows_stay(name: str) -> None:
    """The trainer's memory holds normalised rows; normalising them again changes nothing."""
    feats, labels = problem()
    metric = build_losses(CONFIGS[name]).metric
    close(metric(torch.nn.functional.normalize(feats), labels)[0], metric(feats, labels)[0], 1e-12)
    close(metric(feats * 37, labels)[0], metric(feats, labels)[0], 1e-12)


@pytest.mark.parametrize("name", [*CONFIGS, "none"])
def test_nothing_to_learn_is_nought(name: str) -> None:
    """No anchor with a positive, no row, or identical rows: the loss is finite, with gradient 0 where it is 0."""
    metric = build_losses(CONFIGS.get(name, LossConfig(metric="none", identity=1.0))).metric
    for rows, labels in (
        (torch.randn(4, 3), torch.arange(4)),
        (torch.randn(1, 3), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
    ):
        x = rows.requires_grad_()
        loss, stats = metric(x, labels)
        loss.backward()
        assert float(loss.detach()) == 0.0 and x.grad is not None and torch.equal(x.grad, torch.zeros_like(rows))
        assert int(stats["valid_anchors"]) == 0
    loss, stats = metric(torch.randn(4, 3), torch.arange(4), candidates=torch.zeros(0, 3), candidate_labels=labels)
    assert float(loss) == 0.0 and int(stats["valid_anchors"]) == 0
    x = torch.ones(6, 3, requires_grad=True)
    loss, _ = metric(x, torch.tensor([0, 0, 1, 1, 2, 2]))
    loss.backward()
    assert math.isfinite(float(loss.detach())) and x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("name", [*CONFIGS, "none"])
def test_half_precision_and_nan(name: str) -> None:
    metric = build_losses(CONFIGS.get(name, LossConfig(metric="none", identity=1.0))).metric
    feats, labels = problem()
    for dtype in (torch.float16, torch.bfloat16):
        x = feats.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = metric(x, labels)
        loss.backward()
        assert loss.dtype == torch.float32 and x.grad is not None and x.grad.dtype == dtype
        assert torch.equal(loss, metric(x.float(), labels)[0])
    feats[5, 2] = math.nan
    assert math.isnan(float(metric(feats, labels)[0]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_identity_loss(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(12, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 7, (12,), generator=generator)
    identity = IdentityLoss(smoothing)
    loss, stats = identity(logits, labels)
    total = 0.0
    right = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(value) for value in row))
        for j, value in enumerate(row):
            target = smoothing / 7 + (1 - smoothing if j == label else 0.0)
            total -= target * (value - normaliser)
        right += row.index(max(row)) == label
    close(loss, total / 12)
    assert float(stats["accuracy"]) == pytest.approx(right / 12)
    assert torch.autograd.gradcheck(lambda x: identity(x, labels)[0], (logits,))


def test_build_losses() -> None:
    assert build_losses(LossConfig()).identity is None
    losses = build_losses(LossConfig(metric="triplet", margin=None, identity=0.5, label_smoothing=0.2))
    assert isinstance(losses.metric, TripletMetric) and losses.metric.margin is None
    assert losses.identity is not None and losses.identity.smoothing == 0.2
    sn = build_losses(LossConfig(k=3, alpha=9.0, weight=0.4, squeeze="nearest", backend="cpu", normalize=False)).metric
    assert isinstance(sn, SNMetric) and not sn.normalize
    assert sn.options == {"k": 3, "alpha": 9.0, "weight": 0.4, "squeeze": "nearest", "backend": "cpu"}
    assert isinstance(build_losses(LossConfig(metric="none", identity=1.0)).metric, NoMetric)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LossConfig(metric="hinge"), r'loss.metric: expected "sn", "triplet", "supcon" or "none", got \'hinge\''),
        (LossConfig(metric="triplet", margin=-1.0), "margin: expected a finite number >= 0 or None, got -1.0"),
        (LossConfig(metric="supcon", temperature=0.0), "temperature: expected a finite number > 0, got 0.0"),
        (LossConfig(identity=1.0, label_smoothing=1.0), "label_smoothing: expected from 0 to below 1, got 1.0"),
        (LossConfig(squeeze="wrong"), "squeeze: expected one of"),
        (LossConfig(k=0), "k: expected an int >= 1, got 0"),
    ],
)
def test_refuses(config: LossConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_losses(config)


@pytest.mark.parametrize("name", [*CONFIGS, "none"])
def test_refuses_half_a_bank(name: str) -> None:
    metric = build_losses(CONFIGS.get(name, LossConfig(metric="none", identity=1.0))).metric
    feats, labels = problem()
    for given in ({"candidates": feats}, {"candidate_labels": labels}):
        with pytest.raises(ValueError, match="expected candidates and candidate_labels together"):
            metric(feats, labels, **given)
    with pytest.raises(ValueError, match="self_index: expected None without candidates"):
        metric(feats, labels, self_index=0)


# ---- several ranks --------------------------------------------------------------------------------


def one_process(config: LossConfig, feats: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    x = feats.clone().requires_grad_()
    loss, stats = build_losses(config).metric(x, labels)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), stats, gradient


@pytest.mark.parametrize("sizes", [(17,), (9, 8), (1, 16), (4, 0, 13), (3, 6, 1, 7)])
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_equal_one_process(ranks: Ranks, name: str, sizes: tuple[int, ...]) -> None:
    feats, labels = problem()
    shards = list(zip(feats.split(list(sizes)), labels.split(list(sizes)), strict=True))
    results = ranks.run(range(len(sizes)), reid_on_ranks.metric_loss, CONFIGS[name], shards, None)
    loss, stats, gradient = one_process(CONFIGS[name], feats, labels)
    close(torch.cat([result[2] for result in results]), len(sizes) * gradient, 1e-9)
    for result in results:
        close(result[0], loss, 1e-9)
        assert torch.equal(result[0], results[0][0])
        assert list(result[1]) == list(stats)
        for key, value in stats.items():
            assert float(result[1][key]) == pytest.approx(float(value), rel=1e-9), key


@pytest.mark.parametrize("name", CONFIGS)
def test_banks_of_ranks(ranks: Ranks, name: str) -> None:
    """Each rank's anchors against all batches and its own bank: the sums over anchors of ranks that hold all alone."""
    config = CONFIGS[name]
    feats, labels = problem()
    sizes = [8, 9]
    shards = list(zip(feats.split(sizes), labels.split(sizes), strict=True))
    generator = torch.Generator().manual_seed(11)
    banks: list[dict[str, Any]] = [
        {
            "candidates": torch.randn(5 + rank, 5, generator=generator, dtype=torch.float64),
            "candidate_labels": torch.randint(0, 5, (5 + rank,), generator=generator),
        }
        for rank in range(2)
    ]
    if name != "sn-pair":  # which refuses what follows: an anchor that is in its rank's bank too
        for rank in range(2):
            own = torch.full((sizes[rank],), -1)
            own[:3] = torch.tensor([2, 0, 4])
            banks[rank]["self_index"] = own
            banks[rank]["candidates"][[2, 0, 4]] = shards[rank][0][:3]
            banks[rank]["candidate_labels"][[2, 0, 4]] = shards[rank][1][:3]
    results = ranks.run(range(2), reid_on_ranks.metric_loss, config, shards, banks)

    total, count, start = 0.0, 0, 0
    for rank, (own_feats, own_labels) in enumerate(shards):
        everyone = torch.cat([feats, banks[rank]["candidates"]])
        everyones_labels = torch.cat([labels, banks[rank]["candidate_labels"]])
        for i in range(sizes[rank]):  # one anchor at a time: a mean over it is its loss
            keep = torch.ones(len(everyone), dtype=torch.bool)
            keep[start + i] = False
            if "self_index" in banks[rank] and int(banks[rank]["self_index"][i]) >= 0:
                keep[len(feats) + int(banks[rank]["self_index"][i])] = False
            same = everyones_labels[keep] == own_labels[i]
            if bool(same.any()):
                one = slice(i, i + 1)
                total += slow(config, own_feats[one], own_labels[one], everyone[keep], everyones_labels[keep])
                count += 1
        start += sizes[rank]
    for loss, stats, gradient in results:
        close(loss, total / count)
        assert int(stats["valid_anchors"]) == count
        assert bool(gradient.isfinite().all())


def test_pair_refuses_two_own_rows(ranks: Ranks) -> None:
    feats, labels = problem()
    bank = {"candidates": feats, "candidate_labels": labels, "self_index": 0}
    with pytest.raises(Exception, match='expected None with a group and squeeze "pair"'):
        ranks.run(range(2), reid_on_ranks.metric_loss, CONFIGS["sn-pair"], [(feats, labels)] * 2, [bank] * 2)


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (5, 7), (2, 0, 10)])
def test_identity_loss_of_ranks(ranks: Ranks, sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 4, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 4, (12,), generator=generator)
    loss, stats = IdentityLoss(0.1)(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    shards = list(zip(logits.detach().split(list(sizes)), labels.split(list(sizes)), strict=True))
    results = ranks.run(range(len(sizes)), reid_on_ranks.identity_loss, 0.1, shards)
    close(torch.cat([result[2] for result in results]), len(sizes) * gradient, 1e-9)
    for result in results:
        close(result[0], loss.detach(), 1e-9)
        assert float(result[1]["accuracy"]) == pytest.approx(float(stats["accuracy"]))


def test_gather(ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(6)
    shards = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (4, 0, 2)]
    weights = [torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in shards]
    results = ranks.run(range(3), reid_on_ranks.gathered, shards, weights)
    for rank, (everyone, start, gradient) in enumerate(results):
        assert torch.equal(everyone, torch.cat(shards))
        assert start == (0, 4, 4)[rank]
        close(gradient, sum(weights)[start : start + len(shards[rank])], 1e-12)  # type: ignore[index]
