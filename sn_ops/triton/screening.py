"""Exact selection at the speed of tensor cores: screen, refine, certify. It finds what `search.search_kernel` finds.

A matrix product in half precision gives all distances roughly. With a proven bound of its error it tells which few
candidates of an anchor can be among the first K at all; direct sums in the one summation order decide between those. If
they do not fit the anchor's buffer, direct sums against all candidates serve it.

    prepare_kernel         rows -> half precision, their norms, and how far rounding moved them
    sample_kernel          upper bounds of distances to a sample of the candidates, the least of each group
    threshold_kernel       K of those that are distinct bound the K-th distance from above: a threshold for each anchor
    screen_kernel          the product with all candidates; those not above the threshold go to the anchor's buffer
    shortlist_kernel       of these the ones not above the K-th smallest upper bound
    refine_kernel          their direct sums, sorted: the support set
    fallback_kernel        the anchors whose buffer or shortlist was too small, by direct sums of all pairs
    fallback_merge_kernel  the fallback's segments merged
    positives_kernel       near and far by direct sums within the identity, rows sorted by label (`positives.py`)

## The bound

Distances do not change when a common vector m is subtracted: for float32 features it is the median of a few rows,
so that collapsed features keep their digits; half-precision features are taken as they are. Row i becomes
h_i = half(2^e (x_i - m)), with its own exponent e, so that an outlier loosens only itself. Let a_i = 2^-e h_i, n_i the
computed |a_i|^2, and rho_i >= |(x_i - m) - a_i|, measured, the rounding of x - m included. With D_ij the true distance
and A_ij = |a_i - a_j|:

    |D_ij - A_ij| <= rho_i + rho_j                                                    the triangle inequality
    A_ij^2 in [(n_i + n_j)(1 - eta) - P_ij, (n_i + n_j)(1 + eta) - P_ij]              P_ij = 2 a_i . a_j, computed

Products of half-precision numbers are exact; how a tensor core adds them is not specified, so eta allows 1.25 D units
of 2^-23 for it (|P_ij| <= n_i + n_j), D / 32 for the norms and 64 for the roundings of these formulas themselves:
eta = (1.25 D + D / 32 + 64) 2^-23. So with the roots rounded outwards by 2^-20

    L_ij = sqrt(max(0, (n_i + n_j)(1 - eta) - P_ij)) - rho_i - rho_j  <=  D_ij
    U_ij = sqrt(max(0, (n_i + n_j)(1 + eta) - P_ij)) + rho_i + rho_j  >=  D_ij

The key of a pair, its direct sum, is D_ij^2 (1 +- gamma) with gamma = (64 + D / 2048 + 16) 2^-24, and less than 2^-120
from underflow. If K candidates have U_ij <= U, the K-th key is at most U^2 (1 + gamma), and every member of the support
set has D_ij <= t* = U (1 + 2 gamma) + 2^-60. So nothing is lost by keeping j where L_ij <= t*, that is, with
t = t* + rho_i, where

    n_j (1 - eta) - rho_j^2 - 2 t rho_j - P_ij <= t^2 - n_i (1 - eta)

which takes a few operations a pair. A sample may hold the anchor itself, so the bound is taken from K + 1 groups of it.
Rows whose norm lies outside 2^+-30 (and is not 0) are not screened: as candidates they have rho = inf and are kept for
every anchor, as anchors they go to the fallback. Rows with a NaN or Inf only need to do no harm, as the loss is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .order import NO_KEY, listed_distances, merge_sorted, own_index, pack_keys, smallest
from .search import merge_lists, search_segment, store_support

# Beyond these a row's norm squared is not screened.
LEAST_NORM = tl.constexpr(2.0**-60)
LARGEST_NORM = tl.constexpr(2.0**60)

# Roots and thresholds are rounded outwards by this much, which covers the roundings on the way to them.
UP = tl.constexpr(1.0 + 2.0**-20)
DOWN = tl.constexpr(1.0 - 2.0**-20)

# The largest magnitude in a row becomes 2^13 to 2^14 in half precision: squares of 2^-11 of it are far from underflow.
TOP_EXPONENT = tl.constexpr(13)


@triton.jit
def eta_of(D):
    return (1.28125 * D + 64.0) * (2.0**-23)


@triton.jit
def widened(distance, D):
    """t*: what a candidate's distance cannot exceed if its key is among the K first; `distance` bounds K of them."""
    gamma = (D / 2048.0 + 80.0) * (2.0**-24)
    return distance * (1.0 + 2.0 * gamma) * UP + 2.0**-60


