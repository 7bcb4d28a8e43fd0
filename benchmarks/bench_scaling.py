"""How the loss over ranks scales: measured on local processes, modelled from there.

    python benchmarks/bench_scaling.py              1 to 4 local processes with gloo, measured against the model
    python benchmarks/bench_scaling.py --model ...  the model's tables for 8 to 1024 ranks, for parameters you give

docs/scaling.md explains the model and shows its tables.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import harness
import report
import sn_ops
from sn_ops import ops, reference
from sn_ops.distributed import exchange as exchanges
from sn_ops.distributed import loss as group_loss
from sn_ops.distributed import search

# ---- the model -----------------------------------------------------------------------------------
# N rows a rank, W ranks, D columns, K neighbours, s bytes an element. Seconds; docs/scaling.md derives each line.


@dataclass(frozen=True)
class Machine:
    """What one rank and its link can do."""

    pairs: float  # forward: anchor-candidate-column triples a second
    moves: float  # backward: elements of gradients and edges a second
    call: float  # seconds that a call of an operator costs whatever its size
    bandwidth: float  # bytes a second that a rank sends while it receives as many
    latency: float  # seconds until the first byte of a transfer arrives
    merge: float = 0.0  # ring: seconds an anchor to merge the candidates of a batch
    anchor: float = 0.0  # forward: seconds an anchor, for any number of candidates
    gather: tuple[float, float] = (0.0, 0.0)  # forward, backward: seconds of an empty call without its operators
    ring: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Problem:
    """What every rank computes."""

    rows: int  # N
    dims: int  # D
    k: int = 10
    element: int = 4  # s

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is sent, with its label."""
        return -(-(self.dims * self.element + 8) // 16) * 16


def hops(world: int) -> int:
    """Latencies of a tree over the ranks."""
    return max(0, (world - 1).bit_length())


def forward_call(m: Machine, p: Problem, candidates: int) -> float:
    return m.call + p.rows * (m.anchor + candidates * p.dims / m.pairs)


def backward_call(m: Machine, p: Problem, candidates: int, edges: float) -> float:
    """Both halves of every edge, both gradients written, and added to those of other ranks."""
    return m.call + 2 * (p.rows * edges + candidates + p.rows) * p.dims / m.moves


def gather_seconds(m: Machine, p: Problem, world: int) -> tuple[float, float]:
    """Forward, backward."""
    sent = (world - 1) * p.rows
    small = 2 * hops(world) * m.latency  # the agreement and the totals
    forward = small + hops(world) * m.latency + sent * p.row_bytes / m.bandwidth
    forward += forward_call(m, p, world * p.rows)
    backward = hops(world) * m.latency + sent * p.dims * p.element / m.bandwidth
    backward += backward_call(m, p, world * p.rows, p.k + 2)
    return m.gather[0] + forward, m.gather[1] + backward


def ring_seconds(m: Machine, p: Problem, world: int) -> tuple[float, float]:
    """Forward, backward: each step takes the slower of computing and receiving; the last receives nothing."""
    moved = m.latency + p.rows * p.row_bytes / m.bandwidth
    step = forward_call(m, p, p.rows) + p.rows * m.merge
    forward = 2 * hops(world) * m.latency + (world - 1) * max(step, moved) + step
    returned = m.latency + p.rows * p.dims * max(4, p.element) / m.bandwidth  # gradients travel as they are accumulated
    step = backward_call(m, p, p.rows, (p.k + 2) / world)
    backward = (world - 1) * max(step, moved + returned) + step
    return m.ring[0] + forward, m.ring[1] + backward + (returned if world > 1 else 0.0)


def gather_bytes(p: Problem, world: int) -> int:
    """On a rank, beyond its own features and their gradient: gathered rows, kept for backward, and their gradients."""
    return world * p.rows * (p.row_bytes + p.dims * p.element)


def ring_bytes(p: Problem, world: int) -> int:
    """Three batches of rows (own, at hand, arriving), and gradients: the own sum and what a batch adds to it, one being
    made, two arriving or leaving and one just left. Half-precision batches are widened for backward."""
    batches = 1 if world == 1 else 3
    widened = 2 if p.element < 4 else 0
    return p.rows * (batches * p.row_bytes + (6 + widened) * p.dims * max(4, p.element))


# ---- local processes -----------------------------------------------------------------------------


def least(call: Callable[[], object], repeats: int) -> float:
    """The shortest of several, by the clock of this thread, which stops while others have the processor."""
    call()
    times = []
    for _ in range(repeats):
        started = time.thread_time()
        call()
        times.append(time.thread_time() - started)
    return min(times)


def batch(rows: int, dims: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows around their identities' centres, 4 rows an identity."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) // 4 + 10_000 * seed
    centres = torch.randn(rows // 4 + 1, dims, generator=generator)[torch.arange(rows) // 4]
    feats = torch.nn.functional.normalize(centres + torch.randn(rows, dims, generator=generator), dim=1)
    return feats, labels


def call_seconds(p: Problem, world: int, repeats: int) -> tuple[float, float]:
    """Forward and backward operators of one thread: N anchors against the rows of `world` ranks."""
    pool = [batch(p.rows, p.dims, rank) for rank in range(world)]
    candidates, labels = (torch.cat(list(parts)) for parts in zip(*pool, strict=True))
    feats, own = pool[0]
    total, one = int(reference.Reduction.SUM), torch.ones(())

    def forward() -> reference.Graph:
        return ops.forward("cpu", feats, own, candidates, labels, None, 0, p.k, 50.0, 0.1, 0, total, False)

    _, indices, coefficients, _, _, _, stats = forward()

    def backward() -> object:
        return ops.backward("cpu", one, feats, candidates, indices, coefficients, stats, total, True, True)

    return least(forward, repeats), least(backward, repeats)


def merge_seconds(p: Problem, repeats: int) -> float:
    """What a ring adds to the search of a batch: its squared distances, labels, and the merge."""
    (feats, own), (candidates, labels) = batch(p.rows, p.dims, 0), batch(p.rows, p.dims, 1)
    call = exchanges.Call(False, "cpu", feats, own, None, None, None, -1, p.k, 50.0, 0.1, 0, 0)
    found = search._search(call, candidates, labels, 0, None, -1)

    def search_and_merge() -> object:
        return search._merge(found, search._search(call, candidates, labels, p.rows, None, -1), p.k)

    return max(0.0, least(search_and_merge, repeats) - call_seconds(p, 1, repeats)[0])


def part_seconds(p: Problem, repeats: int) -> float:
    """The backward of a tiny part that no edge leads to: the least that a call costs."""
    indices = torch.full((8, p.k + 2), -1, dtype=torch.int32)
    job = group_loss._Backward(
        "cpu", torch.ones(()), torch.zeros(8, 8), indices, torch.zeros(8, p.k + 2), torch.ones(6, dtype=torch.float64),
        int(reference.Reduction.SUM), True,
    )  # fmt: skip
    return least(lambda: job.through(torch.zeros(8, 8), 0, True), repeats)


def measure_kernels(p: Problem, worlds: Sequence[int], repeats: int) -> dict[str, Any]:
    """Calls against 1, 2, ... batches, and the model's parameters fitted to them."""
    times = {world: call_seconds(p, world, repeats) for world in worlds}
    call = part_seconds(p, repeats)
    large = max(worlds)
    # A line through the forward times: its slope is a batch of candidates, its start what anchors cost by themselves.
    slope, start = np.polyfit(list(times), [forward for forward, _ in times.values()], 1)
    # The operator alone adds to nothing.
    moves = (2 * p.rows * (p.k + 2) + (large + 1) * p.rows) * p.dims / times[large][1]
    return {
        "times": times,
        "pairs": p.rows * p.rows * p.dims / float(slope),
        "anchor": max(0.0, float(start) - call) / p.rows,
        "moves": moves,
        "call": call,
        "merge": merge_seconds(p, repeats) / p.rows,
        **fixed_seconds(p, call, repeats),
    }


def fixed_seconds(p: Problem, call: float, repeats: int) -> dict[str, tuple[float, float]]:
    """The time of a call through a group of one with almost nothing to do, less the operator's own minimum."""
    found = measure_ranks(1, Problem(8, p.dims, p.k, p.element), repeats)
    fixed = {}
    for mode in ("gather", "ring"):
        forward, backward = (max(0.0, found[f"{mode} {half}, computing"] - call) for half in ("forward", "backward"))
        fixed[mode] = forward, backward
    return fixed


def _rank(rank: int, world: int, store: str, p: Problem, repeats: int, out: str) -> None:
    """One process: the link, then the loss both ways; rank 0 writes what the slowest rank took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None
    rows = torch.zeros(p.rows, p.row_bytes, dtype=torch.uint8)
    arriving, tiny = torch.empty_like(rows), torch.zeros(1)
    found: dict[str, float] = {}

    def shift(x: Tensor, y: Tensor) -> None:
        pair = [dist.P2POp(dist.isend, x, (rank + 1) % world), dist.P2POp(dist.irecv, y, (rank - 1) % world)]
        for work in dist.batch_isend_irecv(pair):
            work.wait()

    def timed(name: str, call: Callable[[], object]) -> None:
        """The shortest of several, of the slowest rank: by the clock, and what the rank's own thread computed."""
        attempts = []
        for _ in range(repeats + 1):
            dist.barrier()
            clock, own = time.perf_counter(), time.thread_time()
            call()
            seconds = torch.tensor([time.perf_counter() - clock, time.thread_time() - own], dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            attempts.append(seconds)
        found[name], found[f"{name}, computing"] = torch.stack(attempts[1:]).amin(0).tolist()

    if world > 1:
        timed("tiny transfer", lambda: shift(tiny, torch.empty(1)))
        timed("transfer", lambda: shift(rows, arriving))
    feats, labels = batch(p.rows, p.dims, rank)
    feats.requires_grad_()
    for mode in ("gather", "ring"):
        exchange = exchanges.Exchange(group, mode=mode)
        losses: list[Tensor] = []

        def forward(exchange: exchanges.Exchange = exchange, losses: list[Tensor] = losses) -> None:
            losses[:] = [sn_ops.sn_loss(feats, labels, k=p.k, group=exchange)]

        def backward(losses: list[Tensor] = losses) -> None:
            torch.autograd.grad(losses[0], feats, retain_graph=True)

        timed(f"{mode} forward", forward)
        timed(f"{mode} backward", backward)
    if rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def measure_ranks(world: int, p: Problem, repeats: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        spawn(_rank, (world, f"{folder}/store", p, repeats, out), world)
        found: dict[str, float] = json.loads(Path(out).read_text(encoding="utf-8"))
    return found


def run_local(p: Problem, worlds: Sequence[int], repeats: int, path: Path | None) -> None:
    """Prints measured and modelled times."""
    torch.set_num_threads(1)
    kernels = measure_kernels(p, worlds, repeats)
    cores = os.cpu_count() or 1
    lines, record = [], []
    for world in worlds:
        found = measure_ranks(world, p, repeats)
        share = min(1.0, cores / world)  # more processes than cores take turns
        latency = found.get("tiny transfer", 0.0)
        bandwidth = p.rows * p.row_bytes / max(found.get("transfer", 0.0) - latency, 1e-9)
        one = Machine(
            kernels["pairs"], kernels["moves"], kernels["call"], float("inf"), 0.0, kernels["merge"], kernels["anchor"],
            kernels["gather"], kernels["ring"],
        )  # fmt: skip
        m = replace(
            one, pairs=one.pairs * share, moves=one.moves * share, call=one.call / share, bandwidth=bandwidth,
            latency=latency, merge=one.merge / share, anchor=one.anchor / share,
            gather=(one.gather[0] / share, one.gather[1] / share), ring=(one.ring[0] / share, one.ring[1] / share),
        )  # fmt: skip
        modelled = {"gather": gather_seconds(m, p, world), "ring": ring_seconds(m, p, world)}
        # A thread's own time does not depend on who else uses the machine, nor on links.
        computing = {"gather": gather_seconds(one, p, world), "ring": ring_seconds(one, p, world)}
        for mode in modelled:
            for at, half in enumerate(("forward", "backward")):
                cells = [str(world), mode, half]
                for seconds, expected in (
                    (found[f"{mode} {half}"], modelled[mode][at]),
                    (found[f"{mode} {half}, computing"], computing[mode][at]),
                ):
                    cells += [report.ms(seconds), report.ms(expected), f"{seconds / expected:.2f}"]
                lines.append(cells)
        record.append({"world": world, "measured": found, "machine": asdict(m), "modelled": modelled})
    print(f"{p.rows} rows a rank, D = {p.dims}, k = {p.k}; {cores} cores, one thread a rank; shortest of {repeats}\n")
    print(report.table(["ranks", "mode", "", "ms", "model", "ratio", "computing ms", "model", "ratio"], lines))
    if path is not None:
        facts = harness.provenance(torch.device("cpu"))
        result = {"problem": asdict(p), "kernels": kernels, "ranks": record, "load": os.getloadavg(), **facts}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_model(m: Machine, p: Problem) -> None:
    """Prints the model's tables."""
    lines = []
    for world in (8, 16, 32, 64, 128, 256, 512, 1024):
        row = [str(world)]
        for seconds, size in ((gather_seconds, gather_bytes), (ring_seconds, ring_bytes)):
            forward, backward = seconds(m, p, world)
            row += [report.ms(forward), report.ms(backward), f"{size(p, world) / 2**30:.2f}"]
        chosen = gather_bytes(p, world) > exchanges.RING_ABOVE
        lines.append([*row, "ring" if chosen else "gather"])
    print(f"{p.rows} rows a rank, D = {p.dims}, k = {p.k}, {p.element} bytes an element; {asdict(m)}\n")
    header = ["ranks", "gather forward ms", "backward ms", "GiB", "ring forward ms", "backward ms", "GiB", "auto takes"]
    print(report.table(header, lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="a rank")
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--element", type=int, default=4, choices=(2, 4, 8), help="bytes; local runs use 4")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="where to write the measured numbers as JSON")
    parser.add_argument("--model", action="store_true", help="print the model for the parameters below")
    parser.add_argument("--pairs", type=float, help="forward: anchor x candidate x column triples a second")
    parser.add_argument("--moves", type=float, help="backward: elements a second")
    parser.add_argument("--call", type=float, help="seconds a call of an operator costs at least")
    parser.add_argument("--bandwidth", type=float, help="bytes a second of a rank's link")
    parser.add_argument("--latency", type=float, help="seconds")
    parser.add_argument("--merge", type=float, default=0.0, help="ring: seconds an anchor and step")
    parser.add_argument("--anchor", type=float, default=0.0, help="forward: seconds an anchor")
    args = parser.parse_args()
    p = Problem(args.rows, args.dims, args.k, args.element)
    if not args.model:
        run_local(p, (1, 2, 3, 4), args.repeats, args.out)
        return
    given = {name: getattr(args, name) for name in ("pairs", "moves", "call", "bandwidth", "latency")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        parser.error(f"--model needs {', '.join(missing)}: they are your machine's, and there is no default for them")
    run_model(Machine(**given, merge=args.merge, anchor=args.anchor), p)


if __name__ == "__main__":
    main()
