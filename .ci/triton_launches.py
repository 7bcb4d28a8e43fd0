"""Which variants of the Triton kernels there are: not written down, but found by running the operators on tensors
without data, for the batches in REGIMES. Their launches are noted instead of made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction

from sn_ops.triton import gradients, loss, operators, positives, screening, search


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
            if not parameter.do_not_specialize_on_alignment:
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


def launches_of(regimes: Iterable[Regime]) -> dict[Launch, JITFunction[Any]]:
    """Every variant that these batches launch."""
    launches: dict[Launch, JITFunction[Any]] = {}
    with recorded(launches):
        for regime in regimes:
            walk(regime)
    return launches


def kernels() -> set[str]:
    """The names of all kernels of the package."""
    modules = search, screening, positives, loss, gradients
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}