# ---- prepare ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "first_flag"])
def prepare_kernel(
    gX, stride, rows, D, gCentre, gH, h_stride, gScale, gNorm, gRho, gFlags, first_flag,
    CAST: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of X -> gH (if CAST), gScale (2^-e), gNorm (n) and gRho; and the flags of `inspect_kernel`."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    used = row < rows
    base = row.to(tl.int64) * stride
    largest = tl.zeros((R,), tl.float32)
    bad = tl.zeros((R,), tl.int32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(gX + base[:, None] + column, used[:, None] & (column < D), 0.0).to(tl.float32)
        finite = x * 0 == 0
        bad |= tl.max((~finite).to(tl.int32), axis=1)
        if CAST:
            x -= tl.load(gCentre + column, column < D, 0.0)[None, :]
        largest = tl.maximum(largest, tl.max(tl.where(finite, tl.abs(x), 0.0), axis=1))
    tl.store(gFlags + first_flag + tl.program_id(0), tl.max(bad, axis=0))

    if CAST:
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
        sane = (exponent >= -60) & (exponent <= 60)
        exponent = tl.where(sane, exponent, TOP_EXPONENT)
        up = ((-exponent + (127 + TOP_EXPONENT)) << 23).to(tl.float32, bitcast=True)  # 2^e
        down = ((exponent + (127 - TOP_EXPONENT)) << 23).to(tl.float32, bitcast=True)
    else:
        up = tl.full((R,), 1.0, tl.float32)
        down = up
    norm = tl.zeros((R,), tl.float32)
    moved = tl.zeros((R,), tl.float32)
    full = tl.zeros((R,), tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = used[:, None] & (column < D)
        x = tl.load(gX + base[:, None] + column, inside, 0.0).to(tl.float32)
        x = tl.where((bad > 0)[:, None], 0.0, x)
        if CAST:
            x = tl.where(inside & (bad == 0)[:, None], x - tl.load(gCentre + column, column < D, 0.0)[None, :], 0.0)
            v = tl.where(sane[:, None], x * up[:, None], 0.0)
            h = v.to(tl.float16)
            # Columns behind D are zero: the product's loop runs over whole blocks.
            tl.store(gH + row[:, None].to(tl.int64) * h_stride + column, h, used[:, None] & (column < h_stride))
            wide = h.to(tl.float32)
            moved += tl.sum((v - wide) * (v - wide), axis=1)
            full += tl.sum(v * v, axis=1)
        else:
            wide = x
        norm += tl.sum(wide * wide, axis=1)
    norm = norm * down * down
    screenable = (norm >= LEAST_NORM) & (norm <= LARGEST_NORM)
    if CAST:
        # The measured residual, the rounding of x - m, and squares that underflowed; 1.001 for the sums' own rounding.
        rho = (tl.sqrt(moved) + tl.sqrt(full) * (2.0**-24) + 2.0**-40) * down * 1.001
    else:
        rho = tl.zeros((R,), tl.float32)
    screenable = screenable | (largest == 0.0)
    harmless = bad > 0
    rho = tl.where(harmless | (largest == 0.0), 0.0, tl.where(screenable, rho, float("inf")))
    tl.store(gScale + row, down, used)
    tl.store(gNorm + row, tl.where(screenable & ~harmless, norm, 0.0), used)
    tl.store(gRho + row, rho, used)


# ---- products -----------------------------------------------------------------------------------


@triton.jit
def products(
    gA, a_stride, a_row, a_used, gB, b_stride, b_row, b_used, D, BK: tl.constexpr, EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """[BM, BN] float32 inner products of rows of A and rows of B; EVEN promises that D is a multiple of BK.

    UPCAST is for the interpreter, whose product of bfloat16 is wrong: products are exact and summed in float32 anyway.
    """
    k = tl.arange(0, BK)
    pA = gA + a_row[:, None].to(tl.int64) * a_stride + k[None, :]
    pB = gB + b_row[None, :].to(tl.int64) * b_stride + k[:, None]
    total = tl.zeros((a_row.shape[0], b_row.shape[0]), tl.float32)
    for start in range(0, D, BK):
        if EVEN:
            a = tl.load(pA + start, a_used[:, None], 0.0)
            b = tl.load(pB + start, b_used[None, :], 0.0)
        else:
            a = tl.load(pA + start, a_used[:, None] & (start + k < D)[None, :], 0.0)
            b = tl.load(pB + start, b_used[None, :] & (start + k < D)[:, None], 0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total)
    return total


@triton.jit
def tile_of(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile coordinates of a program: GROUP rows of tiles go through the columns together, to reuse the L2 cache."""
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = program % (GROUP * tiles_n)
    return group * GROUP + inside % height, inside // height


@triton.jit
def bounded(squared):
    """The root of an estimate of a square, which may be a little below 0; inf where it is NaN and bounds nothing."""
    root = tl.sqrt(tl.where(squared < 0.0, 0.0, squared))
    return tl.where(root < float("inf"), root, float("inf"))


@triton.jit(do_not_specialize=["first_row", "rows", "samples", "stride", "groups"])
def sample_kernel(
    gA, a_stride, gAScale, gANorm, gARho, gB, b_stride, gBScale, gBNorm, gBRho,
    first_row, rows, samples, stride, D, gLeast, groups,
    GROUP_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """gLeast [rows, groups]: the least U_ij of each GROUP_SIZE samples.

    Sample c is one of candidates c * stride to (c + 1) * stride - 1, chosen as if at random: identities that repeat
    with a period must not escape it.
    """
    tile_m, tile_n = tile_of(tl.cdiv(rows, BM), tl.cdiv(samples, BN), GROUP)
    row = tile_m * BM + tl.arange(0, BM)
    used = row < rows
    anchor = first_row + row
    sample = tile_n * BN + tl.arange(0, BN)
    present = sample < samples
    candidate = sample * stride + ((sample * 40503) & 0xFFFF) % stride
    product = products(gA, a_stride, anchor, used, gB, b_stride, candidate, present, D, BK, EVEN, UPCAST)
    scale = 2.0 * tl.load(gAScale + anchor, used, 0.0)
    norm = tl.load(gANorm + anchor, used, 0.0)
    rho = tl.load(gARho + anchor, used, 0.0)
    other_norm = tl.load(gBNorm + candidate, present, 0.0)
    other_rho = tl.load(gBRho + candidate, present, float("inf"))
    squared = (norm[:, None] + other_norm[None, :]) * (1.0 + eta_of(D))
    squared -= scale[:, None] * (product * tl.load(gBScale + candidate, present, 0.0)[None, :])
    upper = bounded(squared) * UP + (rho[:, None] + other_rho[None, :])
    least = tl.min(tl.reshape(upper, (BM, BN // GROUP_SIZE, GROUP_SIZE)), axis=2)
    group = tile_n * (BN // GROUP_SIZE) + tl.arange(0, BN // GROUP_SIZE)
    tl.store(gLeast + row[:, None].to(tl.int64) * groups + group[None, :], least, used[:, None] & (group < groups))


@triton.jit(do_not_specialize=["groups", "first_row", "rows", "K"])
def threshold_kernel(
    gLeast, groups, first_row, rows, K, D, gNorm, gRho, gCount, gQueueCount, gLimit, gTwice,
    C: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The right side of the test above, gLimit [rows], and 2 t, gTwice [rows]; clears the counters of the strip."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    used = row < rows
    group = tl.arange(0, C)[None, :]
    least = tl.load(gLeast + row[:, None].to(tl.int64) * groups + group, used[:, None] & (group < groups), float("inf"))
    best = smallest(pack_keys(least, tl.broadcast_to(group, (R, C))), KP, LOG_KP, LOG_GROUPS, 0)
    # The (K + 1)-th: one of the groups may owe its bound to the anchor itself.
    wanted = tl.sum(tl.where(tl.arange(0, KP)[None, :] == K, best, 0), axis=1)
    upper = (wanted >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    norm = tl.load(gNorm + first_row + row, used, 0.0)
    rho = tl.load(gRho + first_row + row, used, 0.0)
    t = (widened(upper, D) + rho) * UP
    limit = t * t * UP - norm * (1.0 - eta_of(D))
    # An anchor that is not screened keeps nothing here, and goes to the fallback.
    screened = rho < float("inf")
    tl.store(gLimit + row, tl.where(screened, limit, -float("inf")), used)
    tl.store(gTwice + row, tl.where(screened & (t < float("inf")), 2.0 * t, 0.0), used)
    tl.store(gCount + row, tl.zeros((R,), tl.int32), used)
    if tl.program_id(0) == 0:
        tl.store(gQueueCount, 0)


@triton.jit(do_not_specialize=["first_row", "rows", "M"])
def screen_kernel(
    gA, a_stride, gAScale, gB, b_stride, gBScale, gBNorm, gBRho, gLimit, gTwice,
    first_row, rows, M, D, gCount, gBuffer,
    CAPACITY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The candidates that can matter to each anchor, with P_ij: gBuffer [rows, CAPACITY] in any order, gCount [rows].

    A count above CAPACITY says that the buffer was too small. Integer atomics count; sorting the keys undoes the order
    that they lead to.
    """
    tile_m, tile_n = tile_of(tl.cdiv(rows, BM), tl.cdiv(M, BN), GROUP)
    row = tile_m * BM + tl.arange(0, BM)
    used = row < rows
    candidate = tile_n * BN + tl.arange(0, BN)
    present = candidate < M
    product = products(gA, a_stride, first_row + row, used, gB, b_stride, candidate, present, D, BK, EVEN, UPCAST)
    norm = tl.load(gBNorm + candidate, present, 0.0)
    rho = tl.load(gBRho + candidate, present, 0.0)
    near_side = norm * (1.0 - eta_of(D)) - rho * rho
    scale = 2.0 * tl.load(gAScale + first_row + row, used, 0.0)
    product = scale[:, None] * (product * tl.load(gBScale + candidate, present, 0.0)[None, :])
    # A candidate that is not screened has rho = inf, and -inf on this side: every anchor keeps it. NaN, from a product
    # beyond float32, is kept too.
    value = near_side[None, :] - tl.load(gTwice + row, used, 0.0)[:, None] * tl.where(rho < float("inf"), rho, 0.0)
    keep = ~(value - product > tl.load(gLimit + row, used, -float("inf"))[:, None])
    keep = keep & used[:, None] & present[None, :]
    # One atomic for each row of the tile that keeps anything; its candidates follow each other in the buffer.
    kept = keep.to(tl.int32)
    total = tl.sum(kept, axis=1)
    first = tl.atomic_add(gCount + row, total, mask=used & (total > 0), sem="relaxed")
    place = first[:, None] + tl.cumsum(kept, axis=1) - 1
    offset = (row * CAPACITY)[:, None] + place  # of a strip: fits 32 bits
    entry = (product.to(tl.int32, bitcast=True).to(tl.int64) << 32) | candidate[None, :].to(tl.int64)
    tl.store(gBuffer + offset, entry, keep & (place < CAPACITY))


# ---- from the buffers to the support sets ---------------------------------------------------------


@triton.jit(do_not_specialize=["first_row", "rows", "K"])
def shortlist_kernel(
    gANorm, gARho, gBNorm, gBRho, gSelf, self_offset, first_row, rows, K, D,
    gCount, gBuffer, gShort, gShortCount, gQueue, gQueueCount,
    HAS_SELF: tl.constexpr, CAPACITY: tl.constexpr, SHORT: tl.constexpr,
    KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The candidates in an anchor's buffer that are not above the K-th smallest upper bound in that buffer.

    gShort [rows, SHORT], gShortCount [rows]. Anchors with too small a buffer or shortlist are queued for the fallback.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    used = row < rows
    anchor = first_row + row
    own = own_index(gSelf, self_offset, anchor, used, HAS_SELF)
    count = tl.load(gCount + row, used, 0)
    norm = tl.load(gANorm + anchor, used, 0.0)
    rho = tl.load(gARho + anchor, used, 0.0)
    place = tl.arange(0, CAPACITY)[None, :]
    filled = used[:, None] & (place < count[:, None])
    entry = tl.load(gBuffer + row[:, None].to(tl.int64) * CAPACITY + place, filled, 0)
    candidate = entry.to(tl.int32)
    eligible = filled & (candidate.to(tl.int64) != own[:, None])
    product = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    norms = norm[:, None] + tl.load(gBNorm + candidate, eligible, 0.0)
    rhos = rho[:, None] + tl.load(gBRho + candidate, eligible, 0.0)
    eta = eta_of(D)
    upper = bounded(norms * (1.0 + eta) - product) * UP + rhos
    lower = tl.sqrt(tl.maximum(norms * (1.0 - eta) - product, 0.0)) * DOWN - rhos
    upper = tl.where(eligible, upper, float("inf"))
    best = smallest(pack_keys(upper, tl.broadcast_to(place, (R, CAPACITY))), KP, LOG_KP, LOG_GROUPS, 0)
    kth = tl.sum(tl.where(tl.arange(0, KP)[None, :] == K - 1, best, 0), axis=1)
    bound = widened((kth >> 32).to(tl.int32).to(tl.float32, bitcast=True), D)
    keep = eligible & ~(lower > bound[:, None])  # kept where lower is NaN too
    target = tl.cumsum(keep.to(tl.int32), axis=1) - 1
    total = tl.sum(keep.to(tl.int32), axis=1)
    certified = (count <= CAPACITY) & (total <= SHORT) & (rho < float("inf"))
    tl.store(
        gShort + row[:, None].to(tl.int64) * SHORT + target, candidate, keep & (target < SHORT) & certified[:, None]
    )
    tl.store(gShortCount + row, tl.where(certified, total, 0), used)
    failed = used & ~certified
    position = tl.atomic_add(
        gQueueCount + tl.zeros((R,), tl.int32), tl.full((R,), 1, tl.int32), mask=failed, sem="relaxed"
    )
    tl.store(gQueue + position, anchor, failed)


@triton.jit(do_not_specialize=["first_row", "rows", "K"])
def refine_kernel(
    gX, x_stride, gZ, z_stride, first_row, rows, K, D, gShort, gShortCount, gIndices, gD2,
    SHORT: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, ONE_SECTION: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """R anchors: the direct sums of their shortlists, C at a time, and their support sets."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    used = row < rows
    anchor = first_row + row
    count = tl.load(gShortCount + row, used, -1)  # -1 says what `used` does further down, and saves registers there
    best = tl.full((R, KP), NO_KEY, tl.int64)
    x_offsets = tl.where(used, anchor, first_row).to(tl.int64) * x_stride
    for first in range(0, tl.max(count, axis=0), C):
        place = first + tl.arange(0, C)[None, :]
        present = place < count[:, None]
        candidate = tl.load(gShort + row[:, None].to(tl.int64) * SHORT + place, present, 0)
        squared = listed_distances(
            gX, x_offsets, gZ, candidate.to(tl.int64) * z_stride, present, D, ONE_SECTION, UNROLL
        )
        keys = tl.where(present, pack_keys(squared, candidate), NO_KEY)
        best = merge_sorted(best, smallest(keys, KP, LOG_KP, LOG_GROUPS, 1), LOG_KP)
    # The fallback serves anchors without a shortlist; until then they have no neighbours.
    store_support(best, anchor, count >= 0, gIndices, gD2, K, KP)


# ---- the anchors that are not certified -----------------------------------------------------------


@triton.jit(do_not_specialize=["first_row", "M", "segment_size"])
def fallback_kernel(
    gX, x_stride, gZ, z_stride, gLabels, gCandidateLabels, gSelf, self_offset, first_row, M, D, segment_size,
    gQueue, gQueueCount, gKeys,
    R: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr,
    SEGMENTS: tl.constexpr, HAS_SELF: tl.constexpr, ONE_SECTION: tl.constexpr,
):  # fmt: skip
    """Queued anchors against all candidates by direct sums: lists gKeys [rows, SEGMENTS, KP].

    gKeys takes the place of the anchors' buffers. Only the device knows how many are queued, so a fixed number of
    programs shares them.
    """
    count = tl.load(gQueueCount)
    for item in range(tl.program_id(0), tl.cdiv(count, R) * SEGMENTS, tl.num_programs(0)):
        place = item // SEGMENTS * R + tl.arange(0, R)
        segment = item % SEGMENTS
        used = place < count
        anchor = tl.load(gQueue + place, used, first_row)
        own = own_index(gSelf, self_offset, anchor, used, HAS_SELF)
        begin = tl.minimum(segment * segment_size, M)
        best, _, _, _, _, _ = search_segment(
            gX, x_stride, gZ, z_stride, gLabels, gCandidateLabels, anchor, used, own,
            begin, tl.minimum(begin + segment_size, M), M, D, gKeys, place,
            C, KP, LOG_KP, LOG_GROUPS, False, False, tl.float32, ONE_SECTION,
        )  # fmt: skip
        slot = (anchor - first_row).to(tl.int64) * SEGMENTS + segment
        tl.store(gKeys + slot[:, None] * KP + tl.arange(0, KP)[None, :], best, used[:, None])


@triton.jit(do_not_specialize=["first_row", "K"])
def fallback_merge_kernel(
    gQueue, gQueueCount, gKeys, first_row, K, gIndices, gD2,
    R: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The fallback's segments of R queued anchors merged into their support sets."""
    count = tl.load(gQueueCount)
    place = tl.program_id(0) * R + tl.arange(0, R)
    if tl.program_id(0) * R < count:
        used = place < count
        anchor = tl.load(gQueue + place, used, first_row)
        slot = (anchor - first_row).to(tl.int64) * SEGMENTS
        best = merge_lists(gKeys, slot, used, SEGMENTS, KP, LOG_KP)
        store_support(best, anchor, used, gIndices, gD2, K, KP)
