"""Time the SN loss: every usable backend of sn_ops against plain PyTorch, in units of one matrix product.

    python benchmarks/bench_loss.py                      the default table, under two minutes on two cores
    python benchmarks/bench_loss.py --quick              a few rows, under 20 seconds
    python benchmarks/bench_loss.py --features FILE.npz  your own embeddings (arrays feats, labels; candidates optional)
    python benchmarks/bench_loss.py --json FILE          also all raw numbers, with machine, versions and commit

benchmarks/README.md explains the columns. Tables go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from tqdm import tqdm

import accuracy
import harness
import inputs
import memory
import sn_ops
from baselines import Recipe
from contestants import Contestant, Setting, backend_contestants, rival_contestants
from inputs import Batch, Spec
from report import Case, Notes, Row, case_table, plural, summary, table
from sn_ops import dispatch

SHAPES = "64x2048,128x2048,256x2048,1024x2048,4096x512,4096x2048,8192x128"
QUICK_SHAPES = "64x2048,256x2048,1024x512"
ADVERSARIAL = [
    Spec("clusters", 2048, 512),
    Spec("collapsed", 1024, 2048),
    Spec("identical", 1024, 2048),
    Spec("outlier", 1024, 2048),
]
TINY = Spec("random", 8, 16)
# Peak memory is taken on shapes where every contestant fits and takes about a second.
MEMORY_PAIRS = (1 << 20, 1 << 24)
MEMORY_PRODUCTS = 1 << 33
MEMORY_KINDS = ("random", "file")
# Seconds of sampling for each table.
BUDGET = 0.5
QUICK_BUDGET = 0.8
# Accuracy costs another pass; contestants slower than this are judged on smaller shapes.
ACCURACY_SECONDS = 1.0

# Anchors, dimensions, candidates (None: the anchors), k. Every run checks the tiny ones; --check all: the larger ones
# reach code that small batches do not.
TINY_CHECKS: list[tuple[int, int, int | None, int]] = [
    (24, 16, None, 10),
    (8, 16, None, 10),
    (12, 16, 40, 10),
    (20, 16, 7, 10),
]
LARGER_CHECKS: list[tuple[int, int, int | None, int]] = [(520, 24, None, 3), (150, 24, 800, 3)]


class MismatchError(Exception):
    """A contestant does not compute the loss."""


# --------------------------------------------------------------------------------------------------
# Self check
# --------------------------------------------------------------------------------------------------


def check(
    contestants: list[Contestant],
    shapes: list[tuple[int, int, int | None, int]],
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Hold every contestant to the direct fp64 evaluation on small batches, in fp64 and fp32. Raises MismatchError.

    `torch.compile` is left to its first timed batch, where it is compared with eager.
    """
    for n, d, m, k in shapes:
        recipe = Recipe(k=k)
        exact_batch = inputs.tiny(n, d, m, seed=n)
        for dtype in (torch.float64, torch.float32):
            batch = exact_batch.to(device, dtype)
            assert _valid(batch) > 1, "a batch without losses checks nothing"
            truth = accuracy.exact(batch, recipe)
            for contestant in contestants:
                setting = Setting(1, 1, "default", device)
                if contestant.compiled or contestant.limit(batch, recipe, setting) is not None:
                    continue
                contestant.enter()
                assert contestant.support is not None
                result = accuracy.judge(
                    batch, truth, _runner(contestant, batch, recipe), contestant.support(batch, recipe)
                )
                # fp64 to rounding; fp32 with room for the expanded squared distances of the rivals.
                tolerance = 1e-9 if dtype == torch.float64 else 2e-4
                where = f"{contestant.name}, {n} x {d}, candidates {m}, k {k}, {dtype}"
                wrong = [
                    f"{what} {value}"
                    for what, value, limit in (
                        ("loss error", result.loss_error, tolerance),
                        ("gradient error", result.gradient_error, tolerance),
                        (
                            "anchors with another selection",
                            1 - result.same_selection,
                            0.0 if dtype == torch.float64 else 0.02,
                        ),
                    )
                    if value is None or not value <= limit
                ]
                _check_mean(contestant, batch, recipe, tolerance, wrong)
                if wrong:
                    raise MismatchError(f"{where}: {', '.join(wrong)}")
                say(f"ok  {where}: loss error {result.loss_error:.1e}, gradient error {result.gradient_error:.1e}")


