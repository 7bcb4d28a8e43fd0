"""The two operators for PyTorch: by backend, their shapes for tracing, autograd, registration.

`forward` turns features into a loss and a support graph; `backward` turns a support graph into gradients. Every backend
has both, with one signature, so any forward works with any backward. `csrc/sn_ops.cpp` has the schemas;
`reference.ForwardArguments`, `reference.Graph` and `reference.BackwardArguments` say what each argument and result is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference, triton
from .dispatch import CORE, LOAD_ERROR, use_reference
from .reference import BackwardArguments, ForwardArguments, Graph, Reduction

# ---- operators by backend -----------------------------------------------------------------------


class Operators(NamedTuple):
    """The two operators of a backend: they take `ForwardArguments` and `BackwardArguments` one by one.

    `forward` returns the entries of `Graph`, from the dispatcher as a plain tuple.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor]]


def _missing(*_: object) -> NoReturn:
    raise RuntimeError(f"sn_ops: the operators are not available: {LOAD_ERROR['cpu']}")


OPERATORS: dict[str, Operators] = {"reference": Operators(reference.forward, reference.backward)}
"""Backend name -> its operators; `register` adds to it."""


def forward(backend: str, *args: Any) -> Graph:
    """The forward operator of a backend, given `ForwardArguments` one by one.

    Differentiable through the dispatcher for the fused backends; "reference" is not (see `reference.loss`).
    """
    return Graph(*OPERATORS[backend].forward(*args))


def backward(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    """The backward operator of a backend, given `BackwardArguments` one by one: the two gradients."""
    return OPERATORS[backend].backward(*args)


# ---- shapes for tracing -------------------------------------------------------------------------


def _fake_forward(*arguments: Any) -> Graph:
    args = ForwardArguments(*arguments)
    feats = args.feats
    n = feats.shape[0]
    columns = torch.sym_min(args.k, n if args.candidates is None else args.candidates.shape[0]) + 2
    acc = reference.accumulation_dtype(feats.dtype)
    return Graph(
        value=feats.new_empty((n,) if args.reduction == Reduction.NONE else (), dtype=acc),
        indices=feats.new_empty((n, columns), dtype=torch.int32),
        coefficients=feats.new_empty((n, columns), dtype=acc),
        nearest=feats.new_empty((n,), dtype=torch.int32),
        farthest=feats.new_empty((n,), dtype=torch.int32),
        squared=feats.new_empty((n, columns) if args.want_squared else (0,), dtype=acc),
        stats=feats.new_empty((6,), dtype=torch.float64),
    )


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    args = BackwardArguments(*arguments)
    feats, candidates = args.feats, args.candidates
    return (
        feats.new_empty(feats.shape if args.need_feats else (0,)),
        feats.new_empty(candidates.shape if args.need_candidates and candidates is not None else (0,)),
    )


# ---- autograd -----------------------------------------------------------------------------------
# Autograd is written twice, for speed. What is registered on the operators serves tracing (torch.compile, torch.export)
# and direct calls of torch.ops.sn_ops. `_EagerLoss` serves eager calls of `loss`: on a small batch the registered one
# would cost more than the kernels. Both call the same backward operator.


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args, graph = ForwardArguments(*inputs), Graph(*output)
    ctx.save_for_backward(args.feats, args.candidates, graph.indices, graph.coefficients, graph.stats)
    ctx.reduction = args.reduction
    ctx.mark_non_differentiable(*graph[1:])
    ctx.set_materialize_grads(False)


def _differentiate(
    operator: Callable[..., tuple[Tensor, Tensor]], ctx: Any, grad_loss: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    """Gradients for the arguments of the forward operator, by the backward operator."""
    grad_feats = grad_candidates = None
    if grad_loss is not None:
        need_feats, need_candidates = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grads = operator(grad_loss, *ctx.saved_tensors, ctx.reduction, need_feats, need_candidates)
        grad_feats = grads[0] if need_feats else None
        grad_candidates = grads[1] if need_candidates else None
    return grad_feats, None, grad_candidates, *[None] * (len(ForwardArguments._fields) - 3)


def _refuse_second_derivative(*_: object) -> NoReturn:
    use_reference("second derivatives are")


class _EagerLoss(torch.autograd.Function):
    """The loss for eager autograd.

    The differentiable tensors are arguments of their own, the operator's arguments are one tuple: each argument of a
    Function costs time.
    """

    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, candidates: Tensor | None, operators: Operators, args: ForwardArguments
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            value, indices, coefficients, _, _, _, stats = operators.forward(*args)
        ctx.save_for_backward(feats, candidates, indices, coefficients, stats)
        ctx.operator = operators.backward
        ctx.reduction = args.reduction
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return value, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad_loss is None:
            return None, None, None, None
        need_feats, need_candidates = ctx.needs_input_grad[:2]
        args = (grad_loss, *ctx.saved_tensors, ctx.reduction, need_feats, need_candidates)
        if torch.is_grad_enabled():
            # create_graph=True: the dispatcher's autograd refuses the next derivative.
            grad_feats, grad_candidates = ctx.operator(*args)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grad_feats, grad_candidates = ctx.operator(*args)
        return grad_feats if need_feats else None, grad_candidates if need_candidates else None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: object) -> NoReturn:
        use_reference("forward-mode derivatives are")


def loss(backend: str, args: ForwardArguments) -> tuple[Tensor, Tensor]:
    """`reference.loss` by the operators of a fused backend: the differentiable loss, the statistics `[6]` detached."""
    operators = OPERATORS[backend]
    if torch.compiler.is_compiling():
        outputs = operators.forward(*args)
        return outputs[0], outputs[6]
    feats, candidates = args.feats, args.candidates
    wants_grad = feats.requires_grad or (candidates is not None and candidates.requires_grad)
    # Forward-mode tangents do not show in requires_grad. The Function refuses them; a bare operator would drop them.
    if (wants_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        pair: tuple[Tensor, Tensor] = _EagerLoss.apply(feats, candidates, operators, args)
        return pair
    with torch._C._AutoDispatchBelowAutograd():
        outputs = operators.forward(*args)
    return outputs[0], outputs[6]


# ---- registration -------------------------------------------------------------------------------


def register(backends: Iterable[str], namespace: str) -> None:
    """Registers `namespace::forward` and `namespace::backward` as the operators of the backends.

    Both get their shapes for tracing, their autograd, and their place in OPERATORS.
    """
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


# "cpu" and "cuda" are one pair of operators: the dispatcher chooses by the tensors' device.
if CORE is None:
    OPERATORS["cpu"] = OPERATORS["cuda"] = Operators(_missing, _missing)
else:
    register(("cpu", "cuda"), "sn_ops")
if "triton" not in LOAD_ERROR:
    triton.define()
    register(("triton",), "sn_triton")
