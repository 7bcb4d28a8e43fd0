"""Which backend serves a call: the native libraries are loaded, what is usable is known, and one is chosen."""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from . import triton
from .checks import reject

LOAD_ERROR: dict[str, str] = {}
"""Backend name -> why this installation does not have it. A backend that is not listed loaded."""

# The device types a backend serves (none: any), in the order in which "auto" asks.
BACKEND_DEVICES: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "cpu": ("cpu",),
    "reference": (),
}


# ---- loading ------------------------------------------------------------------------------------

_PACKAGE = Path(__file__).resolve().parent


def _load_core() -> ModuleType | None:
    """Loads `sn_ops._C`. Without it: None, the reason in LOAD_ERROR, and a warning, as "auto" works on without it."""
    try:
        return importlib.import_module(f"{__package__}._C")
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}._C":
            raise
        reason = f"the compiled library sn_ops._C is not in {_PACKAGE}: "
        if (_PACKAGE.parent / "CMakeLists.txt").exists():
            reason += (
                "this is the source checkout, which hides an installed sn_ops from a Python started there; run "
                "`pip install -e .` in it to build the library in place, or `pip install .` and start Python elsewhere"
            )
        else:
            reason += "run `pip install .` in a source checkout to build it"
    except ImportError as error:
        reason = f"the compiled library sn_ops._C in {_PACKAGE} does not load with torch {torch.__version__}: {error}"
    LOAD_ERROR["cpu"] = reason
    warnings.warn(f"sn_ops has only its slow backend 'reference': {reason}", RuntimeWarning, stacklevel=2)
    return None


def _load_cuda(core: ModuleType | None) -> str:
    """Loads the CUDA kernels, `_C_cuda`. Returns why they cannot serve, empty if they can."""
    if core is None:
        return "it needs sn_ops._C, which did not load"
    built = core.build_info()["cuda"]
    library = _PACKAGE / "_C_cuda.so"
    if not library.exists():
        return built if built.startswith("not built") else f"{library} is missing: run `pip install .` again"
    # Checked before loading: built for another CUDA major version, it would load and leave two runtimes in the process.
    if torch.version.cuda is None:
        return f"it was built for CUDA {built}, torch {torch.__version__} is a build without CUDA"
    if torch.version.cuda.split(".")[0] != built.split(".")[0]:
        return f"it was built for CUDA {built}, torch {torch.__version__} for CUDA {torch.version.cuda}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library} does not load with torch {torch.__version__}: {error}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("sn_ops::forward", "CUDA"):
        return "its kernels of the loss are not part of this version of sn_ops"
    return ""


def _load_autograd(core: ModuleType | None) -> tuple[ModuleType | None, str]:
    """Loads the autograd node in C++, `_C_autograd`. Without it: None, and why Python's serves.

    It speaks to torch's own C++ interface, which changes from release to release: it serves the torch it was built for.
    """
    if core is None:
        return None, "sn_ops._C did not load"
    if os.environ.get("SN_OPS_AUTOGRAD", "").strip().lower() == "python":
        return None, "SN_OPS_AUTOGRAD asks for it"
    built = core.build_info()["torch"]
    if built != torch.__version__:
        remedy = "pip install -e ." if (_PACKAGE.parent / "CMakeLists.txt").exists() else "pip install ."
        return None, f"sn_ops was built with torch {built}, this is {torch.__version__}: run `{remedy}` again"
    try:
        return importlib.import_module(f"{__package__}._C_autograd"), ""
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}._C_autograd":
            raise
        return (
            None,
            f"_C_autograd is not in {_PACKAGE}: it did not compile, which `pip install -v` shows, or was removed",
        )
    except ImportError as error:
        return None, f"_C_autograd in {_PACKAGE} does not load: {error}"


CORE = _load_core()
AUTOGRAD, AUTOGRAD_REASON = _load_autograd(CORE)
"""The library of the autograd node in C++, or None and why Python's `autograd.Function` serves instead."""
if _reason := _load_cuda(CORE):
    LOAD_ERROR["cuda"] = _reason
if _reason := triton.missing():
    LOAD_ERROR["triton"] = _reason


def version() -> str:
    """The version this package was built as, pyproject.toml's; "0+unbuilt" in a checkout that was not built."""
    return "0+unbuilt" if CORE is None else str(CORE.build_info()["version"])


def unfit(backend: str, device: torch.device) -> str:
    """Why a backend that loaded cannot serve this device, which is of a type that it serves; empty if it can."""
    if backend == "triton":
        return triton.unfit(device)
    if backend == "cuda" and CORE is not None:
        built = CORE.build_info()["cuda_architectures"]
        capability = torch.cuda.get_device_capability(device)
        if not runs_on(built, capability):
            return f"it was built for {built}, {device} is {capability[0]}{capability[1]}"
    return ""


