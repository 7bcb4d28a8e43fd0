"""The step "probe": what one mma loses of a sum (`sn_gpu_probe`), against the bound of bound.cuh."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import manifest
import protocol

PROGRAM = "sn_gpu_probe"


def main() -> None:
    """Run it; fail where the bound does not hold."""
    command = [str(manifest.BUILT / PROGRAM)]
    if protocol.pretending():
        command = [os.environ[protocol.EMULATED_PROBE], "--model", "hopper"]
    if not Path(command[0]).exists():
        protocol.not_run(f"{PROGRAM} is not built: run benchmarks/gpu/prepare.sh where nvcc is")
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stderr, done.stdout, sep="\n")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        protocol.fail(f"exit status {done.returncode}, no record: {done.stderr[-300:]}")
    types = ", ".join(
        f"{name} {facts['group']}/{facts['bits']} worst {facts['worst']:.3f}" for name, facts in found["types"].items()
    )
    protocol.say(figure=f"{found['model']}: {types} of {found['bound']}", **found)
    if done.returncode != 0 or found["holds"] is not True:
        protocol.fail("the bound on the tensor cores' accumulation does not hold here")


if __name__ == "__main__":
    main()
