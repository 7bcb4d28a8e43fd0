"""Every figure in a table of README.md and docs/ comes from a record in benchmarks/results, or from a model's code. So
do those of csrc/cuda/README.md that have a marker.

The comment before a table, `<!-- table:NAME argument ... -->`, says which of the functions below knows its rows.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import records
import render
from support.pages import PAGES, ROOT, Block, blocks

RESULTS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(r"[*~]*\d[\d.,]*( ± [\d.]+)?( ?(%|us|ms|s|MB|GB|GiB|x))?\**")

Rows = list[list[str]]


def recorded(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def cpu(name: str) -> Rows:
    """One thread of a CPU: the product's milliseconds, then multiples of it."""
    kinds = {
        "": "",
        "digits": ", handwritten digits",
        "clusters": ", 8 clusters of near-duplicates",
        "collapsed": ", collapsed features",
        "identical": ", all rows equal",
        "outlier": ", one outlier",
    }
    rows = []
    for case in recorded(name)["cases"]:
        if case["threads"] != 1:
            continue
        product = case["mm"]["median"]
        times = {row["contestant"]: row["both"]["median"] / product for row in case["rows"] if row["both"]}
        times["plain"] = min(times[name] for name in ("blocked", "symmetric") if name in times)
        lesser = next(name for name in ("cpu avx512", "cpu avx2") if name in times)
        shown = [times.get(name) for name in ("cpu", lesser, "plain", "eager", "compile", "loop")]
        cells = ["" if time is None else f"{time:.2f}" if time < 10 else f"{time:.1f}" for time in shown]
        shape, _, kind = case["title"].partition(" x ")[2].partition(" ")
        size = f"{case['n']} x {shape}{kinds[kind]}"
        rows.append([size, f"{1e3 * product:#.3g}".rstrip("."), f"**{cells[0]}**", *cells[1:]])
    return rows


def gpu_times(name: str, *steps: str) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """(label, backend, scope, how) -> the case of a record of the GPU kit."""
    made = records.read(RESULTS / name)
    return {
        (case["label"], case["backend"], case["scope"], case["how"]): dict(case)
        for step in steps
        for case in render.cases_of(made, step)
    }


def batch(label: str) -> str:
    """A case's label as tables have it: "256 against a bank of 65536 x 2048"."""
    found = re.fullmatch(r"(bank|gather) (\d+) x (\d+ x .*)", label)
    if found is None:
        return label
    return f"{found[2]} against {'a bank of ' if found[1] == 'bank' else ''}{found[3]}"


def gpu(name: str) -> Rows:
    """Every shape of the step `loss`: forward, forward and backward in a CUDA graph, the latter called."""
    times = gpu_times(name, "loss")
    columns = (("forward", "graph"), ("both", "graph"), ("both", "called"))
    labels = dict.fromkeys(label for label, *_ in times)
    return [
        [
            batch(label),
            str(times[label, "cuda", "forward", "graph"]["path"]),
            *(f"{times[label, 'cuda', scope, how]['median_us']:.0f}" for scope, how in columns),
        ]
        for label in labels
    ]


def gpu_rivals(name: str) -> Rows:
    """Forward and backward beside PyTorch, float32, of the shapes that README.md shows."""
    times = gpu_times(name, "loss", "rivals", "compile")
    shapes = ("128 x 2048", "1024 x 2048", "8192 x 512", "8192 x 2048", "65536 x 2048", "bank 256 x 65536 x 2048")
    columns = (("cuda", "graph"), ("cuda", "called"), *((name, "called") for name in ("eager", "strongest", "compile")))
    rows = []
    for shape in shapes:
        found = [times.get((f"{shape} float32", backend, "both", how)) for backend, how in columns]
        rows.append([batch(shape), *("" if case is None else f"{case['median_us']:.0f}" for case in found)])
    return rows


def step(name: str) -> Rows:
    """A training step: milliseconds of the loss and its share."""
    names = {
        "cpu": '`sn_ops`, `backend="cpu"`',
        "symmetric": "strongest plain PyTorch",
        "eager": "vectorised PyTorch, autograd",
        "loop": "a loop over anchors",
    }
    lines = {line["name"]: line for line in recorded(name)["lines"]}
    return [
        [text, three_digits(1e3 * lines[key]["loss"]["median"]), f"{100 * lines[key]['share']:.2g} %"]
        for key, text in names.items()
    ]


def evaluation(name: str) -> Rows:
    """Seconds of retrieval scores."""
    names = {
        ("matrix", "evaluate_matrix"): "from a distance matrix: `sn_ops.reid.evaluation`",
        ("matrix", "numpy argsort + compiled loop"): "the same: the usual loop compiled by numba, NumPy's `argsort`",
        ("matrix", "compiled loop (numba, parallel)"): "the same: that loop with numba's own sort",
        ("features", "evaluate (float64)"): "from features: `sn_ops.reid.evaluation`, float64",
        ("features", "float64 product alone"): "of which the float64 product",
        ("features", "cdist + numpy argsort + compiled loop"): "from features: float32 `cdist`, `argsort`, that loop",
    }
    made = recorded(name)
    return [[text, f"{made[part][key]['elapsed']:#.2g}"] for (part, key), text in names.items()]