# This is what torch.compiler.assume_constant_result does; calling it would import the compiler, and Triton with it.
unfit._dynamo_marked_constant = True  # type: ignore[attr-defined]


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs code that was built for `architectures`, such as "80 90a 120+PTX".

    Code runs on GPUs of its major version, from its minor version on; "90a" runs on 9.0 only. PTX runs on all newer
    GPUs too, unless its target ends in "a" or "f".
    """
    number = 10 * capability[0] + capability[1]
    for name in architectures.split():
        base = int(name.rstrip("afPTX+"))
        target = name.removesuffix("+PTX")
        if target.endswith("a"):
            fits = number == base
        elif target != name and not target.endswith("f"):
            fits = number >= base
        else:
            fits = number >= base and number // 10 == base // 10
        if fits:
            return True
    return False


# ---- choice -------------------------------------------------------------------------------------


class BackendInfo(NamedTuple):
    """What `backends()` says about one backend."""

    usable: bool
    """The backend loaded here and can serve tensors on its devices."""
    reason: str
    """Why it is not usable, one sentence; empty if it is."""
    devices: tuple[str, ...]
    """The device types that it serves, such as "cuda"; empty for any."""
    autograd: str
    """What differentiates it in eager mode: "C++", or "Python", some 20 microseconds a step slower, where the package
    was not built for the torch that runs (`python -m sn_ops` says why); "PyTorch" for the reference; empty if it is
    not usable."""


def backends() -> dict[str, BackendInfo]:
    """Which backends this installation has, in the order in which "auto" asks them.

    Returns:
        Backend name -> `BackendInfo`: whether it is usable, why not, the device types that it serves, and in which
            language it is differentiated. A usable backend may still refuse one device, such as a GPU that its kernels
            were not built for; the call says so.
    """
    return {
        name: BackendInfo(not reason, reason, _devices_of(name), "" if reason else _autograd_of(name))
        for name, reason in ((name, _unusable(name)) for name in BACKEND_DEVICES)
    }


def _unusable(backend: str) -> str:
    """Why no call of a backend can be served, empty if it can."""
    if backend == "cpu" and CORE is not None and (reason := cpu_capability()[1]):
        return reason
    return LOAD_ERROR.get(backend, "")


def cpu_capability() -> tuple[str, str]:
    """The instruction set of the CPU kernels, or else why there is none: SN_OPS_CPU_CAPABILITY asks for another.

    Such a setting is an error of each call, not of the import: "auto" must not take a slower backend because of it.
    """
    assert CORE is not None
    try:
        return CORE.cpu_capability(), ""
    except ValueError as error:
        return "", str(error)


def _autograd_of(backend: str) -> str:
    if backend == "reference":
        return "PyTorch"
    return "Python" if AUTOGRAD is None else "C++"


def add_backend(name: str, devices: tuple[str, ...]) -> None:
    """Adds a backend whose operators `ops.register` got; "auto" asks it last, for tensors on `devices`."""
    BACKEND_DEVICES[name] = devices
    _known_choice.cache_clear()


def _devices_of(backend: str) -> tuple[str, ...]:
    """The device types that a backend serves when it is named.

    Triton's interpreter serves the CPU too, but "auto" never takes it.
    """
    return triton.DEVICES if backend == "triton" else BACKEND_DEVICES[backend]


def choose_backend(backend: str, feats: Tensor) -> str:
    """The name of the backend that serves a call with these feats.

    Raises:
        ValueError: the backend that was named cannot serve them; the message says why.
        RuntimeError: a transform of torch.func around a fused backend.
    """
    if torch.compiler.is_compiling():
        return _choice(backend, feats.device)
    chosen = _known_choice(backend, feats.device)
    # Inside the transforms of torch.func a bare operator would silently drop tangents.
    if chosen != "reference" and torch._C._are_functorch_transforms_active():
        use_reference("the transforms of torch.func (vmap, grad, jvp, ...) are")
    return chosen


def _choice(backend: str, device: torch.device) -> str:
    if backend == "auto":
        for name, devices in BACKEND_DEVICES.items():
            if device.type in devices and name not in LOAD_ERROR and not unfit(name, device):
                return name
        return "reference"
    if backend == "reference":
        return backend
    if backend in LOAD_ERROR:
        raise ValueError(f"sn_ops: backend: {backend!r} is not usable: {LOAD_ERROR[backend]}")
    if device.type not in _devices_of(backend):
        served = " or ".join(_devices_of(backend))
        reject("backend", f"one that serves {device.type} tensors, as feats is ({backend!r} serves {served})", backend)
    if reason := unfit(backend, device):
        raise ValueError(f"sn_ops: backend: {backend!r} cannot serve {device}: {reason}")
    return backend


_known_choice = cache(_choice)  # every call of the loss asks


# ---- what the fused backends do not serve -------------------------------------------------------


def use_reference(what: str) -> NoReturn:
    """Raises the error for what only the reference serves."""
    raise RuntimeError(
        f"sn_ops: {what} not available from the fused backends, which differentiate the loss once, backwards. Use "
        'backend="reference", which has no such limit.'
    )
