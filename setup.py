"""Builds the native libraries by driving CMake; sources and flags are listed in CMakeLists.txt alone.

Plain setuptools and CMake, no build framework: an install needs nothing but these two and torch's files, and the
three ways of installing (isolated, not isolated, editable) take the same path.

Environment variables:
    SN_OPS_CUDA             0: no CUDA backend; 1: fail when it cannot be built; unset: build it where possible
    CUDA_HOME               the toolkit to build with
    TORCH_CUDA_ARCH_LIST    CUDA architectures, such as "8.0 9.0a 12.0+PTX" or "Ampere;Hopper"; what cannot be
                            built is left out
    SN_OPS_WERROR           1: warnings are errors
    CMAKE_BUILD_PARALLEL_LEVEL  compile jobs at a time; unset: MAX_JOBS, else the processors this process may use
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "sn_ops"
MIN_TORCH = (2, 10)
TORCH_REQUIREMENT = f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"


def usable_torch(folder: Path) -> bool:
    """Whether `folder` is a torch package new enough; reads its version without importing it."""
    try:
        version = re.search(r"^__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text(), re.MULTILINE)
    except OSError:
        return False
    return version is not None and (int(version[1]), int(version[2])) >= MIN_TORCH


def find_torch() -> Path | None:
    """The torch package to build against, or None.

    An isolated build hides the environment that is being installed into, but runs its interpreter; asking that
    interpreter again without the hiding finds a torch that is there already. Headers and sonames are all the build
    takes from it, so this saves fetching another torch, several GB of it where the index prefers a CUDA build.
    """
    script = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    spec = importlib.util.find_spec("torch")
    found = [] if spec is None else list(spec.submodule_search_locations or [])
    outside = subprocess.run([sys.executable, "-E", "-c", script], capture_output=True, text=True, cwd=os.sep)
    found.append(outside.stdout.strip())
    return next((Path(path) for path in found if path and usable_torch(Path(path))), None)


def tool(name: str, attribute: str) -> str | None:
    """Path of cmake or ninja: of the Python package in this environment, which need not be on PATH, else of PATH."""
    if importlib.util.find_spec(name) is not None:
        module = importlib.import_module(name)
        path = Path(getattr(module, attribute, "")) / name
        if path.is_file():
            return str(path)
    return shutil.which(name)


def cuda_choice() -> str:
    """SN_OPS_CUDA as CMake's option."""
    value = os.environ.get("SN_OPS_CUDA", "").strip().lower()
    choices = {"": "AUTO", "auto": "AUTO", "0": "OFF", "off": "OFF", "1": "ON", "on": "ON"}
    if value not in choices:
        raise SystemExit(f"SN_OPS_CUDA: expected 0, 1 or unset, got {value!r}")
    return choices[value]


def quota_of(group: Path) -> float:
    """Processors' time that one control group grants: cpu.max of version 2, cpu.cfs_* of version 1; inf: no limit."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = map(float, " ".join((group / name).read_text() for name in names).split())
        except (OSError, ValueError):  # a missing file, or "max"
            continue
        if quota > 0 and period > 0:
            return quota / period
    return math.inf


def granted_processors(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """Processors' time that this process' control groups grant it; inf: no limit, or none that can be read.

    The limits of all groups above hold too. In a container the path may exist outside only; the process' own group is
    then the root of what is mounted, which is read with those above.
    """
    try:
        lines = groups.read_text(errors="replace").splitlines()
    except OSError:
        return math.inf
    limits = [math.inf]
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (mount / controllers, mount / "cpu") if controllers else (mount, mount / "unified"):
            own = root / path.lstrip("/")
            limits += [quota_of(group) for group in (own, *own.parents) if group.is_relative_to(root)]
    return min(limits)


def jobs() -> int:
    """Compile jobs at a time: what the user says, else the processors that this process may use.

    The machine may have many more than a container or a batch system grants, and nvcc takes gigabytes a job.
    """
    for name in ("CMAKE_BUILD_PARALLEL_LEVEL", "MAX_JOBS"):
        value = os.environ.get(name, "").strip()
        if value:
            if not (value.isascii() and value.isdecimal() and len(value) < 10 and int(value) > 0):
                raise SystemExit(f"{name}: expected a whole number of at least 1, got {value[:40]!r}")
            return int(value)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(usable, granted_processors()))


class CMakeBuild(build_ext):
    """Configures, builds and installs the libraries into the package folder."""

    def target(self) -> Path:
        """Folder that receives the libraries: the source package for an editable install."""
        inplace = self.inplace or self.editable_mode
        return (ROOT if inplace else Path(self.build_lib).resolve()) / PACKAGE

    def run(self) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                f"{PACKAGE}: expected {TORCH_REQUIREMENT} in this environment to build against, found none"
            )
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise SystemExit(f"{PACKAGE}: expected cmake in this environment or on PATH, found none")

        # One tree for each Python, kept between installs: only what changed is compiled again.
        tree = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        ninja = tool("ninja", "BIN_DIR")
        generator = "Ninja" if ninja else "Unix Makefiles"
        self.discard_foreign(tree, generator)
        make_program = [f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(tree), "-G", generator),
            *make_program,
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSN_OPS_TORCH_DIR={torch}",
            f"-DSN_OPS_VERSION={self.distribution.get_version()}",
            f"-DSN_OPS_CUDA={cuda_choice()}",
            f"-DSN_OPS_WERROR={'ON' if os.environ.get('SN_OPS_WERROR') == '1' else 'OFF'}",
        ]
        parallel = str(jobs())  # a bad value is refused before the compiler runs
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(tree), "--parallel", parallel], check=True)

        # The node in C++ depends on what torch promises nobody: without it, Python's serves.
        node = subprocess.run([cmake, "--build", str(tree), "--parallel", parallel, "--target", "_C_autograd"])
        if node.returncode and os.environ.get("SN_OPS_WERROR") == "1":
            raise SystemExit(f"{PACKAGE}: csrc/autograd.cpp does not compile with the torch in {torch}")
        if node.returncode:
            print(f"{PACKAGE}: csrc/autograd.cpp does not compile with this torch: autograd stays in Python")

        # A library of an earlier build (a CUDA one, now switched off) must not slip into this one.
        for stale in self.libraries_in_target():
            stale.unlink()
        for component in ("python", *(() if node.returncode else ("autograd",))):
            install = ["--prefix", str(self.target()), "--component", component, "--strip"]
            subprocess.run([cmake, "--install", str(tree), *install], check=True)

    @staticmethod
    def discard_foreign(tree: Path, generator: str) -> None:
        """Removes a tree that CMake would refuse: made from another source folder, or for another generator."""
        try:
            cache = (tree / "CMakeCache.txt").read_text()
        except OSError:
            return
        expected = (f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n", f"CMAKE_GENERATOR:INTERNAL={generator}\n")
        if not all(line in cache for line in expected):
            shutil.rmtree(tree)

    def libraries_in_target(self) -> list[Path]:
        # Not `_C*`: an editable install must leave alone what another Python's put beside it.
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        names = (f"_C{suffix}", f"_C_autograd{suffix}", "_C_cuda.so")
        return [path for path in (self.target() / name for name in names) if path.is_file()]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.libraries_in_target()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


if __name__ == "__main__":  # frontends run this file; tests only read its functions
    setup(
        # The one extension that is always there; it makes the wheel a platform wheel. CMake knows its sources.
        ext_modules=[Extension(f"{PACKAGE}._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
        # Asked for by an isolated build, on top of pyproject.toml's requirements, when no torch is there yet.
        setup_requires=[] if find_torch() else [TORCH_REQUIREMENT],
    )
