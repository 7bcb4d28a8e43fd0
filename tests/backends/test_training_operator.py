"""The operators of training, `loss` and `loss_backward`: the same as `forward` and `backward` with fewer tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

import sn_ops
from sn_ops import ops, reference
from sn_ops.reference import Graph, GraphLayout, LossOutputs
from support import judge, problems
from support.backends import FULL_SPEED, require
from support.problems import Case

CASES = [
    "self-7x15-ids2-k10",
    "self-33x65-ids8-k10",
    "bank-33-65x100-k1-tensor",
    "bank-65-7x17-k10-none",
    "bank-7-193x128-k10-offset",
    "no-positives",
    "none-anchors",
    "no-candidates",
    "columns-strided",
]
REDUCTION = {"mean": 0, "sum": 1, "none": 2}


def loss_arguments(case: Case, reduction: str = "mean", squeeze: int = 0) -> tuple[Any, ...]:
    tensor = case.self_index if isinstance(case.self_index, Tensor) else None
    offset = 0 if case.candidates is None else case.self_index if isinstance(case.self_index, int) else -1
    return (
        case.feats, case.labels, case.candidates, case.candidate_labels, tensor, offset,
        case.k, 50.0, 0.1, squeeze, REDUCTION[reduction],
    )  # fmt: skip


def upstream_of(value: Tensor) -> Tensor:
    return torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)


def sizes(case: Case) -> tuple[int, int, torch.dtype]:
    n = case.feats.shape[0]
    return n, n if case.candidates is None else case.candidates.shape[0], reference.accumulation_dtype(case.feats.dtype)


@pytest.mark.parametrize(
    ("dtype", "reduction"), [(torch.float32, "mean"), (torch.float64, "none"), (torch.bfloat16, "sum")], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_as_the_two_operators(fused_backend: str, name: str, reduction: str, dtype: torch.dtype) -> None:
    """The loss, the whole graph, the statistics; then each gradient that is asked for, and no other."""
    case = problems.CASES[name]().to(dtype).on(fused_backend)
    operators = ops.OPERATORS[fused_backend]
    args = loss_arguments(case, reduction)
    graph = Graph(*operators.forward(*args, False))
    outputs = LossOutputs(*operators.loss(*args))
    n, m, acc = sizes(case)
    layout = GraphLayout.of(n, m, case.k, acc)
    assert judge.same_bits(outputs.value, graph.value) and judge.same_bits(outputs.stats, graph.stats)
    assert outputs.graph.dtype == torch.int32 and outputs.graph.shape == (layout.words,)
    parts = layout.unpack(outputs.graph, n, acc)
    for part, alone in zip(parts, (graph.indices, graph.coefficients, graph.nearest, graph.farthest), strict=True):
        assert part.shape == alone.shape and judge.same_bits(part, alone)

    grad = upstream_of(graph.value)
    head, tail = (grad, case.feats, case.candidates), (graph.stats, REDUCTION[reduction])
    wanted = operators.backward(*head, graph.indices, graph.coefficients, *tail, True, case.candidates is not None)
    needs = [(True, False)] if case.candidates is None else [(True, False), (False, True), (True, True)]
    for need_feats, need_candidates in needs:
        found = operators.loss_backward(
            *head, outputs.graph, graph.stats, case.k, REDUCTION[reduction], need_feats, need_candidates
        )
        expected = [x for x, need in zip(wanted, (need_feats, need_candidates), strict=True) if need]
        assert len(found) == len(expected)
        assert all(a.dtype == dtype and judge.same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_is_returned_that_is_not_needed(fused_backend: str) -> None:
    case = problems.CASES["bank-33-65x100-k1-tensor"]().on(fused_backend)
    operators = ops.OPERATORS[fused_backend]
    value, graph, stats = operators.loss(*loss_arguments(case))
    args = upstream_of(value), case.feats, case.candidates, graph, stats, case.k, 0, False, False
    assert operators.loss_backward(*args) == []


@pytest.mark.parametrize("name", ["self-7x15-ids2-k10", "bank-33-65x100-k1-tensor", "none-anchors"])
def test_opcheck(fused_backend: str, name: str) -> None:
    case = problems.CASES[name]().on(fused_backend).leaves()
    operators = ops.OPERATORS[fused_backend]
    torch.library.opcheck(cast(Any, operators.loss), loss_arguments(case))
    plain = problems.CASES[name]().on(fused_backend)
    value, graph, stats = operators.loss(*loss_arguments(plain))
    banked = plain.candidates is not None
    torch.library.opcheck(
        cast(Any, operators.loss_backward),
        (upstream_of(value), plain.feats, plain.candidates, graph, stats, plain.k, 0, True, banked),
    )


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (3, torch.zeros(5, dtype=torch.int32), "graph"),
        (3, torch.zeros(320), "graph"),
        (4, torch.zeros(5, dtype=torch.float64), "stats"),
        (0, torch.zeros(2), "grad_loss"),
        (5, 0, "k"),
    ],
)
def test_a_buffer_of_another_batch_is_refused(argument: int, value: Any, message: str) -> None:
    """By name, before memory is read."""
    case = problems.self_case(8, 16, 4)
    operators = ops.OPERATORS["cpu"]
    outputs = LossOutputs(*operators.loss(*loss_arguments(case)))
    args = [torch.ones(()), case.feats, None, outputs.graph, outputs.stats, case.k, 0, True, False]
    args[argument] = value
    with pytest.raises((RuntimeError, ValueError), match=f"loss_backward: {message}"):
        operators.loss_backward(*args)


def test_an_index_outside_of_the_candidates_is_refused() -> None:
    case = problems.self_case(8, 16, 4)
    operators = ops.OPERATORS["cpu"]
    outputs = LossOutputs(*operators.loss(*loss_arguments(case)))
    layout = GraphLayout.of(8, 8, case.k, torch.float32)
    outputs.graph[layout.indices + 3] = 8
    with pytest.raises((RuntimeError, ValueError), match="expected entries of -1 or 0 to 7, got 8"):
        operators.loss_backward(torch.ones(()), case.feats, None, outputs.graph, outputs.stats, case.k, 0, True, False)


# ---- what a call costs ----------------------------------------------------------------------------


def noted(call: Callable[[], Any]) -> tuple[Any, list[str], list[int]]:
    """What a call returns, the operators that PyTorch's dispatcher ran for it, and the bytes of each allocation."""
    with profile(profile_memory=True) as record:
        result = call()
    assert record.kineto_results is not None
    events = [(event.name(), event.nbytes()) for event in record.kineto_results.events()]
    operators = [name for name, _ in events if "::" in name and not name.startswith(("autograd::", "torch::"))]
    return result, operators, [size for name, size in events if name == "[memory]" and size > 0]