def _check_mean(contestant: Contestant, batch: Batch, recipe: Recipe, tolerance: float, wrong: list[str]) -> None:
    """The timed path is the mean: it must be that of the losses, and its gradient the mean of theirs."""
    results = []
    valid = _valid(batch)
    for reduction in ("mean", "none"):
        feats = batch.feats.detach().clone().requires_grad_()
        loss = contestant.run(batch, feats, recipe, reduction)
        loss = loss if reduction == "mean" else loss.sum() / max(valid, 1)
        (gradient,) = torch.autograd.grad(loss, feats)
        results.append((loss.detach(), gradient))
    (mean, mean_gradient), (expected, expected_gradient) = results
    if not bool((mean - expected).abs() <= tolerance * (1 + expected.abs())):
        wrong.append(f"mean {float(mean):.6g} instead of {float(expected):.6g}")
    if not bool((mean_gradient - expected_gradient).norm() <= tolerance * (1e-6 + expected_gradient.norm())):
        wrong.append("gradient of the mean")


def _valid(batch: Batch) -> int:
    """How many anchors have a positive."""
    same = batch.labels[:, None] == batch.pool_labels
    if batch.candidates is None:
        same.fill_diagonal_(False)
    return int(same.any(dim=1).sum())


def _runner(contestant: Contestant, batch: Batch, recipe: Recipe) -> Callable[[torch.Tensor, str], torch.Tensor]:
    return lambda feats, reduction: contestant.run(batch, feats, recipe, reduction)


# --------------------------------------------------------------------------------------------------
# One case
# --------------------------------------------------------------------------------------------------


def tasks_of(contestant: Contestant, batch: Batch, recipe: Recipe) -> list[harness.Task]:
    """Forward (recording for the gradient, as in a training step), and forward + backward."""
    feats = batch.feats.detach().requires_grad_()

    def forward() -> object:
        return contestant.run(batch, feats, recipe, "mean")

    def both() -> object:
        return torch.autograd.grad(contestant.run(batch, feats, recipe, "mean"), feats)

    return [
        harness.Task(f"{contestant.name} forward", forward, contestant.enter),
        harness.Task(f"{contestant.name} forward + backward", both, contestant.enter),
    ]


def compile_first(
    contestant: Contestant, batch: Batch, recipe: Recipe, eager: Contestant, comparable: bool
) -> str | None:
    """Compile before timing. Returns why that is impossible, or None. Raises MismatchError if it differs from eager.

    On near-duplicate rows (not `comparable`) both select by rounding noise, each by its own: nothing to compare then.
    """
    try:
        for task in tasks_of(contestant, batch, recipe):
            task.call()
        feats = batch.feats.detach().requires_grad_()
        mine = contestant.run(batch, feats, recipe, "mean")
        (gradient,) = torch.autograd.grad(mine, feats)
    except (
        Exception
    ) as error:  # whatever a compiler stack may throw: the reason is printed, the rest of the table goes on
        return f"torch.compile failed here: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    if not comparable:
        return None
    expected = eager.run(batch, feats, recipe, "mean")
    (expected_gradient,) = torch.autograd.grad(expected, feats)
    apart = float((gradient - expected_gradient).norm() / expected_gradient.norm().clamp(min=1e-12))
    if not (bool((mine - expected).abs() <= 1e-3 * (1 + expected.abs())) and apart <= 1e-2):
        raise MismatchError(
            f"compile: loss {mine.item():.6g}, eager {expected.item():.6g}; gradients differ by {apart:.2g}"
        )
    return None


