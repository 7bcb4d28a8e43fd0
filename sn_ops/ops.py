"""The operators for PyTorch: by backend, their shapes for tracing, autograd, registration.

`forward` turns features into a loss and a support graph; `backward` turns a support graph into gradients. Every backend
has both, with one signature, so any forward works with any backward. Training calls `loss` and `loss_backward`, which
do the same with fewer tensors: the graph travels between them in one buffer, and only gradients that are needed come
back. `csrc/sn_ops.cpp` has the schemas; the `...Arguments` of `reference` say what each argument and result is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference, triton
from .dispatch import AUTOGRAD, CORE, LOAD_ERROR, use_reference
from .reference import (
    BackwardArguments,
    ForwardArguments,
    Graph,
    GraphLayout,
    LossArguments,
    LossBackwardArguments,
    LossOutputs,
    Reduction,
)

# ---- operators by backend -----------------------------------------------------------------------


class Operators(NamedTuple):
    """The operators of a backend; each takes the entries of its `...Arguments` one by one.

    Results come from the dispatcher as plain tuples: the entries of `Graph`, two gradients, the entries of
    `LossOutputs`, a list of gradients. "reference" has the first two alone: autograd differentiates its loss.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor]]
    loss: Callable[..., tuple[Tensor, Tensor, Tensor]]
    loss_backward: Callable[..., list[Tensor]]
    node: Callable[..., Any] | None = None
    """Eager autograd in C++: takes the entries of `LossArguments` and whether statistics are wanted, returns the loss
    or (loss, statistics), or None for a call that is left to Python. None where Python's autograd serves all calls."""


def _missing(*_: object) -> NoReturn:
    raise RuntimeError(f"sn_ops: the operators are not available: {LOAD_ERROR['cpu']}")


OPERATORS: dict[str, Operators] = {
    "reference": Operators(reference.forward, reference.backward, _missing, _missing),
}
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


def _fake_loss(*arguments: Any) -> LossOutputs:
    args = LossArguments(*arguments)
    feats = args.feats
    n = feats.shape[0]
    m = n if args.candidates is None else args.candidates.shape[0]
    acc = reference.accumulation_dtype(feats.dtype)
    return LossOutputs(
        value=feats.new_empty((n,) if args.reduction == Reduction.NONE else (), dtype=acc),
        graph=feats.new_empty((GraphLayout.of(n, m, args.k, acc).words,), dtype=torch.int32),
        stats=feats.new_empty((6,), dtype=torch.float64),
    )


def _fake_loss_backward(*arguments: Any) -> list[Tensor]:
    args = LossBackwardArguments(*arguments)
    rows = (args.feats if args.need_feats else None, args.candidates if args.need_candidates else None)
    return [args.feats.new_empty(part.shape) for part in rows if part is not None]


# ---- autograd -----------------------------------------------------------------------------------
# Autograd is written three times, for speed. What is registered on the operators serves tracing (torch.compile,
# torch.export, torch.jit.trace) and direct calls of torch.ops.sn_ops. Eager calls of `loss` are served by a node in
# C++, where the package was built for the torch that runs (csrc/autograd.cpp), else by `_EagerLoss`: on a small batch
# the registered one would cost more than the kernels. All call the same backward operators.


