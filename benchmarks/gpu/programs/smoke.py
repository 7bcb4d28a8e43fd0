"""The step "smoke": every path of the forward, every kind of backward and every dtype, each in a process of its own.

    smoke.py                      all of them, several at a time
    smoke.py screen float16       what one process does

A process calls its path on several shapes. It compares neighbours, distances, losses and gradients with those of the
path `direct` bit for bit, and with those of the backend `cpu` by value: losses to within the bounds of CONTRIBUTING.md,
neighbours except where two distances are equal to within rounding.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import protocol
import sn_ops
from device import DTYPES, ROOT, Gpu, Pretended, open_device, same_bits
from sn_ops import dispatch

AT_ONCE = 6
PROCESS_S = 40.0
ALPHA, WEIGHT = 50.0, 0.1
WRONG = 3  # exit status of a process that found a fault and reported it; a traceback's is 1
ELSEWHERE = 4  # of one whose path did not run on some shape: nothing was wrong, but not all was checked


@dataclass(frozen=True)
class Shape:
    """N anchors of D dimensions among M candidates; M None: the anchors themselves. `emulated`: small enough for
    emulated threads. `images` of an identity: positives beyond 128 are screened for, not listed."""

    N: int
    D: int
    M: int | None = None
    k: int = 10
    images: int = 4
    emulated: bool = False

    @property
    def name(self) -> str:
        """How results call it."""
        against = "" if self.M is None else f" x {self.M}"
        return f"{self.N}{against} x {self.D} k {self.k}" + (f" images {self.images}" if self.images != 4 else "")


def small(N: int, D: int, M: int | None = None, k: int = 10, images: int = 4) -> Shape:
    """One that a rehearsal runs, too."""
    return Shape(N, D, M, k, images, emulated=True)


Shapes = tuple[Shape, ...]
HALVES = ("float16", "bfloat16")
FUSED = ("float32", *HALVES)

# One launch: groups of 1, 2, 4 and 8 blocks, and eight planes of shared memory; one anchor a group, and 16; up to 128
# candidates, and more; neighbours that are extracted, and sorted.
ONE_LAUNCH: Shapes = (
    small(7, 64),
    small(25, 64),
    small(50, 128, k=40),
    small(64, 200),
    Shape(63, 2048),
    Shape(64, 16384),
    small(16, 70, 40),
    small(100, 130, k=100),
    Shape(128, 2048),
    Shape(130, 64, 200, k=150),
    Shape(256, 512),
)
# One cluster, and several: of tiles of their own, and of parts; one slice of a block, and several.
SQUARE: Shapes = (
    small(30, 64),
    small(70, 130, k=40),
    Shape(129, 200),
    Shape(192, 2048),
    Shape(256, 2048),
    Shape(250, 4000, k=100),
)
# The score tiles: D of one stage, off a stage, of many; 64 x 64 tiles, then 128 x 128, then several waves.
DENSE: Shapes = (
    small(70, 64),
    small(66, 200),
    Shape(300, 2048),
    Shape(2048, 200),
    Shape(2100, 64),
    Shape(40, 130, 3000),
)
# Single scores of the sample, groups of a lane, groups of a quad.
SCREEN: Shapes = (small(150, 64), Shape(700, 200), Shape(1100, 2048), Shape(3000, 200), Shape(3000, 64, k=128))
SCREEN += (small(20, 65, 300), Shape(200, 200, 20000), Shape(3000, 128, images=600))
SCREEN += (Shape(300, 64, 20000, k=1),)
DIRECT: Shapes = (small(70, 64), Shape(300, 200), Shape(129, 2048), Shape(1500, 64), small(40, 33, 90), Shape(4000, 64))
DIRECT += (small(150, 20, k=140), Shape(1400, 33, k=1100))
BANK: Shapes = (small(16, 64, 300), Shape(16, 64, 4096), Shape(200, 130, 30000), Shape(256, 2048, 5000))
BANK += (Shape(64, 256, 65536, images=600), Shape(100, 64, 40000, k=1))
# One kernel; buckets of targets; hubs with many incoming edges; both gradients.
BACKWARD: Shapes = (
    small(100, 65),
    Shape(300, 2048),
    Shape(5000, 130),
    Shape(4000, 64, images=4000),
    small(30, 40, 120),
)
BACKWARD += (Shape(2000, 200, 9000), Shape(300, 100, k=150))

RUNS: dict[str, tuple[tuple[str, ...], tuple[Shape, ...]]] = {
    "cluster": (FUSED, ONE_LAUNCH),
    "tickets": (FUSED, ONE_LAUNCH),
    "square": (FUSED, SQUARE),
    "direct": ((*FUSED, "float64"), DIRECT),
    "dense": (FUSED, DENSE),
    "screen": (FUSED, SCREEN),
    "bank": (("float32",), BANK),
    "auto": ((*FUSED, "float64"), BACKWARD),
}
"""Path -> dtypes and shapes. "auto" is about the backward: its kinds are chosen by shape."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of a call."""

    feats: Tensor
    labels: Tensor
    candidates: Tensor | None
    candidate_labels: Tensor | None
    k: int

    def to(self, device: torch.device) -> Inputs:
        """The same on a device."""
        moved: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in vars(self).items()}
        return Inputs(**moved)


