"""The operators `sn_triton::forward` and `sn_triton::backward`: what is allocated, and which kernel runs when.

Nothing here reads a value of a tensor: shapes decide everything, so a CUDA graph can capture a call. The kernels'
modules need Triton; the first call imports them.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..reference import BackwardArguments, ForwardArguments, Graph, Reduction, accumulation_dtype
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


@lru_cache(maxsize=256)
def _halves(value: float) -> tuple[float, float]:
    """A float64 as the sum of two float32: a kernel takes no other numbers."""
    largest = 3.4e38
    high = ctypes.c_float(max(-largest, min(largest, value))).value
    return high, max(-largest, min(largest, value - high))


def forward(*arguments: Any) -> Graph:
    """`sn_triton::forward`, given `ForwardArguments` one by one."""
    from . import direct, loss, order, screened
    from .launch import device_of, launch

    args = ForwardArguments(*arguments)
    feats, labels = unit_stride(args.feats), args.labels.contiguous()
    if args.candidates is None or args.candidate_labels is None:
        batch = Batch(feats, labels, feats, labels, None, 0, True)
    else:
        batch = Batch(
            feats, labels, unit_stride(args.candidates), args.candidate_labels.contiguous(),
            None if args.self_index is None else args.self_index.contiguous(), args.self_offset, False,
        )  # fmt: skip
    n, m, d = batch.sizes
    device = feats.device
    neighbours = min(args.k, m)
    acc = accumulation_dtype(feats.dtype)
    value = torch.empty((n,) if args.reduction == Reduction.NONE else (), dtype=acc, device=device)
    indices = torch.empty((n, neighbours + 2), dtype=torch.int32, device=device)
    coefficients = torch.empty((n, neighbours + 2), dtype=acc, device=device)
    nearest = torch.empty(n, dtype=torch.int32, device=device)
    farthest = torch.empty(n, dtype=torch.int32, device=device)
    squared = torch.empty((n, neighbours + 2) if args.want_squared else (0,), dtype=acc, device=device)
    stats = torch.empty(6, dtype=torch.float64, device=device)
    with device_of(feats):
        gpu = tuning.device_facts(device)
        screen = tuning.screen_plan(n, m, d, neighbours, wide=acc == torch.float64, device=gpu)
        plan = tuning.loss_plan(n, neighbours)
        programs = cdiv(n, plan.rows)
        if screen is None:
            whole = padded(feats)
            pool = whole if batch.symmetric else padded(batch.candidates)
            found = direct.select(batch._replace(feats=whole, candidates=pool), neighbours, acc, programs, indices)
        else:
            found = screened.find(batch, neighbours, screen, programs, indices)
        merged = found.keys is not None
        facts = device.index, acc, labels.dtype, batch.candidate_labels.dtype
        if n:
            launch(
                loss.loss_kernel, (programs,), facts,
                indices, found.selection.d2, found.keys if merged else indices, *found.selection[1:], found.segments,
                labels, batch.candidate_labels, n, neighbours, *_halves(args.alpha), *_halves(args.weight),
                value, coefficients, squared, nearest, farthest, found.records,
                SQUEEZE=args.squeeze, REDUCTION=args.reduction, WANT_SQUARED=args.want_squared, MERGED=merged,
                LOG_SEGMENTS=tuning.power_of_two(found.segments).bit_length() - 1, ONE_BLOCK=neighbours <= plan.block,
                R=plan.rows, BLOCK=plan.block, LOG_BLOCK=plan.block.bit_length() - 1, ACC=order.type_of(acc),
                warps=plan.warps,
            )  # fmt: skip
        launch(
            loss.reduce_kernel, (1,), facts,
            found.records, programs, found.flags, found.flag_count, value, stats, n,
            REDUCTION=args.reduction, FLAGS=1024, R=64 if programs <= 64 else 256,
            ACC=order.type_of(acc),
        )  # fmt: skip
    return Graph(value, indices, coefficients, nearest, farthest, squared, stats)


def backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`sn_triton::backward`, given `BackwardArguments` one by one."""
    from . import gradients, order
    from .launch import device_of, launch, workspace

    args = BackwardArguments(*arguments)
    symmetric = args.candidates is None
    feats = padded(unit_stride(args.feats))
    pool = feats if args.candidates is None else padded(unit_stride(args.candidates))
    indices, coefficients = args.indices.contiguous(), args.coefficients.contiguous()
    grad_loss, stats = args.grad_loss.contiguous(), args.stats.contiguous()
    (n, width), (m, depth), d = indices.shape, pool.shape, args.feats.shape[1]
    device, acc = feats.device, coefficients.dtype
    need_feats, need_candidates = args.need_feats, args.need_candidates and not symmetric
    grad_feats = torch.empty((n, d) if need_feats else (0,), dtype=feats.dtype, device=device)
    grad_candidates = torch.empty((m, d) if need_candidates else (0,), dtype=feats.dtype, device=device)
    incoming = (need_candidates or (symmetric and need_feats)) and n > 0
    plan = tuning.gradient_plan(n, m, d, width, feats.element_size())
    columns = cdiv(depth, plan.block)
    facts = (
        device.index, feats.dtype, acc, grad_loss.dtype, depth, d, feats.stride(0), pool.stride(0),
        aligned(feats), aligned(pool),
    )  # fmt: skip
    options = {
        "REDUCTION": args.reduction, "NARROW": indices.numel() < 1 << 31, "CHUNK": plan.chunk, "R": plan.rows,
        "EDGES": plan.edges, "BLOCK": plan.block, "ACC": order.type_of(acc), "warps": plan.warps,
    }  # fmt: skip
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
        for grad, own, into in (
            (grad_feats, True, symmetric) if need_feats else (grad_feats, False, False),
            (grad_candidates, False, True) if need_candidates else (grad_candidates, False, False),
        ):
            if grad.numel() == 0:
                continue
            if into and n == 0:  # no anchors: the candidates' gradient is 0, or NaN
                grad.copy_(stats[5].expand_as(grad))
                continue
            launch(
                gradients.gradient_kernel, (cdiv(grad.shape[0], plan.rows), columns), facts,
                feats, feats.stride(0), pool, pool.stride(0), indices, coefficients, grad_loss, stats,
                grad.shape[0], indices.numel(), width, depth, d,
                *((bounds, by_target, chunks) if into else unread), n, grad,
                OWN=own, INCOMING=into, SORTED=plan.sorted, **options,
            )  # fmt: skip
    return grad_feats, grad_candidates