def run_case(
    spec: Spec,
    batch: Batch,
    contestants: list[Contestant],
    recipe: Recipe,
    setting: Setting,
    budget: float,
    truth: accuracy.Exact | None,
    tick: Callable[[str], None],
    announce: Callable[[str], None],
) -> Case:
    """Time all contestants on a batch, then judge them against `truth` unless it is None."""
    x, z = batch.feats.detach().float(), batch.pool.detach().float()
    ready = torch.empty(batch.n, batch.m, device=x.device)
    mm = harness.Task("torch.mm", lambda: torch.mm(x, z.T))
    mm_ready = harness.Task("torch.mm, out ready", lambda: torch.mm(x, z.T, out=ready))
    rows, tasks = [], [mm, mm_ready]
    timed: list[tuple[Contestant, Row, list[harness.Task]]] = []
    eager = next(c for c in rival_contestants() if c.name == "eager")
    for contestant in contestants:
        row = Row(contestant.name)
        rows.append(row)
        row.skipped = contestant.limit(batch, recipe, setting)
        if row.skipped is None and not contestant.scales and setting.threads != setting.first_threads:
            row.skipped = f"timed with --threads {setting.first_threads} only"
        if row.skipped is None and contestant.compiled:
            tick("compiling")
            start = time.perf_counter()
            row.skipped = compile_first(contestant, batch, recipe, eager, spec.kind in ("random", "digits"))
            spent = time.perf_counter() - start
            if spent > 3.0:
                announce(f"compile: {spent:.0f} s to compile on {spec.title}, not part of its times")
        if row.skipped is None:
            pair = tasks_of(contestant, batch, recipe)
            timed.append((contestant, row, pair))
            tasks += pair
    harness.measure(tasks, setting.device, budget, tick)
    for contestant, row, (forward, both) in timed:
        row.forward, row.both = harness.summarize(forward.samples), harness.summarize(both.samples)
        row.forward_samples, row.both_samples = forward.samples, both.samples
        if truth is None:
            row.accuracy_skipped = f"judged with --threads {setting.first_threads} only"
        elif contestant.support is None:
            row.accuracy_skipped = "the arithmetic of eager; another compilation"
        elif row.both.median > ACCURACY_SECONDS:
            row.accuracy_skipped = f"not judged where one pass takes over {ACCURACY_SECONDS:.0f} s"
        else:
            tick(f"{contestant.name} accuracy")
            contestant.enter()
            support = contestant.support(batch, recipe)
            row.accuracy = accuracy.judge(batch, truth, _runner(contestant, batch, recipe), support)
    return Case(
        spec.title,
        spec,
        batch.n,
        batch.m,
        batch.d,
        setting.threads,
        harness.summarize(mm.samples),
        harness.summarize(mm_ready.samples),
        rows,
    )


def measure_memory(case: Case, server: memory.Server, recipe: Recipe, dtype: str, capabilities: list[str]) -> None:
    """Fill in the peaks of a case."""
    for row in case.rows:
        if row.skipped is not None:
            continue
        if row.contestant == "compile":
            row.peak_skipped = "the memory of the compiler itself would be counted"
            continue
        answer = server.ask(case.spec, row.contestant, recipe, dtype, case.threads, capabilities)
        row.peak_bytes, row.peak_skipped = answer.get("bytes"), answer.get("error")


def measure_cuda_memory(
    case: Case, batch: Batch, contestants: list[Contestant], recipe: Recipe, device: torch.device
) -> None:
    """As measure_memory, in this process: the allocator tells what each call takes."""
    by_name = {contestant.name: contestant for contestant in contestants}
    for row in case.rows:
        if row.skipped is None:
            row.peak_bytes = harness.peak_bytes(tasks_of(by_name[row.contestant], batch, recipe)[1].call, device)


def measure_overhead(
    contestants: list[Contestant], recipe: Recipe, setting: Setting, budget: float, tick: Callable[[str], None]
) -> dict[str, harness.Timing]:
    """Forward + backward on 8 x 16, where the host's overhead is the whole time."""
    batch = inputs.make(TINY).to(setting.device, torch.float32)
    tasks = {c.name: tasks_of(c, batch, recipe)[1] for c in contestants if not c.compiled}
    harness.measure(tasks.values(), setting.device, budget, tick)
    return {name: harness.summarize(task.samples) for name, task in tasks.items()}


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", help=f"N x D list, default {SHAPES}")
    add("--kind", choices=sorted(inputs.KINDS), help="kind of features of --shapes (default random)")
    add("--features", metavar="FILE.npz", help="time on these embeddings instead (arrays feats, labels, ...)")
    add("--k", type=int, default=10, help="neighbours (default 10)")
    add("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32", help="of the features")
    add("--threads", help="list; 'all' is PyTorch's own choice (default: 1,all, on a GPU all; 1 with --quick)")
    add("--backends", default="", help="sn_ops backends to time (default: all usable)")
    add("--rivals", help="rivals to time, 'none' for none (default: all)")
    add(
        "--cpu-capability",
        default="",
        help="list, e.g. 'avx512_vnni,avx2'; each becomes a contestant (default: the best)",
    )
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--budget", type=float, help="seconds of sampling a table (default 1.5, 0.8 with --quick)")
    add("--slow", action="store_true", help="also what is left out by default because it takes long (many minutes)")
    add("--quick", action="store_true", help="few rows, one thread, no compiling, no memory")
    add("--json", metavar="FILE", help="write everything that was measured")
    add("--check", action="store_true", help="only check that all contestants compute the loss")
    return parser.parse_args(arguments)


