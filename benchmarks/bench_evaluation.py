"""How long re-ID scores take, beside compiled peers on the same matrices, and what re-ranking needs.

    python benchmarks/bench_evaluation.py            Market-1501's size, about a minute and a half
    python benchmarks/bench_evaluation.py --quick    a tenth of the queries, less than a minute
    python benchmarks/bench_evaluation.py --rerank   re-ranking too: seconds and peak memory
    python benchmarks/bench_evaluation.py --msmt     re-ranking MSMT17's 93 820 images, minutes on a CPU

The peers are the classic evaluation loop (sort the gallery of each query, drop its own camera, walk down the list),
compiled by numba: with numba's own argsort and queries in parallel, and with numpy's vectorised argsort.
All contestants must agree to 1e-6, on distances without ties, before anything is timed. numba does not come with
sn_ops: `pip install numba`. CPU seconds are those of all threads: on a machine that others use, compare them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import harness
from sn_ops.reid.evaluation import Protocol, ReRank, RerankedDistances, evaluate, evaluate_matrix
from sn_ops.reid.evaluation.metrics import scores

Array = npt.NDArray[Any]
Peer = Callable[..., tuple[float, float]]
MARKET = (3368, 15913, 751, 6)
MSMT = (11659, 82161, 3060, 15)
DIMENSIONS = 2048


@dataclass(frozen=True)
class Retrieval:
    """Arguments of `evaluate`."""

    query: Tensor
    query_ids: Tensor
    query_cameras: Tensor
    gallery: Tensor
    gallery_ids: Tensor
    gallery_cameras: Tensor

    def labels(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Identities and cameras of queries and gallery."""
        return self.query_ids, self.query_cameras, self.gallery_ids, self.gallery_cameras


