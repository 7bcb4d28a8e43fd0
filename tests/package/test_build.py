"""How the build is set up: compile jobs, CUDA architectures that an environment names, a node that does not compile."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from setuptools import Distribution

from support import simt_build

setup = simt_build.setup_functions()
NVCC = Path("/usr/local/cuda/bin/nvcc")


# ---- jobs ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CMAKE_BUILD_PARALLEL_LEVEL", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_jobs_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """CMake's own variable comes first, then MAX_JOBS."""
    monkeypatch.setenv("MAX_JOBS", " 3 ")
    assert setup.jobs() == 3
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "5")
    assert setup.jobs() == 5
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "")
    assert setup.jobs() == 3


@pytest.mark.parametrize("name", ["CMAKE_BUILD_PARALLEL_LEVEL", "MAX_JOBS"])
@pytest.mark.parametrize("value", ["0", "-2", "2.5", "many", "\u0662", "9" * 40])
def test_bad_jobs(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name}: expected a whole number of at least 1, got '{value}'"):
        setup.jobs()


@pytest.mark.parametrize(
    ("usable", "granted", "jobs"), [(8, math.inf, 8), (8, 3.0, 3), (8, 2.5, 3), (8, 0.2, 1), (2, 64.0, 2)]
)
def test_jobs_of_the_machine(monkeypatch: pytest.MonkeyPatch, usable: int, granted: float, jobs: int) -> None:
    """The CPUs that this process may use, not those of the host."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)))
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setattr(setup, "granted_processors", lambda: granted)
    assert setup.jobs() == jobs


@pytest.mark.parametrize(
    ("groups", "files", "granted"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/", {}, math.inf),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000", "cpu.max": "800000 100000"}, 4.0),
        ("0::/only/outside", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/../..", {"cpu.max": "200000 100000"}, 2.0),
        ("4:memory:/x\n2:cpu,cpuacct:/x", {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000",
                                          "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 0.5),
        ("2:cpuacct,cpu:/x", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ("1:cpu:/\n0::/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("3:cpuset:/", {"cpuset/cpu.cfs_quota_us": "100000", "cpuset/cpu.cfs_period_us": "100000"}, math.inf),
        ("", {}, math.inf),
    ],
)  # fmt: skip
def test_control_groups(tmp_path: Path, groups: str, files: dict[str, str], granted: float) -> None:
    """Versions 1 and 2; the limit of a parent group holds too, and a path outside the mount is not an error."""
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text)
    (tmp_path / "groups").write_text(groups)
    assert setup.granted_processors(tmp_path / "groups", tmp_path / "mount") == granted
    assert setup.granted_processors(tmp_path / "missing", tmp_path / "mount") == math.inf


# ---- architectures -------------------------------------------------------------------------------


def configure(folder: Path, architectures: str, choice: str = "AUTO", home: Path | None = None) -> tuple[int, str]:
    """CMake's exit status and output, with a torch that is a version only and a toolkit that is a script."""
    torch = folder / "torch"
    torch.mkdir()
    (torch / "version.py").write_text("__version__ = '2.11.0'\ncuda: Optional[str] = '13.0'\n")
    cmake, ninja = simt_build.tool("cmake"), simt_build.tool("ninja")
    assert cmake is not None
    command = [cmake, "-S", str(simt_build.ROOT), "-B", str(folder / "tree"), f"-DSN_OPS_TORCH_DIR={torch}"]
    command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DSN_OPS_CUDA={choice}"]
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": architectures, "CUDA_HOME": str(home or pretended(folder))}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    return done.returncode, " ".join(done.stdout.split())


def pretended(folder: Path) -> Path:
    """A toolkit that only answers the questions asked before compiling."""
    home = folder / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;\n"
        "  --list-gpu-arch) printf 'compute_%s\\n' 75 80 86 87 89 90 100 103 120;;\n"
        "  *) exit 1;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return home