def specs_of(options: argparse.Namespace) -> list[Spec]:
    """What to run on."""
    if options.features:
        return [Spec("file", path=options.features)]
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    found = []
    for text in shapes.split(","):
        try:
            n, d = (int(part) for part in text.lower().split("x"))
        except ValueError:
            raise SystemExit(f"--shapes: expected NxD,NxD,..., got {text!r}") from None
        found.append(Spec(options.kind or "random", n, d))
    if options.shapes or options.kind:
        return found
    found.append(inputs.DIGITS_SPEC)
    return found if options.quick else found + ADVERSARIAL


def threads_of(options: argparse.Namespace) -> list[int]:
    """Thread counts, the first one being that of all contestants."""
    text = options.threads or ("1" if options.quick else "1,all" if options.device == "cpu" else "all")
    try:
        counts = [torch.get_num_threads() if part == "all" else int(part) for part in text.split(",")]
    except ValueError:
        raise SystemExit(f"--threads: expected a list of numbers or 'all', got {text!r}") from None
    if min(counts) < 1:
        raise SystemExit(f"--threads: expected numbers >= 1, got {text!r}")
    return list(dict.fromkeys(counts))


def contestants_of(options: argparse.Namespace) -> tuple[list[Contestant], list[str]]:
    """All contestants, and the CPU capabilities asked for."""
    device = torch.device(options.device)
    capabilities = [name for name in options.cpu_capability.split(",") if name]
    try:
        ours = backend_contestants([name for name in options.backends.split(",") if name], capabilities, device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    rivals = rival_contestants()
    if options.rivals is not None:
        wanted = [] if options.rivals == "none" else options.rivals.split(",")
        unknown = [name for name in wanted if name not in [r.name for r in rivals]]
        if unknown:
            raise SystemExit(f"--rivals: expected names among {', '.join(r.name for r in rivals)}, got {unknown[0]!r}")
        rivals = [rival for rival in rivals if rival.name in wanted]
    return ours + rivals, capabilities


def package_facts() -> dict[str, Any]:
    """The package: version, backends and, where there is a native core, how it was built and what it runs on."""
    known = sn_ops.backends()
    facts: dict[str, Any] = {
        "sn_ops": sn_ops.__version__,
        "backends": {name: {"usable": info.usable, "reason": info.reason} for name, info in known.items()},
    }
    core: Any = dispatch.CORE
    if core is not None:
        facts |= {"build": core.build_info(), "cpu_capability": core.cpu_capability()}
    return facts


def heading(facts: dict[str, Any], contestants: list[Contestant], options: argparse.Namespace) -> str:
    """What the tables below were measured with."""
    cpu, load = facts["cpu"], facts["load_average_at_start"]
    commit = (facts["commit"] or "unknown")[:10] + (", modified" if facts["dirty"] else "")
    lines = [
        f"{facts['date']}, sn_ops {facts['sn_ops']}, commit {commit}, torch {facts['torch']}, Python {facts['python']}",
        f"{cpu['model']}, {cpu['usable_cores']} cores, torch uses {facts['torch_cpu_capability']}, "
        f"sn_ops {facts.get('cpu_capability', 'no native core')}",
        f"k {options.k}, {options.dtype} features; times are medians, IQR is the interquartile range over the median",
    ]
    if "gpu" in facts:
        lines.append(facts["gpu"]["name"])
    lines += [f"  {contestant.name:10} {contestant.note}" for contestant in contestants]
    if load[0] > 0.5:
        lines.append(f"The machine was busy at the start (load {load[0]}): expect noise.")
    return "\n".join(lines)


def plan_of(specs: list[Spec], all_threads: list[int], options: argparse.Namespace) -> list[tuple[Spec, int]]:
    """Which batch with which thread count. The default's adversarial rows are about exactness: one count does."""
    extra = () if options.shapes or options.kind or options.features else ADVERSARIAL
    return [(spec, t) for spec in specs for t in all_threads if t == all_threads[0] or spec not in extra]


def wants_memory(spec: Spec, batch: Batch) -> bool:
    """Peak memory is measured on shapes where all contestants together take seconds."""
    if spec.kind not in MEMORY_KINDS:
        return False
    return MEMORY_PAIRS[0] <= batch.n * batch.m <= MEMORY_PAIRS[1] and batch.n * batch.m * batch.d <= MEMORY_PRODUCTS


def run(
    specs: list[Spec], contestants: list[Contestant], capabilities: list[str], options: argparse.Namespace
) -> tuple[list[Case], dict[str, harness.Timing], Notes, list[str]]:
    """Measure everything, printing each table as it is done: cases, host overhead, footnotes and remarks."""
    device, dtype, recipe = torch.device(options.device), getattr(torch, options.dtype), Recipe(k=options.k)
    budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET)
    pace = "quick" if options.quick else "slow" if options.slow else "default"
    all_threads = threads_of(options)
    first = all_threads[0]
    plan = plan_of(specs, all_threads, options)
    cases: list[Case] = []
    notes = Notes()
    remarks: list[str] = []
    with (
        nullcontext() if options.quick or device.type != "cpu" else memory.Server() as server,
        tqdm(total=len(plan) + 1, unit="table", file=sys.stderr, disable=None, dynamic_ncols=True) as bar,
    ):
        batch, truth, previous = None, None, None
        for spec, threads in plan:
            bar.set_description(f"{spec.title}, {plural(threads)}")
            torch.set_num_threads(threads)
            if batch is None or spec != previous:
                batch, previous = inputs.make(spec).to(device, dtype), spec
            if threads == first:
                bar.set_postfix_str("fp64 evaluation")
                truth = accuracy.exact(batch, recipe)
            setting = Setting(threads, first, pace, device)
            judged = truth if threads == first else None
            case = run_case(
                spec, batch, contestants, recipe, setting, budget, judged, bar.set_postfix_str, remarks.append
            )
            if threads == first and wants_memory(spec, batch):
                bar.set_postfix_str("memory")
                if server is not None:
                    measure_memory(case, server, recipe, options.dtype, capabilities)
                elif device.type == "cuda":
                    measure_cuda_memory(case, batch, contestants, recipe, device)
            cases.append(case)
            bar.update()
            bar.clear()
            print(case_table(case, notes), flush=True)
        bar.set_description("8 x 16")
        torch.set_num_threads(first)
        setting = Setting(first, first, pace, device)
        overhead = measure_overhead(contestants, recipe, setting, budget, bar.set_postfix_str)
        bar.update()
    return cases, overhead, notes, remarks


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is 1 if a contestant does not compute the loss."""
    options = parse(arguments)
    started = time.perf_counter()
    specs, all_threads = specs_of(options), threads_of(options)
    contestants, capabilities = contestants_of(options)
    facts = harness.provenance(torch.device(options.device)) | package_facts()
    try:
        device = torch.device(options.device)
        if options.check:
            check(contestants, TINY_CHECKS + LARGER_CHECKS, device, print)
            return 0
        check(contestants, TINY_CHECKS, device, lambda _: None)
        print(heading(facts, contestants, options), flush=True)
        cases, overhead, notes, remarks = run(specs, contestants, capabilities, options)
    except MismatchError as mismatch:
        print(f"self check failed: {mismatch}", file=sys.stderr)
        return 1

    names = [contestant.name for contestant in contestants]
    print(summary(cases, names, notes))
    cells = [f"{overhead[name].median * 1e6:.1f}" if name in overhead else "" for name in names]
    print("\nHost overhead: forward + backward on 8 x 16, microseconds\n" + table(["", *names], [["8 x 16", *cells]]))
    print("\n" + "\n".join([*notes.lines(), *remarks, f"{time.perf_counter() - started:.0f} s in all"]))

    if options.json:
        facts |= {"threads": all_threads, "recipe": dataclasses.asdict(Recipe(k=options.k)), "dtype": options.dtype}
        facts["load_average_at_end"] = [round(value, 2) for value in os.getloadavg()]
        record = {
            "provenance": facts,
            "contestants": {contestant.name: contestant.note for contestant in contestants},
            "cases": [dataclasses.asdict(case) for case in cases],
            "host_overhead": {name: dataclasses.asdict(timing) for name, timing in overhead.items()},
            "remarks": remarks,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
