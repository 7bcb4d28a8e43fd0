"""Which variants of the Triton kernels there are: not written down, but found by running the operators on tensors
without data, for the batches in REGIMES. Their launches are noted instead of made.

REGIMES are the batches of the committed table. What the backend serves beyond them, `whole_range`, has about a thousand
variants; `covering` chooses some.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction

from sn_ops.triton import gradients, loss, operators, positives, screening, search, tuning


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


DIMS = (1, 33, 100, 128, 200, 512, 1000, 2048, 2049, 2050, 4096, 16384)
NEIGHBOURS = (1, 2, 10, 33, 64, 100, 128, 200)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = ((128, 0), (512, 0), (16384, 0), (256, 65536), (100, 300))


def whole_range() -> Iterator[Regime]:
    """Batches of all kinds: every class of dimensions and list lengths, aligned or not, with and without a bank."""
    for (anchors, candidates), dims, k, dtype in product(SIZES, DIMS, NEIGHBOURS, DTYPES):
        yield Regime(anchors, candidates, dims, k, dtype)


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


def launches_of(regimes: Iterable[Regime], device: tuning.Device = tuning.HOPPER) -> dict[Launch, JITFunction[Any]]:
    """Every variant that these batches launch on such a device."""
    launches: dict[Launch, JITFunction[Any]] = {}
    usual, tuning.HOPPER = tuning.HOPPER, device
    try:
        with recorded(launches):
            for regime in regimes:
                walk(regime)
    finally:
        tuning.HOPPER = usual
    return launches


def kernels() -> set[str]:
    """The names of all kernels of the package."""
    modules = search, screening, positives, loss, gradients
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


# ---- some of many variants -----------------------------------------------------------------------

TOGETHER = 3
"""A fault shows where so many facts meet: a long list, two sections and rows that are not aligned, say."""

LENGTHS = ("CHUNK", "SEGMENTS")
"""Constants that only say how long a loop is."""

Facts = dict[str, Any]


def facts_of(launch: Launch) -> Facts:
    """By name: types, constants, and whether 16 divides a number."""
    constants = {name: getattr(value, "name", value) for name, value in launch.constants}
    types = {name: kind for name, kind in launch.signature if kind != "constexpr"}
    divided = {f"16|{name}": name in launch.aligned for name, kind in types.items() if not kind.startswith("*")}
    every = {**types, **constants, **divided}
    return {name: value for name, value in every.items() if name not in LENGTHS and not name.startswith("LOG_")}


def _meetings(variants: list[Launch]) -> list[set[tuple[Any, ...]]]:
    """Of each variant the facts that meet in it, TOGETHER at a time; facts that always go together are one."""
    facts = [facts_of(launch) for launch in variants]
    kept: dict[tuple[int, ...], str] = {}
    for name in sorted({name for each in facts for name in each}):
        numbers: dict[Any, int] = {}
        values = tuple(numbers.setdefault(each.get(name), len(numbers)) for each in facts)
        if len(numbers) > 1:
            kept.setdefault(values, name)
    groups = list(combinations(sorted(kept.values()), min(TOGETHER, len(kept))))
    return [{(group, *map(each.get, group)) for group in groups} for each in facts]


def covering(launches: Iterable[Launch], given: Iterable[Launch]) -> list[Launch]:
    """So many of the variants, beside those given, that all facts which meet in one meet in one of these.

    The variant with the most new meetings first, until none is new.
    """
    by_kernel: dict[str, list[Launch]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.kernel, []).append(launch)
    known, chosen = set(given), []
    for variants in by_kernel.values():
        meetings = dict(zip(variants, _meetings(variants), strict=True))
        missing = set().union(*meetings.values()).difference(*(meetings[each] for each in variants if each in known))
        while missing:
            best = max(variants, key=lambda each: len(meetings[each] & missing))
            chosen.append(best)
            missing -= meetings[best]
    return chosen
