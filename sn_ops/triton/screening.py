"""Exact selection at the speed of tensor cores: screen, refine, certify. It finds what `search.search_kernel` finds.

A matrix product in half precision gives all distances roughly. With a proven bound of its error it tells which few
candidates of an anchor can be among the first K at all; direct sums in the one summation order decide between those. If
they do not fit the anchor's buffer, direct sums against all candidates serve it.

    centre_kernel          the median of a few rows
    prepare_kernel         rows -> half precision, their norms, and how far rounding moved them
    sampled_facts_kernel   norms and bounds of a sample of the candidates
    sample_kernel          upper bounds of distances to the sample, the least of each group
    threshold_kernel       K of those that are distinct bound the K-th distance from above: a threshold for each anchor
    screen_kernel          the product with all candidates; those not above the threshold go to the anchor's buffer
    shortlist_kernel       of these the ones not above the K-th smallest upper bound
    refine_kernel          their direct sums, sorted: the support set
    fallback_kernel        the anchors whose buffer or shortlist was too small, by direct sums of all pairs
    fallback_merge_kernel  the fallback's segments merged
    ranges_kernel          where each anchor's identity begins and ends among rows sorted by label (`positives.py`)
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

    near_j - 2 t rho_j - P_ij <= t^2 - n_i (1 - eta),        near_j = n_j (1 - eta) - rho_j^2

which takes four operations a pair. A sample may hold the anchor itself, so the bound is taken from K + 1 groups of it.
Rows whose norm lies outside 2^+-30 (and is not 0) are not screened: as candidates they have rho = inf, near = -inf and
are kept for every anchor, as anchors they go to the fallback. Rows with a NaN or Inf only need to do no harm, as the
loss is NaN.

## Tiles

The products have no masks. The last rows of a tile repeat the last row of the matrix. Facts of rows are padded to whole
tiles, with near = inf behind the last row: nothing is kept there. Counters and buffers are padded to whole tiles too,
and what anchors behind the last leave in theirs is never read. Half precision is a copy with zeros up to a multiple of
the tiles' depth, except for half-precision features that have this form already.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .offer import offer
from .order import NO_KEY, listed_distances, merge_sorted, own_index, pack_keys, smallest
from .search import merge_lists, search_segment, store_support

LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32

# Beyond these a row's norm squared is not screened.
LEAST_NORM = tl.constexpr(2.0**-60)
LARGEST_NORM = tl.constexpr(2.0**60)

# Roots and thresholds are rounded outwards by this much, which covers the roundings on the way to them.
UP = tl.constexpr(1.0 + 2.0**-20)
DOWN = tl.constexpr(1.0 - 2.0**-20)

# A column of an accumulator tile in so many slices: what the test of a slice needs beside it fits the registers.
SLICES = tl.constexpr(4)

FACT_ROWS = 256
"""Facts of rows are padded to a multiple of this, the widest tile."""

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


@triton.jit(do_not_specialize=["step", "count"])
def centre_kernel(gZ, stride, step, count, D, gCentre, ROWS: tl.constexpr, LOG_ROWS: tl.constexpr, C: tl.constexpr):
    """gCentre [D]: the median of rows 0, step, 2 step, ... of Z, `count` of them; 0 where it is not finite."""
    column = tl.program_id(0) * C + tl.arange(0, C)
    row = tl.arange(0, ROWS)
    inside = (row < count)[None, :] & (column < D)[:, None]
    x = tl.load(gZ + (row * step).to(tl.int64)[None, :] * stride + column[:, None], inside, float("inf"))
    x = smallest(tl.where(x == x, x, float("inf")), ROWS, LOG_ROWS, 0, 0)
    middle = tl.sum(tl.where((row == count // 2)[None, :], x, 0.0), axis=1)
    tl.store(gCentre + column, tl.where(tl.abs(middle) < float("inf"), middle, 0.0), column < D)


@triton.jit(do_not_specialize=["rows", "padded", "first_flag"])
def prepare_kernel(
    gX, stride, rows, padded, D, depth, gCentre, gH, h_stride, gScale, gNorm, gRho, gNear, gFlags, first_flag,
    CAST: tl.constexpr, COPY: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of X -> gH [rows, depth] (if CAST or COPY), and the facts [padded] gScale (2^-e), gNorm (n), gRho, gNear.

    gFlags[first_flag + program] = 1 if a value of the program's rows is not finite, else 0.
    """
    poisoned = tl.zeros((R,), tl.int32)
    for first in range(tl.program_id(0) * R, padded, tl.num_programs(0) * R):
        row = first + tl.arange(0, R)
        used = row < rows
        base = row.to(tl.int64) * stride
        largest = tl.zeros((R, BLOCK), tl.float32)
        bad = tl.zeros((R, BLOCK), tl.int32)
        for start in range(0, D, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(gX + base[:, None] + column, used[:, None] & (column < D), 0.0).to(tl.float32)
            finite = x * 0 == 0
            bad |= (~finite).to(tl.int32)
            if CAST:
                x -= tl.load(gCentre + column, column < D, 0.0)[None, :]
            largest = tl.maximum(largest, tl.where(finite, tl.abs(x), 0.0))
        largest = tl.max(largest, axis=1)
        bad = tl.max(bad, axis=1)
        poisoned |= bad

        if CAST:
            exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
            sane = (exponent >= -60) & (exponent <= 60)
            exponent = tl.where(sane, exponent, TOP_EXPONENT)
            up = ((-exponent + (127 + TOP_EXPONENT)) << 23).to(tl.float32, bitcast=True)  # 2^e
            down = ((exponent + (127 - TOP_EXPONENT)) << 23).to(tl.float32, bitcast=True)
        else:
            up = tl.full((R,), 1.0, tl.float32)
            down = up
        norm = tl.zeros((R, BLOCK), tl.float32)
        moved = tl.zeros((R, BLOCK), tl.float32)
        full = tl.zeros((R, BLOCK), tl.float32)
        for start in range(0, depth, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = used[:, None] & (column < D)
            x = tl.load(gX + base[:, None] + column, inside, 0.0)
            h = x
            x = tl.where((bad > 0)[:, None], 0.0, x.to(tl.float32))
            if CAST:
                centre = tl.load(gCentre + column, column < D, 0.0)[None, :]
                x = tl.where(inside & (bad == 0)[:, None], x - centre, 0.0)
                v = tl.where(sane[:, None], x * up[:, None], 0.0)
                h = v.to(tl.float16)
                wide = h.to(tl.float32)
                moved += (v - wide) * (v - wide)
                full += v * v
            else:
                wide = x
            if CAST or COPY:
                # Columns behind D are zero: the product's loop runs over whole blocks.
                tl.store(gH + row[:, None].to(tl.int64) * h_stride + column, h, used[:, None] & (column < depth))
            norm += wide * wide
        norm = tl.sum(norm, axis=1) * down * down
        screenable = (norm >= LEAST_NORM) & (norm <= LARGEST_NORM)
        if CAST:
            # The measured residual and the rounding of x - m. 1.001 is for the roundings of the sums, and for squares
            # that underflow: the largest element alone makes the second term more than 2^-12.
            rho = tl.sqrt(tl.sum(moved, axis=1)) + tl.sqrt(tl.sum(full, axis=1)) * (2.0**-24)
            rho = rho * down * 1.001
        else:
            rho = tl.zeros((R,), tl.float32)
        screenable = screenable | (largest == 0.0)
        harmless = (bad > 0) | ~used
        rho = tl.where(harmless | (largest == 0.0), 0.0, tl.where(screenable, rho, float("inf")))
        norm = tl.where(screenable & ~harmless, norm, 0.0)
        near = norm * (1.0 - eta_of(depth)) - rho * rho
        filled = row < padded
        tl.store(gScale + row, down, filled)
        tl.store(gNorm + row, norm, filled)
        tl.store(gRho + row, rho, filled)
        tl.store(gNear + row, tl.where(used, near, float("inf")), filled)
    tl.store(gFlags + first_flag + tl.program_id(0), tl.max(poisoned, axis=0))


# ---- products -----------------------------------------------------------------------------------


@triton.jit
def products(
    gA, a_stride, a_first, a_last, gB, b_stride, b_offsets, D, BM: tl.constexpr, BK: tl.constexpr, PLAIN: tl.constexpr
):
    """[BM, BN] float32 inner products of rows a_first, a_first + 1, ... of A, the last of them a_last, and rows of B.

    `b_offsets` [BN] says where these start, in 32 bits: an address is one of 64 bits and an offset, which takes half
    the registers. BK divides D. PLAIN is for the interpreter, whose product of bfloat16 is wrong: products are exact
    and summed in float32 anyway.
    """
    # A loop that may not run would have its accumulators initialised behind the compiler's back: products in flight
    # (wgmma) could not overlap it.
    tl.assume(D > 0)
    k = tl.arange(0, BK)
    gA += a_first.to(tl.int64) * a_stride
    a_offsets = (tl.minimum(tl.arange(0, BM), a_last - a_first) * a_stride)[:, None] + k[None, :]
    b_offsets = b_offsets[None, :] + k[:, None]
    total = tl.zeros((BM, b_offsets.shape[1]), tl.float32)
    for start in range(0, D, BK):
        a = tl.load(gA + start + a_offsets)
        b = tl.load(gB + start + b_offsets)
        if PLAIN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total)
    return total


@triton.jit
def halves(x):
    """The left and the right half of a matrix's columns. Compiled, no value moves: a thread has some of each."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (R, 2, C // 2)), (0, 2, 1)))


@triton.jit
def slices(x):
    """The SLICES parts of a matrix's columns, from left to right."""
    left, right = halves(x)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


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
    """The root of an estimate of a square, which may be a little below 0; NaN, which bounds nothing, stays NaN."""
    return tl.sqrt(tl.maximum(squared, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def sampled(sample, stride):
    """The candidate that a sample is: one of candidates sample * stride to (sample + 1) * stride - 1.

    Which one is as if at random: identities that repeat with a period must not escape the sample.
    """
    return sample * stride + ((((sample * 40503) & 0xFFFF) * stride) >> 16)


@triton.jit(do_not_specialize=["samples", "padded", "stride"])
def sampled_facts_kernel(gScale, gNorm, gRho, samples, padded, stride, D, gFacts, R: tl.constexpr):
    """Facts of the samples one behind the other, gFacts [3, padded]: 2^-e, n (1 + eta) and rho.

    Those that bound nothing have n = inf: candidates that are not screened, and what lies behind the last sample.
    """
    sample = tl.program_id(0) * R + tl.arange(0, R)
    present = sample < samples
    candidate = sampled(sample, stride)
    rho = tl.load(gRho + candidate, present, float("inf"))
    bounds = rho < float("inf")
    norm = tl.load(gNorm + candidate, present, 0.0) * (1.0 + eta_of(D))
    inside = sample < padded
    tl.store(gFacts + sample, tl.load(gScale + candidate, present, 0.0), inside)
    tl.store(gFacts + padded + sample, tl.where(bounds, norm, float("inf")), inside)
    tl.store(gFacts + 2 * padded + sample, tl.where(bounds, rho, 0.0), inside)


@triton.jit(do_not_specialize=["first_row", "rows", "samples", "stride", "groups"])
def sample_kernel(
    gA, a_stride, gAScale, gANorm, gARho, gB, b_stride, gFacts, padded,
    first_row, rows, samples, stride, D, gLeast, groups,
    GROUP_SIZE: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """gLeast [rows, groups]: the least U_ij of groups of GROUP_SIZE samples, BN / GROUP_SIZE groups a tile.

    A group has samples from every slice: the least of these is taken where the products lie. With UNIT (see
    `screen_kernel`) one root serves a group.
    """
    W: tl.constexpr = BN // SLICES
    WIDTH: tl.constexpr = GROUP_SIZE // SLICES  # samples of a group in one slice
    tile_m, tile_n = tile_of(tl.cdiv(rows, BM), tl.cdiv(samples, BN), GROUP)
    row = tile_m * BM + tl.arange(0, BM)
    used = row < rows
    b_first = tile_n * BN
    # Offsets from the tile's first sample stay within 32 bits.
    candidate = sampled(tl.minimum(b_first + tl.arange(0, BN), samples - 1), stride) - b_first * stride
    product = products(
        gA, a_stride, first_row + tile_m * BM, first_row + rows - 1,
        gB + (b_first * stride).to(tl.int64) * b_stride, b_stride, candidate * b_stride, D, BM, BK, PLAIN,
    )  # fmt: skip
    scale = -2.0 * tl.load(gAScale + first_row + row, used, 0.0)[:, None]
    norm = (tl.load(gANorm + first_row + row, used, 0.0) * (1.0 + eta_of(D)))[:, None]
    rho = tl.load(gARho + first_row + row, used, 0.0)[:, None]
    parts = slices(product)
    least = tl.full((BM, W), float("inf"), tl.float32)
    for part in tl.static_range(SLICES):
        sample = b_first + part * W + tl.arange(0, W)
        norms = norm + tl.load(gFacts + padded + sample)[None, :]
        if UNIT:
            upper = tl.fma(parts[part], -2.0, norms)
        else:
            upper = tl.fma(scale, parts[part] * tl.load(gFacts + sample)[None, :], norms)
            upper = tl.fma(bounded(upper), UP, tl.load(gFacts + 2 * padded + sample)[None, :])
        least = tl.minimum(least, tl.where(upper == upper, upper, float("inf")))
    if WIDTH > 1:
        least = tl.min(tl.reshape(least, (BM, W // WIDTH, WIDTH)), axis=2)
    if UNIT:
        least = bounded(least) * UP
    group = tile_n * (W // WIDTH) + tl.arange(0, W // WIDTH)
    tl.store(gLeast + row[:, None].to(tl.int64) * groups + group[None, :], least + rho, used[:, None])


@triton.jit(do_not_specialize=["groups", "first_row", "rows", "padded", "K"])
def threshold_kernel(
    gLeast, groups, first_row, rows, padded, K, D, gNorm, gRho, gCount, gQueueCount, gLimit, gTwice,
    C: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The right side of the test above, gLimit [rows], and 2 t, gTwice [rows]; clears the counters, gCount [padded]."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    used = row < rows
    base = row[:, None].to(tl.int64) * groups
    best = tl.full((R, KP), NO_KEY, tl.int64)
    for first in range(0, groups, C):
        group = first + tl.arange(0, C)[None, :]
        least = tl.load(gLeast + base + group, used[:, None] & (group < groups), float("inf"))
        keys = pack_keys(least, tl.broadcast_to(group, (R, C)))
        best = merge_sorted(best, smallest(keys, KP, LOG_KP, LOG_GROUPS, 1), LOG_KP)
    # The (K + 1)-th: one of the groups may owe its bound to the anchor itself.
    wanted = tl.sum(tl.where(tl.arange(0, KP)[None, :] == K, best, 0), axis=1)
    upper = (wanted >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    norm = tl.load(gNorm + first_row + row, used, 0.0)
    rho = tl.load(gRho + first_row + row, used, 0.0)
    t = (widened(upper, D) + rho) * UP
    # Finite where t is not: near = inf, behind the last candidate, must stay above it.
    limit = tl.minimum(t * t * UP - norm * (1.0 - eta_of(D)), LARGEST)
    # An anchor that is not screened keeps nothing here, and goes to the fallback.
    screened = rho < float("inf")
    tl.store(gLimit + row, tl.where(screened, limit, -float("inf")), used)
    tl.store(gTwice + row, tl.where(screened, tl.minimum(2.0 * t, LARGEST), 0.0), used)
    tl.store(gCount + row, tl.zeros((R,), tl.int32), row < padded)
    if tl.program_id(0) == 0:
        tl.store(gQueueCount, 0)


@triton.jit(do_not_specialize=["first_row", "rows", "M"])
def screen_kernel(
    gA, a_stride, gAScale, gB, b_stride, gBScale, gBRho, gBNear, gLimit, gTwice,
    first_row, rows, M, D, gCount, gBuffer,
    CAPACITY: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """The candidates that can matter to each anchor, with their products: gBuffer [rows, CAPACITY] in any order.

    gCount [rows]; above CAPACITY it says that the buffer was too small. Integer atomics count; sorting the keys undoes
    the order that they lead to. UNIT promises that scales are 1 and every rho is 0, or near = -inf in its place.
    """
    tile_m, tile_n = tile_of(tl.cdiv(rows, BM), tl.cdiv(M, BN), GROUP)
    row = tile_m * BM + tl.arange(0, BM)
    used = row < rows
    b_first = tile_n * BN
    product = products(
        gA, a_stride, first_row + tile_m * BM, first_row + rows - 1,
        gB + b_first.to(tl.int64) * b_stride, b_stride, tl.minimum(tl.arange(0, BN), M - 1 - b_first) * b_stride,
        D, BM, BK, PLAIN,
    )  # fmt: skip
    limit = tl.load(gLimit + row, used, -float("inf"))[:, None]
    twice = -tl.load(gTwice + row, used, 0.0)[:, None]
    scale = -2.0 * tl.load(gAScale + first_row + row, used, 0.0)[:, None]
    parts = slices(product)
    W: tl.constexpr = BN // SLICES
    for part in tl.static_range(SLICES):
        candidate = b_first + part * W + tl.arange(0, W)
        # A candidate that is not screened has near = -inf: every anchor keeps it. NaN, from a product beyond float32 or
        # 0 times inf, is kept too.
        value = tl.load(gBNear + candidate)[None, :]
        if UNIT:
            value = tl.fma(parts[part], -2.0, value)
        else:
            value = tl.fma(twice, tl.load(gBRho + candidate)[None, :], value)
            value = tl.fma(scale, parts[part] * tl.load(gBScale + candidate)[None, :], value)
        offer(value, limit, parts[part], candidate, row, gCount, gBuffer, CAPACITY, PLAIN)


# ---- from the buffers to the support sets ---------------------------------------------------------


@triton.jit
def buffered(gBuffer, first, here, own, scale, norm, rho, gBScale, gBNorm, gBRho, M, D, C: tl.constexpr):
    """C entries of the anchors' buffers from `first` on: candidates, whether they are eligible, L_ij and U_ij, [R, C].

    `here` says how many entries there are. U_ij is inf where a candidate is not eligible. Features with a NaN or Inf
    lead to candidates behind the last, which are not.
    """
    place = first + tl.arange(0, C)[None, :]
    filled = place < here[:, None]
    entry = tl.load(gBuffer + place, filled, 0)
    candidate = entry.to(tl.int32)
    eligible = filled & (candidate < M) & (candidate != own[:, None])
    product = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    product = scale[:, None] * (product * tl.load(gBScale + candidate, eligible, 0.0))
    norms = norm[:, None] + tl.load(gBNorm + candidate, eligible, 0.0)
    rhos = rho[:, None] + tl.load(gBRho + candidate, eligible, 0.0)
    eta = eta_of(D)
    upper = bounded(norms * (1.0 + eta) - product) * UP + rhos
    upper = tl.where(eligible & (upper == upper), upper, float("inf"))
    lower = tl.sqrt(tl.maximum(norms * (1.0 - eta) - product, 0.0)) * DOWN - rhos
    return candidate, eligible, lower, upper


@triton.jit(do_not_specialize=["self_offset", "first_row", "rows", "M", "K"], do_not_specialize_on_alignment=["gSelf"])
def shortlist_kernel(
    gAScale, gANorm, gARho, gBScale, gBNorm, gBRho, gSelf, self_offset, first_row, rows, M, K, D,
    gCount, gBuffer, gShort, gShortCount, gQueue, gQueueCount,
    HAS_SELF: tl.constexpr, CAPACITY: tl.constexpr, SHORT: tl.constexpr,
    KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The candidates in an anchor's buffer that are not above the K-th smallest upper bound in that buffer.

    gShort [rows, SHORT], gShortCount [rows]. Anchors with too small a buffer or shortlist are queued for the fallback.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    used = row < rows
    anchor = first_row + row
    own = own_index(gSelf, self_offset, anchor, used, HAS_SELF)
    count = tl.load(gCount + row, used, 0)
    here = tl.minimum(count, CAPACITY)
    scale = 2.0 * tl.load(gAScale + anchor, used, 0.0)
    norm = tl.load(gANorm + anchor, used, 0.0)
    rho = tl.load(gARho + anchor, used, 0.0)
    gBuffer += row[:, None].to(tl.int64) * CAPACITY
    best = tl.full((R, KP), NO_KEY, tl.int64)
    for first in range(0, tl.max(here, axis=0), C):
        _, _, _, upper = buffered(gBuffer, first, here, own, scale, norm, rho, gBScale, gBNorm, gBRho, M, D, C)
        keys = pack_keys(upper, tl.broadcast_to(first + tl.arange(0, C)[None, :], (R, C)))
        best = merge_sorted(best, smallest(keys, KP, LOG_KP, LOG_GROUPS, 1), LOG_KP)
    kth = tl.sum(tl.where(tl.arange(0, KP)[None, :] == K - 1, best, 0), axis=1)
    bound = widened((kth >> 32).to(tl.int32).to(tl.float32, bitcast=True), D)
    total = tl.zeros((R,), tl.int32)
    for first in range(0, tl.max(here, axis=0), C):
        candidate, eligible, lower, _ = buffered(
            gBuffer, first, here, own, scale, norm, rho, gBScale, gBNorm, gBRho, M, D, C
        )
        keep = eligible & ~(lower > bound[:, None])  # kept where lower is NaN too
        target = total[:, None] + tl.cumsum(keep.to(tl.int32), axis=1) - 1
        tl.store(gShort + row[:, None].to(tl.int64) * SHORT + target, candidate, keep & (target < SHORT))
        total += tl.sum(keep.to(tl.int32), axis=1)
    certified = (count <= CAPACITY) & (total <= SHORT) & (rho < float("inf"))
    tl.store(gShortCount + row, tl.where(certified, total, 0), used)
    failed = used & ~certified
    position = tl.atomic_add(
        gQueueCount + tl.zeros((R,), tl.int32), tl.full((R,), 1, tl.int32), mask=failed, sem="relaxed"
    )
    tl.store(gQueue + position, anchor, failed)


@triton.jit(do_not_specialize=["first_row", "rows", "K"], do_not_specialize_on_alignment=["gIndices"])
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


@triton.jit(
    do_not_specialize=["self_offset", "first_row", "M", "segment_size"],
    do_not_specialize_on_alignment=["gLabels", "gCandidateLabels", "gSelf"],
)
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


@triton.jit(do_not_specialize=["first_row", "K"], do_not_specialize_on_alignment=["gIndices"])
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
