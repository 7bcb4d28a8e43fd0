"""The launches of a selection by direct sums of all pairs: `search.search_kernel`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import order, search, tuning
from .batch import Batch, Found, Selection, row_facts
from .launch import launch, workspace
from .loss import RECORD_SIZE
from .tuning import cdiv


def select(batch: Batch, neighbours: int, acc: torch.dtype, loss_programs: int, indices: Tensor) -> Found:
    """The selection, its lists not merged; of large k and of float64 the support sets, in `indices`."""
    n, m, d = batch.sizes
    device = batch.feats.device
    wide = acc == torch.float64
    # float64 keys do not pack, and long lists do not fit registers: those rows are sorted whole.
    dense = wide or neighbours > tuning.MAX_LISTED_K
    strip = tuning.dense_rows(n, m) if dense else max(n, 1)
    plan = tuning.search_plan(strip, m, neighbours, wide, dense, d <= order.SECTION.value)
    segments = plan.segments
    programs = cdiv(strip, plan.rows) * segments
    flags = cdiv(max(n, 1), strip) * programs
    *parts, gFlags, gRecords, memory = workspace(
        device,
        (torch.int64, (0,) if dense else (n, segments, plan.list_size)),
        (acc, (n, segments)), (torch.int32, (n, segments)), (acc, (n, segments)), (torch.int32, (n, segments)),
        (torch.int32, (flags,)),
        (torch.float64, (loss_programs, RECORD_SIZE.value)),
    )  # fmt: skip
    keys, *extremes = parts
    # Lists hold their distances: what stands for these is not read.
    d2 = torch.empty((n, neighbours), dtype=acc, device=device) if dense else extremes[0]
    facts = row_facts(batch)
    for place, first in enumerate(range(0, max(n, 1), strip)):
        rows = min(strip, n - first)
        squared = torch.empty((rows, m), dtype=acc, device=device) if dense else extremes[0]
        launch(
            search.search_kernel, (programs,), facts,
            batch.feats, batch.feats.stride(0), batch.candidates, batch.candidates.stride(0),
            batch.labels, batch.candidate_labels, *batch.self_arguments(),
            first, rows, m, d, segments, plan.segment_size, gFlags, place * programs, keys, *extremes, squared,
            R=plan.rows, C=plan.columns, KP=plan.list_size, LOG_KP=plan.list_size.bit_length() - 1,
            LOG_GROUPS=(plan.columns // plan.list_size).bit_length() - 1,
            HAS_SELF=batch.self_index is not None, DENSE=dense, ACC=order.type_of(acc),
            ONE_SECTION=d <= order.SECTION.value,
            warps=plan.warps,
        )  # fmt: skip
        if dense and rows:
            # A stable sort leaves ties in the order of indices. NaN, an anchor itself, comes behind infinity.
            ordered, candidate = squared.sort(dim=1, stable=True)
            ordered, candidate = ordered[:, :neighbours], candidate[:, :neighbours]
            itself = ordered.isnan()
            d2[first : first + rows] = ordered.masked_fill(itself, torch.inf)
            indices[first : first + rows, :neighbours] = candidate.masked_fill(itself, -1)
    return Found(Selection(d2, *extremes), segments, None if dense else keys, gFlags, flags, gRecords, memory)
