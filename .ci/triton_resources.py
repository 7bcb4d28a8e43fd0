"""Compiles every variant of every Triton kernel ahead of time, for GPUs that need not be there, and prints what each
takes: registers a thread, bytes of shared memory, and instructions that go to local memory (spills), read from the
compiled code.

Which variants there are is not written down here: the operators run on tensors without data, for the batches in
REGIMES, and their launches are compiled instead of run. A spill in a hot kernel, more shared memory than the GPU has,
or a kernel of the package that no regime launched fails the run.

    python .ci/triton_resources.py [sm_80 sm_90 sm_100] [--kernels search_kernel,loss_kernel]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sn_ops.triton import gradients, loss, operators, positives, screening, search, tuning

# Most shared memory of a block, bytes.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# Run once for each pair, or for each tile of pairs. The others run once for each row.
HOT = {"search_kernel", "sample_kernel", "screen_kernel", "refine_kernel", "positives_kernel", "fallback_kernel",
       "gradient_kernel", "hub_kernel"}  # fmt: skip


class Regime(NamedTuple):
    """A batch whose launches are compiled."""

    anchors: int
    candidates: int  # 0: the anchors
    dims: int
    k: int
    dtype: torch.dtype
    reduction: int = 0
    squeeze: int = 0


REGIMES = (
    Regime(128, 0, 2048, 10, torch.float32),
    Regime(128, 0, 2048, 10, torch.float32, reduction=2, squeeze=1),
    Regime(100, 300, 77, 33, torch.float32, reduction=1, squeeze=2),
    Regime(512, 0, 4096, 64, torch.float32, squeeze=3),
    Regime(512, 0, 256, 128, torch.float16),
    Regime(512, 0, 256, 200, torch.float32),
    Regime(512, 0, 256, 10, torch.float64),
    Regime(8192, 0, 2048, 10, torch.float32),
    Regime(8192, 0, 4096, 10, torch.float32),
    Regime(65536, 0, 128, 10, torch.bfloat16),
    Regime(8192, 0, 512, 10, torch.float16),
    Regime(256, 65536, 2048, 32, torch.float32),
    Regime(16384, 0, 256, 128, torch.float32),
)


class Launch(NamedTuple):
    """A kernel with what its compiled code depends on."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]


_POINTER = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def describe(kernel: JITFunction[Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """A launch as Triton would specialise it: 1 is a constant, and what 16 divides is said to be so."""
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    options: dict[str, Any] = {}
    for name, value in named.items():
        (values if name in kernel.arg_names else options)[name] = value
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTER[value.dtype]
            aligned.append(name)  # allocations start at multiples of more than 16 bytes
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(name)
    return Launch(
        kernel.__name__, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(options.items())
    )


@contextmanager
def recorded(launches: dict[Launch, JITFunction[Any]]) -> Iterator[None]:
    """Kernels note how they are launched instead of running."""

    def note(self: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.setdefault(describe(self, arguments, named), self)

    run = JITFunction.run
    JITFunction.run = note
    try:
        yield
    finally:
        JITFunction.run = run


def walk(regime: Regime) -> None:
    """A forward and a backward of the regime on tensors without data."""

    def new(*size: int, dtype: torch.dtype = regime.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    feats, labels = new(regime.anchors, regime.dims), new(regime.anchors, dtype=torch.int64)
    banked = regime.candidates > 0
    bank = new(regime.candidates, regime.dims) if banked else None
    bank_labels = new(regime.candidates, dtype=torch.int64) if banked else None
    self_index = new(regime.anchors, dtype=torch.int64) if banked else None
    outputs = operators.forward(
        feats, labels, bank, bank_labels, self_index, -1 if banked else 0,
        regime.k, 50.0, 0.1, regime.squeeze, regime.reduction, regime.squeeze == 3,
    )  # fmt: skip
    value, indices, coefficients, *_, stats = outputs
    operators.backward(value, feats, bank, indices, coefficients, stats, regime.reduction, True, banked)


def compile_for(launch: Launch, kernel: JITFunction[Any], architecture: int, folder: Path) -> tuple[int, int, int]:
    """Registers, shared memory and spills of a launch's code."""
    place = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={place[name]: value for name, value in launch.constants},
        attrs={place[name]: [["tt.divisibility", 16]] for name in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def dumped(what: str) -> str:
        return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout

    registers = int(re.findall(r"REG:(\d+)", dumped("-res-usage"))[-1])
    # Instructions, not the size of the stack, which a call of a division's slow path needs too.
    spills = len(re.findall(r"\b(?:STL|LDL)\b", dumped("-sass")))
    return registers, int(compiled.metadata.shared), spills


def told(launch: Launch) -> str:
    """What tells a variant from the others of its kernel."""
    constants = dict(launch.constants)
    kept = [f"{name}={getattr(value, 'name', value)}" for name, value in constants.items() if name.isupper()]
    types = sorted({kind for _, kind in launch.signature if kind in ("*fp16", "*bf16", "*fp32", "*fp64")})
    return " ".join([*types, *kept])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("architectures", nargs="*", default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--kernels", help="only these, separated by commas")
    chosen = parser.parse_args()
    assert not tuning.INTERPRETED, "TRITON_INTERPRET is set: nothing would be compiled"

    launches: dict[Launch, JITFunction[Any]] = {}
    with recorded(launches):
        for regime in REGIMES:
            walk(regime)
    is_kernel: Callable[[str], bool] = lambda name: name.endswith("_kernel")  # noqa: E731
    every = {
        name for module in (search, screening, positives, loss, gradients) for name in vars(module) if is_kernel(name)
    }
    failures = [f"{name}: no regime launches it" for name in sorted(every - {launch.kernel for launch in launches})]

    print(f"triton {triton.__version__}: {len(launches)} variants of {len(every)} kernels")
    print(f"{'kernel':22}{'target':8}{'registers':>10}{'shared':>8}{'spills':>8}  variant")
    with tempfile.TemporaryDirectory() as folder:
        for launch, kernel in sorted(launches.items(), key=lambda item: item[0].kernel):
            if chosen.kernels and launch.kernel not in chosen.kernels.split(","):
                continue
            for name in chosen.architectures:
                architecture = int(name.removeprefix("sm_"))
                registers, shared, spills = compile_for(launch, kernel, architecture, Path(folder))
                print(f"{launch.kernel:22}{name:8}{registers:10}{shared:8}{spills:8}  {told(launch)}", flush=True)
                if spills and launch.kernel in HOT:
                    failures.append(f"{launch.kernel} has {spills} spill instructions on {name}: {told(launch)}")
                if shared > SHARED[architecture]:
                    failures.append(f"{launch.kernel} wants {shared} bytes of shared memory on {name}: {told(launch)}")
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
