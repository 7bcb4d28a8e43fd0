"""From a selection to the loss: the anchors' losses, the coefficients of edges, the reduction and the statistics."""

from __future__ import annotations

import triton
import triton.language as tl

from .order import NO_KEY
from .search import merged_extremes, merged_lists

# Distances are clamped from below so that sqrt has a finite derivative; no gradient flows where the clamp holds.
SQUARED_DISTANCE_FLOOR = tl.constexpr(1e-12)

# The codes of `squeeze` and `reduction` in the operators' signatures (sn_types.h has the same).
SPAN_SQUEEZE = tl.constexpr(0)
SUPPORT_SQUEEZE = tl.constexpr(1)
NEAREST_SQUEEZE = tl.constexpr(2)
MEAN = tl.constexpr(0)
NONE = tl.constexpr(2)

# Numbers that a block of anchors adds to the loss and the statistics: `loss_kernel` writes them, `reduce_kernel` adds.
RECORD_SIZE = tl.constexpr(8)


# The formulas are for one anchor, the code handles R at a time. The scalar stage runs in float64: it is cheap, and
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


@triton.jit
def merged_slots(gKeys, gCandidateLabels, anchor, used, label, segments, K,
                 KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_SEGMENTS: tl.constexpr):  # fmt: skip
    """The same from the segments' lists, all K slots at once, KP >= K."""
    best = merged_lists(gKeys, anchor, used, segments, KP, LOG_KP, LOG_SEGMENTS)
    slot = tl.arange(0, KP)[None, :]
    filled = used[:, None] & (slot < K) & (best != NO_KEY)
    index = tl.where(filled, best.to(tl.int32), -1)
    squared = tl.where(filled, (best >> 32).to(tl.int32).to(tl.float32, bitcast=True), 0.0)
    positive = filled & (tl.load(gCandidateLabels + index, filled, 0) == label[:, None])
    return slot, index, squared, filled, positive


