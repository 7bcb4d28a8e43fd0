"""The two operators for PyTorch: shapes for tracing, autograd.

`forward` turns features into a loss and a support graph, `backward` a support graph into gradients; every backend has
the two with one signature (`csrc/sn_ops.cpp` has the schemas, `reference.forward` and `reference.backward` say what
each argument and result is), so any forward can be checked with any backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference, triton
from .dispatch import CORE, LOAD_ERROR, _use_reference

Graph = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# ---- operators by backend -----------------------------------------------------------------------


class Operators(NamedTuple):
    """The two operators of a backend, arguments and results as in `reference.forward` and `reference.backward`."""

    forward: Callable[..., Graph]
    backward: Callable[..., tuple[Tensor, Tensor]]


def _missing(*_: object) -> NoReturn:
    raise RuntimeError(f"sn_ops: the operators are not available: {LOAD_ERROR['cpu']}")


OPERATORS: dict[str, Operators] = {"reference": Operators(reference.forward, reference.backward)}
"""Backend name -> its operators; `register` adds to it."""


def forward(backend: str, *args: Any) -> Graph:
    """The forward operator of a backend, arguments and results as in `reference.forward`.

    Differentiable through the dispatcher for the fused backends; "reference" is not (see `reference.loss`).
    """
    return OPERATORS[backend].forward(*args)


def backward(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    """The backward operator of a backend, arguments and results as in `reference.backward`."""
    return OPERATORS[backend].backward(*args)


# ---- shapes for tracing -------------------------------------------------------------------------


def _fake_forward(
    feats: Tensor,
    labels: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    self_index: Tensor | None,
    self_offset: int,
    k: int,
    alpha: float,
    weight: float,
    squeeze: int,
    reduction: int,
    want_squared: bool,
) -> Graph:
    n = feats.shape[0]
    neighbours = torch.sym_min(k, n if candidates is None else candidates.shape[0])
    acc = reference.accumulation_dtype(feats.dtype)
    return (
        feats.new_empty((n,) if reduction == reference.Reduction.NONE else (), dtype=acc),
        feats.new_empty((n, neighbours + 2), dtype=torch.int32),
        feats.new_empty((n, neighbours + 2), dtype=acc),
        feats.new_empty((n,), dtype=torch.int32),
        feats.new_empty((n,), dtype=torch.int32),
        feats.new_empty((n, neighbours + 2) if want_squared else (0,), dtype=acc),
        feats.new_empty((6,), dtype=torch.float64),
    )


def _fake_backward(
    grad_loss: Tensor,
    feats: Tensor,
    candidates: Tensor | None,
    indices: Tensor,
    coefficients: Tensor,
    stats: Tensor,
    reduction: int,
    need_feats: bool,
    need_candidates: bool,
) -> tuple[Tensor, Tensor]:
    return (
        feats.new_empty(feats.shape if need_feats else (0,)),
        feats.new_empty(candidates.shape if need_candidates and candidates is not None else (0,)),
    )


# ---- autograd -----------------------------------------------------------------------------------
# Twice, for one reason: time. What is registered on the operators serves tracing (torch.compile, torch.export) and
# direct calls of torch.ops.sn_ops; `_EagerLoss` serves eager calls of `loss`, where the registered one would cost more
# than the kernels do on a small batch. Both end in the same backward operator.

_REDUCTION_ARGUMENT = 10
"""Where the forward operator's arguments have the reduction."""


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Graph) -> None:
    feats, _, candidates = inputs[:3]
    _, indices, coefficients, nearest, farthest, squared, stats = output
    ctx.save_for_backward(feats, candidates, indices, coefficients, stats)
    ctx.reduction = inputs[_REDUCTION_ARGUMENT]
    ctx.mark_non_differentiable(indices, coefficients, nearest, farthest, squared, stats)
    ctx.set_materialize_grads(False)


