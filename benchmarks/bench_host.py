"""Time what a call costs the host: `sn_loss` with its backward on so small a batch that nothing else is felt, as a
multiple of `torch.nn.functional.cross_entropy` with its backward on a batch of the same size in the same process.

    python benchmarks/bench_host.py [--shape 8x16] [--repeats 400] [--json FILE]

Twice, in processes of their own: with autograd in C++, if the package has it for this torch, and with the fallback in
Python (SN_OPS_AUTOGRAD=python). Prints also the parts of a call: checks of options and batch, the choice of a backend,
the forward alone, and what `SNLoss` adds. One thread; the functions take turns, and the least of many means of fifty
calls counts: whatever else runs on the machine only adds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import sn_ops
from harness import provenance
from sn_ops import checks, dispatch

CALLS = 50
PARTS = ("options", "batch", "choice")


def functions(n: int, d: int) -> dict[str, Callable[[], Any]]:
    """What is timed. "cross_entropy" is the yardstick."""
    generator = torch.Generator().manual_seed(0)
    feats = F.normalize(torch.randn(n, d, generator=generator), dim=1).requires_grad_()
    labels = torch.arange(n) // 2
    scores = torch.randn(n, d, generator=generator).requires_grad_()
    classes = labels % d
    module = sn_ops.SNLoss()

    def with_backward(loss: Callable[[], Any], leaf: torch.Tensor) -> Callable[[], None]:
        def call() -> None:
            leaf.grad = None
            loss().backward()

        return call

    return {
        "cross_entropy": with_backward(lambda: F.cross_entropy(scores, classes), scores),
        "sn_loss": with_backward(lambda: sn_ops.sn_loss(feats, labels), feats),
        "SNLoss.forward": with_backward(lambda: module.forward(feats, labels), feats),
        "SNLoss": with_backward(lambda: module(feats, labels), feats),
        "sn_loss, forward alone": lambda: sn_ops.sn_loss(feats, labels),
        "options": lambda: checks.check_options(10, 50.0, 0.1, "span", "mean", "auto", dispatch.BACKEND_DEVICES),
        "batch": lambda: checks.check_batch(feats, labels, None, None, None),
        "choice": lambda: dispatch.choose_backend("auto", feats),
    }


def measure(n: int, d: int, repeats: int) -> dict[str, Any]:
    """Autograd's language, and the microseconds of each function: the least, and the quartiles of all means."""
    torch.set_num_threads(1)
    timed = functions(n, d)
    means: dict[str, list[float]] = {name: [] for name in timed}
    for call in timed.values():
        for _ in range(300):
            call()
    for _ in range(repeats):
        for name, call in timed.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            means[name].append((time.perf_counter() - start) / CALLS * 1e6)
    found = {}
    for name, values in means.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = {"least": min(values), "quartiles": [low, middle, high]}
    return {"autograd": sn_ops.backends()["cpu"].autograd, "us": found}


def both(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """`measure` in a process for each autograd."""
    runs = []
    for wanted in ("", "python"):
        done = subprocess.run(
            [sys.executable, __file__, "--one", "--shape", arguments.shape, "--repeats", str(arguments.repeats)],
            env={**os.environ, "SN_OPS_AUTOGRAD": wanted}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit("the process that measures failed; its error is above")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return runs if runs[0]["autograd"] != runs[1]["autograd"] else runs[:1]


def table(runs: list[dict[str, Any]]) -> str:
    lines = [f"{'':24}" + "".join(f"{run['autograd']:>12}, us {'x c. e.':>9}" for run in runs)]
    for name in runs[0]["us"]:
        cells = ""
        for run in runs:
            least = run["us"][name]["least"]
            cells += f"{least:>16.1f} {least / run['us']['cross_entropy']['least']:>9.2f}"
        lines.append(f"{name:24}{cells}")
    lines.append("")
    for run in runs:
        us = {name: facts["least"] for name, facts in run["us"].items()}
        added = [f"{name} adds {100 * (us[name] / us['sn_loss'] - 1):.1f} %" for name in ("SNLoss.forward", "SNLoss")]
        part = sum(us[name] for name in PARTS)
        lines.append(
            f"{run['autograd']}: {', '.join(added)}; checks and choice take {part:.1f} us of {us['sn_loss']:.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shape", default="8x16", help="rows x dims")
    parser.add_argument("--repeats", type=int, default=400, help="means of each function")
    parser.add_argument("--json", type=Path, help="write machine, versions, commit and all times here")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.repeats < 2:
        parser.error(f"--repeats: expected at least 2, got {chosen.repeats}")
    try:
        n, d = map(int, chosen.shape.split("x"))
    except ValueError:
        parser.error(f"--shape: expected ROWSxDIMS, such as 8x16, got {chosen.shape!r}")
    if chosen.one:
        print(json.dumps(measure(n, d, chosen.repeats)))
        return
    runs = both(chosen)
    print(
        f"{n} x {d}, forward and backward, one thread, the least of {chosen.repeats} means; x c. e.: of cross_entropy"
    )
    print(table(runs))
    if chosen.json is not None:
        record = {
            "provenance": provenance(torch.device("cpu")),
            "shape": [n, d],
            "repeats": chosen.repeats,
            "runs": runs,
        }
        chosen.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
