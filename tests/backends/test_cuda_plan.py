"""The CUDA backend's plan, a pure function of shapes and device facts: read here without a GPU."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch

from support.cuda_paths import PATHS
from support.cuda_plans import BF16, DEVICES, F16, F32, F64, plan

ELEMENT = {F32: 4, F64: 8, F16: 2, BF16: 2}
SCRATCH = 2**22
"""Entries: no N x M scratch is larger."""

SHAPES = [0, 1, 2, 63, 64, 65, 257, 1024, 1025, 8192, 65536, 1_000_000]
DIMS = [1, 64, 127, 512, 2048, 2049, 4096]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_workspace_is_bounded(core: ModuleType, device: str, dtype: int) -> None:
    """One cast copy, O(N + M), and a fixed rest (CONTRIBUTING.md, "Numbers"): every shape, on the path of the plan."""
    for n, m, d, k in product(SHAPES, SHAPES, DIMS, (1, 10, 128, 1000)):
        if n * d * ELEMENT[dtype] > 2**38 or m * d * ELEMENT[dtype] > 2**38:
            continue
        facts = plan(core, n, m, d, device, dtype=dtype, k=k)
        padded = (d + 63) // 64 * 64
        copy = 2 * padded * (n + m) if facts["path"] in ("dense", "screen", "bank") else 0
        linear = 1024 * (n + m) + 16 * 1024
        # Scratch of the direct path, or dense scores, or candidate buffers of one strip.
        fixed = max(8 * SCRATCH, 320 * 2**20) + 16 * max(m, 1) * 2
        assert facts["workspace_bytes"] <= copy + linear + fixed, (n, m, d, k, facts)
        assert facts["strips"] * facts["strip_rows"] >= n


def test_large_batch_at_the_size_of_the_goals(core: ModuleType) -> None:
    """65536 x 2048 in float32: peak memory beyond inputs and gradients within 1.25 times the features."""
    facts = plan(core, 65536, 65536, 2048)
    graph = 65536 * 12 * 8
    assert facts["path"] == "screen" and facts["strips"] == 1 and facts["triangular"]
    assert facts["workspace_bytes"] + graph <= 1.25 * 65536 * 2048 * 4


def test_strips_of_the_screening_are_whole_tiles(core: ModuleType) -> None:
    """Where buffers do not fit at once: full strips and a rest, each with a triangle of its own. So one anchor more
    costs little more."""
    for n, d, k in product((65537, 98304, 100_000, 131_073), (128, 2048), (1, 10, 128)):
        facts = plan(core, n, n, d, k=k, path="screen")
        assert facts["strips"] == -(-n // facts["strip_rows"]) > 1
        assert facts["strip_rows"] % 256 == 0 and facts["triangular"]
        assert not plan(core, n, n, d, k=k, path="screen", symmetric=False)["triangular"]
    for d in (128, 2048):
        one, two = (plan(core, n, n, d)["predicted_us"] for n in (65536, 65537))
        assert one < two <= 1.05 * one


def test_small_batches_take_few_launches(core: ModuleType) -> None:
    """Forward and backward of a small batch: two launches up to 128 rows, three up to 256. Without clusters one launch
    of the forward is planned where it is predicted to be cheaper than two, which it can be wherever blocks fit."""
    for n, d, dtype in product((1, 2, 33, 64, 65, 128), (1, 128, 2048), (F32, F16, BF16)):
        for device in ("sm_90", "sm_100", "sm_120"):
            facts = plan(core, n, n, d, device, dtype=dtype)
            assert facts["launches"] == 1, (n, d, device)
            facts = plan(core, n, n, d, device, dtype=dtype, path="cluster")
            assert (facts["path"], facts["launches"]) == ("cluster", 1)
            assert facts["cluster"] in (1, 2, 4, 8) and facts["d_slices"] <= 8 * facts["cluster"]
        for device in DEVICES:
            facts = plan(core, n, n, d, device, dtype=dtype)
            assert facts["launches"] <= 2
            if d <= 128 or (n <= 64 and d <= 2048 and device != "sm_86"):
                assert facts["launches"] == 1, (n, d, device)
            facts = plan(core, n, n, d, device, dtype=dtype, path="tickets")
            assert (facts["path"], facts["launches"]) == ("tickets", 1)
    for n in (129, 256, 384):
        assert plan(core, n, n, 2048)["launches"] <= 2
    for n in (1, 64, 128, 256, 384):
        assert core.cuda_backward_plan(N=n, M=n, D=2048, k=10, dtype=F32, symmetric=True)["launches"] == 1


def test_slices_fill_the_device_and_follow_the_order_of_sums(core: ModuleType) -> None:
    """D is cut where the one summation order allows: into aligned subtrees of its chunks of 64."""
    for n, d in product((65, 128, 256, 384, 700), DIMS):
        facts = plan(core, n, n, d, path="direct")
        slices, width = facts["d_slices"], facts["slice_elements"]
        assert slices * width >= d and (slices - 1) * width < d
        assert width in (64, 128, 256, 512)
        assert facts["strip_rows"] * n <= SCRATCH and 4 * slices * facts["strip_rows"] * n <= 8 * SCRATCH
    assert plan(core, 128, 128, 2048, path="direct")["d_slices"] >= 32


@pytest.mark.parametrize(
    ("n", "m", "d", "options", "path"),
    [
        # One launch of small batches: of clusters, or where there are none, with tickets.
        (8, 8, 64, {}, "cluster"),
        (32, 32, 2048, {}, "cluster"),
        (128, 128, 2048, {}, "cluster"),
        (100, 128, 2048, {"k": 16}, "cluster"),
        (1, 1, 4096, {}, "tickets"),
        (192, 192, 512, {}, "cluster"),
        # Each pair once where sums are most of the work.
        (192, 192, 2048, {}, "square"),
        (256, 256, 2048, {}, "square"),
        (256, 256, 2048, {"symmetric": False}, "cluster"),
        (256, 256, 2048, {"wide_clusters": 0}, "cluster"),
        (257, 257, 2048, {}, "direct"),
        (256, 257, 2048, {}, "direct"),
        (32, 32, 512, {"device": "sm_80"}, "tickets"),
        (128, 128, 2048, {"device": "sm_89"}, "tickets"),
        (32, 32, 512, {"dtype": F64}, "direct"),
        (32, 32, 512, {"largest_cluster": 4}, "cluster"),
        (32, 32, 512, {"largest_cluster": 0}, "tickets"),
        (32, 32, 512, {"cluster_bytes": 0}, "tickets"),
        # Direct sums of small batches, of few anchors against not too many candidates, against few candidates.
        (384, 384, 2048, {}, "direct"),
        (640, 640, 2048, {}, "direct"),
        (1024, 1024, 512, {}, "direct"),
        (64, 1024, 2048, {}, "direct"),
        (256, 1024, 128, {}, "direct"),
        (16384, 64, 512, {}, "direct"),
        # Dense scores between those and the screening, of rows that are not long.
        (960, 960, 2048, {}, "dense"),
        (512, 1024, 2048, {}, "dense"),
        # The screening.
        (1280, 1280, 512, {}, "screen"),
        (1536, 1536, 2048, {}, "screen"),
        (64, 8192, 2048, {}, "screen"),
        (64, 16384, 2048, {}, "screen"),
        (128, 32768, 2048, {}, "screen"),
        (256, 65536, 2048, {}, "screen"),
        (512, 8192, 2048, {}, "screen"),
        (4096, 512, 512, {}, "screen"),
        (16384, 512, 512, {}, "screen"),
        (8192, 8192, 512, {}, "screen"),
        (65536, 65536, 2048, {}, "screen"),
        (257, 65536, 128, {}, "screen"),
        (256, 65536, 128, {"dtype": BF16}, "screen"),
        # A bank is read once where converting it is most of the work.
        (256, 65536, 64, {}, "bank"),
        (256, 262144, 64, {}, "bank"),
        # What nothing else serves.
        (8192, 8192, 512, {"k": 129}, "direct"),
        (8192, 8192, 512, {"dtype": F64}, "direct"),
        (0, 100, 8, {}, "direct"),
        (100, 0, 8, {}, "direct"),
    ],
)
def test_path(core: ModuleType, n: int, m: int, d: int, options: dict[str, Any], path: str) -> None:
    """The path that the plan chooses for each regime of shapes, away from where two cost the same."""
    assert plan(core, n, m, d, **options)["path"] == path


def cost_of(core: ModuleType, n: int, m: int, d: int, path: str, **options: Any) -> float:
    """Predicted microseconds of a path; infinite where it cannot serve."""
    with suppress(ValueError):
        return float(plan(core, n, m, d, path=path, **options)["predicted_us"])
    return math.inf


@pytest.mark.parametrize("device", DEVICES)
def test_the_cheapest_path_is_planned(core: ModuleType, device: str) -> None:
    for n, m, d, dtype in product(SHAPES[1:-1], SHAPES[1:-1], (64, 2048), (F32, F64, BF16)):
        facts = plan(core, n, m, d, device, dtype=dtype)
        costs = {path: cost_of(core, n, m, d, path, device=device, dtype=dtype) for path in PATHS}
        assert facts["predicted_us"] == pytest.approx(costs[facts["path"]])
        assert facts["predicted_us"] <= min(costs.values())
        assert all(us > 0.0 for us in costs.values()) and costs["direct"] < math.inf


def test_forced_path(core: ModuleType) -> None:
    """A path that can serve the shape is taken; another one is an error."""
    for path in ("cluster", "direct", "dense", "screen", "tickets", "square"):
        assert plan(core, 50, 50, 70, path=path)["path"] == path
    assert plan(core, 50, 80, 70, path="bank")["path"] == "bank"
    impossible: list[tuple[str, int, dict[str, Any]]] = [
        ("cluster", 50, {"device": "sm_89"}),
        ("cluster", 257, {}),
        ("tickets", 257, {}),
        ("square", 50, {"symmetric": False}),
        ("square", 50, {"wide_clusters": 0}),
        ("square", 50, {"device": "sm_89"}),
        ("square", 257, {}),
        ("tickets", 50, {"dtype": F64}),
        ("dense", 50, {"dtype": F64}),
        ("screen", 200, {"k": 129}),
        ("bank", 50, {"symmetric": True}),
    ]
    for path, n, options in impossible:
        with pytest.raises(ValueError, match=f"{path} cannot serve"):
            plan(core, n, n, 70, path=path, **options)


def test_buffers_hold_what_a_sample_leaves(core: ModuleType) -> None:
    """About ratio x K candidates pass the thresholds of a sample of one in `ratio`; there is room for twice that."""
    for m, k in product((2000, 8192, 65536, 1_000_000), (1, 10, 33, 128)):
        facts = plan(core, 8192, m, 512, k=k, symmetric=False, path="screen")
        assert facts["sample_columns"] >= min(m, 2 * k)
        ratio = -(-m // facts["sample_columns"])
        assert facts["buffer_capacity"] >= (1.3 if k >= 33 else 2) * ratio * k, (m, k, facts)
        assert facts["buffer_capacity"] >= 16 * k


@pytest.mark.parametrize(
    ("n", "m", "k"), [(8192, 8192, 10), (8192, 8192, 1), (65536, 65536, 10), (256, 65536, 10), (8192, 20000, 128)]
)
def test_no_draw_overflows(core: ModuleType, n: int, m: int, k: int) -> None:
    """Candidates in random order, the sampled ones shared out over groups: how many are not farther than the K-th least
    of the groups is far below the buffer on average, and never above it in 200 draws."""
    facts = plan(core, n, m, 64, k=k, path="screen")
    group, generator = facts["sample_group"], torch.Generator().manual_seed(1)
    groups = facts["sample_columns"] // group
    assert group == 1 or groups >= 4 * (k + 1)
    ranks = torch.stack([torch.randperm(m, generator=generator)[: groups * group] for _ in range(200)])
    entries = ranks.view(200, groups, group).amin(-1).kthvalue(k).values + 1
    assert entries.double().mean() <= 0.72 * facts["buffer_capacity"]
    assert entries.max() <= facts["buffer_capacity"]


def test_one_sample_serves(core: ModuleType) -> None:
    """Thirteen launches of the screening whatever the shape, a strip: no second sample. What the sample leaves of a row
    fits the place of its buffer, or the sample is small."""
    shapes = [(8192, 8192), (65536, 65536), (64, 65536), (256, 4096), (1024, 200_000), (4096, 1_000_000)]
    for (n, m), k in product(shapes, (1, 10, 128)):
        facts = plan(core, n, m, 512, k=k, path="screen")
        assert facts["launches"] == 3 + 10 * facts["strips"]
        values = -(-facts["sample_columns"] // 128) * 128 // facts["sample_group"]
        assert values * 4 <= facts["buffer_capacity"] * 8 or facts["sample_columns"] <= 1024 or n <= 1024
        # Few anchors: no more than buffers of 4096 hold. One in 16 is sampled, or less where that is cheaper.
        assert n > 1024 or facts["buffer_capacity"] <= 4096
        assert n > 1024 or facts["sample_columns"] <= max(2 * k, -(-m // 16))
    assert plan(core, 1024, 1_000_000, 512, k=10, path="screen")["sample_columns"] < 1_000_000 / 64


def test_buffers_of_very_many_anchors(core: ModuleType) -> None:
    """Less memory for fewer entries: a larger sample; room for 32 times its ratio whatever that is."""
    for m in (32768, 65536, 200_000, 1_000_000, 4_000_000):
        facts = plan(core, 65536, m, 128, symmetric=False, path="screen")
        ratio = -(-m // facts["sample_columns"])
        assert ratio >= 12 and facts["buffer_capacity"] >= 32 * ratio, (m, facts)
    assert plan(core, 65536, 65536, 128)["buffer_capacity"] == 384
    assert plan(core, 65536, 65536, 128, k=11)["buffer_capacity"] >= 512


def test_bad_arguments(core: ModuleType) -> None:
    backward = partial(core.cuda_backward_plan, D=1, dtype=F32)
    for size in (-1, 2**31, 2**62):
        with pytest.raises(ValueError, match=rf"expected N, M, D of 0 to 2147483647.* got {size}, 1, 1 and 10"):
            plan(core, size, 1, 1)
    with pytest.raises(ValueError, match=r"of at most 2\^56, got \(2147483647 \+ 1\) x 2147483647"):
        plan(core, 2**31 - 1, 1, 2**31 - 1)
    assert plan(core, 2**31 - 1, 2**31 - 1, 2**23)["workspace_bytes"] > 0
    with pytest.raises(ValueError, match="symmetric: expected N = M, got 2 and 3"):
        plan(core, 2, 3, 1, symmetric=True)
    with pytest.raises(ValueError, match=r"expected a capability of 8.0 or newer.* got 7.5, 132"):
        backward(N=1, M=1, k=1, symmetric=True, capability=(7, 5))
    with pytest.raises(ValueError, match=r"multiprocessors and shared_bytes >= 1, got 9.0, 0"):
        core.cuda_plan(N=1, M=1, D=1, k=1, dtype=F32, symmetric=True, multiprocessors=0)
    with pytest.raises(ValueError, match="at most 4294967295 edges, got 2147483647 x 4"):
        backward(N=2**31 - 1, M=5, k=2, symmetric=False)
    with pytest.raises(ValueError, match=r"cuda_plan: batch: expected one of random, clusters.* got hard"):
        plan(core, 1, 1, 1, batch="hard")
    with pytest.raises(ValueError, match="dtype: expected 0"):
        plan(core, 1, 1, 1, dtype=7)
    with pytest.raises(ValueError, match="expected one of auto, cluster"):
        plan(core, 1, 1, 1, path="fast")


def test_predictions_are_of_the_planned_kernels(core: ModuleType) -> None:
    """Kernels of a prediction are those that are launched, and their times add up."""
    for n, m, d in product(SHAPES[1:], SHAPES[1:], (64, 2048)):
        for facts in (
            plan(core, n, m, d),
            dict(core.cuda_backward_plan(N=n, M=m, D=d, k=10, dtype=F32, symmetric=n == m)),
        ):
            assert sum(launches for _, launches, _ in facts["kernels"]) == facts["launches"], (n, m, d, facts)
            assert facts["predicted_us"] == pytest.approx(sum(us for _, _, us in facts["kernels"]))
            assert all(0.0 < us < float("inf") for _, _, us in facts["kernels"]), (n, m, d, facts)


@pytest.mark.parametrize("device", DEVICES)
def test_the_search_for_positives_fills_the_device(core: ModuleType, device: str) -> None:
    """A block for every multiprocessor wherever there are so many pairs of 64 anchors and 64 candidates, each anchor in
    one group; large searches look up few labels."""
    multiprocessors = DEVICES[device][1]
    sizes = [1, 63, 64, 65, 1000, 1024, 8192, 16383, 16384, 16385, 65536, 300_001]
    for n, m in product(sizes, sizes):
        facts = plan(core, n, m, 64, device, path="screen")
        anchors, segments = facts["positive_anchors"], facts["positive_segments"]
        groups = -(-n // anchors)
        assert 64 <= anchors <= 1024 and 1 <= segments <= -(-m // 64)
        assert groups * segments >= min(multiprocessors, -(-n // 64) * -(-m // 64)), (n, m)
        assert groups * m <= max(2**20, n * m // 1024 + m), (n, m)
    assert plan(core, 1024, 1024, 2048, device, path="screen")["positive_anchors"] == 64