def _differentiate(
    operator: Callable[..., tuple[Tensor, Tensor]], ctx: Any, grad_loss: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    """Gradients for the twelve arguments of the forward operator, by the backward operator."""
    grads: list[Tensor | None] = [None] * 12
    if grad_loss is not None:
        feats, candidates, indices, coefficients, stats = ctx.saved_tensors
        need_feats, need_candidates = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_feats, grad_candidates = operator(
            grad_loss, feats, candidates, indices, coefficients, stats, ctx.reduction, need_feats, need_candidates
        )
        grads[0] = grad_feats if need_feats else None
        grads[2] = grad_candidates if need_candidates else None
    return tuple(grads)


def _refuse_second_derivative(*_: object) -> NoReturn:
    _use_reference("second derivatives are")


class _EagerLoss(torch.autograd.Function):
    """The loss for eager autograd: the differentiable tensors, and the operator's arguments as they are, in one tuple
    because every argument of a Function costs time."""

    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, candidates: Tensor | None, operators: Operators, arguments: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            value, indices, coefficients, _, _, _, stats = operators.forward(*arguments)
        ctx.save_for_backward(feats, candidates, indices, coefficients, stats)
        ctx.operator = operators.backward
        ctx.reduction = arguments[_REDUCTION_ARGUMENT]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return value, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad_loss is None:
            return None, None, None, None
        feats, candidates, indices, coefficients, stats = ctx.saved_tensors
        need_feats, need_candidates = ctx.needs_input_grad[:2]
        args = (grad_loss, feats, candidates, indices, coefficients, stats, ctx.reduction, need_feats, need_candidates)
        if torch.is_grad_enabled():
            # create_graph=True: through the dispatcher, whose autograd refuses the next derivative.
            grad_feats, grad_candidates = ctx.operator(*args)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grad_feats, grad_candidates = ctx.operator(*args)
        return grad_feats if need_feats else None, grad_candidates if need_candidates else None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: object) -> NoReturn:
        _use_reference("forward-mode derivatives are")


def loss(
    backend: str,
    feats: Tensor,
    labels: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    self_index: Tensor | None,
    self_offset: int,
    k: int,
    alpha: float,
    weight: float,
    squeeze: int,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """`reference.loss` by the operators of a fused backend: the differentiable loss, the statistics `[6]` detached."""
    arguments = (
        feats, labels, candidates, candidate_labels, self_index, self_offset,
        k, alpha, weight, squeeze, reduction, False,
    )  # fmt: skip
    operators = OPERATORS[backend]
    if torch.compiler.is_compiling():
        outputs = operators.forward(*arguments)
        return outputs[0], outputs[6]
    wants_grad = feats.requires_grad or (candidates is not None and candidates.requires_grad)
    # Forward-mode tangents do not show in requires_grad; the Function refuses them, a bare operator would drop them.
    if (wants_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        pair: tuple[Tensor, Tensor] = _EagerLoss.apply(feats, candidates, operators, arguments)
        return pair
    with torch._C._AutoDispatchBelowAutograd():
        outputs = operators.forward(*arguments)
    return outputs[0], outputs[6]


# ---- registration -------------------------------------------------------------------------------


def register(backends: Iterable[str], namespace: str) -> None:
    """Makes the operators `namespace::forward` and `namespace::backward` those of the backends: shapes for tracing and
    autograd for the two, and their place in OPERATORS."""
    library = getattr(torch.ops, namespace)
    operators = Operators(library.forward.default, library.backward.default)
    torch.library.register_fake(f"{namespace}::forward", _fake_forward)
    torch.library.register_fake(f"{namespace}::backward", _fake_backward)
    torch.library.register_autograd(
        f"{namespace}::forward", partial(_differentiate, operators.backward), setup_context=_keep_for_backward
    )
    torch.library.register_autograd(f"{namespace}::backward", _refuse_second_derivative)
    for backend in backends:
        OPERATORS[backend] = operators


# "cpu" and "cuda" are one pair of operators: the dispatcher goes by the tensors' device.
if CORE is None:
    OPERATORS["cpu"] = OPERATORS["cuda"] = Operators(_missing, _missing)
else:
    register(("cpu", "cuda"), "sn_ops")
if "triton" not in LOAD_ERROR:
    triton.define()
    register(("triton",), "sn_triton")
