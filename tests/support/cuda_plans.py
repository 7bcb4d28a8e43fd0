"""Plans of the CUDA backend, pure functions of shapes and device facts: read without a GPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

F32, F64, F16, BF16 = range(4)

DEVICES = {
    "sm_80": ((8, 0), 108, 166912),
    "sm_86": ((8, 6), 28, 101376),
    "sm_89": ((8, 9), 128, 101376),
    "sm_90": ((9, 0), 132, 232448),
    "sm_100": ((10, 0), 148, 232448),
    "sm_120": ((12, 0), 170, 101376),
}
"""Capability, multiprocessors, shared bytes a block may have: from the smallest to the largest that is supported."""


def plan(core: ModuleType, n: int, m: int, d: int, device: str = "sm_90", **options: Any) -> dict[str, Any]:
    """The forward of n anchors against m candidates, which are the anchors if there are as many."""
    capability, multiprocessors, shared = DEVICES[device]
    options = {"k": 10, "dtype": F32, "symmetric": n == m} | options
    facts = {"capability": capability, "multiprocessors": multiprocessors, "shared_bytes": shared}
    return dict(core.cuda_plan(N=n, M=m, D=d, **facts, **options))
