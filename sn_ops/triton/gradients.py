"""Gradients from the edges of a support graph."""

from __future__ import annotations

import triton
import triton.language as tl

from .loss import MEAN, NONE

# An edge (i, j) with coefficient w pulls its two ends with g_i w (x_i - z_j). The difference is formed first: the
# factored form a X - C X cancels where rows are close. One program gathers a row of a gradient, in acc, and rounds it
# once; there are no atomics. A row's outgoing edges lie together. Its incoming ones do after a stable sort of all edges
# by target; where there are few edges, each program looks through all of them and lists its own instead. Either way
# they come in the order of their anchors, so the support graph alone fixes the order of every sum.
#
# A hub, a neighbour of many anchors, may have N incoming edges. So the sorted edges are also cut into chunks of a fixed
# size at fixed places. A program of its own sums a chunk that has one target (hub_kernel). The target's program adds
# these sums, and edge by edge what lies in other chunks, two at most.


@triton.jit
def common_factor(gGradLoss, gStats, REDUCTION: tl.constexpr, ACC: tl.constexpr):
    """What the reduction and the gradient of the loss make of every anchor's gradient; 1 if each has its own."""
    factor = tl.full((), 1.0, ACC)
    if REDUCTION != NONE:
        factor = tl.load(gGradLoss).to(ACC)
    if REDUCTION == MEAN:
        valid = tl.load(gStats).to(ACC)
        factor = tl.where(valid > 0, factor / tl.maximum(valid, 1.0), 0.0)
    return factor


@triton.jit
def factor_of(gGradLoss, common, anchor, used, REDUCTION: tl.constexpr):
    """g_i of anchors."""
    return tl.load(gGradLoss + anchor, used, 0.0) if REDUCTION == NONE else tl.where(used, common, 0.0)


@triton.jit
def list_incoming(gIndices, edges, row, gList, most, CHUNK: tl.constexpr):
    """Lists at gList, in order, the edges whose target is `row`, `most` of them at most; returns how many there are."""
    count = tl.zeros((), tl.int32)
    for first in range(0, edges, CHUNK):
        edge = first + tl.arange(0, CHUNK)
        found = (tl.load(gIndices + edge, edge < edges, -1) == row).to(tl.int32)
        place = count + tl.cumsum(found, axis=0) - 1
        tl.store(gList + place, edge, (found > 0) & (place < most))
        count += tl.sum(found, axis=0)
    tl.debug_barrier()  # what some threads of the program have listed, others will read
    return tl.minimum(count, most)


