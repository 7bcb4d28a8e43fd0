"""The steps that take times of the loss: loss, paths, kernels, rivals, triton, compile.

    times.py loss

Each case has two times: in a CUDA graph of several calls on different inputs, what the device takes for one call; and
as called from Python, what a training loop waits for, launches included. Samples last at least SAMPLE_S; every one of
them is kept. Features are unit rows around a centre for each identity of four images, as in the middle of a training.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import expected
import kernel_cache
import manifest
import predict
import protocol
import records
import sn_ops
from device import DTYPES, Gpu, Pretended, open_device
from predict import Shape
from protocol import say

sys.path.append(str(manifest.HERE.parent))

import baselines

IMAGES = 4
# Calls of a graph take several sets of inputs in turn, so that caches do not hold them by chance: most bytes and sets.
SETS_BYTES = 256 << 20
MOST_SETS = 4
SAMPLE_S = 3e-3
MOST_SAMPLES = 30
SAMPLING_S = 0.35  # of one time
ALPHA, WEIGHT = 50.0, 0.1


LOSS = (
    Shape(64, 2048),
    Shape(128, 2048),
    Shape(256, 2048),
    Shape(1024, 2048),
    Shape(8192, 512),
    Shape(8192, 2048),
    Shape(8192, 2048, dtype="bfloat16"),
    Shape(65536, 128, dtype="bfloat16"),
    Shape(64, 2048, 65536, bank=True),
    Shape(128, 2048, 65536, bank=True),
    Shape(256, 2048, 65536, bank=True),
    Shape(512, 2048, 8192),
    Shape(65536, 2048),
)
SELF = ("direct", "dense", "screen")
AGAINST = ("direct", "dense", "screen", "bank")
FORCED: tuple[tuple[Shape, tuple[str, ...]], ...] = (
    *((Shape(N, D), ("cluster", "tickets", "direct")) for N in (16, 32, 64, 128) for D in (64, 512, 2048)),
    *((Shape(N, 2048), ("cluster", "tickets", "square")) for N in (192, 256)),
    *((Shape(N, 2048), SELF) for N in (256, 512, 640, 768, 1024, 2048)),
    *((Shape(N, 512), SELF) for N in (512, 1024, 1280, 1536, 2048, 4096)),
    *((Shape(N, 128), SELF) for N in (1024, 1536, 2048, 4096)),
    *((Shape(N, 2048, dtype="bfloat16"), SELF) for N in (512, 768, 1024)),
    (Shape(1024, 512, k=100), SELF),
    *((Shape(64, D, M, bank=True), AGAINST) for D in (128, 2048) for M in (1024, 4096, 16384, 65536)),
    *((Shape(256, D, M, bank=True), AGAINST) for D in (128, 2048) for M in (1024, 4096, 16384, 65536)),
    *((Shape(512, 2048, M), SELF) for M in (1024, 2048, 8192)),
    *((Shape(N, 512, 512, bank=True), SELF) for N in (1024, 4096, 16384)),
    *((Shape(16384, 512, M, bank=True), SELF) for M in (64, 128, 256)),
)
PLANNED = "planned: "  # what the note of a forced path begins with; the path that the plan chooses follows
MOST_DIRECT = 1 << 34  # products that the direct path is still timed at
KERNELS = (*LOSS[:8], LOSS[10], LOSS[11], LOSS[12])
RIVALS = (LOSS[1], LOSS[3], LOSS[4], LOSS[5])
COMPILED = RIVALS[1:2]
TRITON = (LOSS[1], LOSS[3], LOSS[5], LOSS[10])
EMULATED = (Shape(32, 16), Shape(16, 16, 64, bank=True))
EMULATED_FORCED = ((Shape(32, 16), ("cluster", "tickets", "direct")),)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def inputs_of(shape: Shape, device: torch.device, seed: int) -> dict[str, Any]:
    """Keyword arguments of `sn_loss`, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    pool = shape.N + shape.M if shape.bank else shape.candidates
    labels = torch.arange(pool, device=device) // IMAGES
    if shape.bank:  # anchors are of identities all over the bank
        labels = torch.arange(pool, device=device) % max(1, pool // IMAGES)
    centres = torch.randn(int(labels.max()) + 1, shape.D, device=device, generator=generator)
    rows = torch.randn(pool, shape.D, device=device, generator=generator).mul_(0.7).add_(centres[labels])
    rows = torch.nn.functional.normalize(rows, dim=1).to(DTYPES[shape.dtype])
    if not shape.M:
        return {"feats": rows, "labels": labels}
    n = shape.N
    if shape.bank:
        more: dict[str, Any] = {"candidates": rows[n:].clone(), "candidate_labels": labels[n:].clone()}
    else:
        more = {"candidates": rows, "candidate_labels": labels, "self_index": 0}
    return {"feats": rows[:n].clone(), "labels": labels[:n].clone(), **more}


def sets_of(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Inputs that calls take in turn."""
    size = (shape.N + shape.M) * shape.D * DTYPES[shape.dtype].itemsize
    return [inputs_of(shape, device, seed) for seed in range(max(1, min(MOST_SETS, SETS_BYTES // size)))]


# ---- contestants -----------------------------------------------------------------------------------------------------

Loss = Callable[[dict[str, Any], Tensor], Tensor]
"""The loss of a set of inputs for anchors that may want a gradient."""


def ours(backend: str, k: int) -> Loss:
    """sn_ops."""

    def call(inputs: dict[str, Any], feats: Tensor) -> Tensor:
        loss: Tensor = sn_ops.sn_loss(**(inputs | {"feats": feats}), k=k, alpha=ALPHA, weight=WEIGHT, backend=backend)
        return loss

    return call


def theirs(function: Any, k: int) -> Loss:
    """A rival of baselines.py."""
    recipe = baselines.Recipe(k=k, alpha=ALPHA, weight=WEIGHT)

    def call(inputs: dict[str, Any], feats: Tensor) -> Tensor:
        more = inputs.get("candidates"), inputs.get("candidate_labels")
        loss: Tensor = function(feats, inputs["labels"], *more, recipe, "mean")[0]
        return loss

    return call


def pass_of(loss: Loss, sets: list[dict[str, Any]], scope: str) -> Callable[[int], object]:
    """A call on set number i: forward alone, or forward and backward."""
    leaves = [inputs["feats"].detach().clone().requires_grad_() for inputs in sets]

    def forward(i: int) -> object:
        with torch.no_grad():
            return loss(sets[i], sets[i]["feats"])

    def both(i: int) -> object:
        return torch.autograd.grad(loss(sets[i], leaves[i]), leaves[i])

    return forward if scope == "forward" else both


# ---- times -----------------------------------------------------------------------------------------------------------


def sampled(seconds_of: Callable[[int], float]) -> list[float]:
    """Microseconds a call; `seconds_of(times)` is what so many calls take."""
    if protocol.pretending():
        return [seconds_of(1) * 1e6]
    once = max(min(seconds_of(1), seconds_of(1)), 1e-7)
    times = max(1, round(SAMPLE_S / once))
    end = time.perf_counter() + SAMPLING_S
    samples: list[float] = []
    while len(samples) < 3 or (len(samples) < MOST_SAMPLES and time.perf_counter() < end):
        samples.append(seconds_of(times) / times * 1e6)
    return samples


def graph_samples(device: Gpu | Pretended, call: Callable[[int], object], sets: int) -> list[float]:
    """The device's time of one call, in a graph of one for each set of inputs."""

    def all_sets() -> None:
        for i in range(sets):
            call(i)

    replay = device.capture(all_sets)
    return [sample / sets for sample in sampled(lambda times: device.seconds(replay, times))]


def called_samples(device: Gpu | Pretended, call: Callable[[int], object], sets: int) -> list[float]:
    """The clock's time of one call from Python."""

    def seconds(times: int) -> float:
        device.synchronize()
        start = time.perf_counter()
        for i in range(times):
            call(i % sets)
        device.synchronize()
        return time.perf_counter() - start

    if not protocol.pretending():
        seconds(3)
    return sampled(seconds)


def case_of(
    shape: Shape,
    backend: str,
    wanted: str,
    taken: str | None,
    scope: str,
    how: str,
    samples: list[float],
    note: str = "",
) -> dict[str, Any]:
    """A case in the record's schema."""
    q1, median, q3 = records.quartiles(samples) if samples else (None, None, None)
    goal = None
    if backend == "cuda":
        goal = expected.expected_us(shape.N, shape.candidates, shape.D, shape.dtype, shape.bank, scope, wanted, how)
        if goal is None and how == "graph" and scope == "forward":
            goal = predict.predicted_us(shape, taken or wanted)
    return {
        "label": shape.label,
        "N": shape.N,
        "M": shape.candidates,
        "D": shape.D,
        "k": shape.k,
        "dtype": shape.dtype,
        "bank": shape.bank,
        "backend": backend,
        "path_wanted": wanted,
        "path": taken,
        "scope": scope,
        "how": how,
        "samples_us": samples,
        "median_us": median,
        "q1_us": q1,
        "q3_us": q3,
        "expected_us": goal,
        "note": note,
    }


def timed(
    device: Gpu | Pretended,
    shape: Shape,
    backend: str,
    loss: Loss,
    wanted: str,
    taken: str | None,
    hows: tuple[str, ...],
    scopes: tuple[str, ...] = ("forward", "both"),
) -> Iterator[dict[str, Any]]:
    """Forward, and forward and backward, each in the ways asked for. A contestant that fails becomes a case with
    a note."""
    sets = sets_of(shape, device.device)
    for scope in scopes:
        call = pass_of(loss, sets, scope)
        for how in hows:
            take = graph_samples if how == "graph" else called_samples
            try:
                samples, note = take(device, call, len(sets)), ""
            except RuntimeError as error:
                if "CUDA error" in str(error) and "capture" not in str(error):
                    raise
                samples, note = [], str(error).splitlines()[0][:200]
                print(f"{shape.label} {backend} {wanted} {scope} {how}: {error}", flush=True)
            yield case_of(shape, backend, wanted, taken, scope, how, samples, note)


def told(device: Gpu | Pretended, case: dict[str, Any]) -> None:
    """Report a case as soon as it is measured."""
    median = case["median_us"]
    beside = (
        f", {median / case['expected_us']:.2f} of {case['expected_us']:.0f} expected"
        if case["expected_us"] and median
        else ""
    )
    text = f"{median:.1f} us" if median else case["note"]
    print(f"{case['label']} {case['backend']} {case['path']} {case['scope']} {case['how']}: {text}{beside}", flush=True)
    say(cases=[case], kernels=[])


def path_taken(device: Gpu | Pretended, shape: Shape, wanted: str) -> str | None:
    """The path that a call takes with `wanted` forced, another one where that cannot serve."""
    device.force(wanted)
    inputs = inputs_of(shape, device.device, 0)
    with torch.no_grad():
        ours(device.backend, shape.k)(inputs, inputs["feats"])
    taken = device.last_path()
    device.force("auto")
    return taken or None


# ---- the steps -------------------------------------------------------------------------------------------------------


def loss(device: Gpu | Pretended) -> None:
    """Every shape by the path that the plan chooses."""
    figures = []
    for shape in LOSS if device.name == "cuda" else EMULATED:
        taken = path_taken(device, shape, "auto")
        for case in timed(device, shape, "cuda", ours(device.backend, shape.k), "auto", taken, ("graph", "called")):
            told(device, case)
            if case["scope"] == "both" and case["how"] == "graph" and case["median_us"]:
                figures.append(f"{shape.N}x{shape.D} {case['median_us']:.0f}")
                say(figure=("us: " + ", ".join(figures))[: records.FIGURE_WIDTH])


def paths(device: Gpu | Pretended) -> None:
    """Forward of shapes that several paths serve, by each: the backward is the same."""
    count = 0
    for shape, names in FORCED if device.name == "cuda" else EMULATED_FORCED:
        planned = path_taken(device, shape, "auto")
        for name in names:
            if name == "direct" and shape.N * shape.candidates * shape.D > MOST_DIRECT:
                continue
            taken = path_taken(device, shape, name)
            if taken not in (None, name):
                continue
            device.force(name)
            for case in timed(
                device, shape, "cuda", ours(device.backend, shape.k), name, taken, ("graph",), ("forward",)
            ):
                case["note"] = case["note"] or PLANNED + str(planned)
                told(device, case)
            device.force("auto")
            count += 1
    say(figure=f"{count} shapes and paths")


def kernels(device: Gpu | Pretended) -> None:
    """What each kernel takes of forward and backward."""
    for shape in KERNELS if device.name == "cuda" else EMULATED[:1]:
        sets = sets_of(shape, device.device)[:1]
        call = pass_of(ours(device.backend, shape.k), sets, "both")
        for _ in range(3):
            call(0)
        times = 5
        found = device.kernels(lambda call=call: call(0), times)  # type: ignore[misc]
        rows: list[dict[str, Any]] = [
            {
                "label": shape.label,
                "scope": "both",
                "name": name[:160],
                "calls": -(-count // times),
                "total_us": us / times,
            }
            for name, count, us in sorted(found, key=lambda row: -row[2])
        ]
        say(cases=[], kernels=rows)
        for row in rows:
            print(f"{shape.label}: {row['total_us']:8.1f} us  {row['calls']:3d} x  {row['name'][:100]}", flush=True)
    say(figure="per-kernel times of " + (f"{len(KERNELS)} shapes" if device.name == "cuda" else "one shape"))


def rivals(device: Gpu | Pretended) -> None:
    """Plain PyTorch, as called; `strongest` is the faster of the two strongest at each shape."""
    for shape in RIVALS if device.name == "cuda" else EMULATED[:1]:
        for case in timed(device, shape, "eager", theirs(baselines.eager, shape.k), "", None, ("called",)):
            told(device, case)
        best: dict[str, dict[str, Any]] = {}
        for name in ("blocked", "symmetric"):
            contestant = theirs(baselines.RIVALS[name], shape.k)
            for case in timed(device, shape, "strongest", contestant, "", None, ("called",)):
                case["note"] = case["note"] or name
                kept = best.get(case["scope"])
                if case["median_us"] and (kept is None or case["median_us"] < kept["median_us"]):
                    best[case["scope"]] = case
        for case in best.values():
            told(device, case)
    say(figure="eager and the strongest plain PyTorch")


def by_triton(device: Gpu | Pretended) -> None:
    """The Triton backend; its first calls, which load or compile, are not counted."""
    kernel_cache.listen()
    for shape in TRITON if device.name == "cuda" else EMULATED[:1]:
        for case in timed(device, shape, "triton", ours(device.backend, shape.k), "", None, ("graph", "called")):
            told(device, case)
    say(figure=f"{len(TRITON) if device.name == 'cuda' else 'pretended'} shapes; {kernel_cache.tell()}")


def compiled(device: Gpu | Pretended) -> None:
    """torch.compile of eager; the first call, which compiles, is not counted."""
    function = torch.compile(baselines.eager, dynamic=False) if device.name == "cuda" else baselines.eager
    for shape in COMPILED if device.name == "cuda" else EMULATED[:1]:
        started = time.perf_counter()
        for case in timed(device, shape, "compile", theirs(function, shape.k), "", None, ("called",)):
            told(device, case)
        print(f"{shape.label}: {time.perf_counter() - started:.1f} s with compiling", flush=True)
    say(figure="torch.compile of eager")


STEPS = {"loss": loss, "paths": paths, "kernels": kernels, "rivals": rivals, "triton": by_triton, "compile": compiled}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in STEPS:
        raise SystemExit(f"expected one of {', '.join(STEPS)}, got {' '.join(sys.argv[1:])!r}")
    opened = open_device("cpu", "triton" if sys.argv[1] == "triton" else "cuda")
    protocol.say(cases=[], kernels=[])
    STEPS[sys.argv[1]](opened)
