"""Forcing a path of the CUDA forward: on emulated threads, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PATHS = ("cluster", "direct", "dense", "screen", "bank")
"""In the order of their numbers, which start at 1."""


@contextmanager
def forced(backend: str, path: str) -> Iterator[None]:
    """Calls of "simt" or "cuda" take the path where it can serve them."""
    if backend == "simt":
        from support import simt

        with simt.using(path=path):
            yield
        return
    torch.ops.sn_ops.cuda_force_path(PATHS.index(path) + 1)
    try:
        yield
    finally:
        torch.ops.sn_ops.cuda_force_path(0)
