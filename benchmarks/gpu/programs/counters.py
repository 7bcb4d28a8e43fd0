"""The step "counters": what Nsight Compute says of each kernel at a few shapes, clocks left as they are.

    counters.py          profile what follows, where ncu is
    counters.py calls    forward and backward of each shape; the second call is profiled

Nothing here is a time to quote: a profiled kernel runs alone, many times, with cold caches.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from typing import Any

import torch

import protocol
from device import ROOT, open_device
from times import LOSS, ours, pass_of, sets_of

SHAPES = (LOSS[1], LOSS[5], LOSS[10])
KERNELS = "(score|refine|gather|search|resident|list|bank|thresholds|select|tile|merge)_kernel"
SETS = ("basic", "full")
"""Sets of counters, by what they cost: "basic" first, so that something is there if "full" takes too long."""

WANTED = (
    "Duration",
    "Memory Throughput",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "Compute (SM) Throughput",
    "Registers Per Thread",
    "Achieved Occupancy",
    "Theoretical Occupancy",
    "Executed Ipc Active",
    "Issue Slots Busy",
    "No Eligible",
    "Warp Cycles Per Issued Instruction",
    "L1/TEX Hit Rate",
    "L2 Hit Rate",
    "Waves Per SM",
)


def calls() -> None:
    """What is profiled."""
    device = open_device("cpu")
    for shape in SHAPES:
        call = pass_of(ours(device.backend, shape.k), sets_of(shape, device.device)[:1], "both")
        call(0)
        device.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call(0)
        device.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def rows_of(text: str) -> Any:
    """A row a kernel, from ncu's CSV: its name, and the wanted metrics with their units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        name, metric = row.get("Kernel Name", ""), row.get("Metric Name", "")
        found = kernels.setdefault(row.get("ID", ""), {"kernel": name[:120], "grid": row.get("Grid Size", "")})
        if metric in WANTED:
            found[metric] = f"{row.get('Metric Value', '')} {row.get('Metric Unit', '')}".strip()
    return list(kernels.values())


def main() -> None:
    """Profile with each set."""
    if protocol.pretending():
        protocol.say(figure="none in a rehearsal", basic=rows_of('"ID","Kernel Name","Metric Name","Metric Value"\n'))
        return
    if shutil.which("ncu") is None:
        protocol.not_run("ncu is not on PATH")
    for name in SETS:
        command = ["ncu", "--clock-control", "none", "--set", name, "--csv", "--page", "details"]
        command += ["--profile-from-start", "off", "--kernel-name", f"regex:{KERNELS}"]
        command += [sys.executable, __file__, "calls"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
        rows = rows_of(done.stdout)
        for row in rows:
            print(row, flush=True)
        if done.returncode != 0 or not rows:
            print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
            protocol.fail(f"ncu --set {name}: exit status {done.returncode}, {len(rows)} kernels")
        found: dict[str, Any] = {name: rows}
        protocol.say(figure=f"{len(rows)} launches of {len(SHAPES)} shapes", **found)


if __name__ == "__main__":
    calls() if len(sys.argv) > 1 else main()