def make(q: int, g: int, people: int, cameras: int, d: int) -> Retrieval:
    """Unit rows around identities, noisy enough that mAP is about as on real data; identity 0 is a distractor."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(people + 1, d, generator=generator)
    parts: list[Tensor] = []
    for n, first in ((q, 1), (g, 0)):
        ids = torch.randint(first, people + 1, (n,), generator=generator)
        rows = torch.empty(n, d)
        for start in range(0, n, 4096):
            part = slice(start, start + 4096)
            rows[part] = centres[ids[part]] + 3.4 * torch.randn(len(ids[part]), d, generator=generator)
        # Distractors share no centre.
        rows[ids == 0] = 3.5 * torch.randn(int((ids == 0).sum()), d, generator=generator)
        parts += [torch.nn.functional.normalize(rows), ids, torch.randint(0, cameras, (n,), generator=generator)]
    return Retrieval(*parts)


# ---- peers ------------------------------------------------------------------------------------------------------


def compiled_peers() -> dict[str, Peer]:
    """(rank-1, standard mAP) from a float32 matrix and labels, compiled; none without numba."""
    try:
        numba: Any = importlib.import_module("numba")
    except ImportError:
        return {}
    # numba's OpenMP layer would share PyTorch's runtime and change how many threads PyTorch uses, and how they wait.
    numba.config.THREADING_LAYER = "workqueue"

    def walk(order: Array, qid: int, qcam: int, gids: Array, gcams: Array) -> tuple[float, float]:
        position = found = 0
        total = first = 0.0
        for j in order:
            if gids[j] < 0 or (gids[j] == qid and gcams[j] == qcam):
                continue
            position += 1
            if gids[j] == qid:
                found += 1
                total += found / position
                if position == 1:
                    first = 1.0
        return (first, total / found) if found else (-1.0, 0.0)

    step = numba.njit(walk)

    def sorting(matrix: Array, qids: Array, qcams: Array, gids: Array, gcams: Array, out: Array) -> None:
        for i in numba.prange(matrix.shape[0]):
            out[i] = step(np.argsort(matrix[i]), qids[i], qcams[i], gids, gcams)

    def sorted_before(orders: Array, qids: Array, qcams: Array, gids: Array, gcams: Array, out: Array) -> None:
        for i in numba.prange(orders.shape[0]):
            out[i] = step(orders[i], qids[i], qcams[i], gids, gcams)

    compiled, walking = (numba.njit(f, parallel=True) for f in (sorting, sorted_before))

    def means(out: Array) -> tuple[float, float]:
        counted = out[out[:, 0] >= 0]
        return float(counted[:, 0].mean()), float(counted[:, 1].mean())

    def loop(matrix: Array, *labels: Array) -> tuple[float, float]:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        out = np.empty((len(matrix), 2))
        compiled(matrix, *labels, out)
        return means(out)

    def numpy_sorted(matrix: Array, *labels: Array) -> tuple[float, float]:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        out = np.empty((len(matrix), 2))
        # A few rows at a time: the index matrix of all would only cost memory.
        for start in range(0, len(matrix), 256):
            part = slice(start, start + 256)
            orders = np.argsort(matrix[part], axis=1)
            walking(orders, labels[0][part], labels[1][part], *labels[2:], out[part])
        return means(out)

    return {"compiled loop (numba, parallel)": loop, "numpy argsort + compiled loop": numpy_sorted}


# ---- what is measured -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """Medians."""

    elapsed: float
    processor: float
    """Of all threads."""
    samples: int


def timed(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, Seconds]:
    """Medians of contestants that take turns, three rounds at least; the first, untimed one warms up."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + budget
    while len(next(iter(samples.values()))) < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            call()
            samples[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    medians = {}
    for name, values in samples.items():
        elapsed, processor = (statistics.median(column) for column in zip(*values, strict=True))
        medians[name] = Seconds(elapsed, processor, len(values))
    return medians


def show(title: str, timings: dict[str, Seconds]) -> None:
    """A table whose ratios are to the first line."""
    own = next(iter(timings.values()))
    print(f"\n{title:38} {'elapsed, s':>12} {'ratio':>7} {'CPU, s':>10} {'ratio':>7}")
    for name, s in timings.items():
        ratios = s.elapsed / own.elapsed, s.processor / own.processor
        print(f"  {name:36} {s.elapsed:12.3f} {ratios[0]:7.2f} {s.processor:10.3f} {ratios[1]:7.2f}")


def check(peers: dict[str, Peer], case: Retrieval) -> None:
    """All contestants agree to 1e-6 where no two distances of a query are equal; the peers leave ties to their sort."""
    rows = min(64, len(case.query))
    generator = torch.Generator().manual_seed(1)
    matrix = torch.stack([torch.randperm(len(case.gallery), generator=generator).float() for _ in range(rows)])
    labels = (case.query_ids[:rows], case.query_cameras[:rows], case.gallery_ids, case.gallery_cameras)
    matrix -= 1e5 * (case.gallery_ids == labels[0][:, None]) * (matrix % 2)  # half of the matches come first
    ours = evaluate_matrix(matrix, *labels)
    for name, peer in peers.items():
        rank1, mean_ap = peer(matrix.numpy(), *(x.numpy() for x in labels))
        if abs(rank1 - ours.rank1) > 1e-6 or abs(mean_ap - ours.mAP_standard) > 1e-6:
            raise SystemExit(f"{name} disagrees: rank-1 {rank1}, mAP {mean_ap}, against {ours}")


def bench_scores(case: Retrieval, budget: float) -> dict[str, Any]:
    """From a matrix, and from features with the product included."""
    peers = compiled_peers()
    if not peers:
        print("no compiled peer: numba is not installed")
    labels = case.labels()
    arrays = [x.numpy() for x in labels]
    check(peers, case)
    matrix = torch.cdist(case.query, case.gallery)
    print(evaluate_matrix(matrix, *labels))

    def on_matrix(peer: Peer) -> tuple[float, float]:
        return peer(matrix.numpy(), *arrays)

    def on_features(peer: Peer) -> tuple[float, float]:
        return peer(torch.cdist(case.query, case.gallery).numpy(), *arrays)

    calls: dict[str, Callable[[], object]] = {"evaluate_matrix": lambda: evaluate_matrix(matrix, *labels)}
    calls |= {name: partial(on_matrix, peer) for name, peer in peers.items()}
    from_matrix = timed(calls, budget)
    show("scores from a float32 matrix", from_matrix)
    calls = {"evaluate (float64)": lambda: evaluate(**vars(case))}
    calls |= {f"cdist + {name}": partial(on_features, peer) for name, peer in peers.items()}
    calls["float64 product alone"] = lambda: case.query.double() @ case.gallery.double().T
    from_features = timed(calls, budget)
    show("scores from features", from_features)
    return {
        "matrix": {name: asdict(t) for name, t in from_matrix.items()},
        "features": {name: asdict(t) for name, t in from_features.items()},
    }


def bench_rerank(case: Retrieval) -> dict[str, Any]:
    """One run: seconds, and bytes beyond the features."""
    seconds: dict[str, float] = {}

    def run() -> None:
        start = time.perf_counter()
        distances = RerankedDistances(case.query, case.gallery, ReRank())
        seconds["neighbours and encoding"] = time.perf_counter() - start
        start = time.perf_counter()
        protocol = Protocol(*case.labels(), device=torch.device("cpu"))
        print(scores(distances, protocol)[0])
        seconds["distances and scores"] = time.perf_counter() - start

    peak = harness.peak_bytes(run, torch.device("cpu"))
    features = (len(case.query) + len(case.gallery)) * case.query.shape[1] * 4
    print(f"\nre-ranking {len(case.query)} + {len(case.gallery)} images")
    for name, value in seconds.items():
        print(f"  {name:36} {value:10.1f} s")
    print(f"  peak memory {peak / 2**30:.2f} GiB beyond the features' {features / 2**30:.2f} GiB")
    return {"seconds": seconds, "peak_bytes": peak, "feature_bytes": features}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the queries")
    parser.add_argument("--rerank", action="store_true", help="re-ranking at this size as well")
    parser.add_argument("--msmt", action="store_true", help="re-ranking at MSMT17's size, nothing else")
    parser.add_argument("--dimensions", type=int, default=DIMENSIONS, help="width of the features (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (%(default)s)")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of sampling a table (%(default)s)")
    parser.add_argument("--json", type=Path, help="write numbers, machine, versions and commit there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    q, g, people, cameras = MSMT if options.msmt else MARKET
    case = make(q // 10 if options.quick else q, g, people, cameras, options.dimensions)
    print(f"{len(case.query)} queries, gallery {len(case.gallery)}, D {options.dimensions}, {options.threads} threads")
    results: dict[str, Any] = {"provenance": harness.provenance(torch.device("cpu")), "threads": options.threads}
    if not options.msmt:
        results |= bench_scores(case, options.budget)
    if options.rerank or options.msmt:
        results["rerank"] = bench_rerank(case)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
