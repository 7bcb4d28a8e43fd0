"""`group=`: what several ranks compute together is what one process computes from all of their batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import sn_ops
from sn_ops import ops, reference
from support import loss_on_ranks, problems
from support.backends import ON_HOST
from support.judge import same_bits
from support.loss_on_ranks import Result, Shard
from support.problems import Case
from support.ranks import RankError, Ranks

WORLDS = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 2, 3)}
MODES = ("gather", "ring")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- the one process that the ranks are held against ---------------------------------------------


def split(case: Case, sizes: Sequence[int]) -> list[Shard]:
    assert sum(sizes) == case.feats.shape[0]
    return [Shard(*pair) for pair in zip(case.feats.split(list(sizes)), case.labels.split(list(sizes)), strict=True)]


def sizes_of(world: int, total: int, kind: str) -> list[int]:
    """Shares of a batch: equal, growing, or with an empty rank."""
    if kind == "equal":
        assert total % world == 0
        return [total // world] * world
    if kind == "growing":
        shares = [total * (rank + 1) // (world * (world + 1) // 2) for rank in range(world)]
    else:
        shares = [0 if rank == world // 2 else total // world for rank in range(world)]
    shares[-1] += total - sum(shares)
    return shares


def one_process(shards: Sequence[Shard], options: dict[str, Any], upstream: Sequence[Tensor] = ()) -> list[Result]:
    """What each rank should see, computed from all batches at once; gradients without the world size's factor."""
    options = {
        "k": 10,
        "alpha": 50.0,
        "weight": 0.1,
        "squeeze": "span",
        "reduction": "mean",
        "backend": "cpu",
        **options,
    }
    everyone = torch.cat([shard.feats for shard in shards]).requires_grad_()
    labels = torch.cat([shard.labels for shard in shards])
    loss, stats = sn_ops.sn_loss(everyone, labels, **options, return_stats=True)
    (gradient,) = torch.autograd.grad(loss, everyone, torch.cat(list(upstream)) if upstream else torch.ones_like(loss))
    with torch.no_grad():
        _, indices, _, nearest, farthest, _, _ = ops.forward(
            options["backend"], everyone, labels.long(), None, None, None, 0, options["k"], options["alpha"],
            options["weight"], reference.Squeeze[options["squeeze"].upper()], reference.Reduction.NONE, False,
        )  # fmt: skip
    expected, start = [], 0
    for shard in shards:
        own = slice(start, start + shard.feats.shape[0])
        start = own.stop
        value = loss.detach()[own] if options["reduction"] == "none" else loss.detach()
        expected.append(Result(value, stats, [gradient[own], None], indices[own], nearest[own], farthest[own], []))
    return expected


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """In L2, relative to what is expected."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    error, size = float((found.double() - expected.double()).norm()), float(expected.double().norm())
    assert error <= tolerance * size + 1e-30, f"{what}: error {error:.3e}, size {size:.3e}"


def check(results: Sequence[Result], expected: Sequence[Result], tolerance: float = 1e-6) -> None:
    world = len(results)
    everything = torch.cat([r.gradients[0] for r in expected if r.gradients[0] is not None])
    found = torch.cat([r.gradients[0] for r in results if r.gradients[0] is not None])
    assert_close(found, world * everything, tolerance, "gradient")
    for rank, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert result.indices.equal(wanted.indices), f"rank {rank}: support sets"
        assert result.nearest.equal(wanted.nearest) and result.farthest.equal(wanted.farthest), f"rank {rank}"
        assert_close(result.loss, wanted.loss, tolerance, f"rank {rank}: loss")
        for name, a, b in zip(wanted.stats._fields, result.stats, wanted.stats, strict=True):
            assert a.dtype == b.dtype
            assert abs(float(a) - float(b)) <= 1e-6 * abs(float(b)), f"rank {rank}: stats.{name}: {a} for {b}"
        assert not any(x.requires_grad for x in result.stats)
        # What is global is the same on every rank, bit for bit.
        assert all(same_bits(a, b) for a, b in zip(result.stats, results[0].stats, strict=True))
        assert result.loss.dim() == 1 or same_bits(result.loss, results[0].loss)


# ---- loss, gradients, selection ------------------------------------------------------------------


@pytest.mark.parametrize("backend", ON_HOST)
@pytest.mark.parametrize("kind", ["equal", "growing", "empty"])
@pytest.mark.parametrize("world", WORLDS)
def test_equals_one_process(ranks: Ranks, world: int, kind: str, backend: str, mode: str) -> None:
    """Loss, gradients, statistics, and exactly the same neighbours."""
    shards = split(problems.self_case(60, 33, 11), sizes_of(world, 60, kind))
    options = {"backend": backend}
    check(
        ranks.run(WORLDS[world], loss_on_ranks.loss_and_gradients, shards, options, mode), one_process(shards, options)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("squeeze", ["span", "support", "nearest", "none"])
def test_every_option(ranks: Ranks, squeeze: str, reduction: str, mode: str) -> None:
    shards = split(problems.self_case(61, 20, 9, seed=4), sizes_of(3, 61, "growing"))
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.rand(len(s.labels), generator=generator) for s in shards] if reduction == "none" else []
    options = {"squeeze": squeeze, "reduction": reduction, "k": 4, "alpha": 7.5, "weight": 0.75}
    results = ranks.run(WORLDS[3], loss_on_ranks.loss_and_gradients, shards, options, mode, upstream)
    check(results, one_process(shards, options, upstream))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["equal", "growing"])
def test_every_type(ranks: Ranks, dtype: torch.dtype, kind: str, mode: str) -> None:
    """Half-precision gradients to their rounding: a rank's share of another's gradient is rounded before the sum."""
    shards = split(problems.self_case(60, 33, 11).to(dtype), sizes_of(4, 60, kind))
    tolerance = {torch.float64: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    results = ranks.run(WORLDS[4], loss_on_ranks.loss_and_gradients, shards, {}, mode)
    expected = one_process(shards, {})
    check(results, expected, tolerance)
    for result, wanted in zip(results, expected, strict=True):
        assert_close(result.loss, wanted.loss, 1e-6, "loss")


TIES = ("duplicates", "duplicate-groups-over-k", "all-identical", "grid-1d", "grid-5d", "near-outside-support",
        "singletons-among-pairs", "one-identity", "no-positives", "labels-extreme", "labels-int32", "labels-uint8",
        "columns-strided", "columns-misaligned", "rows-strided", "transposed", "expanded", "self-1x3-ids1-k10",
        "self-2x1-ids1-k1", "self-97x64-ids20-k128", "none-anchors")  # fmt: skip


@pytest.mark.parametrize("name", TIES)
def test_hard_cases(ranks: Ranks, name: str, mode: str) -> None:
    """Ties across ranks go to the lower index of the whole; every layout, label and size works."""
    case = problems.CASES[name]()
    shards = split(case, sizes_of(3, len(case.labels), "growing"))
    options = {"k": case.k}
    check(ranks.run(WORLDS[3], loss_on_ranks.loss_and_gradients, shards, options, mode), one_process(shards, options))


@pytest.mark.parametrize("name", problems.ADVERSARIAL)
def test_selection_of_adversarial_inputs(ranks: Ranks, name: str, mode: str) -> None:
    """The same neighbours, though each rank has its own path and batch. Large enough to be screened."""
    case = problems.adversarial_case(name, 184, 70)
    shards = split(case, [46, 46, 92])
    results = ranks.run(WORLDS[3], loss_on_ranks.loss_and_gradients, shards, {}, mode)
    for result, wanted in zip(results, one_process(shards, {}), strict=True):
        assert result.indices.equal(wanted.indices)
        assert result.nearest.equal(wanted.nearest) and result.farthest.equal(wanted.farthest)


def test_a_rank_without_valid_anchors(ranks: Ranks, mode: str) -> None:
    """The rank's rows are negatives of other anchors and get gradients from them."""
    shards = split(problems.self_case(48, 12, 5), [16, 16, 16])
    lonely = shards[1]._replace(labels=torch.arange(100, 116))
    shards = [shards[0], lonely, shards[2]]
    expected = one_process(shards, {"k": 20})
    assert int(expected[0].stats.valid_anchors) == 32 and expected[1].gradients[0] is not None
    assert expected[1].gradients[0].any()
    check(ranks.run(WORLDS[3], loss_on_ranks.loss_and_gradients, shards, {"k": 20}, mode), expected)


