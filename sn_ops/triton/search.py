"""Neighbours by direct sums of all pairs, and an overview of the Triton kernels.

A forward is five kernels. `inspect_kernel` looks for NaN and Inf. `search_kernel` sums squared differences tile by tile
and keeps, for a group of anchors and a segment of the candidates, the first K in order and the two extreme positives;
no N x M matrix is written. `merge_kernel` merges the segments. In `loss.py`, `loss_kernel` and `reduce_kernel` turn a
selection into the loss, the coefficients of its edges, and the statistics. For large batches the kernels of
`screening.py` take the place of the first three. A backward is in `gradients.py`: `hub_kernel` and `gradient_kernel`,
and `mean_kernel` before them under the mean.

Shapes: N anchors, M candidates, D dims, K = min(k, M) neighbours, E = K + 2 edges. "acc" is the accumulation type:
float32, or float64 for float64 features. Offsets into matrices are 64-bit. Pointers are named g (global memory).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .order import NO_KEY, merge_sorted, own_index, pack_keys, smallest, tile_distances, update_extremes

# ---- is there a NaN or Inf? ------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def inspect_kernel(gX, stride, rows, D, gFlags, first_flag, R: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """gFlags[first_flag + program] = 1 if a value of its R rows is not finite, else 0."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    base = row.to(tl.int64) * stride
    bad = tl.zeros((R, BLOCK), tl.int32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(gX + base[:, None] + column, (row < rows)[:, None] & (column < D), 0.0).to(ACC)
        zero = x * 0  # 0 for every finite value, NaN for the others
        bad |= (zero != zero).to(tl.int32)
    tl.store(gFlags + first_flag + tl.program_id(0), tl.max(tl.max(bad, axis=1), axis=0))


# ---- distances and selection, a group of anchors against a segment of candidates --------------


@triton.jit
def search_segment(
    gX, x_stride, gZ, z_stride, gLabels, gCandidateLabels,
    anchor, used, own,
    begin, end, M, D,
    gDense, dense_row,
    C: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr,
    DENSE: tl.constexpr, EXTREMES: tl.constexpr, ACC: tl.constexpr, ONE_SECTION: tl.constexpr,
):  # fmt: skip
    """Anchors [R] against candidates begin to end: the first KP keys in order [R, KP]; with EXTREMES near and far too.

    With DENSE the squared distances go to gDense [.., M] instead of into lists, NaN for an anchor itself: a stable sort
    puts it last, behind candidates at infinity.
    """
    R: tl.constexpr = anchor.shape[0]
    label = tl.load(gLabels + anchor, used, 0)
    x_offsets = anchor.to(tl.int64) * x_stride
    best = tl.full((R, KP), NO_KEY, tl.int64)
    near_d2 = tl.full((R,), float("inf"), ACC)
    near = tl.full((R,), -1, tl.int32)
    far_d2 = tl.full((R,), -1.0, ACC)
    far = tl.full((R,), -1, tl.int32)
    for first in range(begin, end, C):
        candidate = first + tl.arange(0, C)
        present = candidate < end
        squared = tile_distances(
            gX, x_offsets, used, gZ, candidate.to(tl.int64) * z_stride, present, D, ACC, ONE_SECTION
        )
        eligible = used[:, None] & present[None, :] & (candidate[None, :].to(tl.int64) != own[:, None])
        if DENSE:
            tl.store(
                gDense + dense_row[:, None].to(tl.int64) * M + candidate[None, :],
                tl.where(eligible, squared, float("nan")),
                used[:, None] & present[None, :],
            )
        else:
            keys = tl.where(eligible, pack_keys(squared, candidate[None, :]), NO_KEY)
            # After the first few tiles most improve no list.
            if tl.max((tl.min(keys, axis=1) < tl.max(best, axis=1)).to(tl.int32), axis=0) > 0:
                best = merge_sorted(best, smallest(keys, KP, LOG_KP, LOG_GROUPS, 1), LOG_KP)
        if EXTREMES:
            same = eligible & (tl.load(gCandidateLabels + candidate, present, 0)[None, :] == label[:, None])
            if tl.max(tl.max(same.to(tl.int32), axis=1), axis=0) > 0:
                near_d2, near, far_d2, far = update_extremes(squared, same, candidate, near_d2, near, far_d2, far)
    return best, near_d2, near, far_d2, far


@triton.jit(do_not_specialize=["first_row", "rows", "M", "segment_size", "segments"])
def search_kernel(
    gX, x_stride, gZ, z_stride, gLabels, gCandidateLabels, gSelf, self_offset,
    first_row, rows, M, D, segments, segment_size,
    gKeys, gNearD2, gNear, gFarD2, gFar, gDense,
    R: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr,
    HAS_SELF: tl.constexpr, DENSE: tl.constexpr, ACC: tl.constexpr, ONE_SECTION: tl.constexpr,
):  # fmt: skip
    """Anchors first_row to first_row + rows: lists gKeys [rows, segments, KP], extremes [rows, segments]."""
    group = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    row = group * R + tl.arange(0, R)
    used = row < rows
    anchor = first_row + row
    own = own_index(gSelf, self_offset, anchor, used, HAS_SELF)
    begin = segment * segment_size
    best, near_d2, near, far_d2, far = search_segment(
        gX, x_stride, gZ, z_stride, gLabels, gCandidateLabels, anchor, used, own,
        begin, tl.minimum(begin + segment_size, M), M, D, gDense, row,
        C, KP, LOG_KP, LOG_GROUPS, DENSE, True, ACC, ONE_SECTION,
    )  # fmt: skip
    slot = row.to(tl.int64) * segments + segment
    if not DENSE:
        tl.store(gKeys + slot[:, None] * KP + tl.arange(0, KP)[None, :], best, used[:, None])
    tl.store(gNearD2 + slot, near_d2, used)
    tl.store(gNear + slot, near, used)
    tl.store(gFarD2 + slot, far_d2, used)
    tl.store(gFar + slot, far, used)


@triton.jit
def merge_lists(gKeys, slot, used, segments, KP: tl.constexpr, LOG_KP: tl.constexpr):
    """The KP first keys, in order, over the segments of rows whose first segment is `slot`: [R, KP]."""
    position = tl.arange(0, KP)[None, :]
    best = tl.load(gKeys + slot[:, None] * KP + position, used[:, None], NO_KEY)
    for segment in range(1, segments):
        # Read backwards: an ascending list is descending from its end.
        other = tl.load(gKeys + (slot + segment)[:, None] * KP + (KP - 1 - position), used[:, None], NO_KEY)
        best = merge_sorted(best, other, LOG_KP)
    return best


@triton.jit
def merge_extremes(gNearD2, gNear, gFarD2, gFar, slot, used, segments, ACC: tl.constexpr):
    """near and far over the segments of rows whose first segment is `slot`, in order: the earlier wins a tie."""
    near_d2 = tl.load(gNearD2 + slot, used, float("inf"))
    near = tl.load(gNear + slot, used, -1)
    far_d2 = tl.load(gFarD2 + slot, used, -1.0)
    far = tl.load(gFar + slot, used, -1)
    for segment in range(1, segments):
        d2 = tl.load(gNearD2 + slot + segment, used, float("inf"))
        index = tl.load(gNear + slot + segment, used, -1)
        nearer = (index >= 0) & ((near < 0) | (d2 < near_d2))
        near = tl.where(nearer, index, near)
        near_d2 = tl.where(nearer, d2, near_d2)
        d2 = tl.load(gFarD2 + slot + segment, used, -1.0)
        farther = d2 > far_d2
        far = tl.where(farther, tl.load(gFar + slot + segment, used, -1), far)
        far_d2 = tl.where(farther, d2, far_d2)
    return near_d2, near, far_d2, far


@triton.jit
def store_support(best, row, used, gIndices, gD2, K, KP: tl.constexpr):
    """Sorted keys [R, KP] as the support set: gIndices [.., K + 2] (columns below K), gD2 [.., K]."""
    slot = tl.arange(0, KP)[None, :]
    inside = used[:, None] & (slot < K)
    real = best != NO_KEY
    row = row[:, None].to(tl.int64)
    tl.store(gIndices + row * (K + 2) + slot, tl.where(real, best.to(tl.int32), -1), inside)
    squared = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(gD2 + row * K + slot, tl.where(real, squared, float("inf")), inside)


@triton.jit(do_not_specialize=["first_row", "rows", "K", "segments"])
def merge_kernel(
    gKeys, gNearD2, gNear, gFarD2, gFar, first_row, rows, K, segments,
    gIndices, gD2, gAnchorNearD2, gAnchorNear, gAnchorFarD2, gAnchorFar,
    R: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr, DENSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The segments of R rows merged: support set, near and far of anchors first_row + row."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    used = row < rows
    anchor = first_row + row
    slot = row.to(tl.int64) * segments
    if not DENSE:
        best = merge_lists(gKeys, slot, used, segments, KP, LOG_KP)
        store_support(best, anchor, used, gIndices, gD2, K, KP)
    near_d2, near, far_d2, far = merge_extremes(gNearD2, gNear, gFarD2, gFar, slot, used, segments, ACC)
    tl.store(gAnchorNearD2 + anchor, near_d2, used)
    tl.store(gAnchorNear + anchor, near, used)
    tl.store(gAnchorFarD2 + anchor, far_d2, used)
    tl.store(gAnchorFar + anchor, far, used)
