"""The Triton backend's own promises: one selection by every path, certified screening, plans, registration.

The suite of all backends runs it too. Without a GPU everything runs in Triton's interpreter, on shapes made for it.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sn_ops
from sn_ops import dispatch, ops, triton
from sn_ops.reference import Graph
from sn_ops.triton import tuning
from support import fresh_python, judge, oracle, problems
from support.problems import Case

Plan = Callable[..., Any]


def forward(case: Case, squeeze: int = 0, reduction: int = 2) -> Graph:
    """The forward operator with squared distances."""
    case = case.on("triton")
    tensor = case.self_index if isinstance(case.self_index, torch.Tensor) else None
    offset = 0 if case.candidates is None else case.self_index if isinstance(case.self_index, int) else -1
    return ops.forward(
        "triton", case.feats, case.labels, case.candidates, case.candidate_labels, tensor, offset,
        case.k, 5.0, 0.1, squeeze, reduction, True,
    )  # fmt: skip


def small_screens(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    """Batches of a few dozen rows take the path of thousands, in small strips and with buffers as given."""

    def plan(
        anchors: int, candidates: int, dims: int, neighbours: int, wide: bool, device: tuning.Device
    ) -> tuning.ScreenPlan | None:
        if wide or anchors == 0 or candidates < 2 * neighbours + 4:
            return None
        list_size = tuning.power_of_two(max(neighbours, 2))
        stride = 2 if candidates >= 16 * (neighbours + 1) else 1
        samples = candidates // stride
        usual = tuning.ScreenPlan(
            strip=64, stride=stride, samples=samples, group_size=4, groups=tuning.cdiv(samples, 32) * 8,
            capacity=max(64, 16 * list_size), short=max(32, 4 * list_size), list_size=list_size, tile=(32, 32, 64),
            stages=1, warps=4, registers=None, unroll=2, fallback_segments=4, fallback_programs=3,
        )  # fmt: skip
        return replace(usual, **changed)

    monkeypatch.setattr(tuning, "screen_plan", plan)


def unscreened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct sums of all pairs, whatever the size."""
    monkeypatch.setattr(tuning, "screen_plan", lambda *_, **__: None)


def assert_same(found: Graph, expected: Graph) -> None:
    """Every output to the bit: the loss too, since it is computed from the same selection by the same code."""
    for name, a, b in zip(
        ("loss", "indices", "coefficients", "nearest", "farthest", "squared", "stats"), found, expected, strict=True
    ):
        assert judge.same_bits(a, b), name


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


@pytest.mark.parametrize(("rows", "dims", "k"), [(40, 1, 2), (65, 33, 1), (90, 130, 17), (120, 2100, 4)])
def test_screening_off_every_tile(monkeypatch: pytest.MonkeyPatch, rows: int, dims: int, k: int) -> None:
    """Strips, tiles, blocks of D and sections that do not divide the sizes; half precision without a padded copy."""
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


