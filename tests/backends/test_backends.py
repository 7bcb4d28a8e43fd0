"""The list of backends, the choice between them, and what `python -m sn_ops` prints."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sn_ops
from support import problems
from support.backends import NAMES, SHIPPED
from support.fresh_python import run

PACKAGE = Path(sn_ops.__file__).parent


def shipped() -> dict[str, sn_ops.BackendInfo]:
    """What `sn_ops.backends` lists, but for what the suite added to this process."""
    return {name: entry for name, entry in sn_ops.backends().items() if name in SHIPPED or name not in NAMES}


def test_backends_lists_all_four() -> None:
    facts = shipped()
    assert set(facts) == set(SHIPPED)
    for name, entry in facts.items():
        assert isinstance(entry.usable, bool), name
        assert bool(entry.reason) != entry.usable, f"{name}: a reason exactly when it is not usable"
    assert facts["reference"].usable
    assert "cpu" in facts["cpu"].devices


def test_compiled_backend_is_there() -> None:
    """The package as installed has its native library: the suite must not pass on a half-built one."""
    entry = sn_ops.backends()["cpu"]
    assert entry.usable, entry.reason


def test_auto_takes_cpu_for_cpu_tensors() -> None:
    """The bits show which one ran: this backend and the reference sum in different orders."""
    case = problems.self_case(200, 130, 30)
    auto = sn_ops.sn_loss(case.feats, case.labels, reduction="none")
    named = sn_ops.sn_loss(case.feats, case.labels, reduction="none", backend="cpu")
    other = sn_ops.sn_loss(case.feats, case.labels, reduction="none", backend="reference")
    assert auto.equal(named) and not auto.equal(other)


def test_auto_takes_the_reference_elsewhere() -> None:
    """On devices that no other backend serves: the reference runs wherever PyTorch does."""
    loss = sn_ops.sn_loss(torch.empty(6, 4, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta"))
    assert loss.device.type == "meta" and loss.shape == ()


def test_main_prints_versions_and_backends() -> None:
    done = run("-m", "sn_ops")
    assert done.returncode == 0, done.stderr
    for text in (sn_ops.__version__, torch.__version__, *shipped()):
        assert text in done.stdout
    for entry in sn_ops.backends().values():
        assert entry.reason in done.stdout


def test_import_is_quiet() -> None:
    """No warning, no output, no backtrace."""
    done = run("-W", "error", "-c", "import sn_ops; sn_ops.backends()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_typed_and_versioned() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert sn_ops.__version__.count(".") == 2
    for name in ("sn_loss", "SNLoss", "support_neighbors", "backends", "SNStats", "SupportNeighbors"):
        assert getattr(sn_ops, name).__doc__


def test_capability_can_be_chosen_from_outside(core: ModuleType) -> None:
    """An environment variable chooses any instruction set of this machine; a wrong name is an error that lists them."""
    script = "from sn_ops import _C; print(_C.cpu_capability())"
    for name in core.cpu_capabilities():
        done = run("-c", script, SN_OPS_CPU_CAPABILITY=name)
        assert done.stdout.strip() == name, done.stderr
    assert run("-c", script).stdout.strip() == core.cpu_capabilities()[-1]
    done = run("-c", script, SN_OPS_CPU_CAPABILITY="fastest")
    expected = f"SN_OPS_CPU_CAPABILITY: expected one of {', '.join(core.cpu_capabilities())}, got 'fastest'"
    assert done.returncode != 0 and expected in done.stderr
    done = run("-c", script, SN_OPS_CPU_CAPABILITY="")
    assert done.stdout.strip() == core.cpu_capabilities()[-1], done.stderr

    # The import works, `python -m sn_ops` says what is wrong, and no other backend takes the place of this one.
    done = run("-m", "sn_ops", SN_OPS_CPU_CAPABILITY="fastest")
    assert done.returncode == 0, done.stderr
    assert f"no: {expected}" in done.stdout and "none in use; usable here: generic" in done.stdout
    script = "import sn_ops, torch; sn_ops.sn_loss(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))"
    for autograd in ("", "python"):
        done = run("-c", script, SN_OPS_CPU_CAPABILITY="fastest", SN_OPS_AUTOGRAD=autograd)
        assert done.returncode != 0 and f"ValueError: {expected}" in done.stderr


def test_capabilities(core: ModuleType) -> None:
    names = core.cpu_capabilities()
    assert names[0] == "generic" and len(set(names)) == len(names)
    for name in names:
        core.set_cpu_capability(name)
        assert core.cpu_capability() == name
    with pytest.raises(ValueError, match="generic"):
        core.set_cpu_capability("fastest")
    with pytest.raises(ValueError, match="screen"):
        core.set_cpu_path("fastest")


def test_build_facts(core: ModuleType) -> None:
    facts = core.build_info()
    assert facts["version"] == sn_ops.__version__
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in facts.items())


@pytest.mark.parametrize(
    ("capability", "last_direct", "first_screened"),
    [("generic", 8, 64), ("avx2", 72, 112), ("avx512", 112, 160), ("avx512_vnni", 96, 160)],
)
def test_cpu_path_by_rows(core: ModuleType, capability: str, last_direct: int, first_screened: int) -> None:
    """Rows of 2048 up to which direct sums cost less than screening, away from where both cost the same; and anchors
    against a bank."""
    if capability not in core.cpu_capabilities():
        pytest.skip(f"this machine has no {capability}")
    active = core.cpu_capability()
    core.set_cpu_capability(capability)
    try:
        for rows, path in ((last_direct, "direct"), (first_screened, "screen"), (4 * first_screened, "screen")):
            assert core.cpu_plan(rows, rows, 2048, 10, 0, True, 1)["path"] == path, rows
        assert core.cpu_plan(64, 1024, 128, 10, 0, False, 1)["path"] == "screen"
        assert core.cpu_plan(4, 16, 128, 10, 0, False, 1)["path"] == "direct"
    finally:
        core.set_cpu_capability(active)


def test_plan_tells_path_and_workspace(core: ModuleType) -> None:
    """The launch plan of a large batch screens, that of a tiny one does not; a forced path is what the plan says."""
    large = core.cpu_plan(4096, 4096, 512, 10, 0, True, 1)
    tiny = core.cpu_plan(4, 4, 3, 10, 0, True, 1)
    assert large["path"] == "screen" and tiny["path"] == "direct"
    rows, dims = 4096, 512
    budget = 8 * 2**20 + 2 * 2 * rows * dims + 1024 * rows
    assert core.cpu_plan(4096, 4096, 2**24, 10, 0, True, 1)["path"] == "screen"
    assert core.cpu_plan(4096, 4096, 2**24 + 1, 10, 0, True, 1)["path"] == "direct"  # sums would exceed 32 bits
    padded = -(-rows // 48) * 48
    products, copy, lists = 4 * 384 * (384 + 16), 2 * padded * dims, 8 * rows * large["list_capacity"]
    forms = 4 * ((192 + 192) * dims // 4 + 2 * 192 * (192 + 16))  # of anchors and candidates, and their products
    assert large["workspace_bytes"] == products + forms + copy + lists + rows * (12 * 4 + 2 * 8)  # counters; equal rows
    numbers = [value for value in large.values() if isinstance(value, int)]
    assert numbers and max(numbers) <= budget
    core.set_cpu_path("direct")
    assert core.cpu_plan(4096, 4096, 512, 10, 0, True, 1)["path"] == "direct"


@pytest.mark.parametrize("k", [10, 200])
@pytest.mark.parametrize("dims", [128, 512, 1018, 2048, 4096, 16384])
def test_workspace_of_any_number_of_threads(core: ModuleType, dims: int, k: int) -> None:
    """Products and forms of every thread fit in the budget; a list of 200 has more than a kilobyte a row."""
    for rows, threads in product((700, 768, 1024, 1120, 1536, 4096, 65536), (1, 2, 3, 4, 8, 16, 64, 200)):
        for bank in (0, rows, 8 * rows):
            plan = core.cpu_plan(rows, bank or rows, dims, k, 0, bank == 0, threads)
            both = rows + (bank or rows)
            lists = rows * 8 * max(0, plan.get("list_capacity", 0) - 96)
            budget = 8 * 2**20 + 2 * both * dims + 1024 * (both if bank else rows) + lists
            padding = 2 * 48 * 2 * dims + both * 3 * 4  # of both sides to whole tiles, of rows to words of forms
            assert plan["workspace_bytes"] <= budget + padding, (rows, bank, threads)
