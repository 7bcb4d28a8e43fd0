"""The launch shapes of each kernel, by regime.

**No entry was timed on a GPU.** What was measured is the compiled code: registers, spills and shared memory of the
choices, with Triton 3.9.0 for sm_90 unless a table names others, read from the cubin as `.ci/triton_resources.py` does.
The tables beside the entries have these numbers and the warps that an SM of 64 can hold at once; entries hold until
they are timed. There is no autotuning: a first call compiles the kernels it needs, one variant each.

Results do not depend on anything here: selections by the one summation order and a total order of keys, the loss and
gradients up to rounding.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from typing import Any

import torch

# Read once, and as Triton reads it: every other value leaves the interpreter off. It runs kernels on CPU tensors, one
# NumPy operation on a tile after the other: it wants few large tiles, a GPU many that fit its registers.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

MAX_LISTED_K = 128
"""Above this the first k are found by sorting whole rows of distances, not in lists."""

DENSE_PAIRS = 1 << 22
"""Squared distances held at a time where rows are sorted whole."""

MOST_FLAGS = 2048
"""Programs that look for NaN and Inf beside a screening, at most: one program reads what they found."""

_PROGRAMS = 1024
"""How many programs a kernel should have, about, for a small batch: a few for each SM of any GPU."""


_LARGE_TILES = 264
"""Tiles of 512 pairs that it takes to give each of some 130 SMs two of them: below that tiles are smaller."""

_MERGED_KEYS = 2048
"""Keys of an anchor's lists in all segments, at most: `loss_kernel` merges them in registers."""


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Device:
    """What plans depend on of a GPU and of the compiler."""

    capability: tuple[int, int] = (9, 0)
    shared: int = 227 * 1024  # bytes of shared memory that a block may have
    compiler: tuple[int, int] = (3, 9)  # Triton's version

    @property
    def dots_repeat(self) -> bool:
        """False for B200 and B300 with Triton before 3.8: products there are reported not to repeat bit for bit."""
        return self.capability[0] != 10 or self.compiler >= (3, 8)


HOPPER = Device()
"""Stands for tensors that are on no GPU: without data, or in the interpreter."""


def device_facts(device: torch.device) -> Device:
    """The facts of a tensor's device."""
    return _device(device.index or 0) if device.type == "cuda" and not INTERPRETED else HOPPER


@cache
def _device(index: int) -> Device:
    facts: Any = torch.cuda.get_device_properties(index)  # whose stub lacks a field
    major, minor = re.findall(r"\d+", metadata.version("triton"))[:2]
    return Device((facts.major, facts.minor), facts.shared_memory_per_block_optin, (int(major), int(minor)))


@dataclass(frozen=True)
class SearchPlan:
    """How `search_kernel` cuts N x M into tiles, and the tiles' candidates into segments."""

    rows: int  # R anchors of a tile
    columns: int  # C candidates
    list_size: int  # KP
    segments: int
    segment_size: int
    warps: int


