"""Exactness at full size: batches of thousands of rows, sampled anchors, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sn_ops
from support import judge, oracle, problems
from support.problems import Case


def _batch(kind: str, rows: int, dims: int) -> Case:
    labels = torch.arange(rows) // 8
    if kind == "random":
        feats = problems.embeddings(rows, dims, labels, seed=1, spread=1.5)
    else:
        feats = problems.ADVERSARIAL[kind](rows, dims, 1).float()
    return Case(feats, labels[torch.randperm(rows, generator=torch.Generator().manual_seed(0))], k=10)


@pytest.mark.parametrize(
    ("kind", "rows", "dims"),
    [
        ("random", 2048, 512),
        ("clusters-1e-4", 2048, 512),
        ("collapsed", 2048, 256),
        ("random", 4096, 256),
        ("clusters-1e-3", 4096, 128),
    ],
)
def test_sampled_anchors(full_speed_backend: str, kind: str, rows: int, dims: int) -> None:
    """Selection and loss of sampled anchors; gradients with an upstream that is zero for all others."""
    case = _batch(kind, rows, dims)
    problem = problems.to_oracle(case)
    sample = sorted({0, 1, 63, 64, rows // 2, rows - 2, rows - 1, *range(17, rows, rows // 24)})
    found = judge.selection_of(judge.neighbors_of(case, full_speed_backend))
    chosen = oracle.Selection(found.support[sample], found.nearest[sample], found.farthest[sample])
    oracle.check_selection(problem, case.k, chosen, sample)

    for squeeze in ("span", "nearest"):
        leaves = case.on(full_speed_backend).leaves()
        loss = sn_ops.sn_loss(**leaves.arguments(), squeeze=squeeze, reduction="none", backend=full_speed_backend)
        result = oracle.evaluate(problem, chosen, alpha=50.0, weight=0.1, squeeze=squeeze, rows=sample)
        bound = judge.loss_bound(result.largest_distance, 50.0, 0.1)
        judge.assert_within(abs(judge.numbers(loss)[sample] - result.losses), bound, "loss of an anchor")

        upstream = torch.zeros(rows)
        upstream[sample] = torch.randn(len(sample), generator=torch.Generator().manual_seed(2))
        (gradient,) = torch.autograd.grad(loss, leaves.feats, upstream.to(loss))
        factors = judge.numbers(upstream)[sample]
        expected, _ = oracle.gradients(problem, result, factors)
        largest = float(result.largest_distance.max())
        limit = judge.gradient_bound(expected, factors, largest, 50.0, 0.1, torch.float32)
        judge.assert_within(float(np.linalg.norm(judge.numbers(gradient) - expected)), limit, "gradient")


@pytest.mark.parametrize("kind", ["random", "clusters-1e-4"])
def test_whole_gradient(full_speed_backend: str, kind: str) -> None:
    """N = 2048, every anchor, mean: the merged gather of own and incoming edges."""
    case = _batch(kind, 2048, 64)
    problem = problems.to_oracle(case)
    selection = judge.check_neighbors(case, full_speed_backend)
    result = oracle.evaluate(problem, selection, alpha=50.0, weight=0.1, squeeze="span")
    leaves = case.on(full_speed_backend).leaves()
    loss, stats = sn_ops.sn_loss(**leaves.arguments(), backend=full_speed_backend, return_stats=True)
    bound = judge.loss_bound(result.largest_distance, 50.0, 0.1)[result.valid].mean()
    judge.assert_within(abs(loss.item() - result.total("mean")), bound, "loss")
    judge.check_stats(stats, result)
    upstream = result.valid / result.valid.sum()
    judge.check_gradients(
        loss, leaves, torch.tensor(1.0), oracle.gradients(problem, result, upstream), result, upstream, 50.0, 0.1
    )


def test_a_hub(full_speed_backend: str) -> None:
    """One candidate is every anchor's neighbour: thousands of edges end at one row."""
    generator = torch.Generator().manual_seed(4)
    feats = torch.nn.functional.normalize(torch.randn(3000, 128, generator=generator), dim=1)
    feats[1234] = 0.0
    case = Case(feats, torch.arange(3000) % 2, k=3)
    problem = problems.to_oracle(case)
    selection = judge.selection_of(judge.neighbors_of(case, full_speed_backend))
    assert (selection.support == 1234).any(axis=1).mean() > 0.9
    result = oracle.evaluate(problem, selection, alpha=50.0, weight=0.1, squeeze="span")
    leaves = case.on(full_speed_backend).leaves()
    loss = sn_ops.sn_loss(**leaves.arguments(), backend=full_speed_backend)
    upstream = result.valid / result.valid.sum()
    expected = oracle.gradients(problem, result, upstream)
    judge.check_gradients(loss, leaves, torch.tensor(1.0), expected, result, upstream, 50.0, 0.1)


def test_a_large_bank(full_speed_backend: str) -> None:
    """300 anchors against 20,000 candidates."""
    case = problems.bank_case(300, 20_000, 64, 500, 10, self_kind="tensor", seed=3)
    problem = problems.to_oracle(case)
    sample = list(range(0, 300, 7))
    found = judge.selection_of(judge.neighbors_of(case, full_speed_backend))
    chosen = oracle.Selection(found.support[sample], found.nearest[sample], found.farthest[sample])
    oracle.check_selection(problem, case.k, chosen, sample)
    leaves = case.on(full_speed_backend).leaves()
    loss = sn_ops.sn_loss(**leaves.arguments(), reduction="none", backend=full_speed_backend)
    result = oracle.evaluate(problem, chosen, alpha=50.0, weight=0.1, squeeze="span", rows=sample)
    upstream = torch.zeros(300)
    upstream[sample] = 1.0
    factors = np.ones(len(sample))
    judge.assert_within(
        abs(judge.numbers(loss)[sample] - result.losses), judge.loss_bound(result.largest_distance, 50.0, 0.1), "loss"
    )
    expected = oracle.gradients(problem, result, factors)
    judge.check_gradients(loss, leaves, upstream, expected, result, factors, 50.0, 0.1)
