"""`sn_ops.metric_learning` inside the real pytorch-metric-learning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import sn_ops
from support import loss_on_ranks, problems
from support.ranks import Ranks

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers, testers, trainers
from pytorch_metric_learning.utils import loss_and_miner_utils
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from sn_ops import metric_learning

OPTIONS: dict[str, Any] = {"k": 5, "alpha": 12.0, "weight": 0.3, "squeeze": "support"}


def batch(rows: int = 40, identities: int = 7, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings that are not normalised, and labels; some identities of one image."""
    case = problems.self_case(rows, 12, identities, seed=seed)
    return case.feats * torch.linspace(0.5, 2.0, rows)[:, None], case.labels


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


# ---- the loss ------------------------------------------------------------------------------------


def test_is_the_loss_of_normalised_embeddings(backend: str) -> None:
    """Value and gradient, by the default reducer; PML's losses are called the same way."""
    embeddings, labels = problems.on(backend, batch())
    embeddings.requires_grad_()
    loss_func = metric_learning.SNLoss(**OPTIONS, backend=backend)
    found = loss_func(embeddings, labels)
    expected = sn_ops.sn_loss(normalize(embeddings), labels, **OPTIONS, backend=backend)
    assert_same(found, expected)
    assert_same(gradients(found, embeddings)[0], gradients(expected, embeddings)[0])


def test_defaults_and_raw_distances() -> None:
    embeddings, labels = batch()
    assert_same(metric_learning.SNLoss()(embeddings, labels), sn_ops.sn_loss(normalize(embeddings), labels))
    raw = metric_learning.SNLoss(distance=distances.LpDistance(normalize_embeddings=False))
    assert_same(raw(embeddings, labels), sn_ops.sn_loss(embeddings, labels))


def test_element_losses() -> None:
    """One loss for each valid anchor, with its place in the batch, under any reducer."""
    embeddings, labels = batch(identities=25)
    unit = normalize(embeddings)
    valid = (labels[:, None] == labels).sum(1) > 1
    assert 0 < int(valid.sum()) < len(labels)
    element = sn_ops.sn_loss(unit, labels, **OPTIONS, reduction="none")

    found = metric_learning.SNLoss(**OPTIONS, reducer=reducers.DoNothingReducer())(embeddings, labels)["loss"]
    assert found["reduction_type"] == "element"
    assert found["indices"].equal(torch.where(valid)[0]) and found["losses"].equal(element[valid])

    weights = torch.linspace(1, 2, 25)
    weighted = metric_learning.SNLoss(**OPTIONS, reducer=reducers.ClassWeightedReducer(weights))(embeddings, labels)
    assert_same(weighted, (element * weights[labels])[valid].mean())
    positive = metric_learning.SNLoss(**OPTIONS, reducer=reducers.AvgNonZeroReducer())(embeddings, labels)
    assert_same(positive, element[element > 0].mean())
    low = metric_learning.SNLoss(**OPTIONS, reducer=reducers.ThresholdReducer(low=0.05))(embeddings, labels)
    assert_same(low, element[element > 0.05].mean())


def test_no_valid_anchor() -> None:
    """Loss and gradient are 0, still connected to the embeddings, and NaN where those are."""
    embeddings, _ = batch(6)
    embeddings.requires_grad_()
    loss = metric_learning.SNLoss()(embeddings, torch.arange(6))
    assert loss.item() == 0.0 and not gradients(loss, embeddings)[0].any()
    assert metric_learning.SNLoss()(torch.full((6, 3), float("nan")), torch.arange(6)).isnan()


