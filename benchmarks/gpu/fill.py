"""Fills the cache of compiled Triton kernels for a GPU that is not there, and checks it.

    python benchmarks/gpu/fill.py ARCHIVE --capability 9.0a      fill it with all that the kit's Triton steps launch
    python benchmarks/gpu/fill.py ARCHIVE --capability 9.0a --check      launch the same: nothing may be compiled

Which variants there are follows from the calls of the two operators: shapes, strides, types and options. The calls are
noted while the steps run on this machine: of `times.py` without values, of the tests in Triton's interpreter. Then they
are made once more, on tensors without data, with a driver of Triton that compiles, builds launchers and runs nothing.

Needs the target's Python with its Triton, any PyTorch that can be imported, and what the tests need.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_cache
import manifest

CALLS = "SN_OPS_KIT_CALLS"
"""Environment variable with the file that calls are noted in."""


# ---- calls of the operators ----------------------------------------------------------------------------------------


def described(value: Any) -> Any:
    """An argument of a call; of a tensor what decides about kernels."""
    if isinstance(value, torch.Tensor):
        offset = value.storage_offset() % max(1, 16 // value.element_size())  # what a pointer's alignment depends on
        return [str(value.dtype).removeprefix("torch."), list(value.shape), list(value.stride()), offset]
    return value


def argument_of(description: Any) -> Any:
    """An argument like the one that was described, a tensor without data."""
    if not isinstance(description, list):
        return description
    dtype, shape, stride, offset = description
    size = offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if 0 not in shape else offset
    memory = torch.empty(size, dtype=getattr(torch, dtype), device="meta")
    return memory.as_strided(shape, stride, offset)


class Noting(TorchDispatchMode):
    """Notes the operators' calls. Without `values` they are not run: results have the right shapes alone."""

    def __init__(self, *, values: bool) -> None:
        super().__init__()
        self.values = values
        self.calls: dict[str, None] = {}  # in their order, each once

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "sn_triton":
            return func(*args, **(kwargs or {}))
        self.calls[json.dumps([func._schema.name.partition("::")[2], [described(each) for each in args]])] = None
        if self.values:
            return func(*args)
        results = func(*(each.to("meta") if isinstance(each, torch.Tensor) else each for each in args))
        return tuple(torch.zeros(each.shape, dtype=each.dtype) for each in results)


def calls_of_times() -> list[str]:
    """Of the step `triton` of measure.py."""
    sys.path.append(str(manifest.PROGRAMS))
    import times

    with Noting(values=False) as noting:
        for shape in times.TRITON:
            sets = [times.inputs_of(shape, torch.device("cpu"), 0)]
            for scope in ("forward", "both"):
                times.pass_of(times.ours("triton", shape.k), sets, scope)(0)
    return list(noting.calls)


def calls_of_tests(folder: Path) -> list[str]:
    """Of the step `tests-triton` of prove.py. Tests that fail here are no matter: the others' calls count."""
    sys.path.append(str(manifest.PROGRAMS))
    import suite

    file = folder / "calls-of-tests"
    environment = os.environ | {CALLS: str(file), "PYTHONPATH": os.pathsep.join([str(manifest.HERE), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "fill", "--no-header"]
    command += ["-k", suite.TRITON_WANTED, *suite.TRITON_MODULES]
    subprocess.run(command, cwd=manifest.ROOT, env=environment)
    return file.read_text().splitlines()


def pytest_configure() -> None:
    """As a plugin of pytest: note the calls of all tests."""
    global _noting
    _noting = Noting(values=True)
    _noting.__enter__()


def pytest_unconfigure() -> None:
    """Write them down."""
    Path(os.environ[CALLS]).write_text("\n".join(_noting.calls))


_noting: Noting


# ---- a GPU that is not there -----------------------------------------------------------------------------------------


class Anything:
    """A module of C that was built and need not be loaded."""

    def __getattr__(self, _: str) -> Any:
        return None


def absent_driver(capability: int, folder: Path) -> Any:
    """A driver of Triton for a GPU of this capability. Kernels are compiled and their launchers built, as if they ran.

    Launchers are linked with a libcuda.so.1 that is empty; the one of the GPU's machine takes its place there.
    """
    from triton import knobs
    from triton.backends.nvidia import driver
    from triton.runtime import build

    sys.path.append(str(manifest.HERE.parent))
    from bench_triton_host import IdleDriver

    builds = hasattr(driver, "make_launcher")  # a launcher for each signature, before Triton 3.9
    if builds and not shutil.which("gcc"):
        print("fill: no gcc here: launchers are not built, so that one is needed there", flush=True)
        builds = False
    if builds:
        library = folder / "libcuda.so.1"
        command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null", "-o", str(library)]
        subprocess.run(command, check=True)
        knobs.nvidia.libcuda_path = str(folder)
        build._load_module_from_path = lambda name, path: Anything()
        driver.CudaUtils()

    class Driver(IdleDriver):
        @staticmethod
        def launcher_cls(source: Any, metadata: Any) -> Any:
            if builds:
                driver.CudaLauncher(source, metadata)
            return IdleDriver.launcher_cls(source, metadata)

    return Driver(capability)


def launch(calls: list[Any], capability: int) -> None:
    """Make the calls on a GPU that is not there."""
    from triton.runtime.driver import driver

    from sn_ops.triton import operators

    with tempfile.TemporaryDirectory() as folder:
        driver.set_active(absent_driver(capability, Path(folder)))
        for name, arguments in calls:
            getattr(operators, name)(*map(argument_of, arguments))


# ---- command line ------------------------------------------------------------------------------------------------


def again(act: str, folder: Path, capability: str, **environment: str) -> None:
    """This program in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, __file__, str(folder), "--capability", capability, "--act", act]
    if subprocess.run(command, env=os.environ | environment).returncode != 0:
        raise SystemExit(f"fill: failed: {act}")


def act(name: str, folder: Path, capability: str) -> None:
    """Be such a process. The folder has the calls."""
    calls = folder / kernel_cache.CALLS
    if name == "note":
        noted = dict.fromkeys([*calls_of_times(), *calls_of_tests(folder)])
        calls.write_text("[\n" + ",\n".join(noted) + "\n]\n")
        return
    kernel_cache.listen()
    launch(json.loads(calls.read_text()), int("".join(filter(str.isdigit, capability))))


def main() -> None:
    """Fill or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="the packed cache")
    parser.add_argument("--capability", required=True, help="of the target, such as 9.0a")
    parser.add_argument("--check", action="store_true", help="launch what the cache was made for; fail on a miss")
    parser.add_argument("--act", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.act:
        act(chosen.act, chosen.archive, chosen.capability)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache, events = Path(scratch), Path(scratch, "cache"), Path(scratch, "events")
        if chosen.check:
            kernel_cache.unpack(chosen.archive, cache)
            (cache / kernel_cache.CALLS).rename(folder / kernel_cache.CALLS)
        else:
            again("note", folder, chosen.capability, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
        environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), kernel_cache.EVENTS: str(events)}
        again("launch", folder, chosen.capability, **environment)
        report = kernel_cache.report(events)
        print(f"fill: {kernel_cache.told(report)}")
        if not chosen.check:
            print(f"fill: {kernel_cache.pack(cache, folder / kernel_cache.CALLS, chosen.archive)} entries")
        elif report["misses"] or not report["hits"]:
            raise SystemExit("\n".join(["fill: not all is in the cache:", *report["missed"]]))


if __name__ == "__main__":
    main()
