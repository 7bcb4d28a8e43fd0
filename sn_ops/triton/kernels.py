"""The Support Neighbor loss in Triton: distances, selection, loss and gradients. `screening.py` makes selection faster.

A forward is five kernels. `inspect_kernel` looks for NaN and Inf. `scan_kernel` sums squared differences tile by tile
and keeps, for a group of anchors and a segment of the candidates, the first K in order and the two extreme positives;
no N x M matrix is written. `merge_kernel` merges the segments. `loss_kernel` and `reduce_kernel` turn a selection into
the loss, the coefficients of its edges, and the statistics. A backward is `hub_kernel` and `gradient_kernel`, and
`mean_kernel` before them under the mean.

Shapes: N anchors, M candidates, D dims, K = min(k, M) neighbours, E = K + 2 edges. "acc" is the accumulation type:
float32, or float64 for float64 features. Offsets into matrices are 64-bit.

## The one summation order

Every squared distance of this backend, whatever kernel it comes from, is the direct sum of squared differences in acc
(half-precision inputs are widened first) in one order: D is cut into spans of 2048 elements, zero-padded. In a span
lane l of 32 takes the elements l, l + 32, l + 64, ... by fused multiply-add from 0. The lanes of consecutive spans are
added one after the other. At the end adjacent lanes are added as a tree: 16 pairs, 8, 4, 2, 1. A term thus meets at
most 64 + D / 2048 + 5 roundings. NaN, which finite inputs never lead to except through an overflow of the difference,
counts as infinity.

The lanes are elements of a tensor, and every step is elementwise (`tl.fma`, `+`, `tl.split`): no `tl.sum`, whose order
is the compiler's, and no product outside a fused multiply-add, which the compiler could fuse or not. So the order does
not depend on tile sizes, layouts or the number of warps. `lane_step` and `lane_tree` are its only code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LANES = tl.constexpr(32)
SPAN = tl.constexpr(2048)

# Above the key of every candidate, those at infinity included.
NO_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)

# Distances are clamped from below so that sqrt has a finite derivative; no gradient flows where the clamp holds.
SQUARED_DISTANCE_FLOOR = tl.constexpr(1e-12)

# The codes of `squeeze` and `reduction` in the operators' signatures (sn_types.h has the same).
SPAN_SQUEEZE = tl.constexpr(0)
SUPPORT_SQUEEZE = tl.constexpr(1)
NEAREST_SQUEEZE = tl.constexpr(2)
MEAN = tl.constexpr(0)
NONE = tl.constexpr(2)

# What an anchor, or a block of anchors, adds to the statistics; `loss_kernel` writes them, `reduce_kernel` adds them.
RECORD_SIZE = 8


EXACT = {"enable_fp_fusion": False}
"""Options of every launch: the compiler fuses no product into an addition, so that code has the roundings it shows."""


def type_of(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of an accumulation type."""
    return tl.float64 if dtype == torch.float64 else tl.float32


# ---- sums, order, sorting -----------------------------------------------------------------------


@triton.jit
def lane_step(a, b, part):
    """One step of the summation order: the squares of a - b onto the lanes, their last dimension."""
    t = a - b
    return tl.fma(t, t, part)


@triton.jit
def lane_tree(lanes):
    """The last step: adjacent lanes added as a tree. [..., LANES] -> [...]"""
    shape: tl.constexpr = lanes.shape[:-1]
    for level in tl.static_range(5):
        even, odd = tl.split(tl.reshape(lanes, shape + [LANES >> (level + 1), 2]))  # noqa: RUF005
        lanes = even + odd
    total = tl.reshape(lanes, shape)
    return tl.where(total == total, total, float("inf"))


