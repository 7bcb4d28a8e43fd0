"""The backends that the suite runs, and what it knows of each.

A new backend is one line in `BACKENDS`; fixtures and parametrisations of every suite derive from that list. A line
needs the name that `backend=` takes, and the device of its tensors unless that is the CPU. Everything else says in what
the backend differs from a fused one that every installation for tests has: see `Backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch

import sn_ops
from support import cuda_paths, python_autograd, simt_build

HAS_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Backend:
    """One backend, as the suite sees it."""

    name: str
    device: str = "cpu"
    """Where its tensors live."""
    fused: bool = True
    """It promises memory, determinism and exact repetition, and refuses second derivatives."""
    emulated: bool = False
    """It runs a thread or a program at a time: right at every size, but too slow for large ones."""
    on_gpu: bool = False
    """A GPU backend: test_cuda.py runs on it what only a GPU can show."""
    may_be_missing: bool = False
    """Its tests are skipped without a GPU, or where the package was built without it; others fail if it is unusable."""
    threads: int | None = None
    """PyTorch's number of threads during its tests; None changes nothing."""
    force_path: Callable[[str], AbstractContextManager[None]] | None = None
    """Backends of the CUDA kernels: a context in which their calls take the path of this name."""
    register: Callable[[], None] | None = None
    """Adds it to sn_ops; None if it is part of the package."""


BACKENDS = (
    # Thousands of small dense operations: more threads only wait for each other.
    Backend("reference", fused=False, threads=1),
    Backend("cpu"),
    # The same operators, differentiated by the fallback in Python instead of the node in C++.
    Backend("cpu_in_python", register=python_autograd.enable),
    Backend("triton", device="cuda" if HAS_GPU else "cpu", emulated=not HAS_GPU, on_gpu=True),
    # The CUDA kernels on emulated threads.
    Backend("simt", emulated=True, force_path=cuda_paths.on_host, register=simt_build.enable),
    Backend("cuda", device="cuda", on_gpu=True, may_be_missing=True, force_path=cuda_paths.on_gpu),
)

_BY_NAME = {each.name: each for each in BACKENDS}

NAMES = [each.name for each in BACKENDS]
OPERATORS = [name for name in NAMES if name != "cpu_in_python"]
"""Those with operators of their own."""
SHIPPED = [each.name for each in BACKENDS if each.register is None]
FUSED = [each.name for each in BACKENDS if each.fused]
FULL_SPEED = [each.name for each in BACKENDS if each.fused and not each.emulated]
EMULATED = [each.name for each in BACKENDS if each.emulated]
ON_HOST = [each.name for each in BACKENDS if each.device == "cpu" and not each.emulated and each.register is None]
"""Those that run at full speed on the CPU in any process, ranks included."""
ON_GPU = [each.name for each in BACKENDS if each.on_gpu]
CUDA_KERNELS = [each.name for each in BACKENDS if each.force_path is not None]


def threads_of(name: str) -> int:
    """PyTorch's number of threads during a backend's tests."""
    return _BY_NAME[name].threads or torch.get_num_threads()


def device_of(name: str) -> torch.device:
    """Where a backend's tensors live."""
    return torch.device(_BY_NAME[name].device)


def forced(name: str, path: str) -> AbstractContextManager[None]:
    """Calls of a backend that serves the CUDA kernels take the path, where it can serve them."""
    force = _BY_NAME[name].force_path
    assert force is not None, f"backend {name!r} has no paths"
    return force(path)


def require(name: str) -> str:
    """The name, if that backend is usable here.

    Skips the test if the backend may be missing here, and fails it for any other reason: kernels that were built but
    do not load must not look like kernels that passed.
    """
    backend = _BY_NAME[name]
    if backend.register is not None:
        backend.register()
    facts = sn_ops.backends()[name]
    if backend.may_be_missing and not torch.cuda.is_available():
        pytest.skip(f"no GPU here for the backend {name!r}")
    if backend.may_be_missing and facts.reason.startswith("not built"):
        pytest.skip(f"the backend {name!r} is {facts.reason}")
    assert facts.usable, f"backend {name!r} must be usable to run its tests: {facts.reason}"
    return name


def require_gpu(name: str) -> str:
    """The same for a test that needs a GPU; it is skipped without one."""
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU here for the backend {name!r}")
    return require(name)
