"""The bound on the tensor core's accumulation that csrc/cuda/screen/bound.cuh claims, against models of the hardware.

A step adds a group of products to the accumulator: all are aligned to the largest exponent, truncated some bits below
it, and summed; the sum is truncated to 24 bits. The exponent of a product is the sum of its operands' exponents; a
subnormal operand has the least one. All values are whole multiples of `UNIT`, so the models are exact.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

UNIT = -300
"""Exponent of the unit: below the last bit of any truncated product of bf16 numbers."""
LEAST = {"fp16": -14, "bf16": -126}
BITS = {"fp16": 10, "bf16": 7}

Numbers = list[tuple[int, int]]
"""Significand and exponent: the number is significand 2^(exponent - BITS). Subnormals have the least exponent."""


def cut(value: int, exponent: int) -> int:
    """Towards zero, below 2^exponent."""
    shift = exponent - UNIT
    return value if shift <= 0 else int(math.copysign(1, value)) * (abs(value) >> shift << shift)


def tensor_core(a: Numbers, b: Numbers, bits: int, group: int, fraction: int) -> int:
    """The product of two rows, in units."""
    accumulator = 0
    for first in range(0, len(a), group):
        pairs = list(zip(a[first : first + group], b[first : first + group], strict=True))
        terms = [x * y << (ex + ey - 2 * bits - UNIT) for (x, ex), (y, ey) in pairs]
        exponents = [ex + ey for (_, ex), (_, ey) in pairs]
        if accumulator:
            exponents.append(abs(accumulator).bit_length() - 1 + UNIT)
        total = sum(cut(term, max(exponents) - fraction) for term in [*terms, accumulator])
        accumulator = cut(total, abs(total).bit_length() - 24 + UNIT)
    return accumulator


def exact(a: Numbers, b: Numbers, bits: int) -> int:
    return sum(x * y << (ex + ey - 2 * bits - UNIT) for (x, ex), (y, ey) in zip(a, b, strict=True))


def row(dtype: str, kind: str, size: int, random: np.random.Generator) -> Numbers:
    bits, least = BITS[dtype], LEAST[dtype]
    signs = random.choice([-1, 1], size) if kind != "alike" else np.ones(size, int)
    if kind in ("subnormal", "tiny"):
        highest = 2**bits if kind == "subnormal" else 2
        numbers = [(int(s * random.integers(0, highest)), least) for s in signs]
    else:
        spread = {"small": (least, least + 3), "wide": (least, 4), "alike": (0, 1), "ordinary": (-6, 1)}[kind]
        numbers = [(int(s * (2**bits + random.integers(0, 2**bits))), int(random.integers(*spread))) for s in signs]
    if kind == "alike":  # an accumulator of 1, then products just below what is kept beside it, of one sign
        numbers = [(2 ** (bits + 1) - 1, -13) if i else (2**bits, 0) for i in range(size)]
    return numbers


KINDS = ("subnormal", "tiny", "small", "wide", "alike", "ordinary")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("group", "fraction"), [(16, 25), (8, 24), (8, 23)], ids=["sm_90", "sm_80", "claimed"])
def test_against_the_sum_of_the_norms(dtype: str, group: int, fraction: int) -> None:
    """It holds for rows of every kind against every other; one of zeros beside a large one included."""
    random = np.random.default_rng(7)
    bits, size, worst = BITS[dtype], 128, 0.0
    for kind in KINDS:
        for other in KINDS:
            for _ in range(8):
                a, b = row(dtype, kind, size, random), row(dtype, other, size, random)
                norms = exact(a, a, bits) + exact(b, b, bits)
                if dtype == "bf16" and norms < 1 << (-60 - UNIT):
                    continue  # such a row has no bound
                error = 2 * abs(tensor_core(a, b, bits, group, fraction) - exact(a, b, bits))
                worst = max(worst, error / norms / (size * 2.0**-23))
    assert 0.2 < worst <= 1.25


def test_not_against_the_product_of_the_norms() -> None:
    """A row of the least numbers there are loses more than that: its products are aligned as if they were larger."""
    a, b = [(1, -14)] * 128, [(2047, -14) if i % 8 else (1024, 0) for i in range(128)]
    error = abs(tensor_core(a, b, 10, 8, 24) - exact(a, b, 10))
    product = math.isqrt(exact(a, a, 10) * exact(b, b, 10))
    assert error > 4 * 1.25 * 128 * 2.0**-23 * product
