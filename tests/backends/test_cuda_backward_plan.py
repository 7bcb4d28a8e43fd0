"""The plan of the CUDA backward and its predicted time: pure functions, read without a GPU."""

from __future__ import annotations

import re
from itertools import pairwise, product
from pathlib import Path
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
    """The slice of all rows that are read is at most 24 MB wherever one of 16 bytes a lane is. Wider ones always are,
    but where targets have few rows (of more candidates than anchors), or 24 bytes a lane hold whole rows. Lanes of a
    row follow from D and the type alone."""
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
        if (rows * min(row, 16 * lanes) <= NEAR or width > 16) and n >= m and (width != 24 or facts["slices"] > 1):
            assert slice_bytes <= NEAR, (n, m, d, facts)
    assert seen >= ({16, 24, 32} if dtype in (F32, F64) else {16})


def test_few_rows_a_target_are_summed_in_wide_slices(core: ModuleType) -> None:
    """A slice costs a warp so much before its first row that distance matters less."""
    assert [plan(core, 65536, 0, 2048, k=k)["lane_bytes"] for k in (1, 3, 10, 40)] == [32, 32, 16, 16]
    assert [plan(core, 30_000, 0, d)["lane_bytes"] for d in (128, 192, 256, 257, 2048)] == [16, 24, 16, 24, 24]
    assert [plan(core, n, 60_000, 2048)["lane_bytes"] for n in (2500, 30_000, 60_000)] == [32, 32, 16]


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


def test_the_page_has_what_slices_are_predicted_to_take(core: ModuleType) -> None:
    page = (Path(__file__).parents[2] / "csrc" / "cuda" / "README.md").read_text()
    table = re.findall(r"^\| (\d+) \|.*\*\*(\d+)\*\* \((\d+)\)", page, re.MULTILINE)
    assert len(table) == 6
    for n, us, megabytes in (tuple(map(int, row)) for row in table):
        facts = plan(core, n, 0, 2048)
        assert us == round(facts["predicted_us"])
        assert megabytes == round(n * facts["slice_elements"] * 4 / 2**20)


def edges_of_slices(dims: int, dtype: int) -> set[int]:
    """Rows of which some slice is 24 MB."""
    row = dims * ELEMENT[dtype]
    return {NEAR // min(row, 32 * width) for width in (8, 12, 16, 20, 24, 32)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, F64, F16])
def test_no_cliff_where_slices_change(core: ModuleType, device: str, dtype: int) -> None:
    """One row more costs at most 1.3 times as much, and never less, around every number of rows at which another width
    serves: of many dimensions and few, of few neighbours, of banks smaller and larger than the batch."""
    evenly = {*(2**e for e in range(10, 18)), *range(8192, 131_073, 8192)}
    for d in (64, 129, 132, 192, 256, 257, 300, 384, 513, 768, 1024, 2048, 2049, 4096):
        edges = evenly | edges_of_slices(d, dtype)
        sizes = sorted({edge + step for edge in edges for step in (-1, 0, 1, 2)})
        for m, k in product((0, 512, 24_576, 65_536), (1, 10, 40)):
            most = 0.0
            for n, more in pairwise(sizes):
                us, then = (plan(core, size, m, d, device, dtype=dtype, k=k)["predicted_us"] for size in (n, more))
                most = max(most, us)
                assert then >= most * (1 - 1e-9), (d, m, k, n, more)
                assert more > n + 1 or then <= 1.3 * us, (d, m, k, n, then / us)


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
