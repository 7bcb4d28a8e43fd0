"""near and far of every anchor: direct sums within identities, rows sorted by label.

Candidates in the order of labels, and of indices within a label, are places 0 to M - 1. The positives of an anchor are
the places begin to end of its identity, found by bisection. A group of R anchors that follow each other in the order of
labels needs the places of its own identities and no others. With end_-1 = 0 anchor r adds to those of the anchors
before it in the group

    size_r = end_r - start_r places,        start_r = max(begin_r, end_{r-1}),

none if it shares an identity with the anchor before it, or has no candidate. Counted through they are 0 to V - 1:
anchor r's begin at first_r = size_0 + .. + size_{r-1}, and v is the place

    v + max over r with first_r <= v of (start_r - first_r),

since what is jumped over before anchor r, start_r - first_r, grows with r. A tile takes C of them, whatever lies
between: identities without an anchor cost nothing, and small ones share a tile. The V / C tiles of a group go to
programs in equal parts, segments, whose extremes `loss_kernel` merges: least and largest d2, the lower index on a tie.
Within a program extremes are keys of d2 and index, so no order of tiles matters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import order, tuning
from .batch import Batch, row_facts
from .launch import launch, workspace
from .order import NO_KEY, own_index, pack_keys, tile_distances
from .tuning import cdiv

# Below the far key of every candidate. A far key has the index's complement: on a tie the least index is the greatest.
NO_FAR_KEY = tl.constexpr(-1)
LAST_INDEX = tl.constexpr(0x7FFFFFFF)


@triton.jit
def halved(gSorted, low, high, label, used, AFTER: tl.constexpr):
    """One step of a bisection of places low to high for the first label that is not less, or AFTER: that is greater."""
    middle = low + (high - low) // 2
    inside = used & (low < high)
    value = tl.load(gSorted + middle, inside, 0)
    before = inside & (value <= label if AFTER else value < label)
    return tl.where(before, middle + 1, low), tl.where(before, high, middle)


@triton.jit(do_not_specialize=["N", "M", "steps"], do_not_specialize_on_alignment=["gLabels"])
def ranges_kernel(gLabels, gAnchorOrder, gSorted, N, M, steps, gBegin, gEnd, R: tl.constexpr):
    """Places gBegin to gEnd of each anchor's identity in gSorted [M], for anchors in the order of labels.

    A step leaves less than half of the places, so as many steps as M has bits leave none.
    """
    rank = tl.program_id(0) * R + tl.arange(0, R)
    used = rank < N
    label = tl.load(gLabels + tl.load(gAnchorOrder + rank, used, 0), used, 0)
    begin = tl.zeros((R,), tl.int32)
    end = tl.zeros((R,), tl.int32)
    begin_high = begin + M
    end_high = end + M
    for _ in range(steps):
        begin, begin_high = halved(gSorted, begin, begin_high, label, used, False)
        end, end_high = halved(gSorted, end, end_high, label, used, True)
    tl.store(gBegin + rank, begin, used)
    tl.store(gEnd + rank, end, used)


@triton.jit
def distance_of(key):
    """The squared distance in a key."""
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["self_offset", "N", "segments"], do_not_specialize_on_alignment=["gSelf"])
def positives_kernel(
    gX, x_stride, gZ, z_stride, gSelf, self_offset, gAnchorOrder, gCandidateOrder, gBegin, gEnd, N, D, segments,
    gNearD2, gNear, gFarD2, gFar,
    R: tl.constexpr, C: tl.constexpr, HAS_SELF: tl.constexpr, ONE_SECTION: tl.constexpr,
):  # fmt: skip
    """R anchors that follow each other in the order of labels, against their segment of their own candidates.

    gNearD2, gNear, gFarD2, gFar [N, segments]: the nearest positive of a segment, and the farthest; index -1 for none.
    """
    group = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    rank = group * R + tl.arange(0, R)
    used = rank < N
    anchor = tl.load(gAnchorOrder + rank, used, 0)
    own = own_index(gSelf, self_offset, anchor, used, HAS_SELF)
    begin = tl.load(gBegin + rank, used, 0)
    end = tl.load(gEnd + rank, used, 0)
    start = tl.maximum(begin, tl.load(gEnd + rank - 1, used & (rank > group * R), 0))
    size = tl.where(used, end - start, 0)
    first = tl.cumsum(size, axis=0) - size
    jumped = start - first
    wanted = tl.sum(size, axis=0)
    near = tl.full((R,), NO_KEY, tl.int64)
    far = tl.full((R,), NO_FAR_KEY, tl.int64)
    share = tl.cdiv(tl.cdiv(wanted, C), segments) * C
    for tile in range(segment * share, tl.minimum(segment * share + share, wanted), C):
        number = tile + tl.arange(0, C)
        present = number < wanted
        place = number + tl.max(tl.where(first[:, None] <= number[None, :], jumped[:, None], 0), axis=0)
        candidate = tl.load(gCandidateOrder + place, present, 0)
        same = used[:, None] & present[None, :] & (candidate[None, :] != own[:, None])
        same = same & (place[None, :] >= begin[:, None]) & (place[None, :] < end[:, None])
        # Anchors that are their identity's only candidate read no row.
        if tl.max(tl.max(same.to(tl.int32), axis=1), axis=0) > 0:
            squared = tile_distances(
                gX, anchor * x_stride, used, gZ, candidate * z_stride, present, D, tl.float32, ONE_SECTION
            )
            index = candidate.to(tl.int32)[None, :]
            near = tl.minimum(near, tl.min(tl.where(same, pack_keys(squared, index), NO_KEY), axis=1))
            far_keys = pack_keys(squared, index ^ LAST_INDEX)
            far = tl.maximum(far, tl.max(tl.where(same, far_keys, NO_FAR_KEY), axis=1))
    slot = anchor * segments + segment
    found = near != NO_KEY
    tl.store(gNearD2 + slot, tl.where(found, distance_of(near), float("inf")), used)
    tl.store(gNear + slot, tl.where(found, near.to(tl.int32), -1), used)
    tl.store(gFarD2 + slot, tl.where(found, distance_of(far), -1.0), used)
    tl.store(gFar + slot, tl.where(found, far.to(tl.int32) ^ LAST_INDEX, -1), used)


class Positives(NamedTuple):
    """near and far of every anchor among the candidates of each of S segments, as `Selection` has them."""

    near_d2: Any  # [N, S] float32
    near: Any  # [N, S] int32, -1 for none
    far_d2: Any
    far: Any
    segments: int  # S
    memory: Any  # of the others, which are parts of a `launch.workspace`


def find(batch: Batch) -> Positives:
    """near and far of every anchor, from direct sums within identities."""
    n, m, d = batch.sizes
    labels, candidate_order = batch.candidate_labels.sort(stable=True)
    anchor_order = candidate_order if batch.symmetric else batch.labels.sort(stable=True).indices
    plan = tuning.positives_plan(n, m)
    facts = row_facts(batch)
    one, each = (torch.int32, (n,)), (n, plan.segments)
    begin, end, *extremes, memory = workspace(
        batch.feats.device, one, one,
        (torch.float32, each), (torch.int32, each), (torch.float32, each), (torch.int32, each),
    )  # fmt: skip
    launch(
        ranges_kernel, (cdiv(n, plan.block),), facts,
        batch.labels, anchor_order, labels, n, m, m.bit_length(), begin, end,
        R=plan.block,
    )  # fmt: skip
    launch(
        positives_kernel, (cdiv(n, plan.rows) * plan.segments,), facts,
        batch.feats, batch.feats.stride(0), batch.candidates, batch.candidates.stride(0),
        *batch.self_arguments(), anchor_order, candidate_order, begin, end, n, d, plan.segments, *extremes,
        R=plan.rows, C=plan.columns, HAS_SELF=batch.self_index is not None, ONE_SECTION=d <= order.SECTION.value,
        warps=plan.warps,
    )  # fmt: skip
    return Positives._make([*extremes, plan.segments, memory])
