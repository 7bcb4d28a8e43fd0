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
    """The slice of all rows that are read is at most 24 MB wherever 384 bytes of each are; no wider one serves beyond
    that, but for 512 bytes of a bank and its anchors. Lanes of a row follow from D and the type alone, but that half a
    warp has half of them."""
    seen = set()
    for n, m, d in product((*SIZES, *LARGE), (0, 50_000), DIMS):
        facts = plan(core, n, m, d, device, dtype=dtype)
        row, lanes, width = d * ELEMENT[dtype], facts["row_lanes"], facts["lane_bytes"]
        rows = n if m == 0 else min(m, 12 * n)
        if facts["row_packs"] > 0:
            continue
        seen.add((facts["target_lanes"], width))
        assert lanes == min(facts["target_lanes"], 1 << (max(1, -(-row // 16)) - 1).bit_length())
        assert facts["target_lanes"] == 32 or row > 256
        assert facts["slice_elements"] * ELEMENT[dtype] == width * lanes
        assert (facts["slices"] - 1) * facts["slice_elements"] < d <= facts["slices"] * facts["slice_elements"]
        slice_bytes = rows * min(row, width * lanes)
        narrow = rows * min(row, 384) > NEAR and width * lanes <= 384
        assert slice_bytes <= NEAR or narrow or (m > 0 and width * lanes <= 512), (n, m, d, facts)
    wide = {(32, 32), (16, 32)} if dtype in (F32, F64) else set()
    assert seen >= wide | {(32, 16), (16, 24)}


def test_slices_grow_narrow_with_rows(core: ModuleType) -> None:
    """As wide as is near; two targets a warp where that is 512 bytes of a row or less; 256 bytes of so many that none
    are near, where memory is slow."""

    def of(n: int, d: int = 2048, m: int = 0, **options: Any) -> tuple[int, int]:
        facts = plan(core, n, m, d, **options)
        return facts["target_lanes"], facts["lane_bytes"]

    assert [of(n) for n in (24576, 24577, 49152, 49153, 65536)] == [(32, 32), (16, 32), (16, 32), (16, 24), (16, 24)]
    assert [of(65536, k=k) for k in (1, 3, 10, 40)] == [(16, 24)] * 4
    assert [of(30_000, d) for d in (64, 128, 192, 257, 2048)] == [(32, 16), (16, 32), (16, 24), (16, 24), (16, 32)]
    assert [of(n, m=60_000) for n in (2500, 30_000, 60_000)] == [(16, 32)] * 3
    for device, width in (("sm_80", 16), ("sm_86", 16), ("sm_89", 16), ("sm_90", 24), ("sm_100", 24), ("sm_120", 16)):
        assert of(98304, device=device) == (16, width)


def test_lists_serve_where_searching_costs_more(core: ModuleType) -> None:
    """One launch of a small batch, five of a large one."""
    for n, d, launches in ((640, 2048, 1), (1024, 2048, 5), (640, 128, 1), (8192, 128, 5)):
        facts = plan(core, n, 0, d)
        assert facts["launches"] == launches and facts["partitioned"] == (launches == 5)
        names = [name for name, _, _ in facts["kernels"]]
        assert names == (["search"] if launches == 1 else ["count", "prefix sums", "place", "lists", "gather"])
    assert plan(core, 1_000_000, 0, 8)["buckets"] <= 4096


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, F64, F16])
def test_small_batches_are_resident(core: ModuleType, device: str, dtype: int) -> None:
    """Where all rows, the graph and its lists fit the shared memory that a block may have, and that is predicted to be
    cheaper; in slices of 1, 2, 4 or 8 packs, not wider than a row asks for."""
    sums = 8 if dtype == F64 else 4
    widths = set()
    for n, d, m in product((1, 31, 64, 65, 128, 200, 256, 257, 400, 512, 513, 700), DIMS, (0, 100, 3000)):
        facts = plan(core, n, m, d, device, dtype=dtype)
        names = [name for name, _, _ in facts["kernels"]]
        assert (facts["row_packs"] > 0) == (names == ["resident"])
        if names != ["resident"]:
            continue
        assert facts["launches"] == 1 and facts["workspace_bytes"] == 0
        assert facts["slice_elements"] * sums == 16 * facts["row_packs"]
        assert (facts["slices"] - 1) * facts["slice_elements"] < d <= facts["slices"] * facts["slice_elements"]
        assert facts["row_packs"] <= facts["row_lanes"]
        assert (m or n) <= 512
        edges, words = -(-n * 12 // 32) * 32, -(-n // 32) | 1
        least = 128 * (n + m) + 2 * edges * (sums + 2) + (m or n) * (6 * words + 4)
        assert least <= DEVICES[device][2], (n, m, d)
        widths.add(facts["row_packs"])
    assert widths <= {1, 2, 4, 8} and len(widths) > 1


def test_the_batches_of_reid_are_resident(core: ModuleType) -> None:
    """Up to 256 rows on devices with much shared memory, up to 128 on all that have many multiprocessors."""
    for device in DEVICES:
        wide = device in ("sm_80", "sm_90", "sm_100")
        sizes = (32, 64, 128, 256) if wide else (32, 64, 128) if device != "sm_86" else (32,)
        for n, d in product(sizes, (512, 2048)):
            if device == "sm_86" and d == 2048:
                continue
            assert plan(core, n, 0, d, device)["row_packs"] > 0, (device, n, d)
    assert plan(core, 128, 0, 2048)["slices"] == 128
    assert [plan(core, n, 0, 2048)["thread_packs"] for n in (128, 256, 512)] == [2, 4, 4]


WALKS = [*((0, d) for d in (16, 128, 512, 2048)), (64, 512), (65536, 512)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "k"), [(F32, 10), (BF16, 10), (F64, 10), (F32, 40)])
def test_more_rows_are_never_cheaper_nor_much_dearer(core: ModuleType, device: str, dtype: int, k: int) -> None:
    """A row more than resident rows may be costs up to 1.5 times as much."""
    sizes = sorted({max(1, size + step) for size in (*SIZES, *LARGE) for step in (-1, 0, 1)})
    for m, d in WALKS:
        times = [(n, plan(core, n, m, d, device, dtype=dtype, k=k)) for n in sizes]
        for (n, before), (more, after) in pairwise(times):
            if m == 0 and n <= k + 1:
                continue  # with fewer candidates than k + 1 a row more is a neighbour more of all
            us, then = before["predicted_us"], after["predicted_us"]
            assert then >= us * (1 - 1e-9), (m, d, n, more, before, after)
            most = 1.5 if before["row_packs"] > 0 and after["row_packs"] == 0 else 1.3
            assert more > n + 1 or then <= most * us, (m, d, n, before, after)


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
    """But that rows of up to 256 bytes, with a warp for each target, may cost a quarter more than longer ones, of which
    two targets share a warp; of one neighbour, as far as 65536 rows, 1.3 times as much. And of resident rows of up to
    256 bytes the shorter have more groups of lanes for each list, each of which looks at all of its edges. An edge more
    than shared memory holds costs up to 1.5 times as much."""
    short = [*range(8, 256 // ELEMENT[dtype] + 1, 8)]
    long = [d for d in (*range(8, 520, 8), *range(576, 4161, 64)) if d > short[-1]]
    for n in (64, 256, 1024, 8192, 65536):
        for dims in (short, long):
            for before, after in pairwise(plan(core, n, 0, d, device, dtype=dtype) for d in dims):
                fewer_groups = after["row_packs"] > 0 and after["row_lanes"] > before["row_lanes"]
                assert fewer_groups or after["predicted_us"] >= before["predicted_us"] * (1 - 1e-9), (n, before, after)
        for k, most in ((10, 1.25), (1, 1.3)):
            last, next_one = (
                plan(core, n, 0, d, device, dtype=dtype, k=k)["predicted_us"] for d in (short[-1], long[0])
            )
            assert last <= most * next_one, (n, k)
        for before, after in pairwise(plan(core, n, 0, 512, device, dtype=dtype, k=k) for k in range(1, 60)):
            us, more = before["predicted_us"], after["predicted_us"]
            most = 1.5 if before["row_packs"] > 0 and after["row_packs"] == 0 else 1.3
            assert us * (1 - 1e-9) <= more <= most * us, (n, before, after)