def host(name: str) -> Rows:
    """Microseconds of calls on a tiny batch, and as multiples of `cross_entropy`, for each autograd."""
    names = {
        "cross_entropy": "`cross_entropy`",
        "sn_loss": "`sn_loss`",
        "SNLoss.forward": "`SNLoss.forward`",
        "SNLoss": "`SNLoss`, called",
        "sn_loss, forward alone": "`sn_loss` without backward",
    }
    runs = recorded(name)["runs"]
    assert [run["autograd"] for run in runs] == ["C++", "Python"]
    least = [{key: facts["least"] for key, facts in run["us"].items()} for run in runs]
    cells = {
        key: [f"{us[key]:.1f}" if ratio else f"{us[key] / us['cross_entropy']:.2f}" for us in least for ratio in (1, 0)]
        for key in names
    }
    return [[text, *cells[key]] for key, text in names.items()]


def compare(name: str) -> Rows:
    """Losses compared over seeds: every score in per cent, mean ± sample standard deviation."""
    from sn_ops.reid.compare import ABOUT

    made = recorded(name)
    columns = ("mAP_standard", "mAP_market", "rank1", "mINP")
    rows = [
        [
            ABOUT[variant],
            *(f"{100 * scores[column]['mean']:.2f} ± {100 * scores[column]['stdev']:.2f}" for column in columns),
        ]
        for variant, scores in made["summary"].items()
    ]
    return [*rows, ["colour histograms, no training", *(f"{100 * made['baseline'][column]:.2f}" for column in columns)]]


def compare_short(name: str) -> Rows:
    """The rows and columns of `compare` that README.md shows."""
    rows = compare(name)
    return [[rows[at][0], rows[at][1], rows[at][3]] for at in (0, 5, 7, 8, 9)]


def model(rows: str, dims: str, element: str) -> Rows:
    """The scaling model with the assumptions that docs/scaling.md states."""
    import bench_scaling
    import report
    from sn_ops.distributed import exchange

    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    stated = " ".join(text.split())
    assert "P = 5e13 (1e14 floating-point operations a second), Q = 2.5e11 (1 TB/s of float32)" in stated
    assert "c = 50 us, g = 0.1 us, l = 20 us, B = 50 GB/s" in stated
    machine = bench_scaling.Machine(pairs=5e13, moves=2.5e11, call=50e-6, bandwidth=50e9, latency=20e-6, merge=1e-7)
    problem = bench_scaling.Problem(int(rows), int(dims), 10, int(element))
    made = []
    for world in (8, 16, 32, 64, 128, 256, 512, 1024):
        gather = bench_scaling.gather_bytes(problem, world)
        row = [str(world)]
        for seconds, size in (
            (bench_scaling.gather_seconds(machine, problem, world), gather),
            (bench_scaling.ring_seconds(machine, problem, world), bench_scaling.ring_bytes(problem, world)),
        ):
            row += [*map(report.ms, seconds), f"{size / 2**30:.2f}"]
        made.append([*row, "ring" if gather > exchange.RING_ABOVE else "gather"])
    return made


def costs(name: str) -> Rows:
    """Times of every path of the CUDA forward: predicted, planned in bold, and measured in brackets."""
    import predict

    return predict.costs(name)


def hard_batches() -> Rows:
    """Times of batches that the first screening cannot decide, beside random ones."""
    import predict

    return predict.hard_batches()


KNOWN: dict[str, Callable[..., Rows]] = {
    "compare": compare,
    "compare-short": compare_short,
    "costs": costs,
    "cpu": cpu,
    "evaluation": evaluation,
    "gpu": gpu,
    "gpu-rivals": gpu_rivals,
    "hard-batches": hard_batches,
    "host": host,
    "model": model,
    "step": step,
}
TABLES = [block for page in PAGES for block in blocks(page) if block.language == "table"]
TABLES += [block for block in blocks(ROOT / "csrc" / "cuda" / "README.md") if block.marker.startswith("table:")]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])


def bound(table: Block) -> bool:
    return table.marker.startswith("table:")


def has_figures(table: Block) -> bool:
    """Half of its cells behind the first column are figures."""
    shown = [cell for row in table.rows() for cell in row[1:] if cell]
    return 2 * sum(FIGURE.fullmatch(cell) is not None for cell in shown) >= len(shown) > 0


@pytest.mark.parametrize(
    "table", [table for table in TABLES if bound(table)], ids=lambda table: f"{table.page}:{table.line}"
)
def test_a_table_says_what_its_record_says(table: Block) -> None:
    name, *arguments = table.marker.removeprefix("table:").split()
    assert table.rows() == KNOWN[name](*arguments)


def test_every_table_of_figures_has_a_record() -> None:
    free = [f"{table.page}:{table.line}" for table in TABLES if has_figures(table) and not bound(table)]
    assert not free, "a table of figures without a record"
    assert {table.marker.split()[0].removeprefix("table:") for table in TABLES if bound(table)} == set(KNOWN)


def test_what_counts_as_figures() -> None:
    def table(*cells: str) -> Block:
        return Block("page", 1, "table", "", ("| a | b |", "|---|---|", f"| {' | '.join(cells)} |"))

    assert has_figures(table("64 x 2048", "0.196", "**1.20**", ""))
    assert has_figures(table("SN", "77.62 ± 0.85", "1.3 %"))
    assert not has_figures(table("`k`", "10", "size of the support set", "text"))
    assert not has_figures(table("direct", "tiles"))


def test_a_wrong_figure_is_noticed() -> None:
    (table,) = [table for table in TABLES if table.page == "README.md" and table.marker.startswith("table:gpu-rivals")]
    rows = gpu_rivals(table.marker.split()[1])
    rows[0][1] = "26"
    assert table.rows() != rows


def test_the_record_of_a_table_is_linked() -> None:
    for table in filter(bound, TABLES):
        page = Path(ROOT / table.page).read_text(encoding="utf-8")
        for argument in table.marker.split()[1:]:
            if argument.endswith(".json"):
                assert page.count(argument) >= 2, f"{table.page}:{table.line} does not name {argument}"