@pytest.mark.parametrize(
    ("architectures", "said"),
    [
        ("7.0 7.5", "7.0 7.5 (the CUDA backend needs 8.0 or later)"),
        ("Turing", "7.5+PTX (the CUDA backend needs 8.0 or later)"),
        ("8.0a 9.0f", "8.0a 9.0f (unknown to nvcc 13.0)"),
        ("Volta;14.0", "7.0+PTX (the CUDA backend needs 8.0 or later), 14.0 (unknown to nvcc 13.0)"),
    ],
)
def test_nothing_left_to_build(tmp_path: Path, architectures: str, said: str) -> None:
    """No CUDA backend, with the reason; an error if CUDA was asked for."""
    why = f"no architecture of TORCH_CUDA_ARCH_LIST can be built: {said}"
    status, output = configure(tmp_path, architectures)
    assert status == 0, output
    assert f"CUDA backend not built: {why}" in output
    (tmp_path / "again").mkdir()
    status, output = configure(tmp_path / "again", architectures, "ON")
    assert status != 0
    assert f"SN_OPS_CUDA=1 asks for the CUDA backend, but {why}" in output


@pytest.mark.parametrize("architectures", ["8.0 fast", "sm_80", "8.0-PTX"])
def test_no_architecture_at_all(tmp_path: Path, architectures: str) -> None:
    status, output = configure(tmp_path, architectures)
    assert status != 0
    assert "TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a, 12.0+PTX or Ampere, got" in output


@pytest.mark.skipif(not NVCC.is_file(), reason="no nvcc here")
@pytest.mark.parametrize(
    ("architectures", "left_out", "built"),
    [
        ("7.0 7.5 8.0 8.6 9.0+PTX", "7.0 7.5 (the CUDA backend needs 8.0 or later)", "80 86 90 90+PTX"),
        ("7.5+PTX;8.9, 14.3", "7.5+PTX (the CUDA backend needs 8.0 or later), 14.3 (unknown", "89"),
        ("Turing Ampere;Ada", "7.5+PTX (the CUDA backend needs 8.0 or later)", "80 86 86+PTX 89 89+PTX"),
        ("hopper 9.0 8.0 8.0+PTX", "", "90 90+PTX 80 80+PTX"),
        ("9.0a", "", "90a"),
        ("8.0+ptx\t8.9\n8.6a ", "8.6a (unknown", "80 80+PTX 89"),
    ],
)
def test_what_can_be_built_is(tmp_path: Path, architectures: str, left_out: str, built: str) -> None:
    """Lists as container images set them: older or newer architectures than ours, or names that torch knows."""
    status, output = configure(tmp_path, architectures, home=NVCC.parent.parent)
    assert status == 0 or "SN_CUDART" in output, output  # a toolkit without its runtime fails later
    assert f"for {built} --" in output
    assert ("of the architectures of TORCH_CUDA_ARCH_LIST left out: " + left_out in output) == bool(left_out)
    commands = (tmp_path / "tree" / "compile_commands.json").read_text()
    names = built.split()
    eights = sorted(name for name in names if name in ("80", "86", "89"))
    codes = {(eights[0], "[" + ",".join(f"sm_{number}" for number in eights) + "]")} if eights else set()
    for name in names:
        number = name.removesuffix("+PTX")
        if name not in eights:
            codes.add((number, f"compute_{number}" if name.endswith("+PTX") else f"sm_{number}"))
    assert set(re.findall(r"-gencode \S*?arch=compute_(\w+),code=(\[[^]]*\]|\w+)", commands)) == codes
    assert "compute_7" not in commands


# ---- autograd in C++ -----------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """Runs the build with a CMake that does nothing and fails to compile the node; the components it installed."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "--component" in command:
            components.append(command[command.index("--component") + 1])
        return subprocess.CompletedProcess(command, int(command[-1] == "_C_autograd"), "", "")

    components: list[str] = []
    build = setup.CMakeBuild(Distribution())
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "find_torch", lambda: tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    build.ensure_finalized()
    build.inplace = True

    def installed() -> list[str]:
        build.run()
        return components

    return installed


def test_a_node_that_does_not_compile_is_left_out(
    installed: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Autograd stays in Python, with a word; for developers it is an error."""
    monkeypatch.delenv("SN_OPS_WERROR", raising=False)
    assert installed() == ["python"]
    assert "csrc/autograd.cpp does not compile with this torch: autograd stays in Python" in capsys.readouterr().out
    monkeypatch.setenv("SN_OPS_WERROR", "1")
    with pytest.raises(SystemExit, match=r"csrc/autograd\.cpp does not compile"):
        installed()
