"""Forcing a path of the CUDA forward: on emulated threads, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PATHS = ("cluster", "direct", "dense", "screen", "bank", "tickets", "square")
"""In the order of their numbers, which start at 1."""

AGAINST_OTHERS = tuple(path for path in PATHS if path != "square")
"""Those that serve candidates that are not the anchors."""


@contextmanager
def on_host(path: str) -> Iterator[None]:
    """Calls of "simt" take the path where it can serve them."""
    from support import simt

    with simt.using(path=path):
        yield


@contextmanager
def on_gpu(path: str) -> Iterator[None]:
    """Calls of "cuda" take the path where it can serve them."""
    torch.ops.sn_ops.cuda_force_path(PATHS.index(path) + 1)
    try:
        yield
    finally:
        torch.ops.sn_ops.cuda_force_path(0)