def test_reference_embeddings() -> None:
    """Another tensor holds no anchor; the batch itself passed again does not become one."""
    (embeddings, labels), (ref_emb, ref_labels) = batch(), batch(90, seed=3)
    embeddings.requires_grad_(), ref_emb.requires_grad_()
    loss_func = metric_learning.SNLoss(**OPTIONS)
    found = loss_func(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    expected = sn_ops.sn_loss(
        normalize(embeddings), labels, candidates=normalize(ref_emb), candidate_labels=ref_labels, **OPTIONS
    )
    assert_same(found, expected)
    for a, b in zip(gradients(found, embeddings, ref_emb), gradients(expected, embeddings, ref_emb), strict=True):
        assert_same(a, b)
    itself = loss_func(embeddings, labels, ref_emb=embeddings, ref_labels=labels)
    assert_same(itself, loss_func(embeddings, labels))
    empty = loss_func(embeddings, labels, ref_emb=ref_emb[:0], ref_labels=ref_labels[:0])
    assert empty.item() == 0.0


def test_own_rows_from_pairs_and_told() -> None:
    """All pairs but those of an anchor and itself say which row an anchor is; so does `OwnRows`."""
    embeddings, labels = batch()
    pool, pool_labels = batch(100, seed=3)
    slots = (torch.arange(40) + 85) % 100
    pool[slots], pool_labels[slots] = embeddings, labels
    pairs = loss_and_miner_utils.get_all_pairs_indices(labels, pool_labels)
    pairs = loss_and_miner_utils.remove_self_comparisons(pairs, slots, 100)
    expected = sn_ops.sn_loss(
        normalize(embeddings),
        labels,
        candidates=normalize(pool),
        candidate_labels=pool_labels,
        self_index=slots,
        **OPTIONS,
    )
    loss_func = metric_learning.SNLoss(**OPTIONS)
    assert_same(loss_func(embeddings, labels, pairs, pool, pool_labels), expected)
    assert_same(loss_func(embeddings, labels, metric_learning.OwnRows(slots), pool, pool_labels), expected)
    unmarked = loss_func(embeddings, labels, None, pool, pool_labels)
    assert float((unmarked - expected).abs()) > 1e-3, "the marks matter here"
    within = loss_and_miner_utils.get_all_pairs_indices(labels)
    assert_same(loss_func(embeddings, labels, within), loss_func(embeddings, labels))


def test_statistics_for_loggers() -> None:
    embeddings, labels = batch()
    loss_func = metric_learning.SNLoss(**OPTIONS, collect_stats=True)
    loss_func(embeddings, labels)
    _, expected = sn_ops.sn_loss(normalize(embeddings), labels, **OPTIONS, return_stats=True)
    assert set(expected._fields) <= set(loss_func._record_these_stats)
    assert [getattr(loss_func, name) for name in expected._fields] == [value.item() for value in expected]


def test_regularizer_is_added() -> None:
    embeddings, labels = batch()
    options = {**OPTIONS, "embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.5}
    found = metric_learning.SNLoss(**options)(embeddings, labels)
    assert_same(found, sn_ops.sn_loss(normalize(embeddings), labels, **OPTIONS) + 0.5 * embeddings.norm(dim=1).mean())


def test_bad_input() -> None:
    embeddings, labels = batch()
    loss_func = metric_learning.SNLoss()
    with pytest.raises(ValueError, match="labels: expected an integer tensor, got None"):
        loss_func(embeddings)
    with pytest.raises(ValueError, match="ref_labels: expected an integer tensor, got None"):
        loss_func(embeddings, labels, ref_emb=embeddings + 1)
    with pytest.raises(ValueError, match="distance: expected an LpDistance with p=2 and power=1"):
        metric_learning.SNLoss(distance=distances.CosineSimilarity())
    with pytest.raises(ValueError, match="distance: expected an LpDistance"):
        metric_learning.SNLoss(distance=distances.LpDistance(power=2))
    with pytest.raises(ValueError, match="squeeze: expected one of"):
        metric_learning.SNLoss(squeeze="max")
    mined = miners.BatchHardMiner()(embeddings, labels)
    with pytest.raises(ValueError, match="takes no triplets"):
        loss_func(embeddings, labels, mined)
    mined = miners.PairMarginMiner()(embeddings, labels)
    with pytest.raises(ValueError, match="works without a miner"):
        loss_func(embeddings, labels, mined)
    pool, pool_labels = batch(100, seed=3)
    pairs = loss_and_miner_utils.get_all_pairs_indices(labels, pool_labels)
    for cut in ((pairs[0][2:], pairs[1][2:], *pairs[2:]), (*pairs[:2], pairs[2][1:], pairs[3][1:])):
        with pytest.raises(ValueError, match="works without a miner"):
            loss_func(embeddings, labels, cut, pool, pool_labels)


# ---- the queue -----------------------------------------------------------------------------------


class PairsMemory(losses.CrossBatchMemory):
    """PML's own memory, which lists all pairs, made to accept the loss."""

    @staticmethod
    def supported_losses() -> list[str]:
        return ["SNLoss"]


@pytest.mark.parametrize("memory", [metric_learning.CrossBatchMemory, PairsMemory])
def test_cross_batch_memory(memory: type) -> None:
    """A queue of 50 rows under batches of 16 wraps around inside a batch; compared with a queue written out here."""
    queue = memory(metric_learning.SNLoss(**OPTIONS), embedding_size=12, memory_size=50)
    bank, bank_labels = torch.zeros(50, 12), torch.zeros(50, dtype=torch.int64)
    head = stored = 0
    for step in range(9):
        embeddings, labels = batch(16, 4, seed=step)
        embeddings.requires_grad_()
        slots = (torch.arange(16) + head) % 50
        bank[slots], bank_labels[slots] = embeddings.detach(), labels
        head, stored = (head + 16) % 50, min(stored + 16, 50)
        expected = sn_ops.sn_loss(
            normalize(embeddings), labels, candidates=normalize(bank[:stored]), candidate_labels=bank_labels[:stored],
            self_index=slots, **OPTIONS,
        )  # fmt: skip
        found = queue(embeddings, labels)
        assert_same(found, expected)
        assert_same(gradients(found, embeddings)[0], gradients(expected, embeddings)[0])


def test_cross_batch_memory_with_an_enqueue_mask() -> None:
    """The rows that are enqueued are not anchors: nobody is itself in the queue."""
    queue = metric_learning.CrossBatchMemory(metric_learning.SNLoss(**OPTIONS), embedding_size=12, memory_size=64)
    embeddings, labels = batch(40)
    mask = torch.arange(40) % 2 == 0
    expected = sn_ops.sn_loss(
        normalize(embeddings[~mask]), labels[~mask],
        candidates=normalize(embeddings[mask]), candidate_labels=labels[mask], **OPTIONS,
    )  # fmt: skip
    assert_same(queue(embeddings, labels, enqueue_mask=mask), expected)


def test_cross_batch_memory_of_other_losses_and_miners() -> None:
    """What PML accepts it still accepts, with the same result; a miner is refused by the loss."""
    embeddings, labels = batch(16, 4)
    found, expected = (
        memory(losses.ContrastiveLoss(), embedding_size=12, memory_size=50)(embeddings, labels)
        for memory in (metric_learning.CrossBatchMemory, losses.CrossBatchMemory)
    )
    assert found.equal(expected)
    with pytest.raises(Exception, match="not supported for FastAPLoss"):
        metric_learning.CrossBatchMemory(losses.FastAPLoss(), embedding_size=12)
    mined = metric_learning.CrossBatchMemory(
        metric_learning.SNLoss(), embedding_size=12, memory_size=50, miner=miners.PairMarginMiner()
    )
    with pytest.raises(ValueError, match="works without a miner"):
        mined(embeddings, labels)


# ---- trainer and tester --------------------------------------------------------------------------


def test_trainer_and_tester() -> None:
    """A PML script whose loss is this one: the trunk learns that 6 of 32 numbers tell classes apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 12
    images = torch.randn(240, 32, generator=generator)
    images[:, :6] += 2 * torch.randn(12, 6, generator=generator)[labels]
    train = torch.utils.data.TensorDataset(images[:120], labels[:120])
    test = torch.utils.data.TensorDataset(images[120:], labels[120:])
    torch.manual_seed(0)
    trunk = nn.Linear(32, 16)
    untrained = copy.deepcopy(trunk)
    trainer = trainers.MetricLossOnly(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=1e-2)},
        batch_size=60,
        loss_funcs={"metric_loss": metric_learning.SNLoss(alpha=10.0)},
        dataset=train,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        set_min_label_to_zero=False,
    )
    trainer.train(num_epochs=15)
    accuracy = AccuracyCalculator(include=("precision_at_1",), knn_func=CustomKNN(distances.LpDistance()))
    tester = testers.GlobalEmbeddingSpaceTester(
        accuracy_calculator=accuracy, dataloader_num_workers=0, data_device=torch.device("cpu")
    )
    before, after = (
        tester.test({"val": test}, 1, model)["val"]["precision_at_1_level0"] for model in (untrained, trunk)
    )
    assert after > before + 0.1, f"precision at 1: {before:.3f} -> {after:.3f}"


# ---- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "efficient", "memory"])
def test_distributed_loss_wrapper(ranks: Ranks, kind: str) -> None:
    """Under DistributedDataParallel: the gradient of one process with all rows.

    With `efficient` PML treats other ranks' rows as constants; the one process detaches them.
    """
    shards = [loss_on_ranks.Shard(*batch(16, 5, seed=seed)) for seed in range(4)]
    found = ranks.run(range(4), loss_on_ranks.wrapped_by_pml, shards, kind, OPTIONS)
    alone = loss_on_ranks.network(12)
    parts = [normalize(alone(shard.feats)) for shard in shards]
    everyone, labels = torch.cat(parts), torch.cat([shard.labels for shard in shards])
    if kind == "efficient":
        own_losses = [
            sn_ops.sn_loss(
                part, shards[own].labels, candidates=torch.cat([p if p is part else p.detach() for p in parts]),
                candidate_labels=labels, self_index=16 * own, **OPTIONS,
            )
            for own, part in enumerate(parts)
        ]  # fmt: skip
        loss = torch.stack(own_losses).sum()  # PML multiplies each rank's own mean by the world size
    elif kind == "memory":
        loss = sn_ops.sn_loss(
            everyone, labels, candidates=everyone.detach(), candidate_labels=labels, self_index=0, **OPTIONS
        )
    else:
        loss = sn_ops.sn_loss(everyone, labels, **OPTIONS)
    loss.backward()
    check_parameters(found, alone)


def check_parameters(found: Sequence[Sequence[Tensor]], alone: nn.Module) -> None:
    for gradients_of_rank in found:
        for gradient, parameter in zip(gradients_of_rank, alone.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-6)
