"""The operators of `sn_triton`: what is allocated, and which kernel runs when.

Nothing here reads a value of a tensor: shapes decide everything, so a CUDA graph can capture a call. The kernels'
modules need Triton; the first call imports them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import (
    BackwardArguments,
    ForwardArguments,
    Graph,
    GraphLayout,
    LossArguments,
    LossBackwardArguments,
    LossOutputs,
    Reduction,
    accumulation_dtype,
)
from . import tuning
from .batch import Batch, aligned, padded, unit_stride
from .tuning import cdiv

FORWARD = (
    "forward(Tensor feats, Tensor labels, Tensor? candidates, Tensor? candidate_labels, Tensor? self_index, "
    "SymInt self_offset, SymInt k, float alpha, float weight, int squeeze, int reduction, bool want_squared) -> "
    "(Tensor loss, Tensor indices, Tensor coefficients, Tensor nearest_positive, Tensor farthest_positive, "
    "Tensor squared, Tensor stats)"
)
BACKWARD = (
    "backward(Tensor grad_loss, Tensor feats, Tensor? candidates, Tensor indices, Tensor coefficients, Tensor stats, "
    "int reduction, bool need_feats, bool need_candidates) -> (Tensor grad_feats, Tensor grad_candidates)"
)
LOSS = (
    "loss(Tensor feats, Tensor labels, Tensor? candidates, Tensor? candidate_labels, Tensor? self_index, "
    "SymInt self_offset, SymInt k, float alpha, float weight, int squeeze, int reduction) -> "
    "(Tensor loss, Tensor graph, Tensor stats)"
)
LOSS_BACKWARD = (
    "loss_backward(Tensor grad_loss, Tensor feats, Tensor? candidates, Tensor graph, Tensor stats, SymInt k, "
    "int reduction, bool need_feats, bool need_candidates) -> Tensor[]"
)


@lru_cache(maxsize=256)
def _halves(value: float) -> tuple[float, float]:
    """A float64 as the sum of two float32: a kernel takes no other numbers."""
    largest = 3.4e38
    high = ctypes.c_float(max(-largest, min(largest, value))).value
    return high, max(-largest, min(largest, value - high))


class _Outputs(NamedTuple):
    """What the kernels of a forward write: tensors, or parts of one as `launch.Region` where nothing else reads them.

    The shapes are those of `Graph`.
    """

    value: Tensor
    indices: Any
    coefficients: Any
    nearest: Any
    farthest: Any
    squared: Any
    stats: Tensor


def _batch(args: ForwardArguments | LossArguments) -> Batch:
    feats, labels = unit_stride(args.feats), args.labels.contiguous()
    if args.candidates is None or args.candidate_labels is None:
        return Batch(feats, labels, feats, labels, None, 0, True)
    return Batch(
        feats, labels, unit_stride(args.candidates), args.candidate_labels.contiguous(),
        None if args.self_index is None else args.self_index.contiguous(), args.self_offset, False,
    )  # fmt: skip


def forward(*arguments: Any) -> Graph:
    """`sn_triton::forward`, given `ForwardArguments` one by one."""
    args = ForwardArguments(*arguments)
    batch = _batch(args)
    n, m, _ = batch.sizes
    edges = n, min(args.k, m) + 2
    acc = accumulation_dtype(args.feats.dtype)

    def new(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=args.feats.device)

    outputs = _Outputs(
        value=new(n) if args.reduction == Reduction.NONE else new(),
        indices=new(*edges, dtype=torch.int32),
        coefficients=new(*edges),
        nearest=new(n, dtype=torch.int32),
        farthest=new(n, dtype=torch.int32),
        squared=new(*edges) if args.want_squared else new(0),
        stats=new(6, dtype=torch.float64),
    )
    _run_forward(args, batch, acc, outputs, args.want_squared)
    return Graph(*outputs)


def loss(*arguments: Any) -> LossOutputs:
    """`sn_triton::loss`, given `LossArguments` one by one."""
    args = LossArguments(*arguments)
    batch = _batch(args)
    n, m, _ = batch.sizes
    device, acc = args.feats.device, accumulation_dtype(args.feats.dtype)
    layout = GraphLayout.of(n, m, args.k, acc)
    value = torch.empty((n,) if args.reduction == Reduction.NONE else (), dtype=acc, device=device)
    graph = torch.empty(layout.words, dtype=torch.int32, device=device)
    stats = torch.empty(6, dtype=torch.float64, device=device)
    indices, coefficients, nearest, farthest = _parts(graph, layout, n, acc, _writes_lists(args, batch, acc))
    _run_forward(
        args, batch, acc, _Outputs(value, indices, coefficients, nearest, farthest, coefficients, stats), False
    )
    return LossOutputs(value, graph, stats)


def _writes_lists(args: LossArguments, batch: Batch, acc: torch.dtype) -> bool:
    """Whether a forward writes the support sets by an operation of PyTorch, which takes tensors alone."""
    _, m, _ = batch.sizes
    return acc == torch.float64 or min(args.k, m) > tuning.MAX_LISTED_K


def _parts(graph: Tensor, layout: GraphLayout, n: int, acc: torch.dtype, as_tensors: bool) -> tuple[Any, ...]:
    """Indices, coefficients, nearest and farthest positives of the buffer. A view costs as much as a launch."""
    from .launch import Region

    if as_tensors or tuning.INTERPRETED or graph.device.type == "meta":
        return layout.unpack(graph, n, acc)
    base = graph.data_ptr()
    return (
        Region(base + 4 * layout.indices, torch.int32),
        Region(base, acc),
        Region(base + 4 * layout.nearest, torch.int32),
        Region(base + 4 * layout.farthest, torch.int32),
    )


def _run_forward(
    args: ForwardArguments | LossArguments, batch: Batch, acc: torch.dtype, outputs: _Outputs, want_squared: bool
) -> None:
    from . import direct, loss, order, screened
    from .launch import device_of, launch

    n, m, d = batch.sizes
    device = batch.feats.device
    neighbours = min(args.k, m)
    with device_of(batch.feats):
        gpu = tuning.device_facts(device)
        screen = tuning.screen_plan(n, m, d, neighbours, wide=acc == torch.float64, device=gpu)
        plan = tuning.loss_plan(n, neighbours)
        programs = cdiv(n, plan.rows)
        if screen is None:
            whole = padded(batch.feats)
            pool = whole if batch.symmetric else padded(batch.candidates)
            found = direct.select(
                batch._replace(feats=whole, candidates=pool), neighbours, acc, programs, outputs.indices
            )
        else:
            found = screened.find(batch, neighbours, screen, programs, outputs.indices)
        merged = found.keys is not None
        facts = device.index, acc, batch.labels.dtype, batch.candidate_labels.dtype
        if n:
            launch(
                loss.loss_kernel, (programs,), facts,
                outputs.indices, found.selection.d2, found.keys if merged else found.flags, *found.selection[1:],
                found.segments, batch.labels, batch.candidate_labels, n, neighbours,
                *_halves(args.alpha), *_halves(args.weight),
                outputs.value, outputs.coefficients, outputs.squared, outputs.nearest, outputs.farthest, found.records,
                SQUEEZE=args.squeeze, REDUCTION=args.reduction, WANT_SQUARED=want_squared, MERGED=merged,
                LOG_SEGMENTS=tuning.power_of_two(found.segments).bit_length() - 1, ONE_BLOCK=neighbours <= plan.block,
                R=plan.rows, BLOCK=plan.block, LOG_BLOCK=plan.block.bit_length() - 1, ACC=order.type_of(acc),
                warps=plan.warps,
            )  # fmt: skip
        launch(
            loss.reduce_kernel, (1,), facts,
            found.records, programs, found.flags, found.flag_count, outputs.value, outputs.stats, n,
            REDUCTION=args.reduction, FLAGS=1024, R=64 if programs <= 64 else 256,
            ACC=order.type_of(acc),
        )  # fmt: skip


def backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`sn_triton::backward`, given `BackwardArguments` one by one."""
    args = BackwardArguments(*arguments)
    needs = args.need_feats, args.need_candidates and args.candidates is not None
    indices, coefficients = args.indices.contiguous(), args.coefficients.contiguous()
    found = _gradients(args, indices.shape[1], coefficients.dtype, lambda _: (indices, coefficients), needs)
    missing = [] if all(needs) else [torch.empty(0, dtype=args.feats.dtype, device=args.feats.device)]
    return (found if needs[0] else missing)[0], (found if needs[1] else missing)[-1]


