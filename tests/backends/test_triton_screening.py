"""The screened selection of the Triton backend: it selects what direct sums select, whatever errors its bounds allow.

Without a GPU everything runs in Triton's interpreter; the inline assembly is emulated in `test_triton_assembly.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sn_ops.triton import tuning
from support import judge, oracle, problems
from support.backends import require
from support.problems import Case
from support.triton_screens import assert_same, forward, launched, small_screens, unscreened

# ---- one selection by every path --------------------------------------------------------------------

SCREENED = [*problems.ADVERSARIAL]


@pytest.mark.parametrize("name", SCREENED)
def test_screening_selects_what_direct_sums_select(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Bit for bit, over batches that defeat bounds: those rows must reach the fallback, not a wrong neighbour."""
    for dtype in (torch.float32, torch.bfloat16):
        case = problems.adversarial_case(name, 97, 72, k=6, dtype=dtype)
        unscreened(monkeypatch)
        expected = forward(case)
        small_screens(monkeypatch)
        assert_same(forward(case), expected)


@pytest.mark.parametrize("kind", ["none", "offset", "tensor"])
def test_screening_a_bank(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    case = problems.bank_case(33, 150, 40, 9, 10, self_kind=kind)
    unscreened(monkeypatch)
    expected = forward(case)
    small_screens(monkeypatch)
    assert_same(forward(case), expected)


@pytest.mark.parametrize(
    ("rows", "dims", "k"),
    [(40, 1, 2), (65, 33, 1), (90, 130, 17), (120, 2100, 4), (100, 64, 33), (150, 96, 64), (290, 48, 128)],
)
def test_screening_off_every_tile(monkeypatch: pytest.MonkeyPatch, rows: int, dims: int, k: int) -> None:
    """Strips, tiles, blocks of D and sections that do not divide the sizes; lists of every length; half precision with
    a copy and without."""
    for dtype in (torch.float32, torch.float16):
        case = problems.self_case(rows, dims, 12, k).to(dtype)
        unscreened(monkeypatch)
        expected = forward(case)
        small_screens(monkeypatch, strip=48)
        assert_same(forward(case), expected)


def queued(monkeypatch: pytest.MonkeyPatch, case: Case) -> int:
    """How many anchors of a screened forward went to the fallback: the last strip's counter."""
    counters: list[torch.Tensor] = []
    from sn_ops.triton import screening

    launch = type(screening.fallback_merge_kernel).__getitem__

    def note(self: Any, grid: Any) -> Any:
        run = launch(self, grid)
        if self is not screening.fallback_merge_kernel:
            return run

        def call(*arguments: Any, **options: Any) -> Any:
            counters.append(arguments[1].clone())
            return run(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(type(screening.fallback_merge_kernel), "__getitem__", note)
        forward(case)
    return sum(int(counter) for counter in counters)


def test_screening_certifies_ordinary_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few anchors go to the fallback: sending all of them there would be right, and useless."""
    small_screens(monkeypatch)
    assert queued(monkeypatch, problems.self_case(120, 64, 30, k=6)) == 0
    outlier = problems.adversarial_case("outlier-x1000", 120, 64, k=6)
    assert queued(monkeypatch, outlier) <= 1, "an outlier loosens only itself"
    collapsed = problems.adversarial_case("collapsed", 120, 64, k=6)
    assert queued(monkeypatch, collapsed) == 0, "the centre is subtracted first"


def test_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortlists too small for anybody, then buffers: everyone is served by the fallback, and selects the same."""
    case = problems.self_case(90, 40, 12, k=6)
    unscreened(monkeypatch)
    expected = forward(case)
    for smaller in ({"short": 4}, {"capacity": 32, "fallback_segments": 4}):
        small_screens(monkeypatch, **smaller)
        assert_same(forward(case), expected)
    small_screens(monkeypatch, short=4)
    assert queued(monkeypatch, case) == 90


@pytest.fixture
def stale_memory() -> Iterator[None]:
    """New memory holds NaN and the largest integers, which PyTorch does for its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.usefixtures("stale_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [slice(7, 8), slice(None, None, 9), slice(None)])
def test_non_finite_rows_among_screened_ones(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bad: slice) -> None:
    """The loss is NaN, and indices stay inside: none is what the memory held before."""
    case = problems.self_case(80, 40, 12, k=6)
    feats = case.feats.to(dtype)
    feats[bad] = float("nan")
    feats[5, 3] = float("inf")
    small_screens(monkeypatch)
    loss, indices, *_, stats = forward(replace(case, feats=feats), reduction=0)
    assert loss.isnan() and stats[5].isnan()
    assert int(indices.min()) >= -1 and int(indices.max()) < 80


def test_products_beyond_float32_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision rows whose product is -inf, and whose distance is inf: selected as without screening."""
    case = problems.bank_case(20, 80, 16, 9, 6)
    case = replace(
        case,
        feats=torch.ones(20, 16, dtype=torch.bfloat16),
        candidates=torch.full((80, 16), -1e38, dtype=torch.bfloat16),
    )
    small_screens(monkeypatch)
    screened = forward(case)[1]
    unscreened(monkeypatch)
    assert torch.equal(screened, forward(case)[1]) and int(screened[:, :6].min()) >= 0


def test_the_usual_plan_screens_a_thousand_rows() -> None:
    """Tiles, sample and buffers as they are by default, against exact distances of sampled anchors."""
    rows = 1100
    assert tuning.screen_plan(rows, rows, 40, 10, False) is not None
    case = problems.self_case(rows, 40, 200)
    problem = problems.to_oracle(case)
    sample = [0, 1, 127, 128, 550, *range(17, rows, 90), rows - 1]
    found = judge.selection_of(judge.neighbors_of(case, "triton"))
    chosen = oracle.Selection(found.support[sample], found.nearest[sample], found.farthest[sample])
    oracle.check_selection(problem, case.k, chosen, sample)


# ---- the bounds ---------------------------------------------------------------------------------------


def test_rows_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision moves these rows in the direction of their distances: both residuals enter every threshold.

    Three of four candidates, those in the right slices of a tile, are far away on both sides: so that the least bound
    of a group is that of its one row on the line.
    """
    for k in (30, 75):
        near = problems.line_case(100, 224, k=k, seed=k)
        assert near.candidates is not None and near.candidate_labels is not None
        bank = 100.0 * near.candidates[0].sign() * (1.0 - 2.0 * (torch.arange(7 * 128) % 2))[:, None]
        bank.view(7, 128, -1)[:, :32] = near.candidates.view(7, 32, -1)
        case = replace(near, candidates=bank, candidate_labels=torch.arange(7 * 128))
        unscreened(monkeypatch)
        expected = forward(case)
        small_screens(monkeypatch, every=1, tile=(128, 128, 64), strip=128, groups=7 * 32, capacity=2048, short=512)
        assert_same(forward(case), expected)


def erring_products(monkeypatch: pytest.MonkeyPatch, depth: int, signs: Callable[[tuple[int, ...]], Any]) -> None:
    """Products of rows of a common scale err by what the bound allows: 1.25 depth units of 2^-23 of n_i + n_j.

    P is twice a product, so a product errs by half of that; each step of the loop by its part of the norms.
    """
    from triton.runtime import interpreter

    exact = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        found = exact(self, a, b, d, *options)
        x, y = (operand.data.astype(np.float64) for operand in (a, b))
        norms = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=0)[None, :]
        error = 0.625 * depth * 2.0**-23 * norms * signs(norms.shape)
        return interpreter.TensorHandle((found.data + error).astype(np.float32), found.dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def same_scale(rows: int, dims: int, k: int, dtype: torch.dtype) -> Case:
    """Unit rows close together, far from 0 in half precision: the errors are as large as their distances' gaps."""
    generator = torch.Generator().manual_seed(7)
    feats = torch.randn(rows, dims, generator=generator)
    feats = torch.nn.functional.normalize(feats, dim=1) if dtype == torch.float32 else 1.0 + 0.02 * feats
    return Case(feats.to(dtype), torch.arange(rows) // 4, k=k)


@pytest.mark.skipif(not tuning.INTERPRETED, reason="a GPU's products err as they do")
@pytest.mark.parametrize("how", ["opposed", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_that_err_by_the_bound(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, how: str) -> None:
    """Too large in the sample, which lowers thresholds, and too small in the screening; or one way or the other."""
    from sn_ops.triton import screening

    dims = 1024
    case = same_scale(160, dims, 9, dtype)
    unscreened(monkeypatch)
    expected = forward(case)
    sampling = False
    random = np.random.default_rng(0)

    def signs(shape: tuple[int, ...]) -> Any:
        if how == "random":
            return random.integers(0, 2, shape) * 2 - 1
        return 1.0 if sampling else -1.0

    launch = type(screening.sample_kernel).__getitem__

    def note(self: Any, grid: Any) -> Any:
        nonlocal sampling
        sampling = self is screening.sample_kernel
        return launch(self, grid)

    monkeypatch.setattr(type(screening.sample_kernel), "__getitem__", note)
    erring_products(monkeypatch, dims, signs)
    small_screens(monkeypatch, every=1)
    assert_same(forward(case), expected)


def prepared(feats: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """What the screening prepares of rows, and the centre that it subtracts, if any."""
    from sn_ops.triton import screened

    centre = screened._centre(feats) if feats.dtype == torch.float32 else None
    flags = torch.empty(2, dtype=torch.int32)
    found = screened._prepare(feats, centre, 64, flags, 0, 2)
    return found, torch.zeros(feats.shape[1]) if centre is None else centre


@pytest.mark.parametrize("dims", [16, 100, 1024, 4096])
def test_residuals_are_bounded(dims: int) -> None:
    """rho against the residual in float64, where nothing in it is to spare.

    The centre is just below what makes a difference to a float32 near 1: the subtraction errs by all of it. The rows
    lie just above the middle between two half-precision numbers, where the copy errs as much as it can, the same way;
    or on such a number.
    """
    require("triton")
    if not tuning.INTERPRETED:
        pytest.skip("calls kernels on the CPU")
    random = torch.rand(1024, 1, generator=torch.Generator().manual_seed(dims))
    feats = (1 + 2.0**-11 * (1 + 2.0**-4 * random)).expand(1024, dims).contiguous()
    feats[1::4] = 1 + 2.0**-10 * (1 + (random[1::4] * 100).floor())
    feats[::16] = 0.9999 * 2.0**-24  # those that the median is taken of
    found, centre = prepared(feats)
    copy = found.half.double() * found.scale[:1024, None].double()
    moved = (feats.double() - centre.double() - copy[:, :dims]).norm(dim=1)
    rho = found.rho[:1024].double()
    assert (rho >= moved).all()
    assert (moved > 0).sum() > 900 and (rho[moved > 0] / moved[moved > 0]).min() < 1.00101, "the bound is close"


def test_facts_of_rows() -> None:
    """Norms of the copies, what the screening compares, and what stands behind the last row."""
    require("triton")
    if not tuning.INTERPRETED:
        pytest.skip("calls kernels on the CPU")
    feats = torch.randn(70, 100, generator=torch.Generator().manual_seed(1))
    feats[3], feats[4], feats[5, 7] = 0.0, 1e-25, torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        found, _ = prepared(feats.to(dtype))
        assert found.half.shape == (70, 128) and found.half[:, 100:].eq(0).all()
        rows = found.half.double() * found.scale[:70, None].double()
        norm = (rows * rows).sum(dim=1)
        finite = torch.arange(70) != 5
        if dtype == torch.bfloat16:  # float32 rows are moved by the centre
            assert found.rho[4] == torch.inf and found.near[4] == -torch.inf and found.norm[3] == 0
            finite[4] = False
        assert torch.allclose(found.norm[:70][finite].double(), norm[finite], rtol=1e-5)
        assert found.norm[5] == 0 and found.rho[5] == 0
        wanted = norm * (1 - (1.28125 * 128 + 64) * 2.0**-23) - found.rho[:70].double() ** 2
        assert torch.allclose(found.near[:70][finite].double(), wanted[finite], rtol=1e-5, atol=1e-12)
        for fact, value in (found.norm, 0), (found.rho, 0), (found.near, torch.inf):
            assert fact.numel() == 256 and (fact[70:] == value).all()


def test_thresholds_allow_for_the_anchor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """t is not below the (K + 1)-th bound of the groups and the anchor's own rho, its square and 2 t go with it; no
    threshold is infinite, and the counters of a tile's unused rows are cleared too."""
    require("triton")
    if not tuning.INTERPRETED:
        pytest.skip("looks at memory of the CPU")
    case = problems.line_case(150, k=20, seed=1)
    small_screens(monkeypatch, strip=160)
    leasts, groups, first, rows, padded, k, depth, norm, rho, count, _, limit, twice = launched(
        monkeypatch, case, "threshold_kernel"
    )["threshold_kernel"][1:]
    assert (first, rows, padded, k) == (0, 150, 160, 20) and leasts.shape[1] == groups
    upper = leasts[:150].double().sort(dim=1).values[:, k]
    t = twice[:150].double() / 2
    assert (t >= upper + rho[:150].double()).all() and (t <= 1.001 * (upper + rho[:150].double()) + 1e-6).all()
    eta = (1.28125 * depth + 64) * 2.0**-23
    n = norm[:150].double()
    assert (limit[:150].double() >= t * t - n * (1 - eta) - 1e-6 * n).all()
    assert (rho[:150] > 0).sum() > 140
    assert (count[:padded] == 0).all()


# ---- what lies in whole blocks --------------------------------------------------------------------------


def shifted(rows: torch.Tensor) -> torch.Tensor:
    """The same rows two bytes behind a multiple of 16."""
    wide = torch.empty(rows.numel() + 8, dtype=rows.dtype)
    return wide[1 : 1 + rows.numel()].view(rows.shape).copy_(rows)


def strided(rows: torch.Tensor) -> torch.Tensor:
    """The same rows at an odd distance from each other."""
    wide = torch.empty((rows.shape[0], rows.shape[1] + 3), dtype=rows.dtype)
    return wide[:, : rows.shape[1]].copy_(rows)


@pytest.mark.parametrize("change", [None, shifted, strided])
@pytest.mark.parametrize("dims", [64, 100])
def test_half_precision_is_read_in_whole_blocks(
    monkeypatch: pytest.MonkeyPatch, dims: int, change: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    """By products and by direct sums; copied only where they do not lie so."""
    require("triton")
    if not tuning.INTERPRETED:
        pytest.skip("looks at memory of the CPU")
    case = problems.bank_case(40, 90, dims, 9, 5).to(torch.float16)
    assert case.candidates is not None
    unscreened(monkeypatch)
    expected = forward(case)
    if change is not None:
        case = replace(case, feats=change(case.feats), candidates=change(case.candidates))
    small_screens(monkeypatch)
    assert_same(forward(case), expected)
    arguments = launched(monkeypatch, case)
    for name, places in ("screen_kernel", (1, 4)), ("refine_kernel", (1, 3)), ("fallback_kernel", (1, 3)):
        for place in places:
            rows = arguments[name][place]
            assert rows.shape[1] % 64 == 0 and rows.stride(0) % 16 == 0 and rows.data_ptr() % 16 == 0
    assert case.candidates is not None
    copied = arguments["refine_kernel"][1].data_ptr() != case.feats.data_ptr()
    assert copied == (dims != 64 or change is not None)


def test_flags_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One a program that prepares rows, and every row is looked at by one of them."""
    require("triton")
    from sn_ops.triton import screened

    for most in (2048, 6, 2):
        monkeypatch.setattr(tuning, "MOST_FLAGS", most)
        monkeypatch.setattr(screened, "_prepared_rows", lambda: 8)
        for bank in (False, True):
            case = problems.bank_case(40, 90, 24, 9, 5) if bank else problems.self_case(90, 24, 9, 5)
            small_screens(monkeypatch)
            grid, *arguments = launched(monkeypatch, case)["prepare_kernel"]
            flags, first = arguments[13], arguments[14]
            assert first + grid[0] == flags.numel() <= most
            pool = case.feats if case.candidates is None else case.candidates
            for row in (0, 41, 89):
                saved = pool[row].clone()
                pool[row, -1] = torch.inf
                assert forward(case)[0].isnan().all(), (most, bank, row)
                pool[row] = saved


# ---- the plan -------------------------------------------------------------------------------------------

HOPPER = tuning.HOPPER
OTHERS = {
    "A100": tuning.Device((8, 0), 163 * 1024),
    "GeForce 30": tuning.Device((8, 6), 99 * 1024),
    "GeForce 40": tuning.Device((8, 9), 99 * 1024),
    "B200": tuning.Device((10, 0), 227 * 1024, (3, 8)),
    "GeForce 50": tuning.Device((12, 0), 99 * 1024),
}


@pytest.mark.parametrize("interpreted", [True, False])
def test_the_plan_of_every_size(monkeypatch: pytest.MonkeyPatch, interpreted: bool) -> None:
    """What the kernels assume, up to 4 M candidates and the longest lists."""
    monkeypatch.setattr(tuning, "INTERPRETED", interpreted)
    for device in (HOPPER, *OTHERS.values()):
        for candidates in (1024, 1100, 8192, 10**5, 10**6, 4 * 10**6):
            for k in (1, 2, 10, 15, 16, 31, 32, 64, 65, 100, 128):
                for dims in (16, 128, 2048, 16384):
                    plan = tuning.screen_plan(candidates, candidates, dims, k, False, device)
                    if plan is None:
                        assert candidates < 64 * k
                        continue
                    rows, columns, depth = plan.tile
                    assert plan.samples * plan.stride <= candidates and plan.group_size >= 4
                    assert plan.groups * plan.group_size == -(-plan.samples // columns) * columns
                    assert plan.samples // plan.group_size > k + 1, "groups that are not empty"
                    assert plan.capacity >= 2 * plan.stride * (k + 1) and plan.capacity % 64 == 0
                    assert plan.fallback_segments * plan.list_size <= plan.capacity
                    assert plan.strip >= rows or plan.strip == candidates
                    assert 8 * plan.strip * plan.capacity <= 2**25 and 4 * plan.strip * plan.groups <= 2**25
                    assert plan.strip * plan.capacity < 2**31
                    assert columns <= 256 and 256 % columns == 0, "facts are padded to whole tiles"
                    assert columns * plan.stride * tuning.MOST_DEPTH <= 2**31, "offsets of a tile's samples"
                    shared = plan.stages * (rows + columns) * depth * 2
                    assert interpreted or shared <= device.shared


@pytest.mark.parametrize("candidates", [2**18, 2**20, 2**22])
@pytest.mark.parametrize("k", [1, 10, 15, 32, 128])
def test_few_buffers_overflow(candidates: int, k: int) -> None:
    """Simulated for random rows, whose candidates come in a random order: the threshold is the (K + 1)-th least of the
    groups' leasts, and what is nearer is kept."""
    plan = tuning.screen_plan(candidates, candidates, 2048, k, False)
    assert plan is not None
    random = np.random.default_rng(k)
    nearest = 8 * (k + 1) + 100  # samples in the order of their distances
    kept = []
    for _ in range(1000):
        rank = random.geometric(1 / plan.stride, nearest).cumsum()
        groups = random.integers(0, plan.samples // plan.group_size, nearest)
        firsts = np.sort(np.unique(groups, return_index=True)[1])
        kept.append(rank[firsts[k]])
    assert (np.array(kept) > plan.capacity).mean() <= 0.001
    assert np.mean(kept) <= plan.capacity / 1.9


def test_plans_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that fit the shared memory, two blocks an SM for few steps, and no products that may not repeat."""
    monkeypatch.setattr(tuning, "INTERPRETED", False)

    def plan(device: tuning.Device, dims: int = 2048) -> tuning.ScreenPlan | None:
        return tuning.screen_plan(8192, 8192, dims, 10, False, device)

    for name in ("A100", "B200"):
        found = plan(OTHERS[name])
        assert found is not None and found.tile == (128, 256, 64)
    for name in ("GeForce 30", "GeForce 40", "GeForce 50"):
        found = plan(OTHERS[name])
        assert found is not None and found.tile == (128, 128, 64)
    few = plan(HOPPER, 128)
    assert few is not None and few.registers is not None and 2 * 8 * 32 * few.registers <= 65536
    assert 2 * few.stages * sum(few.tile[:2]) * few.tile[2] * 2 <= HOPPER.shared
    for capability in ((10, 0), (10, 3)):
        assert plan(tuning.Device(capability, 227 * 1024, (3, 7))) is None
        assert plan(tuning.Device(capability, 227 * 1024, (3, 8))) is not None
    assert plan(tuning.Device((9, 0), 227 * 1024, (3, 6))) is not None
    assert plan(tuning.Device((12, 0), 99 * 1024, (3, 6))) is not None


def test_the_facts_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the device and from the package of the compiler; tensors on none count as Hopper's."""

    class Facts:
        major, minor, shared_memory_per_block_optin = 8, 6, 101376

    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Facts)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "3.10.1+git0")
    tuning._device.cache_clear()
    assert tuning.device_facts(torch.device("cuda", 1)) == tuning.Device((8, 6), 101376, (3, 10))
    assert tuning.device_facts(torch.device("meta")) == tuning.HOPPER
    tuning._device.cache_clear()
