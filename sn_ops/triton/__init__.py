"""The Triton backend: the loss on GPUs without a CUDA toolkit, and a second definition of the algorithm.

`search.py` finds the neighbours by direct sums, in the order of `order.py`; `screening.py` finds the same neighbours
faster for large batches, beside `positives.py`; `loss.py` and `gradients.py` turn them into losses and gradients.
`operators.py`, `direct.py` and `screened.py` launch the kernels through `launch.py`; `tuning.py` has the launch shapes.
This module registers the operators of `sn_triton` and needs neither a GPU nor Triton to be imported: the first call
imports Triton.

CPU tensors are served only under Triton's interpreter, for tests: set TRITON_INTERPRET=1 before sn_ops is imported.
`backend="auto"` never does.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from importlib import metadata
from pathlib import Path

import torch

from . import operators, tuning

OLDEST = (3, 6)
"""Triton's oldest version that the kernels are tested with."""

WITHOUT_COMPILER = (3, 9)
"""The version from which on launching a kernel needs no C compiler."""

OLDEST_CAPABILITY = (8, 0)

DEVICES = ("cuda", "cpu") if tuning.INTERPRETED else ("cuda",)

_LIBRARY = torch.library.Library("sn_triton", "DEF")  # registrations live as long as it does


def missing() -> str:
    """Why this installation cannot use the backend; empty if it can. Reads packages' versions, imports none."""
    wanted = ".".join(map(str, OLDEST))
    try:
        found = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return f"it needs the package triton, {wanted} or newer, which is not installed (PyTorch for CUDA brings it)"
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if numbers < OLDEST:
        return f"it needs triton {wanted} or newer, found {found}"
    if tuning.INTERPRETED:
        return ""
    return _no_cuda() or (_no_compiler(found) if numbers < WITHOUT_COMPILER else "")


def _no_cuda() -> str:
    """Why this PyTorch has no device for the kernels; empty if it may. One for ROCm calls its devices "cuda" too."""
    if torch.version.cuda is not None:
        return ""
    return f"it needs PyTorch for CUDA, torch {torch.__version__} is a build without it"


def _no_compiler(version: str) -> str:
    """Why this machine cannot build the launcher that older versions of Triton need; empty if it can."""
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return f"triton {version} needs a C compiler at run time: CC, gcc or clang; found none"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if header.is_file() else f"triton {version} needs Python's headers at run time, found no {header}"


def unfit(device: torch.device) -> str:
    """Why the backend cannot serve this device; empty if it can."""
    if device.type != "cuda":
        return ""
    # PyTorch for ROCm calls its devices "cuda" too, with capabilities that mean another thing.
    if torch.version.cuda is None:
        found = "without it" if torch.version.hip is None else f"for ROCm {torch.version.hip}"
        return f"it needs PyTorch for CUDA, {device} is served by one {found}"
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return ""
    wanted, found = (".".join(map(str, version)) for version in (OLDEST_CAPABILITY, capability))
    return f"it needs compute capability {wanted} or newer, {device} has {found}"


def define() -> None:
    """Registers the operators, for CUDA tensors, and under the interpreter for CPU tensors too."""
    for schema, function in (
        (operators.FORWARD, operators.forward),
        (operators.BACKWARD, operators.backward),
        (operators.LOSS, operators.loss),
        (operators.LOSS_BACKWARD, operators.loss_backward),
    ):
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in DEVICES:
            _LIBRARY.impl(name, function, device.upper())
