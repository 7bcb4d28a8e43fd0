"""The step "tests": the part of the suite that runs kernels on a GPU.

Tests of the emulator (its build would take the whole call), the trainer, plans and validation are left out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter

import torch

import kernel_cache
import protocol
from device import ROOT

MODULES = (
    "tests/backends/test_cuda.py",
    "tests/loss/test_selection.py",
    "tests/loss/test_nonfinite.py",
    "tests/loss/test_semantics.py",
    "tests/loss/test_by_hand.py",
    "tests/backends/test_operators.py",
    "tests/loss/test_bank.py",
)
WANTED = "cuda and not triton and not simt"
# Every variant of a Triton kernel is compiled on the first call of it: some seconds each.
TRITON_MODULES = ("tests/loss/test_by_hand.py", "tests/loss/test_selection.py")
TRITON_WANTED = "triton and not cuda"
WORKERS = 6
MOST_FAILURES = 10
SAY_EVERY = 100
# pytest -v, alone or with workers: "path::name RESULT" or "[gw1] [ 9%] RESULT path::name".
OUTCOME = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
NAME = re.compile(r"\S+\.py::\S.*?(?= (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL)|$)")


def command(backend: str) -> list[str]:
    """Pytest, with several workers where pytest-xdist is there: most of a test's time is its oracle on the CPU."""
    modules: tuple[str, ...]
    wanted, modules = (TRITON_WANTED, TRITON_MODULES) if backend == "triton" else (WANTED, MODULES)
    if protocol.pretending():
        wanted, modules = ("simt" if backend == "cuda" else "triton"), TRITON_MODULES[:1]
    line = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "--no-header"]
    line += [f"--maxfail={MOST_FAILURES}", "-k", wanted]
    if backend == "triton":
        line += ["-p", kernel_cache.__name__]
    if not protocol.pretending() and importlib.util.find_spec("xdist") is not None:
        line += ["-n", str(WORKERS)]
    return [*line, *modules]


def main(backend: str) -> None:
    """Run them, counting outcomes as they come."""
    # Where the step `facts` failed this one is run anyway: without a device the interpreter would pass for it.
    if backend == "triton" and not protocol.pretending() and not torch.cuda.is_available():
        protocol.fail("no GPU: the Triton backend would be interpreted, not compiled")
    protocol.say(failures=[])
    counts: Counter[str] = Counter()
    failures: list[str] = []

    def tell() -> None:
        protocol.say(
            figure=f"{counts['PASSED']} passed, {counts['FAILED'] + counts['ERROR']} failed, "
            f"{counts['SKIPPED']} skipped",
            passed=counts["PASSED"],
            failed=counts["FAILED"] + counts["ERROR"],
            skipped=counts["SKIPPED"],
        )

    # The checkout, where pytest starts, must not hide an installed package.
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        command(backend), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    summing_up = False
    for line in process.stdout:
        # The summary repeats what failed.
        summing_up = summing_up or (line.startswith("====") and ("short test summary" in line or "FAILURES" in line))
        outcome, name = OUTCOME.search(line), NAME.search(line)
        if summing_up or outcome is None or name is None:
            print(line, end="", flush=True)
            continue
        counts[outcome[1]] += 1
        if outcome[1] in ("FAILED", "ERROR"):
            failures.append(name[0].strip())
            print(line, end="", flush=True)
            protocol.say(failures=[name[0].strip()])
        if sum(counts.values()) % SAY_EVERY == 0:
            tell()
    status = process.wait()
    tell()
    if backend == "triton":
        kernel_cache.tell()
    if counts["PASSED"] == 0:
        protocol.fail(f"no test passed; pytest's exit status is {status}")
    if status != 0:
        protocol.fail(f"{', '.join(failures[:3]) or f'pytest exit status {status}'}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
