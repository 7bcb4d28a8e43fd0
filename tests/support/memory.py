"""Memory that tests make by hand: that ends where nothing may be read, or that is too far apart to exist."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_NO_ACCESS = 0
_MAP_NORESERVE = 0x4000  # Linux; mmap has it from Python 3.13 on


def at_the_end(x: Tensor) -> Tensor:
    """A copy of the tensor, contiguous, whose last byte is the last of a page; the next page cannot be read.

    Reading behind the tensor ends the process. The memory is never given back.
    """
    size = x.numel() * x.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + pages * PAGE), ctypes.c_size_t(PAGE), _NO_ACCESS) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    if size == 0:
        return x.clone()
    there = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages * PAGE - size).view(x.shape)
    return there.copy_(x)


def far_apart(x: Tensor, stride: int) -> Tensor:
    """A copy of a few rows that lie `stride` elements apart in memory of which only their pages exist.

    There are as many elements of zeros before the first row as there are between the first and the last: an offset
    that has lost its upper bits reads a zero, and does not crash.
    """
    rows, columns = x.shape
    before = (rows - 1) * stride
    elements = before + (rows - 1) * stride + columns
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, elements * x.element_size(), flags=flags)
    there = torch.frombuffer(memory, dtype=x.dtype).as_strided((rows, columns), (stride, 1), before)
    return there.copy_(x)
