"""Neighbours by direct sums of all pairs, and an overview of the Triton kernels.

A forward is three kernels. `search_kernel` sums squared differences tile by tile and keeps, for a group of anchors and
a segment of the candidates, the first K in order and the two extreme positives. In float64 and for K above 128 it
writes rows of distances instead, 2^22 at a time, which are sorted; otherwise no N x M matrix is written. It looks for
NaN and Inf too. In `loss.py`, `loss_kernel` merges the segments and turns a selection into the loss and the
coefficients of its edges, and `reduce_kernel` adds up the loss and the statistics. For large batches the kernels of
`screening.py` and `positives.py` take the place of the first. A backward is in `gradients.py`: `gradient_kernel`, and
for large batches `hub_kernel` before it.

Shapes: N anchors, M candidates, D dims, K = min(k, M) neighbours, E = K + 2 edges. "acc" is the accumulation type:
float32, or float64 for float64 features. Offsets into matrices are 64-bit. Pointers are named g (global memory).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .order import (
    NO_KEY,
    merge_sorted,
    own_index,
    pack_keys,
    smallest,
    smallest_of_runs,
    tile_distances,
    update_extremes,
)

# ---- is there a NaN or Inf? ------------------------------------------------------------------


@triton.jit
def has_bad_rows(gX, stride, begin, end, D, R: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """1 if a value of the rows begin to end is NaN or Inf, else 0; R rows at a time."""
    bad = tl.zeros((R, BLOCK), ACC)
    for first in range(begin, end, R):
        row = first + tl.arange(0, R)
        base = row.to(tl.int64) * stride
        for start in range(0, D, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(gX + base[:, None] + column, (row < end)[:, None] & (column < D), 0.0).to(ACC)
            bad = tl.fma(x, 0.0, bad)  # 0 until a value is not finite, then NaN
    return tl.max(tl.max((bad != bad).to(tl.int32), axis=1), axis=0)


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
    """Anchors [R] against candidates begin to end: the first KP keys in order [R, KP]; with EXTREMES near and far too,
    and the largest squared distance.

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
    largest = tl.zeros((R, C), ACC)
    for first in range(begin, end, C):
        candidate = first + tl.arange(0, C)
        present = candidate < end
        if EXTREMES:  # read now, so as not to wait for them behind the sums
            candidate_label = tl.load(gCandidateLabels + candidate, present, 0)
        squared = tile_distances(
            gX, x_offsets, used, gZ, candidate.to(tl.int64) * z_stride, present, D, ACC, ONE_SECTION
        )
        eligible = used[:, None] & present[None, :] & (candidate[None, :] != own[:, None])
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
            largest = tl.maximum(largest, squared)
            same = eligible & (candidate_label[None, :] == label[:, None])
            if tl.max(tl.max(same.to(tl.int32), axis=1), axis=0) > 0:
                near_d2, near, far_d2, far = update_extremes(squared, same, candidate, near_d2, near, far_d2, far)
    return best, near_d2, near, far_d2, far, tl.max(tl.max(largest, axis=1), axis=0)


@triton.jit(
    do_not_specialize=["self_offset", "first_row", "rows", "M", "segments", "segment_size", "first_flag"],
    do_not_specialize_on_alignment=["gLabels", "gCandidateLabels", "gSelf"],
)
def search_kernel(
    gX, x_stride, gZ, z_stride, gLabels, gCandidateLabels, gSelf, self_offset,
    first_row, rows, M, D, segments, segment_size, gFlags, first_flag,
    gKeys, gNearD2, gNear, gFarD2, gFar, gDense,
    R: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr,
    HAS_SELF: tl.constexpr, DENSE: tl.constexpr, ACC: tl.constexpr, ONE_SECTION: tl.constexpr,
):  # fmt: skip
    """Anchors first_row to first_row + rows: lists gKeys [N, segments, KP], extremes [N, segments].

    gFlags[first_flag + program] is 1 if a value of the rows that it reads is NaN or Inf, else 0. All programs together
    read all rows, also where there are only candidates or only anchors.
    """
    program = tl.program_id(0)
    segment = program % segments
    row = program // segments * R + tl.arange(0, R)
    used = row < rows
    anchor = first_row + row
    own = own_index(gSelf, self_offset, anchor, used, HAS_SELF)
    begin = segment * segment_size
    end = tl.minimum(begin + segment_size, M)
    best, near_d2, near, far_d2, far, largest = search_segment(
        gX, x_stride, gZ, z_stride, gLabels, gCandidateLabels, anchor, used, own, begin, end, M, D, gDense, row,
        C, KP, LOG_KP, LOG_GROUPS, DENSE, True, ACC, ONE_SECTION,
    )  # fmt: skip
    # Whoever is not finite is infinitely far from everybody; so are some finite rows.
    bad = 0
    if (largest == float("inf")) | (M == 0):
        first_anchor = first_row + program // segments * R
        bad = has_bad_rows(gX, x_stride, first_anchor, tl.minimum(first_anchor + R, first_row + rows), D, 4, 256, ACC)
        bad |= has_bad_rows(gZ, z_stride, begin, end, D, 4, 256, ACC)
    tl.store(gFlags + first_flag + program, bad)
    slot = anchor.to(tl.int64) * segments + segment
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
def merged_lists(gKeys, row, used, segments, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_SEGMENTS: tl.constexpr):
    """The same for at most 1 << LOG_SEGMENTS segments, all at once: no load waits for another."""
    WIDTH: tl.constexpr = KP << LOG_SEGMENTS
    place = tl.arange(0, WIDTH)[None, :]
    segment = place // KP
    # Odd segments are read backwards: an ascending list is descending from its end.
    position = tl.where(segment % 2 == 1, KP - 1 - place % KP, place % KP)
    slot = row.to(tl.int64)[:, None] * segments + segment
    keys = tl.load(gKeys + slot * KP + position, used[:, None] & (segment < segments), NO_KEY)
    return smallest_of_runs(keys, KP, LOG_KP, LOG_SEGMENTS, 0)


@triton.jit
def merged_extremes(gNearD2, gNear, gFarD2, gFar, row, used, segments, LOG_SEGMENTS: tl.constexpr):
    """near and far over the segments of each row: least and largest d2, the lower index on a tie, -1 for none."""
    segment = tl.arange(0, 1 << LOG_SEGMENTS)[None, :]
    slot = row.to(tl.int64)[:, None] * segments + segment
    present = used[:, None] & (segment < segments)
    index = tl.load(gNear + slot, present, -1)
    d2 = tl.load(gNearD2 + slot, present & (index >= 0), float("inf"))
    near_d2 = tl.min(d2, axis=1)
    near = tl.min(tl.where((index >= 0) & (d2 == near_d2[:, None]), index, 0x7FFFFFFF), axis=1)
    near = tl.where(near == 0x7FFFFFFF, -1, near)
    index = tl.load(gFar + slot, present, -1)
    d2 = tl.load(gFarD2 + slot, present & (index >= 0), -1.0)
    far_d2 = tl.max(d2, axis=1)
    far = tl.min(tl.where((index >= 0) & (d2 == far_d2[:, None]), index, 0x7FFFFFFF), axis=1)
    far = tl.where(far == 0x7FFFFFFF, -1, far)
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