@triton.jit(
    do_not_specialize=["segments", "N", "K"],
    do_not_specialize_on_alignment=[
        "gIndices", "gLabels", "gCandidateLabels", "gCoefficients", "gSquared", "gNearest", "gFarthest",
    ],
)  # fmt: skip
def loss_kernel(
    gIndices, gD2, gKeys, gNearD2, gNear, gFarD2, gFar, segments, gLabels, gCandidateLabels,
    N, K, alpha_high, alpha_low, weight_high, weight_low,
    gLoss, gCoefficients, gSquared, gNearest, gFarthest, gRecords,
    SQUEEZE: tl.constexpr, REDUCTION: tl.constexpr, WANT_SQUARED: tl.constexpr,
    MERGED: tl.constexpr, LOG_SEGMENTS: tl.constexpr, ONE_BLOCK: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Selections to losses, coefficients of edges [N, K + 2] and one record for each R anchors.

    The support sets are merged from the lists of gKeys [N, segments, BLOCK] (MERGED), or are columns 0 to K - 1 of
    gIndices [N, K + 2] and gD2 [N, K]; the extremes are those of `segments` segments. Writes gNearest and gFarthest,
    and in gIndices what was merged and the last two columns: near_i, if the support set has no positive, and far_i, if
    the squeeze needs it and no other column holds it.
    """
    anchor = tl.program_id(0) * R + tl.arange(0, R)
    used = anchor < N
    row = anchor.to(tl.int64)
    # Triton passes numbers as float32: two of them make a float64.
    alpha = tl.zeros((R,), tl.float64) + alpha_high + alpha_low
    weight = tl.zeros((R,), tl.float64) + weight_high + weight_low
    label = tl.load(gLabels + anchor, used, 0)
    # K <= BLOCK (ONE_BLOCK): the slots are held, else each of the three passes below reads them anew.
    if MERGED:
        held = merged_slots(gKeys, gCandidateLabels, anchor, used, label, segments, K, BLOCK, LOG_BLOCK, LOG_SEGMENTS)
        tl.store(gIndices + row[:, None] * (K + 2) + held[0], held[1], used[:, None] & (held[0] < K))
    elif ONE_BLOCK:
        held = support_slots(gIndices, gD2, gCandidateLabels, anchor, used, label, 0, K, BLOCK)
    near_d2, near, far_d2, far = merged_extremes(gNearD2, gNear, gFarD2, gFar, anchor, used, segments, LOG_SEGMENTS)
    tl.store(gNearest + anchor, near, used)
    tl.store(gFarthest + anchor, far, used)
    near_d = clamped_distance(near_d2)
    valid = near >= 0

    # Which slot holds whom. The first positive of the support set is near_i: both are first in the same order.
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
        if ONE_BLOCK:
            slot, index, squared, filled, positive = held
        else:
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

    # separation_i. Masses are relative to the nearest of each side. Where a distance is not finite they mean nothing
    # and are not used.
    positive_mass = tl.where(outside, 1.0, tl.zeros((R,), tl.float64))
    negative_mass = tl.zeros((R,), tl.float64)
    for first in range(0, K, BLOCK):
        if ONE_BLOCK:
            slot, index, squared, filled, positive = held
        else:
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

    # (dL_i / dd_ij) / d_ij of every edge; NaN where a selected distance overflowed.
    pull = alpha * share / positive_mass
    push = -alpha * share / negative_mass
    for first in range(0, K, BLOCK):
        if ONE_BLOCK:
            slot, index, squared, filled, positive = held
        else:
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
    # Column K is near_i as the only member of P_i, with mass 1; column K + 1 is far_i outside the support set.
    near_coefficient = tl.where(near_d2.to(tl.float64) < SQUARED_DISTANCE_FLOOR, 0.0, (pull + near_slope) / near_d)
    near_coefficient = tl.where(finite, near_coefficient, float("nan"))
    tl.store(gCoefficients + row * (K + 2) + K, tl.where(outside, near_coefficient, 0.0).to(ACC), used)
    far_coefficient = tl.where(far_d2.to(tl.float64) < SQUARED_DISTANCE_FLOOR, 0.0, weight / clamped_distance(far_d2))
    far_coefficient = tl.where(finite, far_coefficient, float("nan"))
    tl.store(gCoefficients + row * (K + 2) + K + 1, tl.where(extra, far_coefficient, 0.0).to(ACC), used)

    if REDUCTION == NONE:
        tl.store(gLoss + anchor, loss.to(ACC), used)
    record = gRecords + tl.program_id(0).to(tl.int64) * RECORD_SIZE
    tl.store(record + 0, tl.sum(loss, axis=0))
    tl.store(record + 1, tl.sum(tl.where(valid, positive_sum, 0.0), axis=0))
    tl.store(record + 2, tl.sum(tl.where(valid, negative_sum, 0.0), axis=0))
    tl.store(record + 3, tl.sum(tl.where(valid, positives, 0), axis=0).to(tl.float64))
    tl.store(record + 4, tl.sum(tl.where(valid, negatives, 0), axis=0).to(tl.float64))
    tl.store(record + 5, tl.sum(valid.to(tl.int32), axis=0).to(tl.float64))
    tl.store(record + 6, tl.sum((valid & (near_slot == 0) & (K > 0)).to(tl.int32), axis=0).to(tl.float64))
    tl.store(record + 7, tl.sum(tl.where(valid, support_positives, 0), axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["records", "flags", "N"])
def reduce_kernel(
    gRecords, records, gFlags, flags, gLoss, gStats, N,
    REDUCTION: tl.constexpr, FLAGS: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program adds the records in order: the loss, unless every anchor has its own, and the statistics.

    One of the `flags` flags poisons them, and every anchor's loss too.
    """
    found = tl.zeros((FLAGS,), tl.int32)
    for first in range(0, flags, FLAGS):
        flag = first + tl.arange(0, FLAGS)
        found |= tl.load(gFlags + flag, flag < flags, 0)
    poisoned = tl.max(found, axis=0) > 0
    total = tl.zeros((R, RECORD_SIZE), tl.float64)
    field = tl.arange(0, RECORD_SIZE)
    for first in range(0, records, R):
        record = first + tl.arange(0, R)
        place = gRecords + record[:, None].to(tl.int64) * RECORD_SIZE + field
        total += tl.load(place, (record < records)[:, None], 0.0)
    total = tl.sum(total, axis=0)
    loss = tl.sum(tl.where(field == 0, total, 0.0), axis=0)
    positive_sum = tl.sum(tl.where(field == 1, total, 0.0), axis=0)
    negative_sum = tl.sum(tl.where(field == 2, total, 0.0), axis=0)
    positives = tl.sum(tl.where(field == 3, total, 0.0), axis=0)
    negatives = tl.sum(tl.where(field == 4, total, 0.0), axis=0)
    valid = tl.sum(tl.where(field == 5, total, 0.0), axis=0)
    nearest = tl.sum(tl.where(field == 6, total, 0.0), axis=0)
    inside = tl.sum(tl.where(field == 7, total, 0.0), axis=0)
    poison = tl.where(poisoned, float("nan"), 0.0)
    if REDUCTION == NONE:
        if poisoned:
            for first in range(0, N, FLAGS):
                anchor = first + tl.arange(0, FLAGS)
                tl.store(gLoss + anchor, tl.full((FLAGS,), float("nan"), ACC), anchor < N)
    else:
        if REDUCTION == MEAN:
            loss = loss / tl.maximum(valid, 1.0)
        tl.store(gLoss, (loss + poison).to(ACC))
    tl.store(gStats + 0, valid)
    tl.store(gStats + 1, positive_sum / tl.maximum(positives, 1.0))
    tl.store(gStats + 2, negative_sum / tl.maximum(negatives, 1.0))
    tl.store(gStats + 3, nearest / tl.maximum(valid, 1.0))
    tl.store(gStats + 4, inside / tl.maximum(valid, 1.0))
    tl.store(gStats + 5, poison)
