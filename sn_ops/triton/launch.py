"""How kernels are launched: compiled once, then handed to the driver with what was compiled.

Triton's own launch works out on every call from all arguments, in Python, which variant of a kernel they need. Here the
caller names the facts on which the choice depends, and the variant is looked up by them. What a call needs besides its
results lies in one piece of memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor

from .tuning import INTERPRETED

EXACT = {"enable_fp_fusion": False}
"""Options of every launch: the compiler fuses no product into an addition, so the code rounds where it says so."""

_ALIGNMENT = 64
"""Bytes. Triton distinguishes pointers that 16 bytes divide from others; all parts of a `workspace` start at such."""

_HERE = nullcontext()

_COMPILED: dict[tuple[Any, ...], Any] = {}
"""The variants that were launched, by kernel, options, facts and constants: a part of Triton's own table."""

COLD = (
    "sn_ops: the Triton backend compiles and loads a kernel ({}) on the first call with its shapes, dtype and options, "
    "which cannot be captured in a CUDA graph: run forward and backward once before the capture"
)


class Region:
    """A part of a `workspace`, as an argument of a compiled kernel."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def workspace(device: torch.device, *parts: tuple[torch.dtype, tuple[int, ...]]) -> list[Any]:
    """Parts of one allocation, which the caller keeps until its launches are made: the last entry of the list.

    Args:
        parts: the dtype and the shape of each. They are tensors in the interpreter and on devices without memory.
    """
    offsets, end = [], 0
    for dtype, shape in parts:
        offsets.append(end)
        # An empty part has a place too: an address behind the memory would be nobody's, and refused.
        end += -(-max(1, prod(shape) * dtype.itemsize) // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(end, dtype=torch.uint8, device=device)
    if INTERPRETED or device.type == "meta":
        views: list[Any] = [
            memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for offset, (dtype, shape) in zip(offsets, parts, strict=True)
        ]
        return [*views, memory]
    base = memory.data_ptr()
    return [*(Region(base + offset, part[0]) for offset, part in zip(offsets, parts, strict=True)), memory]


def device_of(rows: Tensor) -> AbstractContextManager[Any]:
    """A context in which the current device is that of the rows."""
    device = rows.device
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(device)


def launch(
    kernel: Any, grid: tuple[int, ...], facts: tuple[Any, ...], *arguments: Any, warps: int = 4, stages: int = 3,
    registers: int | None = None, **constants: Any,
) -> None:  # fmt: skip
    """Runs a kernel on the current stream of the current device.

    Args:
        grid: the number of programs along one or two axes.
        facts: what decides, together with the constants, the variant of the kernel that Triton would compile for these
            arguments, and where: the device, data types, every number and pointer that Triton may specialise.
        arguments: those before the kernel's constants, in order.
        registers: the most of a thread, if the compiler is to keep within so many.

    Raises:
        RuntimeError: the variant was never launched, and the stream is being captured in a CUDA graph.
    """
    if INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    key = (kernel.fn, warps, stages, registers, facts, *constants.values())
    compiled = _COMPILED.get(key)
    if compiled is None:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(COLD.format(kernel.fn.__name__))
        options = {**EXACT, "num_warps": warps, "num_stages": stages, "maxnreg": registers}
        compiled = kernel[grid](*arguments, **options, **constants)
        if compiled is not None:  # None where launches are noted instead of made
            _COMPILED[key] = compiled
        return
    # The places of the constants hold anything: they are part of the code.
    compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*arguments, *constants.values())
