"""The launches of a screened selection: the kernels of `screening.py`, in strips of anchors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import order, positives, screening, tuning
from .batch import Batch, Found, Selection, aligned, row_facts
from .launch import launch
from .loss import RECORD_SIZE
from .tuning import cdiv


class Screened(NamedTuple):
    """Rows as the products take them, and one entry a row of the matrix they were made from."""

    half: Tensor  # [rows, depth] half precision
    scale: Tensor  # [rows, padded to FACT_ROWS], as the others: what a product is multiplied by
    norm: Tensor
    rho: Tensor
    near: Tensor


def _facts(rows: Tensor) -> tuple[Any, ...]:
    """What rows alone decide about a kernel's variant."""
    return rows.device.index, rows.dtype, rows.shape[1], rows.stride(0), aligned(rows)


def _centre(rows: Tensor) -> Tensor:
    """[D] float32: the median of a few rows, about the middle of all; neither outliers nor NaN move it."""
    m, d = rows.shape
    centre = torch.empty(d, dtype=torch.float32, device=rows.device)
    step = max(1, m // 64)
    columns = 512 if tuning.INTERPRETED else 16
    launch(
        screening.centre_kernel, (cdiv(d, columns),), _facts(rows),
        rows, rows.stride(0), step, min(64, cdiv(m, step)), d, centre,
        ROWS=64, LOG_ROWS=6, C=columns,
    )  # fmt: skip
    return centre


def _vectors(count: int, n: int, dtype: torch.dtype, device: torch.device, multiple: int = 4) -> Tensor:
    """[count, n or a few more] with every row aligned to 16 bytes: for other alignments Triton would compile again."""
    return torch.empty((count, cdiv(n, multiple) * multiple), dtype=dtype, device=device)


def _whole(rows: Tensor, depth: int) -> bool:
    """Whether half-precision rows are read in whole blocks as they lie, 16 bytes at a time."""
    return (
        rows.shape[1] == depth and aligned(rows)
        and rows.stride(0) % 16 == 0 and rows.stride(0) <= tuning.MOST_DEPTH
    )  # fmt: skip


def _prepare(rows: Tensor, centre: Tensor | None, block: int, flags: Tensor, first_flag: int, most: int) -> Screened:
    """Half precision and facts of rows; flags from first_flag on, which `most` programs may write."""
    n, d = rows.shape
    depth = cdiv(d, block) * block
    copied = centre is None and not _whole(rows, depth)
    half = rows
    if centre is not None or copied:
        half = rows.new_empty((n, depth), dtype=rows.dtype if copied else torch.float16)
    entries = _vectors(4, n, torch.float32, rows.device, screening.FACT_ROWS)
    launch(
        screening.prepare_kernel, (most,), _facts(rows),
        rows, rows.stride(0), n, entries.shape[1], d, depth, rows if centre is None else centre, half, half.stride(0),
        *entries, flags, first_flag,
        CAST=centre is not None, COPY=copied, R=_prepared_rows(), BLOCK=512 if tuning.INTERPRETED else 128,
    )  # fmt: skip
    return Screened(half, *entries)


def _prepared_rows() -> int:
    """Rows of a program of `prepare_kernel` at a time."""
    return 256 if tuning.INTERPRETED else 8


def _flags(batch: Batch) -> tuple[int, int]:
    """How many programs prepare the anchors and the candidates, each with a flag; together at most MOST_FLAGS."""
    most = tuning.MOST_FLAGS if batch.symmetric else tuning.MOST_FLAGS // 2
    n, m, _ = batch.sizes
    own, others = (max(1, min(most, cdiv(rows, _prepared_rows()))) for rows in (n, m))
    return own, 0 if batch.symmetric else others


def select(batch: Batch, neighbours: int, plan: tuning.ScreenPlan, indices: Tensor, d2: Tensor) -> tuple[Tensor, Batch]:
    """The support sets, through products of half precision, in `indices` and `d2` [N, K].

    Returns the flags of NaN and Inf, MOST_FLAGS at most, and the batch with its rows where the kernels read them best.
    """
    device = batch.feats.device
    cast = batch.feats.dtype == torch.float32
    own_flags, other_flags = _flags(batch)
    flags = torch.empty(own_flags + other_flags, dtype=torch.int32, device=device)
    centre = _centre(batch.candidates) if cast else None
    anchors = _prepare(batch.feats, centre, plan.tile[2], flags, 0, own_flags)
    pool = anchors
    if not batch.symmetric:
        pool = _prepare(batch.candidates, centre, plan.tile[2], flags, own_flags, other_flags)
    if not cast:
        # Direct sums take the copies too: zeros behind the last column add nothing to any of them, in any order.
        batch = batch._replace(feats=anchors.half, candidates=pool.half)
    n, m, d = batch.sizes
    depth = anchors.half.shape[1]
    facts = row_facts(batch)
    product = {
        "BM": plan.tile[0], "BN": plan.tile[1], "BK": plan.tile[2], "GROUP": 8,
        "UNIT": not cast, "PLAIN": tuning.INTERPRETED,
        "warps": plan.warps, "stages": plan.stages,
    }  # fmt: skip

    def new(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    strip = cdiv(plan.strip, plan.tile[0]) * plan.tile[0]
    least = new(strip, plan.groups, dtype=torch.float32)
    limit, twice = _vectors(2, strip, torch.float32, device)
    count, short_count, queue = _vectors(3, strip, torch.int32, device)
    queue_count = new(1)
    buffer = new(strip, plan.capacity, dtype=torch.int64)
    short = new(strip, plan.short)
    log_kp = plan.list_size.bit_length() - 1
    width = max(tuning.power_of_two(neighbours + 1), 2)  # of the thresholds' lists, which hold one key more
    sample_width = max(width, min(tuning.power_of_two(plan.groups), 256))
    one_section = d <= order.SECTION.value
    direct = tuning.search_plan(n, m, neighbours, False, False, one_section)
    chunk = max(plan.list_size, min(128, plan.capacity))
    has_self = batch.self_index is not None

    def groups_of(wide: int, narrow: int) -> int:
        return (wide // narrow).bit_length() - 1

    sampled = _vectors(3, plan.samples, torch.float32, device, screening.FACT_ROWS)
    launch(
        screening.sampled_facts_kernel, (cdiv(sampled.shape[1], 1024),), facts,
        *pool[1:4], plan.samples, sampled.shape[1], plan.stride, depth, sampled, R=1024,
    )  # fmt: skip
    for first in range(0, n, plan.strip):
        rows = min(plan.strip, n - first)
        row_tiles = cdiv(rows, plan.tile[0])
        launch(
            screening.sample_kernel, (row_tiles * cdiv(plan.samples, plan.tile[1]),), facts,
            anchors.half, anchors.half.stride(0), *anchors[1:4], pool.half, pool.half.stride(0),
            sampled, sampled.shape[1], first, rows, plan.samples, plan.stride, depth, least, plan.groups,
            GROUP_SIZE=plan.group_size, **product,
        )  # fmt: skip
        block = min(64, tuning.power_of_two(rows)) if tuning.INTERPRETED else max(1, 512 // sample_width)
        padded = row_tiles * plan.tile[0]
        launch(
            screening.threshold_kernel, (cdiv(padded, block),), facts,
            least, plan.groups, first, rows, padded, neighbours, depth, anchors.norm, anchors.rho,
            count, queue_count, limit, twice,
            C=sample_width, KP=width, LOG_KP=width.bit_length() - 1, LOG_GROUPS=groups_of(sample_width, width),
            R=block,
        )  # fmt: skip
        launch(
            screening.screen_kernel, (row_tiles * cdiv(m, plan.tile[1]),), facts,
            anchors.half, anchors.half.stride(0), anchors.scale,
            pool.half, pool.half.stride(0), pool.scale, pool.rho, pool.near,
            limit, twice, first, rows, m, depth, count, buffer,
            CAPACITY=plan.capacity, registers=plan.registers, **product,
        )  # fmt: skip
        block = min(64, tuning.power_of_two(rows)) if tuning.INTERPRETED else 1
        launch(
            screening.shortlist_kernel, (cdiv(rows, block),), facts,
            *anchors[1:4], *pool[1:4], *batch.self_arguments(), first, rows, m, neighbours, depth,
            count, buffer, short, short_count, queue, queue_count,
            HAS_SELF=has_self, CAPACITY=plan.capacity, SHORT=plan.short, KP=plan.list_size, LOG_KP=log_kp,
            LOG_GROUPS=groups_of(chunk, plan.list_size), R=block, C=chunk, warps=1,
        )  # fmt: skip
        columns = max(16, plan.list_size)
        warps = max(4, columns // 8)
        launch(
            screening.refine_kernel, (cdiv(rows, block),), facts,
            batch.feats, batch.feats.stride(0), batch.candidates, batch.candidates.stride(0),
            first, rows, neighbours, d, short, short_count, indices, d2,
            SHORT=plan.short, KP=plan.list_size, LOG_KP=log_kp, LOG_GROUPS=groups_of(columns, plan.list_size),
            R=block, C=columns, ONE_SECTION=one_section, UNROLL=plan.unroll,
            warps=warps, registers=None if warps == 4 else min(255, 2048 // warps),
        )  # fmt: skip
        launch(
            screening.fallback_kernel, (plan.fallback_programs,), facts,
            batch.feats, batch.feats.stride(0), batch.candidates, batch.candidates.stride(0),
            batch.labels, batch.candidate_labels, *batch.self_arguments(), first, m, d,
            cdiv(cdiv(m, plan.fallback_segments), direct.columns) * direct.columns, queue, queue_count, buffer,
            R=direct.rows, C=direct.columns, KP=plan.list_size, LOG_KP=log_kp,
            LOG_GROUPS=groups_of(direct.columns, plan.list_size), SEGMENTS=plan.fallback_segments, HAS_SELF=has_self,
            ONE_SECTION=one_section, warps=direct.warps, registers=255,
        )  # fmt: skip
        block = 64 if tuning.INTERPRETED else max(1, 128 // plan.list_size)
        launch(
            screening.fallback_merge_kernel, (cdiv(rows, block),), facts,
            queue, queue_count, buffer, first, neighbours, indices, d2,
            R=block, KP=plan.list_size, LOG_KP=log_kp, SEGMENTS=plan.fallback_segments, warps=1,
        )  # fmt: skip
    return flags, batch


def find(batch: Batch, neighbours: int, plan: tuning.ScreenPlan, loss_programs: int, indices: Tensor) -> Found:
    """The selection, with the support sets in `indices`."""
    n, device = batch.sizes[0], batch.feats.device
    d2 = torch.empty((n, neighbours), dtype=torch.float32, device=device)
    flags, batch = select(batch, neighbours, plan, indices, d2)
    extremes = positives.find(batch)
    records = torch.empty((loss_programs, RECORD_SIZE.value), dtype=torch.float64, device=device)
    return Found(Selection(d2, *extremes[:4]), extremes.segments, None, flags, flags.numel(), records, extremes.memory)
