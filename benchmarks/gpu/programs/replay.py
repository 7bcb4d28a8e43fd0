"""The step "replay": CUDA graphs replayed thousands of times beside a busy stream, their bits compared each time.

A missing fence or a wrong last-block pattern shows as a stale value once in thousands of runs, and only if the stale
value differs: each graph computes two batches in turn, in the same memory, and counts on the device what differs from
the first eager call. A capture in a process that has called nothing before is tried as well.

    replay.py             all of it
    replay.py fresh       what the process without a warm-up does
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import protocol
import sn_ops
from device import ROOT, Gpu, Pretended, open_device


@dataclass(frozen=True)
class Case:
    """A batch and the path it takes; `emulated`: small enough for emulated threads."""

    name: str
    N: int
    D: int
    path: str = "auto"
    M: int | None = None
    dtype: torch.dtype = torch.float32
    emulated: bool = False


CASES = (
    Case("cluster", 48, 128, emulated=True),
    Case("tickets", 128, 256, path="tickets"),
    Case("square", 200, 256, path="square"),
    Case("direct", 300, 256),
    Case("dense", 1500, 256),
    Case("screen", 5000, 256),
    Case("screen bf16", 5000, 128, dtype=torch.bfloat16),
    Case("direct in waves", 2600, 64, path="direct"),
    Case("bank", 128, 128, M=20000, path="bank"),
    Case("direct, emulated", 70, 64, path="direct", emulated=True),
)
REPLAYS = 2000
CASE_S = 5.0
"""Replays go on until there are enough, or for so long."""
BATCH = 25
"""Replays between two looks at the clock."""


def batch(case: Case, seed: int, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """Features [N, D] and the other arguments of the loss."""
    generator = torch.Generator().manual_seed(seed)
    pool = case.N + (case.M or 0)
    labels = torch.arange(pool) % max(1, pool // 4)
    centres = torch.randn(pool, case.D, generator=generator)
    rows = torch.nn.functional.normalize(centres[labels] + torch.randn(pool, case.D, generator=generator), dim=1)
    rows, labels = rows.to(device, case.dtype), labels.to(device)
    if case.M is None:
        return rows, {"labels": labels}
    n = case.N
    bank = {"candidates": rows[n:].contiguous(), "candidate_labels": labels[n:].contiguous()}
    return rows[:n].contiguous(), {"labels": labels[:n].contiguous(), **bank}


def bits(x: Tensor) -> Tensor:
    """As integers, so that NaN equals itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def replays_of(device: Gpu | Pretended, case: Case) -> dict[str, Any]:
    """How many replays were made, and in how many the bits were wrong."""
    device.force(case.path)
    batches = [batch(case, seed, device.device) for seed in (1, 2)]
    leaf = batches[0][0].clone().requires_grad_()

    def both(options: dict[str, Any]) -> list[Tensor]:
        loss, stats = sn_ops.sn_loss(leaf, **options, backend=device.backend, return_stats=True)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return [loss.detach(), gradient, *stats]

    def load(seed: int) -> None:
        with torch.no_grad():
            leaf.copy_(batches[seed][0])

    expected = []
    for seed in (0, 1):
        load(seed)
        expected.append([x.clone() for x in both(batches[seed][1])])
    wrong = torch.zeros((), dtype=torch.int64, device=device.device)

    def turn() -> None:
        for seed in (0, 1):
            load(seed)
            for value, true in zip(both(batches[seed][1]), expected[seed], strict=True):
                wrong.add_((bits(value) != bits(true)).any())

    replay = device.capture(turn)
    wrong.zero_()
    count = 0
    end = time.monotonic() + (CASE_S if device.name == "cuda" else 0.2)
    with device.busy() as more:
        while count < REPLAYS and time.monotonic() < end:
            more()
            for _ in range(BATCH if device.name == "cuda" else 1):
                replay()
                count += 1
            device.synchronize()
    taken = device.last_path()
    device.force("auto")
    return {"case": case.name, "path": taken, "replays": count, "wrong": int(wrong)}


def fresh(device: Gpu | Pretended) -> None:
    """Capture the first call that this process makes, and hold its bits against an eager call."""
    for case in (CASES[0], *(CASES[1:5] if device.name == "cuda" else ())):
        device.force(case.path)
        feats, options = batch(case, 1, device.device)
        out: list[Tensor] = []

        def call(feats: Tensor = feats, options: dict[str, Any] = options, out: list[Tensor] = out) -> None:
            leaf = feats.detach().requires_grad_()
            loss = sn_ops.sn_loss(leaf, **options, backend=device.backend)
            out[:] = [loss.detach(), *torch.autograd.grad(loss, leaf)]

        replay = device.capture(call, warm_ups=0)
        replay()
        device.synchronize()
        captured = [x.clone() for x in out]
        call()
        device.synchronize()
        if not all(torch.equal(bits(a), bits(b)) for a, b in zip(captured, out, strict=True)):
            raise SystemExit(f"{case.name}: a capture without a warm-up gives other bits than an eager call")
        print(f"{case.name}: captured without a warm-up, {device.last_path()}", flush=True)


def main() -> None:
    """All cases; fail where any replay was wrong."""
    cold = subprocess.Popen(
        [sys.executable, __file__, "fresh"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    device = open_device("simt")
    runs = []
    for case in CASES:
        if case.emulated == (device.name == "cuda") and case.name != "cluster":
            continue
        run = replays_of(device, case)
        runs.append(run)
        print(run, flush=True)
        protocol.say(
            figure=f"{sum(r['replays'] for r in runs)} replays, {sum(r['wrong'] for r in runs)} wrong", runs=[run]
        )
    text = cold.communicate()[0]
    print(text)
    protocol.say(runs=[{"case": "capture in a fresh process", "replays": 1, "wrong": int(cold.returncode != 0)}])
    bad = [run["case"] for run in runs if run["wrong"]]
    if cold.returncode != 0:
        bad.append("capture in a fresh process: " + (text.strip().splitlines() or ["no output"])[-1])
    if bad:
        protocol.fail(f"wrong: {', '.join(bad)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        fresh(open_device("simt"))
    else:
        main()
