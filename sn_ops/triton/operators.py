"""The operators `sn_triton::forward` and `sn_triton::backward`: what is allocated, and which kernel runs when.

Nothing here reads a value of a tensor: shapes decide everything, so a CUDA graph can capture a call. The kernels'
modules need Triton; the first call imports them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..reference import BackwardArguments, ForwardArguments, Graph, Reduction, accumulation_dtype
from . import tuning
from .batch import Batch, Selection, unit_stride
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


def _halves(value: float) -> tuple[float, float]:
    """A float64 as the sum of two float32: a kernel takes no other numbers."""
    largest = 3.4e38
    high = ctypes.c_float(max(-largest, min(largest, value))).value
    return high, max(-largest, min(largest, value - high))


def _inspect(batch: Batch) -> Tensor:
    """Flags of blocks of rows, int32: 1 where a value is not finite."""
    from . import order, search

    rows, block = (64, 256) if tuning.INTERPRETED else (4, 1024)
    acc = order.type_of(accumulation_dtype(batch.feats.dtype))
    n, m, d = batch.sizes
    own, others = cdiv(n, rows), 0 if batch.symmetric else cdiv(m, rows)
    flags = torch.empty(own + others, dtype=torch.int32, device=batch.feats.device)
    if own:
        search.inspect_kernel[(own,)](
            batch.feats, batch.feats.stride(0), n, d, flags, 0, rows, block, acc, **order.EXACT
        )
    if others:
        pool = batch.candidates
        search.inspect_kernel[(others,)](pool, pool.stride(0), m, d, flags, own, rows, block, acc, **order.EXACT)
    return flags


def _search(batch: Batch, neighbours: int, indices: Tensor, selection: Selection) -> None:
    """Selection from direct sums of all pairs."""
    from . import order, search

    n, m, d = batch.sizes
    acc = selection.d2.dtype
    wide = acc == torch.float64
    device = batch.feats.device
    # float64 keys do not pack, and long lists do not fit registers: those rows are sorted whole.
    dense = wide or neighbours > tuning.MAX_LISTED_K
    strip = tuning.dense_rows(n, m) if dense else n
    for first in range(0, n, strip):
        rows = min(strip, n - first)
        plan = tuning.search_plan(rows, m, neighbours, wide, dense)
        log_kp = plan.list_size.bit_length() - 1
        segments = plan.segments
        keys = torch.empty((0,) if dense else (rows, segments, plan.list_size), dtype=torch.int64, device=device)
        squared = torch.empty((rows, m) if dense else (0,), dtype=acc, device=device)
        extremes = Selection.empty(rows * segments, 0, batch.feats, acc)[1:]
        search.search_kernel[(cdiv(rows, plan.rows) * segments,)](
            batch.feats, batch.feats.stride(0), batch.candidates, batch.candidates.stride(0),
            batch.labels, batch.candidate_labels, *batch.self_arguments(),
            first, rows, m, d, segments, plan.segment_size,
            keys, *extremes, squared,
            R=plan.rows, C=plan.columns, KP=plan.list_size, LOG_KP=log_kp,
            LOG_GROUPS=(plan.columns // plan.list_size).bit_length() - 1,
            HAS_SELF=batch.self_index is not None, DENSE=dense, ACC=order.type_of(acc),
            ONE_SECTION=d <= order.SECTION.value, num_warps=plan.warps, **order.EXACT,
        )  # fmt: skip
        merge_rows = min(64, tuning.power_of_two(rows)) if tuning.INTERPRETED else max(1, 128 // plan.list_size)
        search.merge_kernel[(cdiv(rows, merge_rows),)](
            keys, *extremes, first, rows, neighbours, segments,
            indices, selection.d2, *selection[1:],
            R=merge_rows, KP=plan.list_size, LOG_KP=log_kp, DENSE=dense, ACC=order.type_of(acc),
            num_warps=1, **order.EXACT,
        )  # fmt: skip
        if dense:
            # A stable sort leaves ties in the order of indices. NaN, an anchor itself, comes behind infinity.
            ordered, candidate = squared.sort(dim=1, stable=True)
            ordered, candidate = ordered[:, :neighbours], candidate[:, :neighbours]
            itself = ordered.isnan()
            selection.d2[first : first + rows] = ordered.masked_fill(itself, torch.inf)
            indices[first : first + rows, :neighbours] = candidate.masked_fill(itself, -1)


def forward(*arguments: Any) -> Graph:
    """`sn_triton::forward`, given `ForwardArguments` one by one."""
    from . import loss, order, screened

    args = ForwardArguments(*arguments)
    feats, labels = unit_stride(args.feats), args.labels.contiguous()
    if args.candidates is None or args.candidate_labels is None:
        batch = Batch(feats, labels, feats, labels, None, 0, True)
    else:
        batch = Batch(
            feats, labels, unit_stride(args.candidates), args.candidate_labels.contiguous(),
            None if args.self_index is None else args.self_index.contiguous(), args.self_offset, False,
        )  # fmt: skip
    n, m, _ = batch.sizes
    neighbours = min(args.k, m)
    acc = accumulation_dtype(feats.dtype)

    def new(*size: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(size, dtype=dtype, device=feats.device)

    value = new(n) if args.reduction == Reduction.NONE else new()
    indices = new(n, neighbours + 2, dtype=torch.int32)
    coefficients = new(n, neighbours + 2)
    squared = new(n, neighbours + 2) if args.want_squared else new(0)
    stats = new(6, dtype=torch.float64)
    selection = Selection.empty(n, neighbours, feats, acc)
    with torch.cuda.device_of(feats):
        screen = tuning.screen_plan(*batch.sizes, neighbours, wide=acc == torch.float64)
        if screen is None:
            flags = _inspect(batch)
            if n:
                _search(batch, neighbours, indices, selection)
        else:
            flags = screened.select(batch, neighbours, screen, indices, selection)
        plan = tuning.loss_plan(n, neighbours)
        records = new(cdiv(n, plan.rows), loss.RECORD_SIZE.value, dtype=torch.float64)
        if n:
            loss.loss_kernel[(records.shape[0],)](
                indices, *selection, batch.labels, batch.candidate_labels, flags, flags.numel(),
                n, neighbours, *_halves(args.alpha), *_halves(args.weight),
                value, coefficients, squared, records,
                SQUEEZE=args.squeeze, REDUCTION=args.reduction, WANT_SQUARED=args.want_squared,
                R=plan.rows, BLOCK=plan.block, ACC=order.type_of(acc), num_warps=plan.warps, **order.EXACT,
            )  # fmt: skip
        loss.reduce_kernel[(1,)](
            records, records.shape[0], flags, flags.numel(), value, stats,
            REDUCTION=args.reduction, R=64, ACC=order.type_of(acc), num_warps=4, **order.EXACT,
        )  # fmt: skip
    return Graph(value, indices, coefficients, selection.near, selection.far, squared, stats)


def backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`sn_triton::backward`, given `BackwardArguments` one by one."""
    from . import gradients, order

    args = BackwardArguments(*arguments)
    symmetric = args.candidates is None
    feats = unit_stride(args.feats)
    pool = feats if args.candidates is None else unit_stride(args.candidates)
    indices, coefficients = args.indices.contiguous(), args.coefficients.contiguous()
    grad_loss, stats = args.grad_loss.contiguous(), args.stats.contiguous()
    (n, edges), (m, d) = indices.shape, pool.shape
    need_feats, need_candidates = args.need_feats, args.need_candidates and not symmetric
    grad_feats = torch.empty((n, d) if need_feats else (0,), dtype=feats.dtype, device=feats.device)
    grad_candidates = torch.empty((m, d) if need_candidates else (0,), dtype=feats.dtype, device=feats.device)
    plan = tuning.gradient_plan(max(n, m), d, edges, feats.element_size() == 2)
    acc = coefficients.dtype
    columns = cdiv(d, plan.block)

    with torch.cuda.device_of(feats):
        each = args.reduction == Reduction.NONE
        upstream = grad_loss
        if args.reduction == Reduction.MEAN:
            upstream = torch.empty_like(grad_loss)
            gradients.mean_kernel[(1,)](grad_loss, stats, upstream, order.type_of(acc), num_warps=1, **order.EXACT)
        targets = by_target = bounds = indices
        chunks = torch.empty(0, dtype=acc, device=feats.device)
        incoming = need_candidates or (symmetric and need_feats)
        if incoming and n:
            targets, by_target = indices.flatten().sort(stable=True)
            rows = torch.arange(m + 1, dtype=torch.int32, device=feats.device)
            bounds = torch.searchsorted(targets, rows)
            whole = targets.numel() // plan.chunk
            if whole and columns:
                chunks = torch.empty((whole, d), dtype=acc, device=feats.device)
                gradients.hub_kernel[(cdiv(whole, plan.rows), columns)](
                    feats, feats.stride(0), pool, pool.stride(0), targets, by_target, coefficients, upstream,
                    whole, edges, d, chunks,
                    EACH=each, CHUNK=plan.chunk, R=plan.rows, EDGES=plan.edges, BLOCK=plan.block,
                    ACC=order.type_of(acc), num_warps=plan.warps, **order.EXACT,
                )  # fmt: skip
        for grad, own, into in (
            (grad_feats, True, symmetric) if need_feats else (grad_feats, False, False),
            (grad_candidates, False, True) if need_candidates else (grad_candidates, False, False),
        ):
            if grad.numel() == 0:
                continue
            if into and n == 0:  # no anchors: the candidates' gradient is 0, or NaN
                grad.copy_(stats[5].expand_as(grad))
                continue
            gradients.gradient_kernel[(cdiv(grad.shape[0], plan.rows), columns)](
                feats, feats.stride(0), pool, pool.stride(0), indices, coefficients, bounds, by_target, upstream, stats,
                grad.shape[0], edges, d, chunks, grad,
                OWN=own, INCOMING=into, EACH=each, CHUNK=plan.chunk, R=plan.rows, EDGES=plan.edges,
                BLOCK=plan.block, ACC=order.type_of(acc), num_warps=plan.warps, **order.EXACT,
            )  # fmt: skip
    return grad_feats, grad_candidates
