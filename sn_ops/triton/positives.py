"""near and far of every anchor: direct sums within identities, rows sorted by label."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import order, tuning
from .batch import Batch, Selection
from .order import own_index, tile_distances, update_extremes
from .tuning import cdiv


@triton.jit(do_not_specialize=["N"])
def positives_kernel(
    gX, x_stride, gZ, z_stride, gLabels, gCandidateLabels, gSelf, self_offset, gAnchorOrder, gCandidateOrder,
    gBegin, gEnd, N, D, gNearD2, gNear, gFarD2, gFar,
    R: tl.constexpr, C: tl.constexpr, HAS_SELF: tl.constexpr, ONE_SECTION: tl.constexpr,
):  # fmt: skip
    """near and far of R anchors that follow each other in the order of labels.

    The candidates are in the same order; read are those from the first anchor's identity to the last one's. Within an
    identity the order is that of indices.
    """
    place = tl.program_id(0) * R + tl.arange(0, R)
    used = place < N
    anchor = tl.load(gAnchorOrder + place, used, 0)
    own = own_index(gSelf, self_offset, anchor, used, HAS_SELF)
    label = tl.load(gLabels + anchor, used, 0)
    begin = tl.min(tl.load(gBegin + place, used, 0x7FFFFFFF), axis=0)
    end = tl.max(tl.load(gEnd + place, used, 0), axis=0)
    near_d2 = tl.full((R,), float("inf"), tl.float32)
    near = tl.full((R,), -1, tl.int32)
    far_d2 = tl.full((R,), -1.0, tl.float32)
    far = tl.full((R,), -1, tl.int32)
    for first in range(begin, end, C):
        position = first + tl.arange(0, C)
        present = position < end
        candidate = tl.load(gCandidateOrder + position, present, 0)
        squared = tile_distances(
            gX, anchor * x_stride, used, gZ, candidate * z_stride, present, D, tl.float32, ONE_SECTION
        )
        same = used[:, None] & present[None, :] & (candidate[None, :] != own[:, None])
        same = same & (tl.load(gCandidateLabels + candidate, present, 0)[None, :] == label[:, None])
        near_d2, near, far_d2, far = update_extremes(squared, same, candidate.to(tl.int32), near_d2, near, far_d2, far)
    tl.store(gNearD2 + anchor, near_d2, used)
    tl.store(gNear + anchor, near, used)
    tl.store(gFarD2 + anchor, far_d2, used)
    tl.store(gFar + anchor, far, used)


def find(batch: Batch, selection: Selection) -> None:
    """near and far of every anchor, from direct sums within identities."""
    n, _, d = batch.sizes
    labels, candidate_order = batch.candidate_labels.sort(stable=True)
    anchor_order = candidate_order if batch.symmetric else batch.labels.sort(stable=True).indices
    ordered = batch.labels[anchor_order]
    begin = torch.searchsorted(labels, ordered, out_int32=True)
    end = torch.searchsorted(labels, ordered, right=True, out_int32=True)
    plan = tuning.search_plan(n, batch.sizes[1], 1, False, False)
    positives_kernel[(cdiv(n, plan.rows),)](
        batch.feats, batch.feats.stride(0), batch.candidates, batch.candidates.stride(0),
        batch.labels, batch.candidate_labels, *batch.self_arguments(), anchor_order, candidate_order, begin, end, n, d,
        *selection[1:],
        R=plan.rows, C=plan.columns, HAS_SELF=batch.self_index is not None, ONE_SECTION=d <= order.SECTION.value,
        num_warps=plan.warps, **order.EXACT,
    )  # fmt: skip
