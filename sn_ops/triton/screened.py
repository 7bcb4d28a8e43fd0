"""The launches of a screened selection: the kernels of `screening.py`, in strips of anchors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import order, positives, screening, tuning
from .batch import Batch, Found, Selection
from .launch import EXACT
from .loss import RECORD_SIZE
from .tuning import cdiv


class Screened(NamedTuple):
    """Rows as the products take them, one entry a row of the matrix they were made from."""

    half: Tensor  # [rows, D or more] half precision
    scale: Tensor  # [rows] what a product is multiplied by
    norm: Tensor
    rho: Tensor


def _centre(rows: Tensor) -> Tensor:
    """[D] float32: the median of a few rows, about the middle of all; neither outliers nor NaN move it."""
    few = rows[:: max(1, rows.shape[0] // 64)][:64]
    middle = few.sort(dim=0).values[few.shape[0] // 2]
    return middle.nan_to_num(0.0, 0.0, 0.0)


def _vectors(count: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, n] with every row aligned to 16 bytes: for other alignments Triton would compile a kernel again."""
    return torch.empty((count, cdiv(n, 4) * 4), dtype=dtype, device=device)[:, :n]


def _prepare(rows: Tensor, centre: Tensor | None, flags: Tensor, first_flag: int, block_rows: int) -> Screened:
    n, d = rows.shape
    half = rows if centre is None else rows.new_empty((n, cdiv(d, 64) * 64), dtype=torch.float16)
    scale, norm, rho = _vectors(3, n, torch.float32, rows.device)
    if n:
        screening.prepare_kernel[(cdiv(n, block_rows),)](
            rows, rows.stride(0), n, d, rows if centre is None else centre, half, half.stride(0),
            scale, norm, rho, flags, first_flag,
            CAST=centre is not None, R=block_rows, BLOCK=512, num_warps=4, **EXACT,
        )  # fmt: skip
    return Screened(half, scale, norm, rho)