def test_path_does_not_depend_on_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors alone, in a small batch, in a large one: the same neighbours at the same distances, to the bit."""
    case = problems.bank_case(70, 120, 48, 9, 7)
    small_screens(monkeypatch)
    together = forward(case)
    unscreened(monkeypatch)
    few = replace(case, feats=case.feats[20:29], labels=case.labels[20:29])
    for a, b in zip(together[1:6], forward(few)[1:6], strict=True):
        assert judge.same_bits(a[20:29].contiguous(), b)


# ---- the summation order ----------------------------------------------------------------------------


def sums_in_documented_order(anchor: oracle.Array, candidates: oracle.Array) -> oracle.Array:
    """`sn_ops/triton/order.py`, "The one summation order", in NumPy."""
    rows, dims = candidates.shape
    total = np.zeros((rows, 32), candidates.dtype)
    for section in range(0, dims, 2048):
        part = np.zeros((rows, 32), candidates.dtype)
        for start in range(section, min(section + 2048, dims), 32):
            difference = np.zeros((rows, 32), candidates.dtype)
            chunk = anchor[start : start + 32] - candidates[:, start : start + 32]
            difference[:, : chunk.shape[1]] = chunk
            part = oracle.fused_multiply_add(difference, difference, part)
        total = total + part
    while total.shape[1] > 1:
        total = total[:, 0::2] + total[:, 1::2]
    return total[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dims", [1, 31, 33, 100, 2049, 4100])
def test_documented_summation_order(monkeypatch: pytest.MonkeyPatch, dims: int, dtype: torch.dtype) -> None:
    """Squared distances to the bit, from tiles and from lists. The interpreter of Triton 3.6 rounds a fused
    multiply-add twice, as the machine code does not: there the same order with two roundings."""
    case = replace(problems.self_case(20, dims, 4, k=20, seed=dims), k=20).to(dtype)
    if dtype == torch.float32:
        small_screens(monkeypatch)
        case = replace(case, k=6)
    _, indices, *_, squared, _ = (x.cpu() for x in forward(case))
    feats = case.feats.numpy()
    wanted = sums_in_documented_order if fused_is_fused() else _with_two_roundings
    for i in range(20):
        used = indices[i] >= 0
        chosen = indices[i][used].numpy()
        assert (squared[i][used].numpy() == wanted(feats[i], feats[chosen])).all()


def _with_two_roundings(anchor: oracle.Array, candidates: oracle.Array) -> oracle.Array:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "fused_multiply_add", lambda a, b, c: a * b + c)
        return sums_in_documented_order(anchor, candidates)


def fused_is_fused() -> bool:
    """Whether `tl.fma` rounds once here: on a GPU always, in the interpreter since it has its own."""
    if not tuning.INTERPRETED:
        return True
    from triton.runtime import interpreter

    return "fma_fp32" in inspect.getsource(interpreter.InterpreterBuilder.create_fma)


def test_one_place_sums() -> None:
    """No `tl.sum` of squares, no product outside `tl.fma`: `lane_step` and `lane_tree` are the order's only code."""
    from sn_ops.triton import gradients, loss, order, positives, screening, search

    for module in (order, search, screening, positives, loss, gradients):
        path = module.__file__
        assert path is not None
        for node in ast.walk(ast.parse(Path(path).read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("distances"):
                called = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
                assert {"lane_step", "lane_tree"} <= called and not {"tl.sum", "tl.fma", "tl.dot"} & called


# ---- other paths and plans ----------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [1, 3])
def test_segments_change_nothing(monkeypatch: pytest.MonkeyPatch, segments: int) -> None:
    """Candidates in one piece or in several."""
    case = problems.bank_case(20, 130, 24, 6, 10, self_kind="offset")
    expected = forward(case)
    usual = tuning.search_plan

    def plan(*arguments: Any) -> tuning.SearchPlan:
        found = usual(*arguments)
        size = tuning.cdiv(130, segments * found.list_size) * found.list_size
        return replace(found, rows=8, columns=found.list_size, segments=tuning.cdiv(130, size), segment_size=size)

    monkeypatch.setattr(tuning, "search_plan", plan)
    assert_same(forward(case), expected)


def test_rows_sorted_whole_select_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of large k and of float64, in strips, against lists."""
    for name in ("self-97x64-ids20-k128", "duplicates", "bank-63-64x257-k10-tensor"):
        case = problems.CASES[name]()
        with monkeypatch.context() as patch:
            expected = forward(case)
            patch.setattr(tuning, "MAX_LISTED_K", 0)
            patch.setattr(tuning, "DENSE_PAIRS", 1000)
            assert_same(forward(case), expected)


def test_k_above_every_list() -> None:
    case = problems.self_case(150, 16, 10, k=140)
    judge.check_loss(case, "triton", judge.check_neighbors(case, "triton"), reductions=("mean",))


@pytest.mark.parametrize("chunk", [16, 64, 4096])
def test_hubs_in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """One candidate is everybody's neighbour; whole chunks of its edges are summed apart, or none is."""
    feats = torch.nn.functional.normalize(torch.randn(90, 20, generator=torch.Generator().manual_seed(1)), dim=1)
    feats[40] = 0.0
    case = Case(feats, torch.arange(90) % 2, k=3)
    usual = tuning.gradient_plan
    monkeypatch.setattr(tuning, "gradient_plan", lambda *a: replace(usual(*a), chunk=chunk, edges=8, rows=4))
    selection = judge.check_neighbors(case, "triton")
    assert (selection.support == 40).any(axis=1).sum() > 80
    judge.check_loss(case, "triton", selection)


def test_plans_keep_their_promises() -> None:
    """Plans keep what kernels assume about tiles, for shapes of every regime."""
    for rows, pool, dims, k in [(1, 1, 1, 1), (128, 128, 2048, 10), (8192, 8192, 2048, 10), (65536, 65536, 128, 128),
                                (256, 65536, 2048, 33), (4096, 10**6, 64, 64), (300, 20000, 17, 7)]:  # fmt: skip
        for wide in (False, True):
            found = tuning.search_plan(rows, pool, k, wide, wide)
            assert found.columns % found.list_size == 0 and found.segment_size % found.columns == 0
            assert found.segments * found.segment_size >= pool > (found.segments - 1) * found.segment_size
            screen = tuning.screen_plan(rows, pool, dims, k, wide)
            if screen is None:
                assert wide or pool < 64 * k or pool < 1024 or dims < 16
                continue
            assert screen.samples * screen.stride <= pool and screen.tile[1] % screen.group_size == 0
            assert screen.groups > k + 1 and screen.groups * screen.group_size >= screen.samples
            assert screen.fallback_segments * screen.list_size <= screen.capacity
            assert 8 * screen.strip * screen.capacity <= 2**25, "the buffers of a strip"


# ---- registration ---------------------------------------------------------------------------------


def test_nothing_is_imported_before_it_is_needed() -> None:
    """Neither Triton nor its interpreter is imported before the first call."""
    script = "import sys, sn_ops; print(*sn_ops.backends()); assert 'triton' not in sys.modules, 'imported'"
    done = fresh_python.run("-c", script, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


def test_without_triton_it_says_so() -> None:
    """The error says so, and everything else works."""
    script = """
from importlib import metadata
found = metadata.version
def version(name):
    if name == "triton":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
import torch, sn_ops
entry = sn_ops.backends()["triton"]
assert not entry.usable and "triton" in entry.reason and "not installed" in entry.reason, entry
try:
    sn_ops.sn_loss(torch.eye(4), torch.zeros(4).long(), backend="triton")
except ValueError as error:
    assert entry.reason in str(error)
else:
    raise AssertionError("served")
assert sn_ops.sn_loss(torch.eye(4), torch.zeros(4).long()).isfinite()
"""
    done = fresh_python.run("-c", script)
    assert done.returncode == 0, done.stderr


def test_older_versions_need_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton 3.6 builds its launcher with the machine's C compiler and Python's headers, 3.9 does not."""
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "3.6.0")
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert triton.missing() == ""
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "C compiler" in triton.missing()
    monkeypatch.setenv("CC", "cc")
    assert triton.missing() == ""
    (tmp_path / "Python.h").unlink()
    assert "Python.h" in triton.missing()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "3.9.0")
    assert triton.missing() == ""


@pytest.mark.parametrize(("found", "usable"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True), ("4.0", True)])
def test_versions(monkeypatch: pytest.MonkeyPatch, found: str, usable: bool) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: found)
    assert (triton.missing() == "") == usable
    assert usable or found in triton.missing()


def test_only_the_interpreter_serves_cpu_tensors() -> None:
    """By name; "auto" takes the compiled CPU backend."""
    script = """
import torch, sn_ops
try:
    sn_ops.sn_loss(torch.eye(4), torch.zeros(4).long(), backend="triton")
except ValueError as error:
    assert "cuda" in str(error), error
else:
    raise AssertionError("served")
"""
    done = fresh_python.run("-c", script, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80 86 90a", (8, 0), True),
        ("80 86 90a", (8, 9), True),
        ("86", (8, 0), False),
        ("80 90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("80 90a 100 120+PTX", (12, 1), True),
        ("80+PTX", (9, 0), True),
        ("120+PTX", (10, 0), False),
        ("90a+PTX", (9, 0), True),
        ("90a+PTX", (10, 0), False),
        ("100f+PTX", (10, 3), True),
        ("100f+PTX", (12, 0), False),
        ("", (9, 0), False),
    ],
)
def test_which_code_runs_where(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert dispatch.runs_on(architectures, capability) == runs


def test_auto_passes_over_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA library for other GPUs leaves them to Triton, a GPU too old for that to the reference."""

    class OnCuda:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(dispatch, "LOAD_ERROR", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    capability = (8, 6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(dispatch, "runs_on", lambda _, found: found == (9, 0))
    choose: Any = dispatch.choose_backend
    for capability, chosen in ((8, 6), "triton"), ((9, 0), "cuda"), ((7, 5), "reference"):  # noqa: B007
        dispatch._unfit.cache_clear()
        assert choose("auto", OnCuda) == chosen
    with pytest.raises(ValueError, match=r"7\.5"):
        choose("triton", OnCuda)
    dispatch._unfit.cache_clear()


def test_shapes_decide_everything() -> None:
    """Forward and backward run on tensors without data: no value is ever waited for, so a CUDA graph can hold them.

    In a process without the interpreter, with launches that are noted instead of made."""
    script = Path(sn_ops.__file__).parents[1] / ".ci" / "triton_launches.py"
    if not script.exists():
        script = Path(__file__).parents[2] / ".ci" / "triton_launches.py"
    code = f"""
import runpy
facts = runpy.run_path({str(script)!r})
launches = facts["launches_of"](facts["REGIMES"])
names = {{launch.kernel for launch in launches}}
assert {{"search_kernel", "screen_kernel", "gradient_kernel"}} <= names, names
"""
    done = fresh_python.run("-c", code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert subprocess.run([sys.executable, "-m", "py_compile", str(script)], check=False).returncode == 0