@lru_cache(maxsize=1024)
def search_plan(
    anchors: int, candidates: int, neighbours: int, wide: bool, dense: bool, one_section: bool = True
) -> SearchPlan:
    """A tile has R x C pairs of 32 lanes: 512 pairs are 64 registers a thread of 8 warps, as many in float64 with half
    the pairs. A list of KP keys a row needs C >= KP. Segments fill the GPU where there are few groups of anchors.

    Compiled, float32, K = 10, C = 32 but for the last line's 16:

    =====  =====  =========  ======  ==============  =============================
    pairs  warps  registers  spills  warps on an SM  elements a pair
    =====  =====  =========  ======  ==============  =============================
    256    8      124        0       16              0.16
    512    8      174        0       8               0.09, taken
    512    4      254        0       8               0.09
    1024   8      254        0       8               0.06
    1024   4      255        382     8               0.06
    128    4      126        0       16              0.19, taken for small batches
    =====  =====  =========  ======  ==============  =============================

    256 pairs hide latency better but load each row nearly twice as often; 1024 leave no register to spare for another
    option or another version of the compiler.
    """
    list_size = 1 if dense else power_of_two(max(neighbours, 2))
    warps = 8
    if INTERPRETED:
        rows = min(64, power_of_two(anchors))
        columns = max(list_size, min(128, power_of_two(candidates)))
    else:
        columns = max(32, list_size)
        tight = wide or (list_size == 128 and not one_section)  # half the pairs
        rows = (256 if tight else 512) // columns
        if cdiv(anchors, rows) * cdiv(candidates, columns) < _LARGE_TILES:
            columns = max(16, list_size)
            rows = max(2, (64 if wide else 128) // columns)
            few = cdiv(anchors, rows) * cdiv(candidates, columns) <= 64
            if rows == 8 and (few or not one_section):  # sums of many sections take twice the registers
                rows = 4
            warps = 8 if list_size == 128 else 4
    groups = max(1, cdiv(anchors, rows))
    tiles = max(1, cdiv(candidates, columns))
    segments = 1 if INTERPRETED else max(1, min(cdiv(_PROGRAMS, groups), tiles, 32, _MERGED_KEYS // list_size))
    size = cdiv(tiles, segments) * columns
    return SearchPlan(rows, columns, list_size, max(1, cdiv(candidates, size)), size, warps)


def dense_rows(anchors: int, candidates: int) -> int:
    """How many anchors' rows of distances are sorted at a time."""
    return max(1, min(anchors, DENSE_PAIRS // max(1, candidates)))


@dataclass(frozen=True)
class ScreenPlan:
    """How a forward is screened; the kernels of `screening.py`, in strips of anchors."""

    strip: int  # anchors at a time: the buffers of a strip are what is held beyond O(N + M)
    stride: int  # one candidate of so many is in the sample
    samples: int
    group_size: int  # samples whose least upper bound is kept
    groups: int
    capacity: int  # of an anchor's buffer
    short: int  # of its shortlist
    list_size: int  # KP, for lists of K keys
    tile: tuple[int, int, int]  # BM, BN, BK of the products
    stages: int
    warps: int
    registers: int | None  # the most of a thread, where two blocks shall fit an SM
    unroll: int  # steps of a direct sum whose loads are in flight together
    fallback_segments: int
    fallback_programs: int


_LEAST_CANDIDATES = 1024
"""Below this direct sums of all pairs are fewer launches and about the same work."""

_STRIP_ENTRIES = 1 << 21
"""Entries of 8 bytes in the buffers of a strip: 16 MB."""

MOST_DEPTH = 1 << 19
"""Most elements from a row to the next: a tile's samples lie BN times the stride of the sample apart, in 31 bits."""


def _tile(depth: int, device: Device, fine: bool) -> tuple[tuple[int, int, int], int | None]:
    """The tile of the products, and the most registers of a thread, if any; all with 8 warps and 3 stages.

    Compiled, float32 batches, `screen_kernel` with Triton 3.6.0; no spills; "a pair" are the instructions behind the
    products that a warp issues for 32 pairs none of which it keeps:

    ==========  ==============  =========  =============  ======  =====================
    target      tile            registers  shared, bytes  a pair  elements a pair
    ==========  ==============  =========  =============  ======  =====================
    sm_80       128 x 256 x 64  250        98304          6.7     0.012, taken
    sm_90       128 x 256 x 64  250        147456         7.6     0.012, taken
    sm_90       128 x 128 x 64  128        98304          8.4     0.016, taken for few D
    sm_100      128 x 256 x 64  254        147472         8.6     0.012, taken
    sm_100      128 x 128 x 64  128        98320          9.6     0.016, taken for few D
    sm_86, 120  128 x 128 x 64  169        65536          8.6     0.016, taken
    ==========  ==============  =========  =============  ======  =====================
    """
    if INTERPRETED:
        return (128, 256, 64), None
    # With groups of 4 samples (`fine`) `sample_kernel` holds most; on sm_100 it spills in the wide tile.
    if device.shared < 147 * 1024 or (fine and device.capability[0] == 10):
        return (128, 128, 64), None
    # Two blocks on an SM: one tests its pairs while the other multiplies. By estimate that pays where steps are few.
    if depth <= 192 and device.shared >= 2 * 99 * 1024:
        return (128, 128, 64), 128
    return (128, 256, 64), None


def screen_plan(
    anchors: int, candidates: int, dims: int, neighbours: int, wide: bool, device: Device = HOPPER
) -> ScreenPlan | None:
    """None where direct sums of all pairs serve.

    A sample of 1/8 of the candidates costs 1/8 of the product and leaves about 8 (K + 1) candidates below the
    threshold; the buffer has room for more than twice as many. Simulated for random rows, 1024 to 4 M candidates and K
    from 1 to 128, less than one anchor in 1000 overflows it.
    """
    least = max(_LEAST_CANDIDATES, 64 * neighbours)
    if wide or neighbours > MAX_LISTED_K or candidates < least or anchors < 1 or not 16 <= dims <= MOST_DEPTH - 64:
        return None
    if not device.dots_repeat:
        return None
    stride = 8
    list_size = power_of_two(max(neighbours, 2))
    fallback_segments = 16
    capacity = max(256, fallback_segments * list_size, cdiv((2 * stride + 4) * (neighbours + 1), 64) * 64)
    samples = candidates // stride
    group_size = 4  # one of each slice, at least
    tile, registers = _tile(dims, device, samples // (2 * group_size) < 4 * (neighbours + 1))
    while group_size < tile[1] and samples // (2 * group_size) >= 4 * (neighbours + 1):
        group_size *= 2
    groups = cdiv(samples, tile[1]) * (tile[1] // group_size)
    return ScreenPlan(
        strip=min(anchors, max(tile[0], _STRIP_ENTRIES // max(capacity, power_of_two(groups) // 2))),
        stride=stride,
        samples=samples,
        group_size=group_size,
        groups=groups,
        capacity=capacity,
        short=max(64, 4 * list_size),
        list_size=list_size,
        tile=tile,
        stages=3,
        warps=8,
        registers=registers,
        unroll=1 if INTERPRETED else 2 if list_size > 64 else 4,
        fallback_segments=fallback_segments,
        fallback_programs=8 if INTERPRETED else 528,
    )


@dataclass(frozen=True)
class PositivesPlan:
    """R anchors of a group, C candidates of a tile; a group's tiles in segments. BLOCK entries in small kernels."""

    rows: int
    columns: int
    segments: int
    warps: int
    block: int


def positives_plan(anchors: int, candidates: int) -> PositivesPlan:
    """Tiles as for all pairs. How many a group has only the device knows: any number that the candidates allow.

    Without a tile a program ends at once, so a large batch has one segment or two, and a few anchors of a large bank
    have dozens.
    """
    if INTERPRETED:
        return PositivesPlan(min(64, power_of_two(anchors)), min(128, power_of_two(candidates)), 1, 4, 1024)
    rows, columns = 16, 32
    segments = max(1, min(cdiv(_PROGRAMS, cdiv(anchors, rows)), cdiv(candidates, columns), 64))
    return PositivesPlan(rows, columns, segments, 8, 256)


@dataclass(frozen=True)
class LossPlan:
    """R anchors of a program, BLOCK slots at a time."""

    rows: int
    block: int
    warps: int


@lru_cache(maxsize=1024)
def loss_plan(anchors: int, neighbours: int) -> LossPlan:
    """The float64 stage needs many registers a slot: two slots a thread, one where there are few anchors."""
    block = min(128, power_of_two(max(2, neighbours)))
    if INTERPRETED:
        return LossPlan(min(256, power_of_two(anchors)), block, 4)
    if anchors * block <= 1 << 14:
        return LossPlan(max(1, 32 // block), block, max(1, block // 32))
    return LossPlan(max(1, 256 // block), block, 4)


@dataclass(frozen=True)
class GradientPlan:
    """R rows, EDGES edges of each at a time, in blocks of BLOCK columns; sorted edges in chunks of CHUNK,
    or CHUNK edges looked through at a time.
    """

    rows: int
    edges: int
    block: int
    chunk: int
    warps: int
    sorted: bool  # whether incoming edges are sorted by target, or each program lists its own


_LISTED_EDGES = 300 if INTERPRETED else 1 << 13
"""Edges that a program looks through for those of its row, at most."""

_SEARCHED_EDGES = 1 << 24
"""The same by all programs, at most: so many of E edges an anchor have lists of 64 / E MB in all."""


@lru_cache(maxsize=1024)
def gradient_plan(anchors: int, candidates: int, dims: int, edges: int, bytes_each: int) -> GradientPlan:
    """A tile of 4 x 512 float32 values puts 16 registers a thread in flight, which hides the latency of gathered rows.

    In half precision it is 4 x 256 values for one warp, 32 registers a thread when widened; so it is where a program
    lists its own edges. Chunks of 16 times the edges of an anchor keep their sums below a quarter byte a feature.

    Compiled, float32, sorted edges, 4 warps; "in flight" are bytes of gathered rows that an SM waits for at once:

    =====  =====  =========  ======  ==============  ============
    edges  block  registers  spills  warps on an SM  in flight
    =====  =====  =========  ======  ==============  ============
    2      512    40         0       48              48 KB
    4      256    48         0       40              40 KB
    4      512    56         0       36              72 KB, taken
    4      1024   80         0       24              96 KB
    8      512    72         0       28              112 KB
    8      1024   128        0       16              128 KB
    =====  =====  =========  ======  ==============  ============

    Half a microsecond of 10 TB/s of cached rows over 132 SMs is 38 KB, an estimate that each of them reaches. Wider
    blocks leave lanes idle where D is not a multiple of them, narrower ones read the edges more often.
    """
    listed = anchors * edges
    width = 128 if bytes_each == 8 else 256  # columns of a program that lists its edges: more would spill
    sort = listed > _LISTED_EDGES or candidates * cdiv(dims, width) * listed > _SEARCHED_EDGES
    if INTERPRETED:
        block, slots = min(2048, power_of_two(max(dims, 16))), 16
        few = max(1, min(power_of_two(max(anchors, candidates)), (1 << 18) // (slots * block)))
        return GradientPlan(few if sort else 1, slots, block, max(64, power_of_two(4 * edges)), 4, sort)
    if not sort:
        block = min(width, power_of_two(max(dims, 16)))
        return GradientPlan(1, 4, block, 512, 1, False)
    block = min(256 if bytes_each == 2 else 512, power_of_two(max(dims, 16)))
    vectors = block * bytes_each // 16  # one a thread: an edge is not shared out among warps
    return GradientPlan(1, 4, block, max(128, power_of_two(16 * edges)), max(1, min(4, vectors // 32)), True)