@triton.jit
def incoming(
    gX, x_stride, gOrder, gCoefficients, gGradLoss, common, begin, end, E, z, column, inside,
    REDUCTION: tl.constexpr, NARROW: tl.constexpr, EDGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[R, BLOCK]: for each of R rows, with its own z and range, g_i w (x_i - z) over the edges begin to end of gOrder.

    NARROW promises that edges fit 32 bits, where dividing is fast.
    """
    total = tl.zeros(z.shape, ACC)
    for step in range(0, tl.max(end - begin, axis=0), EDGES):
        position = begin[:, None] + step + tl.arange(0, EDGES)[None, :]
        within = position < end[:, None]
        edge = tl.load(gOrder + position, within, 0)
        if NARROW:
            edge = edge.to(tl.int32)
        w = tl.load(gCoefficients + edge, within, 0.0)
        active = w != 0  # an edge without coefficient is not multiplied: no 0 * Inf
        anchor = (edge // E).to(tl.int64)
        w = w * factor_of(gGradLoss, common, anchor, active, REDUCTION)
        x = tl.load(
            gX + anchor[:, :, None] * x_stride + column[None, None, :], active[:, :, None] & inside[None, None, :], 0.0
        ).to(ACC)
        pull = w[:, :, None] * (x - z[:, None, :])
        total += tl.sum(tl.where(active[:, :, None], pull, 0.0), axis=1)
    return total


@triton.jit(
    do_not_specialize=["whole", "E"],
    do_not_specialize_on_alignment=["gTargets", "gOrder", "gCoefficients", "gGradLoss", "gStats"],
)
def hub_kernel(
    gX, x_stride, gZ, z_stride, gTargets, gOrder, gCoefficients, gGradLoss, gStats, whole, E, depth, gChunks,
    REDUCTION: tl.constexpr, NARROW: tl.constexpr, CHUNK: tl.constexpr, R: tl.constexpr, EDGES: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """gChunks [whole, depth]: the sum over each chunk of sorted edges that has one target; others are not written."""
    chunk = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    present = chunk < whole
    target = tl.load(gTargets + chunk * CHUNK, present, -1).to(tl.int64)
    last = tl.load(gTargets + chunk * CHUNK + CHUNK - 1, present, -1)
    is_hub = (target >= 0) & (target == last)
    if tl.max(is_hub.to(tl.int32), axis=0) > 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < depth
        tile = is_hub[:, None] & inside[None, :]
        z = tl.load(gZ + target[:, None] * z_stride + column[None, :], tile, 0.0).to(ACC)
        begin = chunk * CHUNK
        total = incoming(
            gX, x_stride, gOrder, gCoefficients, gGradLoss, common_factor(gGradLoss, gStats, REDUCTION, ACC),
            begin, tl.where(is_hub, begin + CHUNK, begin), E, z, column, inside, REDUCTION, NARROW, EDGES, ACC,
        )  # fmt: skip
        tl.store(gChunks + chunk[:, None] * depth + column[None, :], total, tile)


@triton.jit(
    do_not_specialize=["rows", "edges", "E", "most"],
    do_not_specialize_on_alignment=[
        "gIndices",
        "gCoefficients",
        "gGradLoss",
        "gStats",
        "gBounds",
        "gOrder",
        "gChunks",
    ],
)
def gradient_kernel(
    gX, x_stride, gZ, z_stride, gIndices, gCoefficients, gGradLoss, gStats, rows, edges, E, depth, D,
    gBounds, gOrder, gChunks, most, gGrad,
    OWN: tl.constexpr, INCOMING: tl.constexpr, SORTED: tl.constexpr, REDUCTION: tl.constexpr, NARROW: tl.constexpr,
    CHUNK: tl.constexpr, R: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A block of columns of R rows of a gradient: of anchors (OWN), of candidates (INCOMING), of both in one.

    Rows of X and Z have `depth` columns, of which the first D are theirs and the others 0.

    Incoming edges are those from gBounds[row] to gBounds[row + 1] of the order gOrder (SORTED), or else, one row a
    program, the program lists those of all `edges` edges, at its place in gOrder [programs, most].
    """
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    used = row < rows
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < depth
    tile = used[:, None] & inside[None, :]
    common = common_factor(gGradLoss, gStats, REDUCTION, ACC)
    total = tl.zeros((R, BLOCK), ACC)
    if OWN:
        x = tl.load(gX + row[:, None] * x_stride + column[None, :], tile, 0.0).to(ACC)
        factor = factor_of(gGradLoss, common, row, used, REDUCTION)
        for first in range(0, E, EDGES):
            slot = first + tl.arange(0, EDGES)[None, :]
            listed = used[:, None] & (slot < E)
            index = tl.load(gIndices + row[:, None] * E + slot, listed, -1)
            w = tl.load(gCoefficients + row[:, None] * E + slot, listed, 0.0)
            active = (index >= 0) & (w != 0)
            z = tl.load(
                gZ + index[:, :, None].to(tl.int64) * z_stride + column[None, None, :],
                active[:, :, None] & inside[None, None, :],
                0.0,
            ).to(ACC)
            pull = (factor[:, None] * w)[:, :, None] * (x[:, None, :] - z)
            total += tl.sum(tl.where(active[:, :, None], pull, 0.0), axis=1)
    if INCOMING:
        z = tl.load(gZ + row[:, None] * z_stride + column[None, :], tile, 0.0).to(ACC)
        if SORTED:
            begin = tl.load(gBounds + row, used, 0)
            end = tl.load(gBounds + row + 1, used, 0)
            first_whole = tl.minimum((begin + CHUNK - 1) // CHUNK * CHUNK, end)
            last_whole = tl.maximum(end // CHUNK * CHUNK, first_whole)
            total -= incoming(
                gX, x_stride, gOrder, gCoefficients, gGradLoss, common, begin, first_whole, E, z, column, inside,
                REDUCTION, NARROW, EDGES, ACC,
            )  # fmt: skip
            chunk = first_whole // CHUNK
            for step in range(tl.max(last_whole // CHUNK - chunk, axis=0)):
                within = tile & (chunk + step < last_whole // CHUNK)[:, None]
                total -= tl.load(gChunks + (chunk + step)[:, None] * depth + column[None, :], within, 0.0)
            begin = last_whole
        else:
            tl.static_assert(R == 1, "a program lists the edges of one row")
            gOrder += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * most
            begin = tl.zeros((R,), tl.int64)
            end = begin + list_incoming(gIndices, edges, tl.program_id(0), gOrder, most, CHUNK)
        total -= incoming(
            gX, x_stride, gOrder, gCoefficients, gGradLoss, common, begin, end, E, z, column, inside,
            REDUCTION, NARROW, EDGES, ACC,
        )  # fmt: skip
    poison = tl.load(gStats + 5)
    total = tl.where(poison == poison, total, float("nan"))
    tl.store(gGrad + row[:, None] * D + column[None, :], total.to(gGrad.dtype.element_ty), tile & (column < D)[None, :])
