"""The step "ceilings": what the device can do at all: launches, copies, caches (`sn_gpu_micro`), matrix products."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import torch

import manifest
import protocol
import runner
from device import Gpu, Pretended, open_device

PROGRAM = "sn_gpu_micro"
N, D = 8192, 2048
SAMPLES = 15
SAME = {"null_kernel": "null_kernel_stream", "graph_gap": "null_kernel_graph", "l2": "l2_read_16_mib"}
"""Ceiling that `expected` states -> what the compiled program calls it."""

SAMPLE_S = 4e-3


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether fp32 products may be rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def entry(unit: str, samples: list[float]) -> dict[str, Any]:
    """A ceiling in the record's schema."""
    return {"unit": unit, "samples": samples, "median": statistics.median(samples)}


def rates(device: Gpu | Pretended, call: Any, amount: float) -> list[float]:
    """`amount` over the seconds of a call, for each sample."""
    call()
    once = max(device.seconds(call, 1), 1e-7)
    times = max(1, round(SAMPLE_S / once))
    return [amount * times / device.seconds(call, times) for _ in range(SAMPLES if device.name == "cuda" else 1)]


def products(device: Gpu | Pretended) -> dict[str, Any]:
    """X @ X.T of N x D as cuBLAS makes it, random values."""
    n, d = (N, D) if device.name == "cuda" else (64, 32)
    wide = torch.randn(n, d, device=device.device)
    found = {}
    for name, dtype, rounded in (
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("fp16", torch.float16, False),
        ("bf16", torch.bfloat16, False),
    ):
        x = wide.to(dtype)
        out = torch.empty(n, n, device=device.device, dtype=dtype)
        with tf32(rounded):

            def call(x: torch.Tensor = x, out: torch.Tensor = out) -> None:
                torch.mm(x, x.T, out=out)

            found[name] = entry("FLOP/s", rates(device, call, 2.0 * n * n * d))
    return found


def copies(device: Gpu | Pretended) -> dict[str, Any]:
    """A device-to-device copy by PyTorch, bytes read and written."""
    size = (1 << 30) if device.name == "cuda" else (1 << 20)
    source = torch.randint(0, 100, (size,), dtype=torch.int8, device=device.device)
    target = torch.empty_like(source)
    return {"copy": entry("B/s", rates(device, lambda: target.copy_(source), 2.0 * size))}


def calls(device: Gpu | Pretended) -> dict[str, Any]:
    """PyTorch's time, called from Python, for a small operation and for a small loss with its gradient: a floor
    for ours."""
    x = torch.randn(128, 128, device=device.device, requires_grad=True)
    labels = torch.arange(128, device=device.device)

    def operation() -> None:
        with torch.no_grad():
            x.add_(0.0)

    def both() -> None:
        torch.autograd.grad(torch.nn.functional.cross_entropy(x, labels), x)

    def seconds(call: Any) -> list[float]:
        device.synchronize()
        times = 100 if device.name == "cuda" else 1
        samples = []
        for _ in range(SAMPLES):
            start = time.perf_counter()
            for _ in range(times):
                call()
            device.synchronize()
            samples.append((time.perf_counter() - start) / times)
        return samples[1:]

    return {"torch_operation": entry("s", seconds(operation)), "torch_cross_entropy": entry("s", seconds(both))}


def micro(device: Gpu | Pretended) -> dict[str, Any]:
    """What the compiled program measures, under its names and, for what `expected` states, under those."""
    if device.name != "cuda":
        return {name: entry("s", [1.0, 1.0]) for name in SAME}
    program = manifest.BUILT / PROGRAM
    if not program.exists():
        print(f"{PROGRAM} is not built: run benchmarks/gpu/prepare.sh where nvcc is", flush=True)
        return {}
    found: dict[str, Any] = {}
    # Programmatic launches come last: where they fail, the rest is reported already.
    for options in ([], ["--quick", "--programmatic"]):
        done = subprocess.run([str(program), *options], capture_output=True, text=True)
        print(f"{PROGRAM} {' '.join(options)}: exit status {done.returncode}. {done.stderr}", flush=True)
        if done.returncode == 0:
            found = json.loads(done.stdout)["measurements"] | found
        elif not options:
            protocol.fail(f"{PROGRAM}: exit status {done.returncode}: {done.stderr[-200:]}")
    return found | {name: found[measured] for name, measured in SAME.items()}


def main() -> None:
    """All of them."""
    device = open_device("cpu")
    made = products(device)
    during = (runner.device_of_smi() or {}).get("clocks_mhz") if device.name == "cuda" else None
    protocol.say(**made)
    print(f"clocks while products ran: {during}", flush=True)
    copied = copies(device)
    protocol.say(
        figure=", ".join(
            f"{name} {found['median'] / 1e12:.3g} T{found['unit']}" for name, found in (made | copied).items()
        ),
        **copied,
    )
    protocol.say(**calls(device))
    protocol.say(**micro(device))
    if during:
        protocol.say(provenance={"clocks_under_load_mhz": during})


if __name__ == "__main__":
    main()
