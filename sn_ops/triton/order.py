"""What all kernels that select share: the one summation order, the order of candidates, sorting.

Every squared distance of this backend, whatever kernel it comes from, is the direct sum of squared differences in acc
(half-precision inputs are widened first) in one order: D is cut into sections of 2048 elements, zero-padded. In a
section lane l of 32 takes the elements l, l + 32, l + 64, ... by fused multiply-add from 0. The lanes of consecutive
sections are added one after the other. At the end adjacent lanes are added as a tree: 16 pairs, 8, 4, 2, 1. A term thus
meets at most 64 + D / 2048 + 5 roundings. NaN, which finite inputs never lead to except through an overflow of the
difference, counts as infinity.

The lanes are elements of a tensor, and every step is elementwise (`tl.fma`, `+`, `tl.split`): no `tl.sum`, whose order
is the compiler's, and no product outside a fused multiply-add, which the compiler could fuse or not. So the order does
not depend on tile sizes, layouts or the number of warps. `lane_step` and `lane_tree` are its only code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LANES = tl.constexpr(32)
SECTION = tl.constexpr(2048)

# Above the key of every candidate, also of one at infinity.
NO_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)

# Steps of `tile_distances` on their way from memory while one is summed, one less than this: copied without registers.
STAGES = tl.constexpr(4)


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
def tile_distances(gX, x_offsets, x_used, gZ, z_offsets, z_used, D, ACC: tl.constexpr, ONE_SECTION: tl.constexpr):
    """Squared distances of R rows of X and C rows of Z, [R, C] acc; offsets [R], [C] say where the rows start.

    ONE_SECTION promises D <= SECTION: adding the only section to 0 changes nothing, and saves the registers of its sum.
    """
    lane = tl.arange(0, LANES)
    total = tl.zeros((x_offsets.shape[0], z_offsets.shape[0], LANES), ACC)
    if ONE_SECTION:
        for start in tl.range(0, D, LANES, num_stages=STAGES):
            inside = start + lane < D
            a = tl.load(gX + x_offsets[:, None] + (start + lane), x_used[:, None] & inside, 0.0).to(ACC)
            b = tl.load(gZ + z_offsets[:, None] + (start + lane), z_used[:, None] & inside, 0.0).to(ACC)
            total = lane_step(a[:, None, :], b[None, :, :], total)
    else:
        for section in range(0, D, SECTION):
            part = tl.zeros_like(total)
            for start in tl.range(section, tl.minimum(section + SECTION, D), LANES, num_stages=STAGES):
                inside = start + lane < D
                a = tl.load(gX + x_offsets[:, None] + (start + lane), x_used[:, None] & inside, 0.0).to(ACC)
                b = tl.load(gZ + z_offsets[:, None] + (start + lane), z_used[:, None] & inside, 0.0).to(ACC)
                part = lane_step(a[:, None, :], b[None, :, :], part)
            total += part
    return lane_tree(total)


@triton.jit
def listed_distances(gX, x_offsets, gZ, z_offsets, z_used, D, ONE_SECTION: tl.constexpr, UNROLL: tl.constexpr):
    """Squared distances of R rows of X, each and its own C rows of Z: offsets [R] and [R, C]; [R, C] float32.

    UNROLL steps have their loads in flight together; beyond D a step adds zeros, which changes nothing.
    """
    lane = tl.arange(0, LANES)
    total = tl.zeros((z_offsets.shape[0], z_offsets.shape[1], LANES), tl.float32)
    pX = gX + x_offsets[:, None, None] + lane[None, None, :]
    pZ = gZ + z_offsets[:, :, None] + lane[None, None, :]
    if ONE_SECTION:
        for first in range(0, D, LANES * UNROLL):
            for step in tl.static_range(UNROLL):
                start = first + step * LANES
                inside = (start + lane < D)[None, None, :]
                a = tl.load(pX + start, inside, 0.0).to(tl.float32)
                b = tl.load(pZ + start, z_used[:, :, None] & inside, 0.0).to(tl.float32)
                total = lane_step(a, b, total)
    else:
        for section in range(0, D, SECTION):
            part = tl.zeros_like(total)
            for first in range(section, tl.minimum(section + SECTION, D), LANES * UNROLL):
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
    """One step of a bitonic network on the last dimension of x [R, W].

    Positions `distance` apart change places if they are out of order: ascending in even runs of `run` positions and
    descending in odd ones, the reverse with flip. Minima and maxima over an axis of 2 are fast in the interpreter,
    where tl.sort does not work.
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
    # Runs of KP, sorted up and down in turn; a single run as DESCENDING says.
    for size in tl.static_range(1, LOG_KP + 1):
        for step in tl.static_range(size):
            x = _compare_exchange(
                x, 1 << (size - 1 - step), 1 << size, DESCENDING * (LOG_GROUPS == 0) * (size == LOG_KP)
            )
    return smallest_of_runs(x, KP, LOG_KP, LOG_GROUPS, DESCENDING)


@triton.jit
def smallest_of_runs(x, KP: tl.constexpr, LOG_KP: tl.constexpr, LOG_GROUPS: tl.constexpr, DESCENDING: tl.constexpr):
    """The same of rows whose runs of KP are in order already, ascending in even runs and descending in odd ones."""
    R: tl.constexpr = x.shape[0]
    # The smaller at each place of an ascending and a descending run: the KP smallest of both, in bitonic order.
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

    Tiles come in the order of their candidates' indices, so on a tie what was found before wins.
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
    """Which candidate each anchor is itself, int32; -1 for none and for what no candidate can be."""
    if HAS_SELF:
        own = tl.load(gSelf + anchor, used, -1)
    else:
        own = tl.where(self_offset >= 0, anchor.to(tl.int64) + self_offset, -1)
    return tl.where(own <= 0x7FFFFFFF, own, -1).to(tl.int32)
