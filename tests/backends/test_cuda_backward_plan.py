"""The plan of the CUDA backward and its predicted time: pure functions, read without a GPU."""

from __future__ import annotations

from itertools import pairwise, product
from types import ModuleType
from typing import Any

import pytest

from support.cuda_plans import BF16, DEVICES, F16, F32, F64

NEAR = 24 * 2**20
ELEMENT = {F32: 4, F64: 8, F16: 2, BF16: 2}
SIZES = (
    1,
    8,
    64,
    100,
    128,
    200,
    256,
    384,
    512,
    640,
    700,
    768,
    1024,
    1536,
    2730,
    4096,
    8192,
    16384,
    24576,
    32768,
    49152,
)
LARGE = (65536, 98304, 131072, 262144, 1_000_000)
DIMS = (1, 8, 64, 127, 128, 512, 2048, 2049)


def plan(core: ModuleType, n: int, m: int, d: int, device: str = "sm_90", **options: Any) -> dict[str, Any]:
    """Of n anchors against m candidates of their own; the anchors are the candidates where m is 0."""
    capability, multiprocessors, shared = DEVICES[device]
    facts = {"capability": capability, "multiprocessors": multiprocessors, "shared_bytes": shared}
    options = {"k": 10, "dtype": F32} | options
    return dict(core.cuda_backward_plan(N=n, M=m or n, D=d, symmetric=m == 0, **facts, **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_slices_stay_near(core: ModuleType, device: str, dtype: int) -> None:
    """The slice of all rows that are read is at most 24 MB wherever one of 16 bytes a lane is; wider ones always are.
    Lanes of a row follow from D and the type alone."""
    seen = set()
    for n, m, d in product((*SIZES, *LARGE), (0, 50_000), DIMS):
        facts = plan(core, n, m, d, device, dtype=dtype)
        row, lanes, width = d * ELEMENT[dtype], facts["row_lanes"], facts["lane_bytes"]
        rows = max(n, min(m, 12 * n))
        seen.add(width)
        assert lanes == min(32, 1 << (max(1, -(-row // 16)) - 1).bit_length())
        assert facts["slice_elements"] * ELEMENT[dtype] == width * lanes
        assert (facts["slices"] - 1) * facts["slice_elements"] < d <= facts["slices"] * facts["slice_elements"]
        slice_bytes = rows * min(row, width * lanes)
        if rows * min(row, 16 * lanes) <= NEAR or width == 32:
            assert slice_bytes <= NEAR, (n, m, d, facts)
            assert width >= 16
    assert seen >= ({16, 32} if dtype in (F32, F64) else {16})


def test_half_a_pack_serves_where_memory_is_slow(core: ModuleType) -> None:
    """It keeps 98304 rows near. By the count it costs more than it saves where memory is not much slower than the
    second-level cache."""
    for device, width in (("sm_80", 16), ("sm_86", 8), ("sm_89", 8), ("sm_90", 16), ("sm_100", 16), ("sm_120", 8)):
        facts = plan(core, 98304, 0, 2048, device)
        assert facts["lane_bytes"] == width
        assert (98304 * facts["slice_elements"] * 4 <= NEAR) == (width == 8)


def test_lists_serve_where_searching_costs_more(core: ModuleType) -> None:
    """One launch of a small batch, five of a large one; own edges alone need no search."""
    for n, d, launches in ((64, 2048, 1), (384, 2048, 1), (1024, 2048, 5), (512, 128, 1), (8192, 128, 5)):
        facts = plan(core, n, 0, d)
        assert facts["launches"] == launches and facts["partitioned"] == (launches == 5)
        names = [name for name, _, _ in facts["kernels"]]
        assert names == (["search"] if launches == 1 else ["count", "prefix sums", "place", "lists", "gather"])
    assert plan(core, 1_000_000, 0, 8)["buckets"] <= 4096


WALKS = [*((0, d) for d in (16, 128, 512, 2048)), (64, 512), (65536, 512)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "k"), [(F32, 10), (BF16, 10), (F64, 10), (F32, 40)])
def test_more_rows_are_never_cheaper_nor_much_dearer(core: ModuleType, device: str, dtype: int, k: int) -> None:
    sizes = sorted({max(1, size + step) for size in (*SIZES, *LARGE) for step in (-1, 0, 1)})
    for m, d in WALKS:
        times = [(n, plan(core, n, m, d, device, dtype=dtype, k=k)) for n in sizes]
        for (n, before), (more, after) in pairwise(times):
            if m == 0 and n <= k + 1:
                continue  # with fewer candidates than k + 1 a row more is a neighbour more of all
            us, then = before["predicted_us"], after["predicted_us"]
            assert then >= us * (1 - 1e-9), (m, d, n, more, before, after)
            assert more > n + 1 or then <= 1.3 * us, (m, d, n, before, after)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, F64, F16])
def test_more_dimensions_and_neighbours_are_never_cheaper(core: ModuleType, device: str, dtype: int) -> None:
    for n in (64, 256, 1024, 8192, 65536):
        dims = [
            plan(core, n, 0, d, device, dtype=dtype)["predicted_us"] for d in (*range(8, 520, 8), *range(576, 4161, 64))
        ]
        assert all(more >= us * (1 - 1e-9) for us, more in pairwise(dims)), (n, dims)
        edges = [plan(core, n, 0, 512, device, dtype=dtype, k=k)["predicted_us"] for k in range(1, 60)]
        assert all(us * (1 - 1e-9) <= more <= 1.3 * us for us, more in pairwise(edges)), (n, edges)
