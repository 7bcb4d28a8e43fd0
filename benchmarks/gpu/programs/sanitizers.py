"""The step "sanitizers": compute-sanitizer's memcheck and racecheck on one small call of every path.

The parent runs a process for each tool and share of the calls, all at once: each mostly keeps one CPU thread busy.
PyTorch's caching allocator is off: with it, small tensors share segments, and reading beyond one is no error.

    compute-sanitizer --tool memcheck python sanitizers.py direct    what a process runs
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from typing import Any

import torch
from torch import Tensor

import protocol
import sn_ops
from device import ROOT, open_device

TOOLS = ("memcheck", "racecheck")
SHARES = ("cluster", "tickets", "square", "direct", "dense", "screen", "bank", "backward")
SMALL = ("cluster", "tickets")
"""Paths of up to 256 rows that serve other candidates, too."""
# Our kernels alone (names are mangled: namespace sn::cuda).
OURS = "kns=2sn4cuda"
QUIET = ("--report-api-errors", "no")
PROCESSES = 6
# racecheck looks at shared memory: cp.async may give it hazards that __syncwarp or a barrier settles.
SUMMARY = re.compile(r"(ERROR SUMMARY: \d+ errors?|RACECHECK SUMMARY: .*)")
CLEAN = re.compile(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards displayed")


def features(rows: int, dims: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Clusters, duplicates and an outlier."""
    generator = torch.Generator().manual_seed(rows)
    centres = torch.randn(7, dims, generator=generator)
    feats = centres[torch.arange(rows) % 7] + 1e-3 * torch.randn(rows, dims, generator=generator)
    feats[1::9] = feats[0]
    feats[rows // 2] *= 100
    return feats.to(device, dtype)


def call(backend: str, feats: Tensor, k: int, candidates: Tensor | None = None) -> None:
    """Forward and backward, everything asked for."""
    feats = feats.clone().requires_grad_()
    more: dict[str, Any] = {}
    if candidates is not None:
        candidates = candidates.clone().requires_grad_()
        more = {"candidates": candidates, "candidate_labels": torch.arange(len(candidates), device=feats.device) // 3}
    labels = torch.arange(len(feats), device=feats.device) // 3
    sn_ops.sn_loss(feats, labels, k=k, backend=backend, **more).backward()
    sn_ops.support_neighbors(feats, labels, k=k, backend=backend, **more)


def run_share(share: str) -> None:
    """The calls of one process. Shapes lie just beyond tile boundaries; features use thresholds, buffers, fallback."""
    device = open_device("simt")
    halves = (torch.float32, torch.bfloat16)

    def feats(rows: int, dims: int, dtype: torch.dtype) -> Tensor:
        return features(rows, dims, dtype, device.device)

    if share == "backward":
        call(device.backend, feats(70, 65, torch.float64), 10)
        call(device.backend, feats(140, 65, torch.float32), 135)
        if device.name == "cuda":
            call(device.backend, feats(1500, 64, torch.float32), 25)
    else:
        device.force(share)
        for dtype in halves:
            call(device.backend, feats(50, 70, dtype), 5)
            if device.name == "cuda":
                call(device.backend, feats(150, 130, dtype), 10)
            if share != "square":
                call(device.backend, feats(40, 33, dtype), 10, feats(200 if share in SMALL else 300, 33, dtype))
    device.synchronize()
    print("all calls returned", flush=True)


def command(tool: str, share: str) -> list[str]:
    """A process."""
    line = [sys.executable, __file__, share]
    if protocol.pretending():
        return line
    # Some of PyTorch's own queries to the runtime fail: these errors are not ours.
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *QUIET, "--kernel-name", OURS, *line]


def main() -> None:
    """All tools on all shares."""
    if not protocol.pretending() and shutil.which("compute-sanitizer") is None:
        protocol.not_run("compute-sanitizer is not on PATH")
    shares = SHARES[-1:] if protocol.pretending() else SHARES
    jobs = [(tool, share) for tool in TOOLS for share in shares]
    turn, lock = threading.Semaphore(PROCESSES), threading.Lock()
    bad: list[str] = []
    clean = 0

    def run(tool: str, share: str) -> None:
        nonlocal clean
        with turn:
            done = subprocess.run(
                command(tool, share), cwd=ROOT, capture_output=True, text=True, errors="replace", env=dict(os.environ)
            )
        text = done.stdout + done.stderr
        summary = SUMMARY.search(text)
        word = summary[1] if summary else f"exit status {done.returncode}"
        good = done.returncode == 0 and "all calls returned" in text
        good = good and (protocol.pretending() or CLEAN.search(text) is not None)
        with lock:
            if good:
                clean += 1
            else:
                bad.append(f"{tool} {share}: {word}")
                print(f"---- {tool} {share}\n{text[:6000]}\n...\n{text[-3000:]}", flush=True)
            protocol.say(
                figure=f"{clean} of {len(jobs)} clean",
                runs=[{"tool": tool, "share": share, "clean": good, "said": word}],
            )

    threads = [threading.Thread(target=run, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if bad:
        protocol.fail("; ".join(bad))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_share(sys.argv[1])
    else:
        main()