def _keep_graph(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args, graph = ForwardArguments(*inputs), Graph(*output)
    ctx.save_for_backward(args.feats, args.candidates, graph.indices, graph.coefficients, graph.stats)
    ctx.reduction = args.reduction
    ctx.mark_non_differentiable(*graph[1:])
    ctx.set_materialize_grads(False)


def _differentiate_forward(
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


def _keep_buffer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args, outputs = LossArguments(*inputs), LossOutputs(*output)
    ctx.save_for_backward(args.feats, args.candidates, outputs.graph, outputs.stats)
    ctx.k, ctx.reduction = args.k, args.reduction
    ctx.mark_non_differentiable(outputs.graph, outputs.stats)
    ctx.set_materialize_grads(False)


def _differentiate_loss(
    operator: Callable[..., list[Tensor]], ctx: Any, grad_loss: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    """Gradients for the arguments of the loss operator, by its backward operator."""
    pair: tuple[Tensor | None, Tensor | None] = (None, None)
    if grad_loss is not None:
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        pair = _placed(operator(grad_loss, *ctx.saved_tensors, ctx.k, ctx.reduction, *needs), *needs)
    return pair[0], None, pair[1], *[None] * (len(LossArguments._fields) - 3)


def _placed(grads: list[Tensor], need_feats: bool, need_candidates: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that came back, as those of feats and of candidates."""
    return grads[0] if need_feats else None, grads[-1] if need_candidates else None


def _refuse_second_derivative(*_: object) -> NoReturn:
    use_reference("second derivatives are")


def _refuse_batches(*_: object) -> NoReturn:
    use_reference("batches of calls (vmap, is_grads_batched) are")


def _refuse_tangents(*values: object) -> None:
    """Raises if one of the values has a forward-mode tangent, which does not show in requires_grad.

    A tracer of torch.compile does not see tangents: it may not get past this, and leaves the frame to Python.
    """
    if torch.compiler.is_compiling():
        use_reference("forward-mode derivatives are")
    for value in values:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            use_reference("forward-mode derivatives are")


class _WithoutTangents(torch.library.Library):
    """Registers autograd kernels that refuse forward-mode tangents, which those of `register_autograd` would drop."""

    def impl(self, op_name: str, fn: Any, *key: Any, **options: Any) -> None:
        def kernel(keyset: Any, *args: Any, **named: Any) -> Any:
            if forward_ad._current_level >= 0:
                _refuse_tangents(*args, *named.values())
            return fn(keyset, *args, **named)

        super().impl(op_name, kernel, *key, **options)


class _EagerLoss(torch.autograd.Function):
    """The loss for eager autograd, in Python: the loss alone, or the loss and the statistics.

    The differentiable tensors are arguments of their own, all else is one argument, what nobody asked for is not
    returned, and operators are called past OpOverload (`_op`): each costs time.
    """

    @staticmethod
    def forward(ctx: Any, feats: Tensor, candidates: Tensor | None, call: tuple[Any, ...]) -> Any:
        operators, args, want_stats = call
        bare: Any = operators.loss
        with torch._C._AutoDispatchBelowAutograd():
            value, graph, stats = bare._op(*args)
        ctx.save_for_backward(feats, candidates, graph, stats)
        # Not the whole call: its features and labels would live until the loss does not.
        ctx.kept = operators.loss_backward, args[_K], args[_REDUCTION]
        ctx.set_materialize_grads(False)
        if not want_stats:
            return value
        ctx.mark_non_differentiable(stats)
        return value, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad_loss is None:
            return None, None, None
        if forward_ad._current_level >= 0:
            _refuse_tangents(grad_loss)
        operator, k, reduction = ctx.kept
        feats, candidates, graph, stats = ctx.saved_tensors
        need_feats, need_candidates, _call = ctx.needs_input_grad
        args = (grad_loss, feats, candidates, graph, stats, k, reduction, need_feats, need_candidates)
        if torch.is_grad_enabled():
            grads = operator(*args)  # create_graph=True: the dispatcher's autograd refuses the next derivative
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = operator._op(*args)
        return grads[0] if need_feats else None, grads[-1] if need_candidates else None, None

    @staticmethod
    def jvp(ctx: Any, *_: object) -> NoReturn:
        use_reference("forward-mode derivatives are")


# What Function.apply calls in the end, bound as it binds it. On the way it looks for transforms of torch.func, which
# `choose_backend` has refused, and that takes longer than to check all arguments of the loss.
_apply_eagerly = super(torch.autograd.Function, _EagerLoss).apply

_K, _REDUCTION = (LossArguments._fields.index(name) for name in ("k", "reduction"))


def loss(backend: str, args: tuple[Any, ...], want_stats: bool) -> tuple[Tensor, Tensor | None]:
    """`reference.loss` by the operators of a fused backend: the differentiable loss and the statistics, detached.

    Args:
        backend: a fused backend's name.
        args: the entries of `LossArguments`.
        want_stats: whether the statistics are wanted; None may stand for them if not.
    """
    operators = OPERATORS[backend]
    if forward_ad._current_level >= 0:  # a bare operator would drop tangents, and so would a compiled graph
        _refuse_tangents(*args)
    if torch.compiler.is_compiling():
        value, _, stats = operators.loss(*args)
        return value, stats
    if operators.node is not None:
        found = operators.node(*args, want_stats)
        if found is not None:
            return found if want_stats else (found, None)
    if torch._C._is_tracing():  # torch.jit.trace records operators, and fails at a Function like ours
        value, _, stats = operators.loss(*args)
        return value, stats
    feats, _, candidates, *_ = args
    wants_grad = feats.requires_grad or (candidates is not None and candidates.requires_grad)
    if wants_grad and torch.is_grad_enabled():
        found = _apply_eagerly(feats, candidates, (operators, args, want_stats))
        return found if want_stats else (found, None)
    with torch._C._AutoDispatchBelowAutograd():
        value, _, stats = operators.loss(*args)
    return value, stats


# ---- registration -------------------------------------------------------------------------------

_REGISTRATIONS: list[torch.library.Library] = []  # what they registered lasts as long as they do


def register(backends: Iterable[str], namespace: str) -> None:
    """Registers `namespace::forward`, `backward`, `loss` and `loss_backward` as the operators of the backends.

    They get their shapes for tracing, their autograd, and their place in OPERATORS.
    """
    library = getattr(torch.ops, namespace)
    operators = Operators(
        library.forward.default, library.backward.default, library.loss.default, library.loss_backward.default,
        None if AUTOGRAD is None else AUTOGRAD.bind(namespace, use_reference),
    )  # fmt: skip
    refusals, autograd = torch.library.Library(namespace, "FRAGMENT"), _WithoutTangents(namespace, "FRAGMENT")
    _REGISTRATIONS.extend((refusals, autograd))
    for name, fake in (
        ("forward", _fake_forward),
        ("backward", _fake_backward),
        ("loss", _fake_loss),
        ("loss_backward", _fake_loss_backward),
    ):
        torch.library.register_fake(f"{namespace}::{name}", fake)
        # The keys of torch.func.vmap and of is_grads_batched.
        torch.library.register_vmap(f"{namespace}::{name}", _refuse_batches)
        refusals.impl(name, _refuse_batches, "Batched")
    for name, backward_of, keep in (
        ("forward", partial(_differentiate_forward, operators.backward), _keep_graph),
        ("loss", partial(_differentiate_loss, operators.loss_backward), _keep_buffer),
    ):
        torch.library.register_autograd(f"{namespace}::{name}", backward_of, setup_context=keep, lib=autograd)
    for name in ("backward", "loss_backward"):
        torch.library.register_autograd(f"{namespace}::{name}", _refuse_second_derivative)
    for backend in backends:
        OPERATORS[backend] = operators


# "cpu" and "cuda" are one set of operators: the dispatcher chooses by the tensors' device.
if CORE is None:
    OPERATORS["cpu"] = OPERATORS["cuda"] = Operators(_missing, _missing, _missing, _missing)
else:
    register(("cpu", "cuda"), "sn_ops")
if "triton" not in LOAD_ERROR:
    triton.define()
    register(("triton",), "sn_triton")
