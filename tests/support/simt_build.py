"""The backend "simt" of the suite: the CUDA kernels compiled for this CPU, on the host harness of tests/simt."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "simt"


@cache
def setup_functions() -> ModuleType:
    """The functions of setup.py, which does nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("sn_ops_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(name: str) -> str | None:
    """A program of this environment, activated or not, else of PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@cache
def build(target: str) -> Path:
    """Builds a target of the harness and returns its path. Processes that want one at once take turns.

    Raises:
        RuntimeError: with the output of a build that failed.
    """
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        raise RuntimeError("the backend 'simt' is built with cmake, which is in the extra 'test'; found none")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    TREE.mkdir(parents=True, exist_ok=True)
    with (TREE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(TREE), *generator, "-DSN_OPS_CUDA=OFF"],
            [cmake, "--build", str(TREE), "--target", target, "--parallel", str(setup_functions().jobs())],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return TREE / target


@cache
def library() -> Path:
    """The library of the harness and the kernels; SN_SIMT_LIBRARY names one that is already built."""
    if given := os.environ.get("SN_SIMT_LIBRARY"):
        return Path(given)
    return build("sn_simt").with_name("libsn_simt.so")


@cache
def enable() -> None:
    """Registers the backend with sn_ops, for CPU tensors. Once."""
    from sn_ops import dispatch, ops
    from support import simt

    simt.load(library())
    ops.register(("simt",), "sn_simt")
    dispatch.add_backend("simt", ("cpu",))