@pytest.mark.parametrize("banked", [False, True])
@pytest.mark.parametrize("name", [*FULL_SPEED, "simt"])
def test_a_call_is_one_operator_and_its_outputs(name: str, banked: bool) -> None:
    """Forward: the loss, the graph, the statistics. Backward: a gradient for each input that needs one, nothing else.

    The kernels on a GPU take a workspace on top, in each direction: four allocations and two. Triton's interpreter
    allocates for itself: `test_triton_launches.py` counts its compiled calls."""
    backend = require(name)
    # An offset: the entries of a tensor would be checked, which takes operators of its own.
    batch = "bank-7-193x128-k10-offset" if banked else "self-33x65-ids8-k10"
    case = problems.CASES[batch]().on(backend).leaves()
    namespace = ops.OPERATORS[backend].loss.name().partition("::")[0]  # type: ignore[attr-defined]
    one = torch.ones((), device=case.feats.device)

    def forward() -> Tensor:
        return sn_ops.sn_loss(**case.arguments(), backend=backend)

    torch.autograd.grad(forward(), case.inputs(), one)  # loads code
    loss, names, memory = noted(forward)
    grads, back_names, back_memory = noted(lambda: torch.autograd.grad(loss, case.inputs(), one))
    if backend == "simt":  # its operators are Python, whose tensors and views go through the dispatcher
        names, back_names = ([x for x in each if not x.startswith("aten::")] for each in (names, back_names))
    assert names == [f"{namespace}::loss"], names
    assert back_names == [f"{namespace}::loss_backward"], back_names
    n, m, acc = sizes(case)
    on_gpu = case.feats.is_cuda
    assert memory[:3] == [4, 4 * GraphLayout.of(n, m, case.k, acc).words, 6 * 8] or on_gpu, memory
    assert back_memory[: len(grads)] == [grad.nbytes for grad in grads] or on_gpu, back_memory
    assert len(memory) <= 3 + on_gpu and len(back_memory) <= len(grads) + on_gpu, (memory, back_memory)