def test_no_rank_with_anchors(ranks: Ranks, mode: str) -> None:
    shards = [Shard(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))] * 3
    for result in ranks.run(WORLDS[3], loss_on_ranks.loss_and_gradients, shards, {}, mode):
        assert result.loss.item() == 0.0 and result.gradients[0] is not None
        assert result.gradients[0].shape == (0, 5) and int(result.stats.valid_anchors) == 0


def test_part_of_the_processes(ranks: Ranks, mode: str) -> None:
    """Groups whose ranks are not those of the job."""
    shards = split(problems.self_case(41, 18, 6), [30, 11])
    for members in ((1, 3), (2, 3)):
        check(ranks.run(members, loss_on_ranks.loss_and_gradients, shards, {}, mode), one_process(shards, {}))


def test_repeats_bit_for_bit(ranks: Ranks, mode: str) -> None:
    shards = split(problems.self_case(150, 40, 16), [40, 60, 50])
    first, second = (ranks.run(WORLDS[3], loss_on_ranks.loss_and_gradients, shards, {}, mode) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.gradients[0] is not None and b.gradients[0] is not None
        assert same_bits(a.loss, b.loss) and same_bits(a.gradients[0], b.gradients[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_nan_on_one_rank_is_seen_on_all(ranks: Ranks, reduction: str, mode: str) -> None:
    shards = split(problems.self_case(30, 8, 4), [10, 10, 10])
    shards[1].feats[3, 3] = float("nan")
    for result in ranks.run(WORLDS[3], loss_on_ranks.loss_and_gradients, shards, {"reduction": reduction}, mode):
        assert result.loss.isnan().all() and result.gradients[0] is not None and result.gradients[0].isnan().all()


# ---- a bank of the rank's own --------------------------------------------------------------------


def with_banks(shards: Sequence[Shard]) -> list[Shard]:
    """Each rank another bank, the second none, the third an empty one."""
    banks = [problems.self_case(rows, shards[0].feats.shape[1], 9, seed=77 + rows) for rows in (37, 5)]
    empty = Shard(banks[0].feats[:0], banks[0].labels[:0])
    extra: list[Any] = [(banks[0].feats, banks[0].labels), (None, None), empty[:2], (banks[1].feats, banks[1].labels)]
    return [
        shard._replace(candidates=bank, candidate_labels=labels)
        for shard, (bank, labels) in zip(shards, extra, strict=False)
    ]


def check_banks(results: Sequence[Result], shards: Sequence[Shard], options: dict[str, Any]) -> None:
    """Against one process that computes each rank's anchors in turn, with separate candidates."""
    world = len(shards)
    leaves = [shard.feats.clone().requires_grad_() for shard in shards]
    banks = [None if s.candidates is None else s.candidates.clone().requires_grad_() for s in shards]
    labels = torch.cat([shard.labels for shard in shards])
    sums, valid, start = [], 0, 0
    for rank, shard in enumerate(shards):
        pool = torch.cat([*leaves, *([] if banks[rank] is None else [banks[rank]])])  # type: ignore[list-item]
        pool_labels = torch.cat([labels, *([] if shard.candidate_labels is None else [shard.candidate_labels])])
        arguments: dict[str, Any] = {"candidates": pool, "candidate_labels": pool_labels, "self_index": start}
        loss, stats = sn_ops.sn_loss(leaves[rank], shard.labels, **arguments, reduction="sum", return_stats=True)
        found = sn_ops.support_neighbors(leaves[rank].detach(), shard.labels, **arguments)
        assert found.indices.equal(results[rank].indices[:, :-2].long())
        assert found.nearest_positive.equal(results[rank].nearest.long())
        assert found.farthest_positive.equal(results[rank].farthest.long())
        sums.append(loss)
        valid += int(stats.valid_anchors)
        start += len(shard.labels)
    total = torch.stack(sums).sum() / (valid if options.get("reduction", "mean") == "mean" else 1)
    inputs = [*leaves, *(bank for bank in banks if bank is not None)]
    gradients = iter(torch.autograd.grad(total, inputs))
    for result in results:
        assert_close(result.loss, total.detach(), 1e-6, "loss")
        assert int(result.stats.valid_anchors) == valid
        assert result.gradients[0] is not None
        assert_close(result.gradients[0], world * next(gradients), 2e-6, "gradient of feats")
    for result, bank in zip(results, banks, strict=True):
        if bank is not None:
            assert result.gradients[1] is not None
            assert_close(result.gradients[1], world * next(gradients), 2e-6, "gradient of candidates")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("world", [1, 3, 4])
def test_banks(ranks: Ranks, world: int, reduction: str, mode: str) -> None:
    """The gathered rows first, the rank's own bank behind them; gradients to both."""
    shards = with_banks(split(problems.self_case(48, 14, 8), sizes_of(world, 48, "growing")))
    options = {"reduction": reduction}
    check_banks(ranks.run(WORLDS[world], loss_on_ranks.loss_and_gradients, shards, options, mode), shards, options)


# ---- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "accumulate", "amp"),
    [(True, False, False), (True, True, False), (False, True, False), (True, True, True)],
    ids=["ddp", "ddp-accumulate", "plain-accumulate", "ddp-accumulate-amp"],
)
def test_parameter_gradients(ranks: Ranks, parallel: bool, accumulate: bool, amp: bool, mode: str) -> None:
    """DistributedDataParallel's average, or the sum of loss / world size, is the one process's gradient."""
    # Four ranks: the factor of the world size is then exact in bf16, whose layers would else round everything anew.
    sizes = ([12, 16, 7, 4], [10, 0, 10, 10])
    steps = [split(problems.self_case(sum(s), 24, 6, seed=at), s) for at, s in enumerate(sizes)]
    found = ranks.run(WORLDS[4], loss_on_ranks.train, steps, parallel, accumulate, amp, mode)

    alone = loss_on_ranks.network(24)
    for shards in steps:
        # By shard and without a common bf16 copy of the weights: each rank's share of their gradients is rounded alone.
        with torch.autocast("cpu", torch.bfloat16, enabled=amp, cache_enabled=False):
            embeddings = torch.cat([alone(shard.feats) for shard in shards])
        labels = torch.cat([shard.labels for shard in shards])
        sn_ops.sn_loss(torch.nn.functional.normalize(embeddings.float(), dim=1), labels).backward()
    for gradients in found:
        for gradient, parameter in zip(gradients, alone.parameters(), strict=True):
            assert parameter.grad is not None
            assert_close(gradient, parameter.grad, 2e-6, "parameter gradient")


# ---- what does not hang --------------------------------------------------------------------------


@pytest.mark.parametrize("hint", [False, True], ids=["agreed", "sizes"])
def test_ranks_that_need_no_gradient_take_part(ranks: Ranks, hint: bool, mode: str) -> None:
    shards = split(problems.self_case(30, 8, 4), [14, 10, 6])
    sizes = [14, 10, 6] if hint else None
    expected = one_process(shards, {})
    needs = [False, True, False]
    for rank, (required, gradient) in enumerate(
        ranks.run(WORLDS[3], loss_on_ranks.backward_where_some_need_none, shards, needs, mode, sizes)
    ):
        assert required
        if needs[rank]:
            wanted = expected[rank].gradients[0]
            assert gradient is not None and wanted is not None
            assert_close(gradient, 3 * wanted, 1e-6, "gradient")
        else:
            assert gradient is None


def test_no_rank_needs_a_gradient(ranks: Ranks, mode: str) -> None:
    shards = split(problems.self_case(30, 8, 4), [14, 10, 6])
    outcome = ranks.run(WORLDS[3], loss_on_ranks.backward_where_some_need_none, shards, [False] * 3, mode, None)
    assert outcome == [(False, None)] * 3


FEATS = problems.self_case(12, 6, 3).feats
LABELS = problems.self_case(12, 6, 3).labels
GOOD: dict[str, Any] = {"feats": FEATS, "labels": LABELS}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "feats": ({"feats": FEATS[0]}, "feats: expected a 2-D tensor"),
    "feats-none": ({"feats": None}, "feats: expected a tensor"),
    "labels": ({"labels": LABELS[:5]}, "labels: expected shape"),
    "k": ({"k": 0}, "k: expected an int >= 1"),
    "alpha": ({"alpha": float("nan")}, "alpha: expected a finite number"),
    "backend": ({"backend": "gpu"}, "backend: expected one of"),
    "bank": ({"candidates": FEATS}, "candidate_labels: expected an integer tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_on_one_rank_raises_on_all(ranks: Ranks, name: str) -> None:
    bad, message = BAD[name]
    calls = [GOOD, {**GOOD, **bad}, GOOD]
    outcomes = ranks.outcomes(WORLDS[3], loss_on_ranks.just_call, calls)
    assert all(isinstance(outcome, RankError) for outcome in outcomes)
    errors = [outcome.error for outcome in outcomes]
    assert isinstance(errors[1], (TypeError, ValueError)) and message in str(errors[1])
    for error in (errors[0], errors[2]):
        assert isinstance(error, RuntimeError)
        assert "rank 1 was given bad input" in str(error) and message in str(error)
    assert ranks.run(WORLDS[3], loss_on_ranks.just_call, [GOOD] * 3), "the group is usable again"


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"k": 3}, "the same k on every rank, got 10 on rank 0, 3 on rank 2"),
    "alpha": ({"alpha": 7.0}, "the same alpha on every rank, got 50.0 on rank 0, 7.0 on rank 2"),
    "weight": ({"weight": 0.0}, "the same weight on every rank, got 0.1 on rank 0, 0.0 on rank 2"),
    "squeeze": ({"squeeze": "none"}, "the same squeeze on every rank, got span on rank 0, none on rank 2"),
    "reduction": ({"reduction": "sum"}, "the same reduction on every rank, got mean on rank 0, sum on rank 2"),
    "dtype": ({"feats": FEATS.double()}, "the same dtype of feats on every rank, got torch.float32 on rank 0"),
    "columns": ({"feats": FEATS[:, :4]}, "the same columns of feats on every rank, got 6 on rank 0, 4 on rank 2"),
    "backend": ({"backend": "reference"}, "the same backend on every rank, got cpu on rank 0, reference on rank 2"),
    "grad": ({"no_grad": True}, "torch.no_grad on rank 2"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_options_raise_on_all(ranks: Ranks, name: str) -> None:
    different, message = DIFFERENT[name]
    good = {**GOOD, "feats": FEATS.clone().requires_grad_()}
    outcomes = ranks.outcomes(WORLDS[3], loss_on_ranks.just_call, [good, good, {**GOOD, **different}])
    for outcome in outcomes:
        assert (
            isinstance(outcome, RankError) and isinstance(outcome.error, ValueError) and message in str(outcome.error)
        )


def test_sizes_hint(ranks: Ranks, mode: str) -> None:
    """One collective less and the same result; a hint that is visibly wrong raises."""
    shards = split(problems.self_case(30, 8, 4), [14, 10, 6])
    without, with_hint = (
        ranks.run(WORLDS[3], loss_on_ranks.loss_and_gradients, shards, options, mode)
        for options in ({}, {"sizes": [14, 10, 6]})
    )
    for a, b in zip(without, with_hint, strict=True):
        assert a.gradients[0] is not None and b.gradients[0] is not None
        assert same_bits(a.loss, b.loss) and same_bits(a.gradients[0], b.gradients[0])
        assert len(b.collectives) == len(a.collectives) - 1
    for loss, wanted in zip(
        ranks.run(WORLDS[3], loss_on_ranks.module_with_sizes, shards, [14, 10, 6]), with_hint, strict=True
    ):
        torch.testing.assert_close(loss, wanted.loss, rtol=1e-6, atol=0)
    (loss,) = ranks.run((2,), loss_on_ranks.just_call, [{**GOOD, "sizes": [12]}])
    assert loss.isfinite()
    for sizes, message in (
        ([11], "sizes: expected 12 at position 0"),
        ([12, 12], "sizes: expected 1 ints"),
        ([-1], "sizes: expected 1 ints >= 0"),
        (["a"], "sizes: expected one int for each rank"),
    ):
        (outcome,) = ranks.outcomes((2,), loss_on_ranks.just_call, [{**GOOD, "sizes": sizes}])
        assert isinstance(outcome, RankError) and message in str(outcome.error)


def test_how_many_collectives(ranks: Ranks) -> None:
    """Terms, rows, totals; backward one reduce-scatter, which gloo does as an exchange of parts."""
    shards = split(problems.self_case(60, 33, 11), [20, 20, 20])
    for result in ranks.run(WORLDS[3], loss_on_ranks.loss_and_gradients, shards, {}, "gather"):
        assert result.collectives == ["_all_gather_single"] * 3 + ["all_to_all_single"]


def test_ring_transfers(ranks: Ranks) -> None:
    """Forward a transfer for every other rank; backward these again, and one of a gradient after every batch."""
    shards = split(problems.self_case(60, 33, 11), [20, 20, 20])
    for result in ranks.run(WORLDS[3], loss_on_ranks.loss_and_gradients, shards, {}, "ring"):
        transfers = ["batch_isend_irecv"]
        assert result.collectives == ["_all_gather_single"] + 2 * transfers + ["_all_gather_single"] + 5 * transfers


def test_memory(ranks: Ranks) -> None:
    """Gather: one tensor of all rows and one of their gradients, which gloo's exchange of parts has a second time.
    Ring: nothing as large as two batches."""
    world, rows, dims = 4, 64, 512
    shards = split(problems.self_case(world * rows, dims, 40), [rows] * world)
    batch = rows * dims * 4
    for result in ranks.run(WORLDS[4], loss_on_ranks.large_tensors, shards, "gather", 2 * batch):
        forward, backward = result
        assert len(forward) == 1 and world * batch <= forward[0] <= world * (batch + rows * 16)
        assert backward == [world * batch] * 2
    for result in ranks.run(WORLDS[4], loss_on_ranks.large_tensors, shards, "ring", 2 * batch):
        assert result == ([], [])


def test_the_ring_is_chosen_by_size(ranks: Ranks) -> None:
    """Every rank takes the ring exactly when gathered rows and their gradients exceed the limit."""
    shards = split(problems.self_case(30, 8, 4), [20, 10])
    needed = 30 * (8 * 4 + 16) + 30 * 8 * 4  # rows with their labels, gradients
    for limit, ring in ((needed, False), (needed - 1, True)):
        assert ranks.run(WORLDS[2], loss_on_ranks.takes_the_ring, shards, limit) == [ring] * 2


# ---- around the loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ON_HOST)
def test_second_derivatives_are_refused(ranks: Ranks, backend: str) -> None:
    shards = split(problems.self_case(20, 8, 4), [10, 10])
    for outcome in ranks.outcomes(WORLDS[2], loss_on_ranks.differentiate_twice, shards, backend):
        assert isinstance(outcome, RankError) and isinstance(outcome.error, RuntimeError)
        assert "second derivatives are not available with group=" in str(outcome.error)


def test_transforms_are_refused(ranks: Ranks) -> None:
    shards = split(problems.self_case(20, 8, 4), [20])
    (outcome,) = ranks.outcomes(WORLDS[1], loss_on_ranks.vmapped, shards)
    assert isinstance(outcome, RankError) and "group= is not available in the transforms" in str(outcome.error)


def test_compiled_functions(ranks: Ranks) -> None:
    """torch.compile runs the loss outside its graph; with fullgraph=True the error says why."""
    shards = split(problems.self_case(20, 8, 4), [10, 10])
    for (loss, gradient), wanted in zip(
        ranks.run(WORLDS[2], loss_on_ranks.compiled, shards, False), one_process(shards, {}), strict=True
    ):
        assert gradient is not None and wanted.gradients[0] is not None
        assert_close(loss, wanted.loss, 1e-6, "loss")
        assert_close(gradient, 2 * wanted.gradients[0], 1e-6, "gradient")
    for outcome in ranks.outcomes(WORLDS[2], loss_on_ranks.compiled, shards, True):
        assert isinstance(outcome, RankError) and "group= runs collectives" in str(outcome)


def test_texts(ranks: Ranks) -> None:
    (texts,) = ranks.run((0,), loss_on_ranks.represent)
    assert "group=" in texts[0] and "mode='ring'" in texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "tree"}, "sn_ops: mode: expected one of 'auto', 'gather', 'ring', got 'tree'"),
        ({"ring_above": -1}, "sn_ops: ring_above: expected bytes, an int >= 0, got -1"),
        ({"ring_above": 1.5}, "sn_ops: ring_above: expected bytes, an int >= 0, got 1.5"),
    ],
)
def test_bad_exchange(ranks: Ranks, arguments: dict[str, Any], message: str) -> None:
    (outcome,) = ranks.outcomes((0,), loss_on_ranks.bad_exchange, arguments)
    assert isinstance(outcome, RankError) and str(outcome.error) == message
