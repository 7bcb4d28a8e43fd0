"""Gradients from the edges of a support graph."""

from __future__ import annotations

import triton
import triton.language as tl

# An edge (i, j) with coefficient w pulls its two ends with g_i w (x_i - z_j). The difference is formed first: the
# factored form a X - C X cancels where rows are close. One program gathers a row of a gradient, in acc, and rounds it
# once; there are no atomics. A row's outgoing edges lie together; its incoming ones do after a stable sort of all edges
# by target. So the support graph alone fixes the order of every sum.
#
# A hub, a neighbour of many anchors, may have N incoming edges. So the sorted edges are also cut into chunks of a fixed
# size at fixed places. A program of its own sums a chunk that has one target (hub_kernel). The target's program adds
# these sums, and edge by edge what lies in other chunks, two at most.


@triton.jit
def mean_kernel(gGradLoss, gStats, gUpstream, ACC: tl.constexpr):
    """The factor of every anchor under the mean. A kernel of its own: the division would cost the others registers."""
    valid = tl.load(gStats).to(ACC)
    tl.store(gUpstream, tl.where(valid > 0, tl.load(gGradLoss) / tl.maximum(valid, 1.0), 0.0))


@triton.jit
def upstream_of(gUpstream, anchor, used, EACH: tl.constexpr):
    """g_i: the factor of anchors from the reduction and the gradient of the loss; one for EACH, or one for all."""
    return tl.load(gUpstream + anchor, used, 0.0) if EACH else tl.where(used, tl.load(gUpstream), 0.0)


@triton.jit
def incoming(
    gX, x_stride, gOrder, gCoefficients, gUpstream, begin, end, E, z, column, inside,
    EACH: tl.constexpr, EDGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[R, BLOCK]: for each of R rows, with its own z and range, g_i w (x_i - z) over the sorted edges begin to end."""
    total = tl.zeros(z.shape, ACC)
    for step in range(0, tl.max(end - begin, axis=0), EDGES):
        position = begin[:, None] + step + tl.arange(0, EDGES)[None, :]
        within = position < end[:, None]
        edge = tl.load(gOrder + position, within, 0)
        w = tl.load(gCoefficients + edge, within, 0.0)
        active = w != 0  # an edge without coefficient is not multiplied: no 0 * Inf
        anchor = edge // E
        w = w * upstream_of(gUpstream, anchor, active, EACH)
        x = tl.load(
            gX + anchor[:, :, None] * x_stride + column[None, None, :], active[:, :, None] & inside[None, None, :], 0.0
        ).to(ACC)
        pull = w[:, :, None] * (x - z[:, None, :])
        total += tl.sum(tl.where(active[:, :, None], pull, 0.0), axis=1)
    return total


@triton.jit(do_not_specialize=["whole"])
def hub_kernel(
    gX, x_stride, gZ, z_stride, gTargets, gOrder, gCoefficients, gUpstream, whole, E, D, gChunks,
    EACH: tl.constexpr, CHUNK: tl.constexpr, R: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """gChunks [whole, D]: the sum over each chunk of sorted edges that has one target; others are not written."""
    chunk = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    present = chunk < whole
    target = tl.load(gTargets + chunk * CHUNK, present, -1).to(tl.int64)
    last = tl.load(gTargets + chunk * CHUNK + CHUNK - 1, present, -1)
    is_hub = (target >= 0) & (target == last)
    if tl.max(is_hub.to(tl.int32), axis=0) > 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < D
        tile = is_hub[:, None] & inside[None, :]
        z = tl.load(gZ + target[:, None] * z_stride + column[None, :], tile, 0.0).to(ACC)
        begin = chunk * CHUNK
        total = incoming(
            gX, x_stride, gOrder, gCoefficients, gUpstream, begin, tl.where(is_hub, begin + CHUNK, begin), E, z,
            column, inside, EACH, EDGES, ACC,
        )  # fmt: skip
        tl.store(gChunks + chunk[:, None] * D + column[None, :], total, tile)


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    gX, x_stride, gZ, z_stride, gIndices, gCoefficients, gBounds, gOrder, gUpstream, gStats, rows, E, D, gChunks, gGrad,
    OWN: tl.constexpr, INCOMING: tl.constexpr, EACH: tl.constexpr, CHUNK: tl.constexpr,
    R: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A block of columns of R rows of a gradient: of anchors (OWN), of candidates (INCOMING), of both in one."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    used = row < rows
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    tile = used[:, None] & inside[None, :]
    total = tl.zeros((R, BLOCK), ACC)
    if OWN:
        x = tl.load(gX + row[:, None] * x_stride + column[None, :], tile, 0.0).to(ACC)
        factor = upstream_of(gUpstream, row, used, EACH)
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
        begin = tl.load(gBounds + row, used, 0)
        end = tl.load(gBounds + row + 1, used, 0)
        first_whole = tl.minimum((begin + CHUNK - 1) // CHUNK * CHUNK, end)
        last_whole = tl.maximum(end // CHUNK * CHUNK, first_whole)
        total -= incoming(
            gX, x_stride, gOrder, gCoefficients, gUpstream, begin, first_whole, E, z, column, inside,
            EACH, EDGES, ACC,
        )  # fmt: skip
        chunk = first_whole // CHUNK
        for step in range(tl.max(last_whole // CHUNK - chunk, axis=0)):
            within = tile & (chunk + step < last_whole // CHUNK)[:, None]
            total -= tl.load(gChunks + (chunk + step)[:, None] * D + column[None, :], within, 0.0)
        total -= incoming(
            gX, x_stride, gOrder, gCoefficients, gUpstream, last_whole, end, E, z, column, inside,
            EACH, EDGES, ACC,
        )  # fmt: skip
    poison = tl.load(gStats + 5)
    total = tl.where(poison == poison, total, float("nan"))
    tl.store(gGrad + row[:, None] * D + column[None, :], total.to(gGrad.dtype.element_ty), tile)
