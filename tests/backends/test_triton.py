"""The Triton backend's own promises: one selection by every path, certified screening, plans, registration.

The suite of all backends runs it too. Without a GPU everything runs in Triton's interpreter, on shapes made for it.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sn_ops
from sn_ops import dispatch, triton
from sn_ops.triton import tuning
from support import fresh_python, judge, oracle, problems
from support.problems import Case
from support.triton_screens import assert_same, forward, small_screens, unscreened

Plan = Callable[..., Any]


# ---- paths and the order of sums ----------------------------------------------------------------------------


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


def test_path_does_not_depend_on_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors alone, in a small batch, in a large one: the same neighbours at the same distances, to the bit."""
    case = problems.bank_case(70, 120, 48, 9, 7)
    small_screens(monkeypatch)
    together = forward(case)
    unscreened(monkeypatch)
    few = replace(case, feats=case.feats[20:29], labels=case.labels[20:29])
    for a, b in zip(together[1:6], forward(few)[1:6], strict=True):
        assert judge.same_bits(a[20:29].contiguous(), b)


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
    monkeypatch.setattr(torch.version, "cuda", "13.0")
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


@pytest.mark.parametrize("interpreted", [False, True])
def test_a_pytorch_without_cuda_has_no_device_for_it(monkeypatch: pytest.MonkeyPatch, interpreted: bool) -> None:
    """It is not listed as usable for tensors that cannot exist, but under the interpreter."""
    monkeypatch.setattr(tuning, "INTERPRETED", interpreted)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "3.9.0")
    assert ("PyTorch for CUDA" in triton.missing()) != interpreted


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
    assert "cuda" in str(error).lower(), error
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
        dispatch._known_choice.cache_clear()
        assert choose("auto", OnCuda) == chosen
    with pytest.raises(ValueError, match=r"7\.5"):
        choose("triton", OnCuda)
    dispatch._known_choice.cache_clear()


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