@triton.jit
def tile_distances(gX, x_offsets, x_used, gZ, z_offsets, z_used, D, ACC: tl.constexpr, ONE_SPAN: tl.constexpr):
    """Squared distances of R rows of X and C rows of Z, [R, C] acc; offsets [R], [C] say where the rows start.

    ONE_SPAN promises D <= SPAN: adding the only span to 0 changes nothing, and saves the registers of its sum.
    """
    lane = tl.arange(0, LANES)
    total = tl.zeros((x_offsets.shape[0], z_offsets.shape[0], LANES), ACC)
    if ONE_SPAN:
        for start in range(0, D, LANES):
            inside = start + lane < D
            a = tl.load(gX + x_offsets[:, None] + (start + lane), x_used[:, None] & inside, 0.0).to(ACC)
            b = tl.load(gZ + z_offsets[:, None] + (start + lane), z_used[:, None] & inside, 0.0).to(ACC)
            total = lane_step(a[:, None, :], b[None, :, :], total)
    else:
        for span in range(0, D, SPAN):
            part = tl.zeros_like(total)
            for start in range(span, tl.minimum(span + SPAN, D), LANES):
                inside = start + lane < D
                a = tl.load(gX + x_offsets[:, None] + (start + lane), x_used[:, None] & inside, 0.0).to(ACC)
                b = tl.load(gZ + z_offsets[:, None] + (start + lane), z_used[:, None] & inside, 0.0).to(ACC)
                part = lane_step(a[:, None, :], b[None, :, :], part)
            total += part
    return lane_tree(total)


@triton.jit
def listed_distances(gX, x_offsets, gZ, z_offsets, z_used, D, ONE_SPAN: tl.constexpr, UNROLL: tl.constexpr):
    """Squared distances of R rows of X, each and its own C rows of Z: offsets [R] and [R, C]; [R, C] float32.

    UNROLL steps have their loads in flight together; beyond D a step adds zeros, which changes nothing.
    """
    lane = tl.arange(0, LANES)
    total = tl.zeros((z_offsets.shape[0], z_offsets.shape[1], LANES), tl.float32)
    pX = gX + x_offsets[:, None, None] + lane[None, None, :]
    pZ = gZ + z_offsets[:, :, None] + lane[None, None, :]
    if ONE_SPAN:
        for first in range(0, D, LANES * UNROLL):
            for step in tl.static_range(UNROLL):
                start = first + step * LANES
                inside = (start + lane < D)[None, None, :]
                a = tl.load(pX + start, inside, 0.0).to(tl.float32)
                b = tl.load(pZ + start, z_used[:, :, None] & inside, 0.0).to(tl.float32)
                total = lane_step(a, b, total)
    else:
        for span in range(0, D, SPAN):
            part = tl.zeros_like(total)
            for first in range(span, tl.minimum(span + SPAN, D), LANES * UNROLL):
                for step in tl.static_range(UNROLL):
                    start = first + step * LANES
                    inside = (start + lane < D)[None, None, :]
                    a = tl.load(pX + start, inside, 0.0).to(tl.float32)
                    b = tl.load(pZ + start, z_used[:, :, None] & inside, 0.0).to(tl.float32)
                    part = lane_step(a, b, part)
            total += part
    return lane_tree(total)


