"""Time what a call of the Triton backend costs the host: its kernels are compiled, a driver that does nothing takes
their launches. Needs no GPU; the features lie in CPU memory, which nobody reads.

    python benchmarks/bench_triton_host.py [--shapes 64x2048,128x2048,256x2048] [--k 10] [--architecture 90]

Prints, for each shape, the launches of a forward and of a backward and the time of the two operators through PyTorch's
dispatcher, as a multiple of torch.nn.functional.cross_entropy with its backward in the same process too. The least of
many repetitions: whatever else runs on the machine only adds. The first call compiles: some seconds a shape.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import triton as compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sn_ops import triton as backend
from sn_ops.triton import operators, tuning


class IdleDriver:
    """A driver of Triton that loads every kernel and runs none, for a GPU that is not there.

    `launches` has the names of the kernels that it was asked to run.
    """

    launches: ClassVar[list[str]] = []
    loads: ClassVar[list[str]] = []

    class utils:  # noqa: N801, the name that Triton looks for
        """What Triton asks of a GPU's runtime: an H100's facts."""

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

        @staticmethod
        def load_binary(name: str, *_: Any) -> tuple[int, int, int, int, int]:
            """Module, function, registers, spills, most threads."""
            IdleDriver.loads.append(name)
            return 1, 1, 0, 0, 1024

        @staticmethod
        def unload_module(module: int) -> None: ...

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: IdleDriver.launches.append(metadata.name)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend(architecture: int = 90) -> None:
    """From here on the operators of the Triton backend serve CPU tensors, by launches that do nothing."""
    assert not tuning.INTERPRETED, "TRITON_INTERPRET is set: nothing would be compiled"
    driver.set_active(IdleDriver(architecture))
    if backend.missing():  # sn_ops defines no operators of a backend that cannot run, as under a PyTorch without CUDA
        backend.define()
    for name in ("forward", "backward", "loss", "loss_backward"):
        backend._LIBRARY.impl(name, getattr(operators, name), "CPU")


def operators_of(n: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], Any], ...]:
    """The training operators, of a batch of n rows, four of each identity, through the dispatcher."""
    feats, labels, upstream = torch.zeros(n, d, dtype=dtype), torch.arange(n) // 4, torch.ones(())
    sn_triton = torch.ops.sn_triton

    def forward() -> Any:
        return sn_triton.loss.default(feats, labels, None, None, None, 0, k, 50.0, 0.1, 0, 0)

    _, graph, stats = forward()

    def backward() -> Any:
        return sn_triton.loss_backward.default(upstream, feats, None, graph, stats, k, 0, True, False)

    return forward, backward


def launched(call: Callable[[], Any]) -> list[str]:
    """The kernels that a call launches."""
    IdleDriver.launches.clear()
    call()
    return list(IdleDriver.launches)


def microseconds(call: Callable[[], Any], repeats: int = 300, calls: int = 10) -> float:
    """The least time of a call, over means of `calls`."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def cross_entropy(n: int) -> Callable[[], Any]:
    """A loss of PyTorch with its backward, on a batch of n rows of 16 classes."""
    scores: Tensor = torch.zeros(n, 16, requires_grad=True)
    classes = torch.zeros(n, dtype=torch.int64)

    def call() -> Any:
        torch.nn.functional.cross_entropy(scores, classes).backward()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shapes", default="64x2048,128x2048,256x2048", help="rows x dims, separated by commas")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--architecture", type=int, default=90, help="of the GPU that is pretended")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    pretend(chosen.architecture)
    print(
        f"Triton {compiler.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {os.cpu_count()} cores"
    )
    print(f"{'shape':>12} {'launches':>9} {'forward':>11} {'backward':>11} {'both':>11} {'of cross_entropy':>17}")
    for shape in chosen.shapes.split(","):
        n, d = map(int, shape.split("x"))
        with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
            forward, backward = operators_of(n, d, chosen.k)
            backward()
            count = f"{len(launched(forward))} + {len(launched(backward))}"
            ahead, back = microseconds(forward), microseconds(backward)
        ratio = (ahead + back) / microseconds(cross_entropy(n))
        print(
            f"{shape:>12} {count:>9} {ahead:8.1f} us {back:8.1f} us {ahead + back:8.1f} us {ratio:16.2f}x", flush=True
        )


if __name__ == "__main__":
    main()