def select(batch: Batch, neighbours: int, plan: tuning.ScreenPlan, indices: Tensor, selection: Selection) -> Tensor:
    """Selection through products of half precision; returns the flags of `_inspect`."""
    n, m, d = batch.sizes
    device = batch.feats.device
    block_rows = 256 if tuning.INTERPRETED else 4
    own_flags = cdiv(n, block_rows)
    flags = torch.empty(own_flags + (0 if batch.symmetric else cdiv(m, block_rows)), dtype=torch.int32, device=device)
    centre = _centre(batch.candidates) if batch.feats.dtype == torch.float32 else None
    anchors = _prepare(batch.feats, centre, flags, 0, block_rows)
    pool = anchors if batch.symmetric else _prepare(batch.candidates, centre, flags, own_flags, block_rows)
    depth = anchors.half.shape[1]
    product = {
        "BM": plan.tile[0], "BN": plan.tile[1], "BK": plan.tile[2], "GROUP": 8, "EVEN": depth % plan.tile[2] == 0,
        "UPCAST": tuning.INTERPRETED, "num_warps": plan.warps, "num_stages": plan.stages, **EXACT,
    }  # fmt: skip

    def new(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    strip = plan.strip
    least = new(strip, plan.groups, dtype=torch.float32)
    limit, twice = _vectors(2, strip, torch.float32, device)
    count, short_count, queue = _vectors(3, strip, torch.int32, device)
    queue_count = new(1)
    buffer = new(strip, plan.capacity, dtype=torch.int64)
    short = new(strip, plan.short)
    log_kp = plan.list_size.bit_length() - 1
    width = max(tuning.power_of_two(neighbours + 1), 2)  # of the thresholds' lists, which hold one key more
    sample_width = max(width, tuning.power_of_two(plan.groups))
    # Widening half precision beside the fallback's loop takes registers: half the pairs of a tile, as for float64.
    direct = tuning.search_plan(n, m, neighbours, batch.feats.dtype != torch.float32, False)
    one_section = d <= order.SECTION.value
    has_self = batch.self_index is not None

    def groups_of(wide: int, narrow: int) -> int:
        return (wide // narrow).bit_length() - 1

    for first in range(0, n, strip):
        rows = min(strip, n - first)
        row_tiles = cdiv(rows, plan.tile[0])
        screening.sample_kernel[(row_tiles * cdiv(plan.samples, plan.tile[1]),)](
            anchors.half, anchors.half.stride(0), *anchors[1:], pool.half, pool.half.stride(0), *pool[1:],
            first, rows, plan.samples, plan.stride, depth, least, plan.groups, GROUP_SIZE=plan.group_size, **product,
        )  # fmt: skip
        block = min(64, tuning.power_of_two(rows)) if tuning.INTERPRETED else max(1, 512 // sample_width)
        screening.threshold_kernel[(cdiv(rows, block),)](
            least, plan.groups, first, rows, neighbours, depth, anchors.norm, anchors.rho, count, queue_count, limit,
            twice,
            C=sample_width, KP=width, LOG_KP=width.bit_length() - 1, LOG_GROUPS=groups_of(sample_width, width),
            R=block, num_warps=4, **EXACT,
        )  # fmt: skip
        screening.screen_kernel[(row_tiles * cdiv(m, plan.tile[1]),)](
            anchors.half, anchors.half.stride(0), anchors.scale, pool.half, pool.half.stride(0), *pool[1:],
            limit, twice, first, rows, m, depth, count, buffer, CAPACITY=plan.capacity, **product,
        )  # fmt: skip
        block = min(64, tuning.power_of_two(rows)) if tuning.INTERPRETED else 1
        screening.shortlist_kernel[(cdiv(rows, block),)](
            anchors.norm, anchors.rho, pool.norm, pool.rho, *batch.self_arguments(), first, rows, neighbours, depth,
            count, buffer, short, short_count, queue, queue_count,
            HAS_SELF=has_self, CAPACITY=plan.capacity, SHORT=plan.short, KP=plan.list_size, LOG_KP=log_kp,
            LOG_GROUPS=groups_of(plan.capacity, plan.list_size), R=block, num_warps=4, **EXACT,
        )  # fmt: skip
        columns = max(16, plan.list_size)
        screening.refine_kernel[(cdiv(rows, block),)](
            batch.feats, batch.feats.stride(0), batch.candidates, batch.candidates.stride(0),
            first, rows, neighbours, d, short, short_count, indices, selection.d2,
            SHORT=plan.short, KP=plan.list_size, LOG_KP=log_kp, LOG_GROUPS=groups_of(columns, plan.list_size),
            R=block, C=columns, ONE_SECTION=one_section, UNROLL=plan.unroll, num_warps=4, **EXACT,
        )  # fmt: skip
        screening.fallback_kernel[(plan.fallback_programs,)](
            batch.feats, batch.feats.stride(0), batch.candidates, batch.candidates.stride(0),
            batch.labels, batch.candidate_labels, *batch.self_arguments(), first, m, d,
            cdiv(cdiv(m, plan.fallback_segments), direct.columns) * direct.columns, queue, queue_count, buffer,
            R=direct.rows, C=direct.columns, KP=plan.list_size, LOG_KP=log_kp,
            LOG_GROUPS=groups_of(direct.columns, plan.list_size), SEGMENTS=plan.fallback_segments, HAS_SELF=has_self,
            ONE_SECTION=one_section, num_warps=direct.warps, **EXACT,
        )  # fmt: skip
        block = 64 if tuning.INTERPRETED else max(1, 128 // plan.list_size)
        screening.fallback_merge_kernel[(cdiv(rows, block),)](
            queue, queue_count, buffer, first, neighbours, indices, selection.d2,
            R=block, KP=plan.list_size, LOG_KP=log_kp, SEGMENTS=plan.fallback_segments, num_warps=1, **EXACT,
        )  # fmt: skip
    positives.find(batch, selection)
    return flags


def find(batch: Batch, neighbours: int, plan: tuning.ScreenPlan, loss_programs: int, indices: Tensor) -> Found:
    """The selection, with the support sets in `indices`."""
    selection = Selection.empty(batch.sizes[0], neighbours, batch.feats, torch.float32)
    flags = select(batch, neighbours, plan, indices, selection)
    records = torch.empty((loss_programs, RECORD_SIZE.value), dtype=torch.float64, device=batch.feats.device)
    return Found(selection, 1, None, flags, flags.numel(), records, None)
