"""The probe of the tensor core's accumulation (benchmarks/gpu/programs/probe.cu) on emulated threads, under each model.

On a device it has one short run: here it must name every model, find what a broken adder does wrong, and refuse what
exceeds the bound that the screening relies on.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from support import simt_build

BOUND = 1.25


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report."""
    command = [str(simt_build.build("sn_simt_probe")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    assert not done.stderr
    return done.returncode, json.loads(done.stdout)


# What rows can lose at most, by the arithmetic alone: beside 1, a group's terms just below the last bit that is kept,
# and the sum's cut to a float as far as kept bits below it are lost. In units of D 2^-23.
MODELS = {
    "hopper": (16, 25, (16 / 4 + 3 / 4) / 16),
    "ampere": (8, 24, (8 / 2 + 1 / 2) / 8),
    "volta": (4, 23, 4 / 4),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_probe_names_the_model(model: str) -> None:
    """Group, bits, rounding and subnormals; rows that lose nearly as much as they can; the verdict."""
    group, bits, worst = MODELS[model]
    status, report = run("--model", model)
    assert report["model"] == model
    assert set(report["types"]) == {"float16", "bfloat16"}
    for found in report["types"].values():
        assert (found["group"], found["bits"], found["model"]) == (group, bits, model)
        assert found["bits_of_products"] == found["bits_of_accumulator"] == bits
        assert found["group_of_column"] == [column // group for column in range(16)]
        assert found["rounding"] == found["sum_rounding"] == "truncates"
        assert found["subnormals"] == found["subnormal_sums"] == "kept"
        assert found["subnormal_exponents"] == found["product_exponents"] == "unnormalised"
        assert found["zeros"] == "ignored"
        assert found["general"] == pytest.approx(((group + 1) * 2.0 ** (23 - bits) + 1) / group)
        assert 0.99 * worst <= found["worst"] <= worst
        assert found["worst"] == max(found["worst_by_family"].values())
        assert all(ratio <= found["general"] for ratio in found["worst_by_family"].values())
    # Of Volta's arithmetic no more follows than 1.5, whatever the rows of the probe lose.
    holds = model != "volta"
    assert report["bound"] == BOUND
    assert (status == 0) == report["holds"] == holds
    assert all(found["holds"] == holds for found in report["types"].values())


def test_the_probe_refuses_rows_beyond_the_bound() -> None:
    """An adder of 22 bits: known to no model, and its rows exceed the bound."""
    status, report = run("--model", "crude")
    assert status == 1 and not report["holds"] and report["model"] == "unknown"
    for found in report["types"].values():
        assert (found["group"], found["bits"]) == (4, 22)
        assert found["worst"] > BOUND


@pytest.mark.parametrize(("scale", "holds"), [("1", True), ("1.1", False)])
def test_what_the_harness_injects_is_the_bound(scale: str, holds: bool) -> None:
    """The injected error fills the bound in every family of rows, and a tenth more is noticed; no model is named."""
    status, report = run("--model", "none", "--scale", scale)
    assert (status == 0) == report["holds"] == holds
    assert report["model"] == "unknown"
    for found in report["types"].values():
        assert found["group"] == 0 and found["general"] is None
        assert found["worst"] > 0.99 * float(scale) * BOUND
    assert all(ratio > 0.8 * BOUND for ratio in report["types"]["float16"]["worst_by_family"].values())
