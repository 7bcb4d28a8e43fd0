"""The device that the steps run on: a GPU, or what stands in for one while the kit is rehearsed.

A rehearsal runs the emulated CUDA kernels (tests/simt, backend "simt") where a step looks at values, and the backend
"cpu" where it takes times. Steps use a device through this module only, so that a rehearsal runs every line of them.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import protocol
import sn_ops

ROOT = Path(__file__).resolve().parent.parent.parent
PATHS = ("auto", "cluster", "direct", "dense", "screen", "bank", "tickets", "square")
"""Paths of the CUDA forward, by the number that `cuda_force_path` knows them by."""

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
WARM_UPS = 3


class Gpu:
    """The first CUDA device."""

    name = "cuda"

    def __init__(self, backend: str = "cuda") -> None:
        if not torch.cuda.is_available():
            protocol.not_run(f"torch {torch.__version__} finds no GPU")
        usable = sn_ops.backends()[backend]
        if not usable.usable:
            protocol.not_run(f"the backend {backend!r} is not usable: {usable.reason}")
        self.backend = backend
        self.device = torch.device("cuda")

    def force(self, path: str) -> None:
        """Forward calls take this path from now on, where it can serve."""
        torch.ops.sn_ops.cuda_force_path(PATHS.index(path))

    def last_path(self) -> str:
        """The path that the last forward took, another one than was forced where that cannot serve."""
        return PATHS[torch.ops.sn_ops.cuda_last_path()]

    def synchronize(self) -> None:
        """Wait for the device; its errors surface here."""
        torch.cuda.synchronize()

    def capture(self, call: Callable[[], object], *, warm_ups: int = WARM_UPS) -> Callable[[], object]:
        """A CUDA graph of what `call` enqueues."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_ups):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def seconds(self, call: Callable[[], object], times: int) -> float:
        """What the device takes for so many calls, between two events."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    @contextmanager
    def busy(self) -> Any:
        """Another stream multiplies matrices meanwhile; yields a function that enqueues more of that."""
        stream = torch.cuda.Stream()
        noise = torch.randn(2048, 2048, device=self.device, dtype=torch.bfloat16)

        def more() -> None:
            with torch.cuda.stream(stream):
                for _ in range(40):
                    noise @ noise

        yield more
        stream.synchronize()

    def kernels(self, call: Callable[[], object], times: int) -> list[tuple[str, int, float]]:
        """Name, launches and total microseconds of the kernels of so many calls, by the profiler."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
            for _ in range(times):
                call()
            torch.cuda.synchronize()
        return [
            (event.key, event.count, float(event.self_device_time_total))
            for event in found.key_averages()
            if event.self_device_time_total > 0
        ]


class Pretended:
    """No GPU: values by the emulated kernels, times by the CPU."""

    name = "pretended"

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.device = torch.device("cpu")
        self._forced: Any = nullcontext()
        if backend == "simt":
            sys.path.append(str(ROOT / "tests"))
            from support import simt_build

            simt_build.enable()

    def force(self, path: str) -> None:
        """As on a GPU."""
        if self.backend == "simt":
            from support import simt

            simt.settings = dataclasses.replace(simt.settings, path=path)

    def last_path(self) -> str:
        """As on a GPU; the CPU's own paths are none of these."""
        if self.backend != "simt":
            return ""
        from support import simt

        assert simt.last_report is not None
        return simt.last_report.path

    def synchronize(self) -> None:
        """Work is done when a call returns."""

    def capture(self, call: Callable[[], object], *, warm_ups: int = WARM_UPS) -> Callable[[], object]:
        """The call itself."""
        for _ in range(min(1, warm_ups)):
            call()

        def replay() -> None:
            call()

        return replay

    def seconds(self, call: Callable[[], object], times: int) -> float:
        """By the clock."""
        start = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - start

    @contextmanager
    def busy(self) -> Any:
        """Nothing else runs."""
        yield lambda: None

    def kernels(self, call: Callable[[], object], times: int) -> list[tuple[str, int, float]]:
        """One pretended kernel."""
        return [("pretended", times, self.seconds(call, times) * 1e6)]


def open_device(stand_in: str, backend: str = "cuda") -> Gpu | Pretended:
    """The GPU with the backend that the step is about, or in a rehearsal `stand_in`: "simt" or "cpu"."""
    return Pretended(stand_in) if protocol.pretending() else Gpu(backend)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, so that a NaN equals itself and 0.0 is not -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))