def loss_backward(*arguments: Any) -> list[Tensor]:
    """`sn_triton::loss_backward`, given `LossBackwardArguments` one by one."""
    args = LossBackwardArguments(*arguments)
    n, acc = args.feats.shape[0], accumulation_dtype(args.feats.dtype)
    layout = GraphLayout.of(n, n if args.candidates is None else args.candidates.shape[0], args.k, acc)
    graph = args.graph.contiguous()
    return _gradients(
        args, layout.edges, acc, lambda as_tensors: _parts(graph, layout, n, acc, as_tensors)[:2],
        (args.need_feats, args.need_candidates and args.candidates is not None),
    )  # fmt: skip


def _gradients(
    args: BackwardArguments | LossBackwardArguments,
    width: int,  # K + 2
    acc: torch.dtype,
    graph: Callable[[bool], tuple[Any, ...]],  # indices and coefficients, as tensors or as kernels alone take them
    needs: tuple[bool, bool],
) -> list[Tensor]:
    """The gradients that are needed, of the features and of the candidates."""
    from . import gradients, order
    from .launch import device_of, launch, workspace

    symmetric = args.candidates is None
    feats = padded(unit_stride(args.feats))
    pool = feats if args.candidates is None else padded(unit_stride(args.candidates))
    grad_loss, stats = args.grad_loss.contiguous(), args.stats.contiguous()
    n, d = args.feats.shape
    m, depth = pool.shape
    edges = n * width
    device = feats.device
    need_feats, need_candidates = needs
    incoming = (need_candidates or (symmetric and need_feats)) and n > 0
    plan = tuning.gradient_plan(n, m, d, width, feats.element_size())
    indices, coefficients = graph(incoming and plan.sorted)
    columns = cdiv(depth, plan.block)
    facts = (
        device.index, feats.dtype, acc, grad_loss.dtype, depth, d, feats.stride(0), pool.stride(0),
        aligned(feats), aligned(pool),
    )  # fmt: skip
    options = {
        "REDUCTION": args.reduction, "NARROW": edges < 1 << 31, "CHUNK": plan.chunk, "R": plan.rows,
        "EDGES": plan.edges, "BLOCK": plan.block, "ACC": order.type_of(acc), "warps": plan.warps,
    }  # fmt: skip
    sides = [(n, True, symmetric)] if need_feats else []
    sides += [(m, False, True)] if need_candidates else []
    found = []
    with device_of(feats):
        unread = indices, indices, coefficients  # what stands for these where they are not read
        bounds, by_target, chunks = unread
        if incoming and plan.sorted:
            targets, by_target = indices.flatten().sort(stable=True)
            bounds = torch.searchsorted(targets, torch.arange(m + 1, dtype=torch.int32, device=device))
            whole = targets.numel() // plan.chunk
            if whole and columns:
                chunks = torch.empty((whole, depth), dtype=acc, device=device)
                launch(
                    gradients.hub_kernel, (cdiv(whole, plan.rows), columns), facts,
                    feats, feats.stride(0), pool, pool.stride(0), targets, by_target, coefficients, grad_loss, stats,
                    whole, width, depth, chunks, **options,
                )  # fmt: skip
        elif incoming:
            by_target, _memory = workspace(device, (torch.int32, (m * columns, n)))  # kept until the launch
        for rows, own, into in sides:
            grad = torch.empty((rows, d), dtype=feats.dtype, device=device)
            found.append(grad)
            if grad.numel() == 0:
                continue
            if into and n == 0:  # no anchors: the candidates' gradient is 0, or NaN
                grad.copy_(stats[5].expand_as(grad))
                continue
            launch(
                gradients.gradient_kernel, (cdiv(rows, plan.rows), columns), facts,
                feats, feats.stride(0), pool, pool.stride(0), indices, coefficients, grad_loss, stats,
                rows, edges, width, depth, d,
                *((bounds, by_target, chunks) if into else unread), n, grad,
                OWN=own, INCOMING=into, SORTED=plan.sorted, **options,
            )  # fmt: skip
    return found