@triton.jit
def pack_keys(squared, index):
    """(d2, index) as one int64 that orders like it: the bits of a float that is not negative order as it does."""
    return (squared.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def _compare_exchange(x, distance: tl.constexpr, run: tl.constexpr, flip: tl.constexpr):
    """One step of a bitonic network on the last dimension of x [R, W]: positions `distance` apart change places if
    they are out of order, ascending in even runs of `run` positions and descending in odd ones; the reverse with flip.

    Spelled with minima and maxima over an axis of 2, which the interpreter has fast; tl.sort is not usable there.
    """
    R: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    pairs = tl.reshape(x, (R, W // (2 * distance), 2, distance))
    low = tl.min(pairs, axis=2, keep_dims=True)
    high = tl.max(pairs, axis=2, keep_dims=True)
    right = tl.arange(0, 2)[None, None, :, None]
    descending = (tl.arange(0, W // (2 * distance))[None, :, None, None] * (2 * distance) // run + flip) % 2
    pairs = tl.where(right == descending, low, high)
    return tl.reshape(pairs, (R, W))


@triton.jit
def smallest(x, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr, DESCENDING: tl.constexpr):
    """The KP smallest of each row of x [R, KP << LOG_GROUPS], in order: [R, KP]."""
    R: tl.constexpr = x.shape[0]
    # Runs of KP, sorted up and down in turn (up or down as asked, if there is one).
    for size in tl.static_range(1, LOG_KP + 1):
        for step in tl.static_range(size):
            x = _compare_exchange(
                x, 1 << (size - 1 - step), 1 << size, DESCENDING * (LOG_GROUPS == 0) * (size == LOG_KP)
            )
    # Of an ascending and a descending run the smaller at each place are the KP smallest of both, and bitonic.
    for level in tl.static_range(LOG_GROUPS):
        x = tl.min(tl.reshape(x, (R, 1 << (LOG_GROUPS - 1 - level), 2, KP)), axis=2)
        x = tl.reshape(x, (R, KP << (LOG_GROUPS - 1 - level)))
        for step in tl.static_range(LOG_KP):
            x = _compare_exchange(x, 1 << (LOG_KP - 1 - step), KP, DESCENDING * (level == LOG_GROUPS - 1))
    return x


@triton.jit
def merge_sorted(best, descending, LOG_KP: tl.constexpr):
    """The smallest of two lists [R, KP], one ascending, one descending; ascending."""
    x = tl.minimum(best, descending)
    for step in tl.static_range(LOG_KP):
        x = _compare_exchange(x, 1 << (LOG_KP - 1 - step), 1 << LOG_KP, 0)
    return x


@triton.jit
def update_extremes(squared, same, candidate, near_d2, near, far_d2, far):
    """near and far [R] after a tile of squared distances [R, C] whose positives are `same`.

    Tiles come in the order of their candidates' indices: what is merely as near or as far as before loses.
    """
    nearest = tl.min(tl.where(same, squared, float("inf")), axis=1)
    farthest = tl.max(tl.where(same, squared, -1.0), axis=1)
    at_nearest = tl.where(same & (squared == nearest[:, None]), candidate[None, :], 0x7FFFFFFF)
    at_farthest = tl.where(same & (squared == farthest[:, None]), candidate[None, :], 0x7FFFFFFF)
    nearer = (farthest >= 0.0) & ((near < 0) | (nearest < near_d2))
    farther = farthest > far_d2
    near = tl.where(nearer, tl.min(at_nearest, axis=1), near)
    near_d2 = tl.where(nearer, nearest, near_d2)
    far = tl.where(farther, tl.min(at_farthest, axis=1), far)
    far_d2 = tl.where(farther, farthest, far_d2)
    return near_d2, near, far_d2, far


@triton.jit
def own_index(gSelf, self_offset, anchor, used, HAS_SELF: tl.constexpr):
    """Which candidate each anchor is itself, int64; a value outside [0, M) is none, and equals no candidate."""
    if HAS_SELF:
        own = tl.load(gSelf + anchor, used, -1)
    else:
        own = tl.where(self_offset >= 0, anchor.to(tl.int64) + self_offset, -1)
    return own


# ---- 0: is there a NaN or Inf? ------------------------------------------------------------------


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


# ---- 1: distances and selection, a group of anchors against a segment of candidates --------------


@triton.jit
def scan_segment(
    gX, x_stride, gZ, z_stride, gLabels, gCandidateLabels,
    anchor, used, own,
    begin, end, M, D,
    gDense, dense_row,
    C: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr,
    DENSE: tl.constexpr, EXTREMES: tl.constexpr, ACC: tl.constexpr, ONE_SPAN: tl.constexpr,
):  # fmt: skip
    """Anchors [R] against candidates [begin, end): the KP first keys in order [R, KP], and near and far as (d2, index),
    if EXTREMES are wanted.

    With DENSE the squared distances go to gDense [.., M] instead of into lists, NaN for an anchor itself: sorted
    stably it comes last, behind candidates at infinity.
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
        squared = tile_distances(gX, x_offsets, used, gZ, candidate.to(tl.int64) * z_stride, present, D, ACC, ONE_SPAN)
        eligible = used[:, None] & present[None, :] & (candidate[None, :].to(tl.int64) != own[:, None])
        if DENSE:
            tl.store(
                gDense + dense_row[:, None].to(tl.int64) * M + candidate[None, :],
                tl.where(eligible, squared, float("nan")),
                used[:, None] & present[None, :],
            )
        else:
            keys = tl.where(eligible, pack_keys(squared, candidate[None, :]), NO_KEY)
            # Most tiles behind the first few improve no list.
            if tl.max((tl.min(keys, axis=1) < tl.max(best, axis=1)).to(tl.int32), axis=0) > 0:
                best = merge_sorted(best, smallest(keys, KP, LOG_KP, LOG_GROUPS, 1), LOG_KP)
        if EXTREMES:
            same = eligible & (tl.load(gCandidateLabels + candidate, present, 0)[None, :] == label[:, None])
            if tl.max(tl.max(same.to(tl.int32), axis=1), axis=0) > 0:
                near_d2, near, far_d2, far = update_extremes(squared, same, candidate, near_d2, near, far_d2, far)
    return best, near_d2, near, far_d2, far


@triton.jit(do_not_specialize=["first_row", "rows", "M", "segment_size", "segments"])
def scan_kernel(
    gX, x_stride, gZ, z_stride, gLabels, gCandidateLabels, gSelf, self_offset,
    first_row, rows, M, D, segments, segment_size,
    gKeys, gNearD2, gNear, gFarD2, gFar, gDense,
    R: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr,
    HAS_SELF: tl.constexpr, DENSE: tl.constexpr, ACC: tl.constexpr, ONE_SPAN: tl.constexpr,
):  # fmt: skip
    """Anchors first_row to first_row + rows: lists gKeys [rows, segments, KP], extremes [rows, segments]."""
    group = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    row = group * R + tl.arange(0, R)
    used = row < rows
    anchor = first_row + row
    own = own_index(gSelf, self_offset, anchor, used, HAS_SELF)
    begin = segment * segment_size
    best, near_d2, near, far_d2, far = scan_segment(
        gX, x_stride, gZ, z_stride, gLabels, gCandidateLabels, anchor, used, own,
        begin, tl.minimum(begin + segment_size, M), M, D, gDense, row,
        C, KP, LOG_KP, LOG_GROUPS, DENSE, True, ACC, ONE_SPAN,
    )  # fmt: skip
    slot = row.to(tl.int64) * segments + segment
    if not DENSE:
        tl.store(gKeys + slot[:, None] * KP + tl.arange(0, KP)[None, :], best, used[:, None])
    tl.store(gNearD2 + slot, near_d2, used)
    tl.store(gNear + slot, near, used)
    tl.store(gFarD2 + slot, far_d2, used)
    tl.store(gFar + slot, far, used)


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
        position = tl.arange(0, KP)[None, :]
        best = tl.load(gKeys + slot[:, None] * KP + position, used[:, None], NO_KEY)
        for segment in range(1, segments):
            # Read backwards: an ascending list is descending from its end.
            other = tl.load(gKeys + (slot + segment)[:, None] * KP + (KP - 1 - position), used[:, None], NO_KEY)
            best = merge_sorted(best, other, LOG_KP)
        store_support(best, anchor, used, gIndices, gD2, K, KP)
    near_d2, near, far_d2, far = merge_extremes(gNearD2, gNear, gFarD2, gFar, slot, used, segments, ACC)
    tl.store(gAnchorNearD2 + anchor, near_d2, used)
    tl.store(gAnchorNear + anchor, near, used)
    tl.store(gAnchorFarD2 + anchor, far_d2, used)
    tl.store(gAnchorFar + anchor, far, used)


# ---- 2: from a selection to the loss ------------------------------------------------------------
# One anchor at a time in mathematics, R at a time in code. The scalar stage runs in float64: it is cheap, and
# exp(-alpha d) amplifies every rounding of d by alpha. With lse the log of the sum of exp(-alpha d) over a set,
# v = lse_N - lse_P and s = sigmoid(v):
#
#   separation = softplus(v)        d separation / d d_j = alpha s softmax_P(j) on P, -alpha s softmax_N(j) on N
#
# Neither form subtracts nearly equal numbers, and neither overflows for any alpha d.


@triton.jit
def clamped_distance(squared):
    wide = squared.to(tl.float64)
    return tl.sqrt(tl.where(wide > SQUARED_DISTANCE_FLOOR, wide, SQUARED_DISTANCE_FLOOR))


@triton.jit
def log1p(t):
    """log(1 + t) to full precision for t >= 0: the rounding of 1 + t cancels in t / ((1 + t) - 1)."""
    u = 1.0 + t
    return tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def is_finite(x):
    return x * 0 == 0


@triton.jit
def support_slots(gIndices, gD2, gCandidateLabels, anchor, used, label, first, K, BLOCK: tl.constexpr):
    """Slots first to first + BLOCK of support sets: slot [1, BLOCK], then [R, BLOCK] of index, d2, used, positive."""
    slot = first + tl.arange(0, BLOCK)[None, :]
    row = anchor[:, None].to(tl.int64)
    inside = used[:, None] & (slot < K)
    index = tl.load(gIndices + row * (K + 2) + slot, inside, -1)
    filled = index >= 0
    squared = tl.load(gD2 + row * K + slot, inside, 0.0)
    positive = filled & (tl.load(gCandidateLabels + index, filled, 0) == label[:, None])
    return slot, index, squared, filled, positive


@triton.jit(do_not_specialize=["N", "K", "flags"])
def loss_kernel(
    gIndices, gD2, gNearD2, gNear, gFarD2, gFar, gLabels, gCandidateLabels, gFlags, flags,
    N, K, alpha_high, alpha_low, weight_high, weight_low,
    gLoss, gCoefficients, gSquared, gRecords,
    SQUEEZE: tl.constexpr, REDUCTION: tl.constexpr, WANT_SQUARED: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Selections to losses, coefficients of edges [N, K + 2] and one record for each R anchors.

    Reads columns 0 to K - 1 of gIndices [N, K + 2] and writes the last two: near_i, if the support set has no positive,
    and far_i, if the squeeze needs it and no other column holds it.
    """
    anchor = tl.program_id(0) * R + tl.arange(0, R)
    used = anchor < N
    row = anchor.to(tl.int64)
    # Triton passes numbers as float32: two of them make a float64.
    alpha = tl.zeros((R,), tl.float64) + alpha_high + alpha_low
    weight = tl.zeros((R,), tl.float64) + weight_high + weight_low
    label = tl.load(gLabels + anchor, used, 0)
    near = tl.load(gNear + anchor, used, -1)
    near_d2 = tl.load(gNearD2 + anchor, used, 0.0)
    far = tl.load(gFar + anchor, used, -1)
    far_d2 = tl.load(gFarD2 + anchor, used, 0.0)
    near_d = clamped_distance(near_d2)
    valid = near >= 0

    # Who is where. The first positive of the support set is near_i: both are first in the same order.
    near_slot = tl.zeros((R,), tl.int32) + K
    far_slot = tl.zeros((R,), tl.int32) + (K + 1)
    finite = is_finite(near_d2)
    positives = tl.zeros((R,), tl.int32)
    negatives = tl.zeros((R,), tl.int32)
    positive_sum = tl.zeros((R,), tl.float64)
    negative_sum = tl.zeros((R,), tl.float64)
    nearest_negative = tl.full((R,), float("inf"), tl.float64)
    last_d2 = tl.full((R,), -1.0, ACC)  # of the farthest member of P_i, the first slot on a tie
    last_slot = tl.zeros((R,), tl.int32) + K
    for first in range(0, K, BLOCK):
        slot, index, squared, filled, positive = support_slots(
            gIndices, gD2, gCandidateLabels, anchor, used, label, first, K, BLOCK
        )
        d = clamped_distance(squared)
        negative = filled & ~positive
        positives += tl.sum(positive.to(tl.int32), axis=1)
        negatives += tl.sum(negative.to(tl.int32), axis=1)
        positive_sum += tl.sum(tl.where(positive, d, 0.0), axis=1)
        negative_sum += tl.sum(tl.where(negative, d, 0.0), axis=1)
        nearest_negative = tl.minimum(nearest_negative, tl.min(tl.where(negative, d, float("inf")), axis=1))
        near_slot = tl.minimum(near_slot, tl.min(tl.where(positive, slot, K), axis=1))
        far_slot = tl.minimum(far_slot, tl.min(tl.where(filled & (index == far[:, None]), slot, K + 1), axis=1))
        finite = finite & (tl.max((filled & ~is_finite(squared)).to(tl.int32), axis=1) == 0)
        block_d2 = tl.max(tl.where(positive, squared, -1.0), axis=1)
        block_slot = tl.min(tl.where(positive & (squared == block_d2[:, None]), slot, K), axis=1)
        last_slot = tl.where(block_d2 > last_d2, block_slot, last_slot)
        last_d2 = tl.maximum(last_d2, block_d2)
        if WANT_SQUARED:
            squared = tl.where(filled, squared, float("inf"))
            tl.store(gSquared + row[:, None] * (K + 2) + slot, squared, used[:, None] & (slot < K))
    support_positives = positives
    outside = valid & (near_slot == K)
    positives = tl.where(outside, 1, positives)
    positive_sum = tl.where(outside, near_d, positive_sum)
    far_slot = tl.where((far_slot == K + 1) & (far == near), near_slot, far_slot)
    tl.store(gIndices + row * (K + 2) + K, tl.where(outside, near, -1), used)
    if SQUEEZE == SPAN_SQUEEZE:
        extra = valid & (far_slot == K + 1)
        finite = finite & is_finite(far_d2)
    else:
        extra = valid & False
    tl.store(gIndices + row * (K + 2) + K + 1, tl.where(extra, far, -1), used)
    if WANT_SQUARED:
        tl.store(gSquared + row * (K + 2) + K, tl.where(outside, near_d2, float("inf")), used)
        tl.store(gSquared + row * (K + 2) + K + 1, tl.where(extra, far_d2, float("inf")), used)

    # separation_i. Masses are relative to the nearest of each side. Where a distance is not finite the masses mean
    # nothing, and nothing is made of them.
    positive_mass = tl.where(outside, 1.0, tl.zeros((R,), tl.float64))
    negative_mass = tl.zeros((R,), tl.float64)
    for first in range(0, K, BLOCK):
        slot, index, squared, filled, positive = support_slots(
            gIndices, gD2, gCandidateLabels, anchor, used, label, first, K, BLOCK
        )
        start = tl.where(positive, near_d[:, None], nearest_negative[:, None])
        mass = tl.where(filled, tl.exp(-alpha[:, None] * (clamped_distance(squared) - start)), 0.0)
        positive_mass += tl.sum(tl.where(positive, mass, 0.0), axis=1)
        negative_mass += tl.sum(tl.where(positive, 0.0, mass), axis=1)
    contested = valid & finite & (negatives > 0)
    positive_mass = tl.where(contested, positive_mass, 1.0)
    negative_mass = tl.where(contested, negative_mass, 1.0)
    gap = tl.where(contested, near_d - nearest_negative, 0.0)
    v = tl.log(negative_mass / positive_mass) + alpha * gap
    tail = tl.exp(-tl.abs(v))
    separation = tl.where(contested, tl.maximum(v, 0.0) + log1p(tail), 0.0)
    share = tl.where(contested, tl.where(v > 0.0, 1.0, tail) / (1.0 + tail), 0.0)

    # squeeze_i = d(opposite) - d(near), or d(near). No opposite: slot -1.
    opposite = tl.zeros((R,), tl.int32) - 1
    opposite_d = tl.zeros((R,), tl.float64)
    alone = valid & False
    if SQUEEZE == SPAN_SQUEEZE:
        opposite = tl.where(valid, far_slot, -1)
        opposite_d = clamped_distance(far_d2)
    elif SQUEEZE == SUPPORT_SQUEEZE:
        opposite = tl.where(valid & (positives > 1), last_slot, -1)
        opposite_d = clamped_distance(last_d2)
        alone = valid & (positives <= 1)
    elif SQUEEZE == NEAREST_SQUEEZE:
        alone = valid
    opposed = (opposite >= 0) & (opposite != near_slot)
    squeeze = tl.where(opposed, opposite_d - near_d, tl.where(alone, near_d, 0.0))
    near_slope = tl.where(opposed, -weight, tl.where(alone, weight, 0.0))
    loss = tl.where(valid, separation + weight * squeeze, 0.0)
    loss = tl.where(valid & ~finite, float("inf"), loss)

    # (dL_i / dd_ij) / d_ij of every edge; NaN says loudly that a selected distance overflowed.
    pull = alpha * share / positive_mass
    push = -alpha * share / negative_mass
    for first in range(0, K, BLOCK):
        slot, index, squared, filled, positive = support_slots(
            gIndices, gD2, gCandidateLabels, anchor, used, label, first, K, BLOCK
        )
        d = clamped_distance(squared)
        start = tl.where(positive, near_d[:, None], nearest_negative[:, None])
        mass = tl.where(filled & contested[:, None], tl.exp(-alpha[:, None] * (d - start)), 0.0)
        slope = mass * tl.where(positive, pull[:, None], push[:, None])
        slope += tl.where(slot == near_slot[:, None], near_slope[:, None], 0.0)
        slope += tl.where((slot == opposite[:, None]) & opposed[:, None], weight[:, None], 0.0)
        flows = filled & valid[:, None] & ~(squared.to(tl.float64) < SQUARED_DISTANCE_FLOOR)
        coefficient = tl.where(flows, slope / d, 0.0)
        coefficient = tl.where(filled & (valid & ~finite)[:, None], float("nan"), coefficient)
        tl.store(gCoefficients + row[:, None] * (K + 2) + slot, coefficient.to(ACC), used[:, None] & (slot < K))
    # Column K is of near_i alone in P_i, whose mass is 1; column K + 1 is of far_i outside the support set.
    near_coefficient = tl.where(near_d2.to(tl.float64) < SQUARED_DISTANCE_FLOOR, 0.0, (pull + near_slope) / near_d)
    near_coefficient = tl.where(finite, near_coefficient, float("nan"))
    tl.store(gCoefficients + row * (K + 2) + K, tl.where(outside, near_coefficient, 0.0).to(ACC), used)
    far_coefficient = tl.where(far_d2.to(tl.float64) < SQUARED_DISTANCE_FLOOR, 0.0, weight / clamped_distance(far_d2))
    far_coefficient = tl.where(finite, far_coefficient, float("nan"))
    tl.store(gCoefficients + row * (K + 2) + K + 1, tl.where(extra, far_coefficient, 0.0).to(ACC), used)

    if REDUCTION == NONE:
        poisoned = any_flag(gFlags, flags)
        tl.store(gLoss + anchor, tl.where(poisoned, float("nan"), loss).to(ACC), used)
    record = gRecords + tl.program_id(0).to(tl.int64) * 8
    tl.store(record + 0, tl.sum(loss, axis=0))
    tl.store(record + 1, tl.sum(tl.where(valid, positive_sum, 0.0), axis=0))
    tl.store(record + 2, tl.sum(tl.where(valid, negative_sum, 0.0), axis=0))
    tl.store(record + 3, tl.sum(tl.where(valid, positives, 0), axis=0).to(tl.float64))
    tl.store(record + 4, tl.sum(tl.where(valid, negatives, 0), axis=0).to(tl.float64))
    tl.store(record + 5, tl.sum(valid.to(tl.int32), axis=0).to(tl.float64))
    tl.store(record + 6, tl.sum((valid & (near_slot == 0) & (K > 0)).to(tl.int32), axis=0).to(tl.float64))
    tl.store(record + 7, tl.sum(tl.where(valid, support_positives, 0), axis=0).to(tl.float64))


@triton.jit
def any_flag(gFlags, flags):
    """Whether one of the flags is set."""
    found = tl.zeros((256,), tl.int32)
    for first in range(0, flags, 256):
        position = first + tl.arange(0, 256)
        found |= tl.load(gFlags + position, position < flags, 0)
    return tl.max(found, axis=0) > 0


@triton.jit(do_not_specialize=["records", "flags"])
def reduce_kernel(
    gRecords, records, gFlags, flags, gLoss, gStats, REDUCTION: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr
):
    """One program, records in order: the loss (unless it is one an anchor) and the statistics of sn_types.h."""
    total = tl.zeros((R, 8), tl.float64)
    field = tl.arange(0, 8)
    for first in range(0, records, R):
        record = first + tl.arange(0, R)
        total += tl.load(gRecords + record[:, None].to(tl.int64) * 8 + field, (record < records)[:, None], 0.0)
    total = tl.sum(total, axis=0)
    loss = tl.sum(tl.where(field == 0, total, 0.0), axis=0)
    positive_sum = tl.sum(tl.where(field == 1, total, 0.0), axis=0)
    negative_sum = tl.sum(tl.where(field == 2, total, 0.0), axis=0)
    positives = tl.sum(tl.where(field == 3, total, 0.0), axis=0)
    negatives = tl.sum(tl.where(field == 4, total, 0.0), axis=0)
    valid = tl.sum(tl.where(field == 5, total, 0.0), axis=0)
    nearest = tl.sum(tl.where(field == 6, total, 0.0), axis=0)
    inside = tl.sum(tl.where(field == 7, total, 0.0), axis=0)
    poison = tl.where(any_flag(gFlags, flags), float("nan"), 0.0)
    if REDUCTION != NONE:
        if REDUCTION == MEAN:
            loss = loss / tl.maximum(valid, 1.0)
        tl.store(gLoss, (loss + poison).to(ACC))
    tl.store(gStats + 0, valid)
    tl.store(gStats + 1, positive_sum / tl.maximum(positives, 1.0))
    tl.store(gStats + 2, negative_sum / tl.maximum(negatives, 1.0))
    tl.store(gStats + 3, nearest / tl.maximum(valid, 1.0))
    tl.store(gStats + 4, inside / tl.maximum(valid, 1.0))
    tl.store(gStats + 5, poison)


# ---- 3: gradients -------------------------------------------------------------------------------
# An edge (i, j) with coefficient w pulls its two ends with g_i w (x_i - z_j), difference first: the factored form
# a X - C X cancels where rows are close. Every row of a gradient is gathered by one program, in acc, and rounded once;
# nothing is added by atomics. A row's outgoing edges lie together; its incoming ones do after a stable sort of all
# edges by target, so that the order of every sum is fixed by the support graph alone.
#
# A hub, everybody's neighbour, may have N incoming edges. So the sorted edges are also cut into chunks of fixed size at
# fixed places: a chunk that belongs to one target as a whole is summed by a program of its own (hub_kernel), and the
# target's program adds up to two broken chunks edge by edge and the whole ones by their sums.


@triton.jit
def mean_kernel(gGradLoss, gStats, gUpstream, ACC: tl.constexpr):
    """The factor that every anchor has under the mean; by itself, as the division costs the kernels below registers."""
    valid = tl.load(gStats).to(ACC)
    tl.store(gUpstream, tl.where(valid > 0, tl.load(gGradLoss) / tl.maximum(valid, 1.0), 0.0))


@triton.jit
def upstream_of(gUpstream, anchor, used, EACH: tl.constexpr):
    """g_i: the factor that the reduction and the gradient of the loss give anchors: EACH its own, or all the same."""
    return tl.load(gUpstream + anchor, used, 0.0) if EACH else tl.where(used, tl.load(gUpstream), 0.0)


@triton.jit
def incoming(
    gX, x_stride, gOrder, gCoefficients, gUpstream, begin, end, E, z, column, inside,
    EACH: tl.constexpr, EDGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[R, BLOCK]: for each of R rows, its own z and range: g_i w (x_i - z) summed over sorted edges begin to end."""
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
    """gChunks [whole, D]: the sum over each chunk of sorted edges that has one target; others are left alone."""
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