def inputs_of(shape: Shape, dtype: torch.dtype) -> Inputs:
    """Unit rows around a centre for each identity, some exact duplicates; made on the CPU, the same every time."""
    generator = torch.Generator().manual_seed(1000 * shape.N + shape.D)
    pool = shape.N + (shape.M or 0)
    labels = torch.arange(pool) % max(1, pool // shape.images)
    centres = torch.randn(pool, shape.D, generator=generator)
    rows = torch.nn.functional.normalize(centres[labels] + torch.randn(pool, shape.D, generator=generator), dim=1)
    rows[5 % pool] = rows[pool // 2]
    rows = rows.to(dtype)
    if shape.M is None:
        return Inputs(rows, labels, None, None, shape.k)
    n = shape.N
    return Inputs(rows[:n], labels[:n], rows[n:].contiguous(), labels[n:].contiguous(), shape.k)


def outcome(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Everything that a call gives: losses, statistics, gradients, neighbours, on the device."""
    leaves = [x.clone().requires_grad_() for x in (inputs.feats, inputs.candidates) if x is not None]
    given = replace(inputs, feats=leaves[0], candidates=leaves[1] if len(leaves) > 1 else None)
    loss, stats = sn_ops.sn_loss(
        **vars(given), alpha=ALPHA, weight=WEIGHT, reduction="none", backend=backend, return_stats=True
    )
    upstream = torch.linspace(0.5, 1.5, max(1, len(loss)), device=loss.device, dtype=loss.dtype)[: len(loss)]
    grads = torch.autograd.grad(loss, leaves, upstream)
    mean = sn_ops.sn_loss(**vars(inputs), alpha=ALPHA, weight=WEIGHT, backend=backend)
    neighbours = sn_ops.support_neighbors(**vars(inputs), backend=backend)
    found = {"loss": loss.detach(), "mean": mean, **{f"stats.{name}": value for name, value in stats._asdict().items()}}
    found |= {f"gradient {position}": gradient for position, gradient in enumerate(grads)}
    return found | neighbours._asdict()


def different_bits(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Which results differ, and in how many places."""
    names = []
    for name, value in expected.items():
        if not same_bits(value, found[name]):
            rows = (value != found[name]).reshape(len(value), -1).any(1) if value.ndim else value != found[name]
            names.append(f"{name} ({int(rows.sum())} of {rows.numel()} rows, first {int(rows.int().argmax())})")
    return names


def different_values(expected: dict[str, Tensor], found: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """What differs between two backends by more than rounding. All on the CPU."""
    names = []
    same = (expected["indices"] == found["indices"]).float().mean()
    # Two distances that are equal but for rounding may change places, in half precision more often.
    if not same >= (0.999 if dtype in (torch.float32, torch.float64) else 0.98):
        names.append(f"indices ({100 * float(same):.2f} % equal)")
    distances = expected["distances"], found["distances"]
    if not torch.allclose(*distances, rtol=1e-5, atol=1e-6):
        names.append("distances")
    bound = 2e-6 * (1 + (ALPHA + WEIGHT) * float(expected["distances"][expected["distances"].isfinite()].max()))
    off = (expected["loss"] - found["loss"]).abs().max()
    if not off <= bound:
        names.append(f"loss (off by {float(off):.2e}, allowed {bound:.2e})")
    for name in (name for name in expected if name.startswith("gradient")):
        wide = expected[name].double(), found[name].double()
        off = (wide[0] - wide[1]).norm() / wide[0].norm().clamp(min=1e-30)
        rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 3e-4)
        # Where two neighbours changed places a gradient row differs; they are few.
        if not off <= rounding + 3 * float(1 - same) ** 0.5:
            names.append(f"{name} (off by {float(off):.2e})")
    return names


def faults_of(device: Gpu | Pretended, path: str, inputs: Inputs, dtype: torch.dtype) -> tuple[str, list[str]]:
    """The path that ran, and what is wrong with what it gave."""
    on_device = inputs.to(device.device)
    device.force("direct")
    direct = outcome(on_device, device.backend)
    assert device.last_path() == "direct"
    device.force(path)
    found = outcome(on_device, device.backend)
    taken = device.last_path()
    again = outcome(on_device, device.backend)
    device.synchronize()
    faults = [f"differs from direct: {name}" for name in different_bits(direct, found)]
    faults += [f"differs from itself: {name}" for name in different_bits(found, again)]
    brought = {name: value.cpu() for name, value in found.items()}
    faults += [f"differs from cpu: {name}" for name in different_values(outcome(inputs, "cpu"), brought, dtype)]
    return taken, faults


def one_process(device: Gpu | Pretended, path: str, dtype: str) -> int:
    """Run all shapes of a path; returns the exit status. A path that did not run is a fault too, except those of
    clusters, which a device may lack."""
    wrong = elsewhere = 0
    for shape in [shape for shape in RUNS[path][1] if shape.emulated or device.name == "cuda"]:
        started = time.monotonic()
        taken, faults = faults_of(device, path, inputs_of(shape, DTYPES[dtype]), DTYPES[dtype])
        result = "failed" if faults else "passed"
        if path not in ("auto", taken):
            faults.append(f"{taken} ran")
            result = "not run" if path in ("cluster", "square") and not faults[:-1] else "failed"
        wrong += result == "failed"
        elsewhere += result == "not run"
        run = {"path": path, "taken": taken, "dtype": dtype, "shape": shape.name, "result": result}
        protocol.say(runs=[run | {"note": "; ".join(faults), "seconds": round(time.monotonic() - started, 2)}])
    return WRONG if wrong else ELSEWHERE if elsewhere else 0


def jobs() -> list[tuple[str, str]]:
    """One for each process; a rehearsal takes one dtype a path."""
    every = [(path, dtype) for path, (dtypes, _) in RUNS.items() for dtype in dtypes]
    return [(path, dtype) for path, dtype in every if dtype == "float32"] if protocol.pretending() else every


def main() -> None:
    """Run all processes, several at a time, passing on what they say."""
    todo, lock = jobs(), threading.Lock()
    turn = threading.Semaphore(2 if protocol.pretending() else AT_ONCE)
    bad: list[str] = []
    elsewhere: list[str] = []
    done = 0

    def run(path: str, dtype: str) -> None:
        nonlocal done
        with turn:
            process = subprocess.Popen(
                [sys.executable, __file__, path, dtype],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=dict(os.environ),
            )
            timer = threading.Timer(PROCESS_S, process.kill)
            timer.start()
            assert process.stdout is not None
            tail: list[str] = []
            for line in process.stdout:
                with lock:
                    print(line, end="", flush=True)
                if not line.startswith(protocol.MARK):
                    tail = [*tail, line.strip()][-3:]
            status = process.wait()
            timer.cancel()
        with lock:
            done += 1
            if status == ELSEWHERE:
                elsewhere.append(f"{path} {dtype}")
            elif status != 0:
                how = f"exit status {status}" if status > 0 else f"ended by signal {-status}"
                bad.append(f"{path} {dtype}")
                print(f"{path} {dtype}: {how}: {' | '.join(tail)}", flush=True)
                if status != WRONG:  # its shapes report what is wrong themselves
                    note = f"{how}: {' | '.join(tail)}"[:300]
                    protocol.say(runs=[{"path": path, "dtype": dtype, "shape": "", "result": "crashed", "note": note}])
            aside = f"; DID NOT RUN: {', '.join(sorted(elsewhere))}" if elsewhere else ""
            protocol.say(figure=f"{done - len(bad) - len(elsewhere)} of {len(todo)} right{aside}")

    threads = [threading.Thread(target=run, args=job) for job in todo]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if bad:
        protocol.fail(f"wrong: {', '.join(sorted(bad))}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        opened = open_device("simt")
        torch.set_num_threads(2)
        assert dispatch.CORE is not None
        sys.exit(one_process(opened, sys.argv[1], sys.argv[2]))
    main()
