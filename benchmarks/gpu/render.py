"""Records as tables, for the page (Markdown) and for the last screen of a call (text). Reads no file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import expected
from records import DATA, Case, Cases, Ceiling, Compiled, Kernel, Probe, Provenance, Record, Smoke, Step, Tests, kind_of

# An interquartile range above this share of the median: something else was running.
NOISY = 0.1
NOTHING = "-"
# What makes two cases the same problem, whatever their contestants and labels.
Problem = tuple[int, int, int, int, str, bool]


@dataclass(frozen=True)
class Table:
    """A title, and rows of as many cells as the header has."""

    title: str
    header: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """Under a heading of the fourth level."""
        rows = [self.header, ["---"] * len(self.header), *self.lines]
        body = "\n".join(
            "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in row) + " |" for row in rows
        )
        return f"#### {self.title}\n\n{body}\n"

    def text(self) -> str:
        """Columns as wide as their cells, all but the first right aligned."""
        widths = [max(len(row[i]) for row in [self.header, *self.lines]) for i in range(len(self.header))]
        rows = [self.header, ["-" * width for width in widths], *self.lines]
        body = "\n".join(
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        )
        return f"{self.title}\n{body}\n"


# --------------------------------------------------------------------------------------------------
# Cells
# --------------------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """Three significant digits, all of those before the point, and no exponent."""
    if value == 0:
        return "0"
    return f"{value:.{min(9, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"


def quantity(value: float, unit: str) -> str:
    """A ceiling's figure: "2.10 us", "4.30 TB/s", "790 TFLOP/s". `unit` is s, B/s or FLOP/s."""
    return f"{digits(value * 1e6)} us" if unit == "s" else f"{digits(value * 1e-12)} T{unit}"


def shape(case: Case) -> str:
    """N x D, or N x M x D with what the M candidates are; k where it is not the usual one."""
    text = f"{case['N']} x {case['D']}"
    if case["bank"] or case["N"] != case["M"]:
        text = f"{case['N']} x {case['M']} x {case['D']} {'bank' if case['bank'] else 'gather'}"
    return text if case["k"] == expected.K else f"{text}, k = {case['k']}"


def time_cell(case: Case | None) -> str:
    """The median in us, with a ~ where it is noisy; "failed" where there are no samples."""
    if case is None:
        return NOTHING
    median, q1, q3 = case["median_us"], case["q1_us"], case["q3_us"]
    if median is None or q1 is None or q3 is None:
        return "failed"
    return ("~" if (q3 - q1) / median > NOISY else "") + digits(median)


def ratio_cell(case: Case | None) -> str:
    """Measured over expected."""
    if case is None or case["median_us"] is None or case["expected_us"] is None:
        return NOTHING
    return f"{case['median_us'] / case['expected_us']:.2f}"


def path_cell(case: Case) -> str:
    """The path that ran, and what was asked for where that was a path."""
    ran = case["path"] or NOTHING
    return f"{ran} (forced)" if case["path_wanted"] not in ("", "auto") else ran


def _expected_cell(case: Case | None) -> str:
    return NOTHING if case is None or case["expected_us"] is None else digits(case["expected_us"])


def _multiple_cell(case: Case | None, ours: Case | None) -> str:
    """A time as a multiple of ours, or in us where we have none."""
    if case is None or case["median_us"] is None:
        return time_cell(case)
    if ours is None or ours["median_us"] is None:
        return f"{time_cell(case)} us"
    return f"{digits(case['median_us'] / ours['median_us'])}x"


def notes_cell(cases: Iterable[Case]) -> str:
    """The notes of some cases, each once."""
    return "; ".join(_distinct(case["note"] for case in cases if case["note"])) or NOTHING


def _problem(case: Case) -> Problem:
    return case["N"], case["M"], case["D"], case["k"], case["dtype"], case["bank"]


def _distinct(words: Iterable[str]) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(words))


# --------------------------------------------------------------------------------------------------
# Reading a record's steps
# --------------------------------------------------------------------------------------------------


def steps_of(record: Record, kind: str) -> list[Step]:
    """The steps of a kind that have data."""
    return [step for step in record["steps"] if kind_of(step["name"]) == kind and step["data"] is not None]


def cases_of(record: Record, kind: str) -> list[Case]:
    """The cases of all steps of a kind."""
    return [case for step in steps_of(record, kind) for case in cast(Cases, step["data"])["cases"]]


def kernels_of(record: Record) -> list[Kernel]:
    """The kernels of all steps."""
    kinds = [kind for kind, data in DATA.items() if data is Cases]
    steps = [step for kind in kinds for step in steps_of(record, kind)]
    return [kernel for step in steps for kernel in cast(Cases, step["data"])["kernels"]]


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def steps_table(record: Record) -> Table:
    """Every step with its result."""
    return Table(
        "Steps",
        ["step", "result", "seconds", "of at most", "figure", "reason"],
        [
            [
                step["name"],
                step["result"],
                f"{step['seconds']:.1f}",
                f"{step['cap']:.0f}",
                step["figure"] or NOTHING,
                step["reason"] or NOTHING,
            ]
            for step in record["steps"]
        ],
    )


def failures_table(record: Record) -> Table:
    """What failed inside the steps smoke and tests, by name."""
    lines = [
        [step["name"], f"{run['path']} {run['dtype']} {run['shape']}", run["result"], run["note"]]
        for step in steps_of(record, "smoke")
        for run in cast(Smoke, step["data"])["runs"]
        if run["result"] != "passed"
    ]
    for step in steps_of(record, "tests"):
        lines += [[step["name"], name, "failed", ""] for name in cast(Tests, step["data"])["failures"]]
    return Table("What failed", ["step", "what", "result", "note"], lines)


def compiled_table(record: Record) -> Table:
    """What Triton compiled in its steps, and what it found in the cache."""
    lines = []
    for step in record["steps"]:
        found = cast("Compiled | None", (step["data"] or {}).get("compiled"))
        if found is not None:
            cells = [str(found["hits"]), str(found["misses"]), f"{found['seconds']:.1f}"]
            prepared = "yes" if found["prepared"] else "no"
            lines.append([step["name"], prepared, *cells, "; ".join(found["missed"]) or NOTHING])
    return Table(
        "Kernels of Triton", ["step", "cache prepared", "from the cache", "compiled", "seconds", "of these"], lines
    )


def probe_table(probe: Probe) -> Table:
    """How the tensor core accumulates, by type."""
    holds = "holds" if probe["holds"] else "DOES NOT HOLD"
    return Table(
        f"Tensor core: {probe['model']}; the bound of {probe['bound']} D 2^-23 {holds}",
        ["type", "group", "bits", "rounding", "subnormals", "worst error in D 2^-23", "margin"],
        [
            [
                name,
                str(facts["group"]),
                str(facts["bits"]),
                facts["rounding"],
                facts["subnormals"],
                digits(facts["worst"]),
                f"{digits(probe['bound'] / facts['worst'])}x" if facts["worst"] > 0 else NOTHING,
            ]
            for name, facts in probe["types"].items()
        ],
    )


def ceilings_table(ceilings: dict[str, Ceiling]) -> Table:
    """What the device can do, beside what was expected of it."""
    lines = []
    for name, ceiling in ceilings.items():
        stated = expected.CEILINGS.get(name)
        comparable = stated is not None and stated.unit == ceiling["unit"]
        lines.append(
            [
                name,
                quantity(ceiling["median"], ceiling["unit"]),
                quantity(stated.value, stated.unit) if stated and comparable else NOTHING,
                f"{ceiling['median'] / stated.value:.2f}" if stated and comparable else NOTHING,
                stated.what if stated else NOTHING,
            ]
        )
    return Table("Ceilings", ["ceiling", "measured", "expected", "ratio", "what"], lines)


def cases_table(title: str, cases: list[Case]) -> Table:
    """A line for each problem and path; forward, and forward + backward, in a graph and as called. In us.

    Ratios are of the graph's times; a called time with an expected one of its own has it in brackets.
    """
    rows: dict[tuple[str, Problem, str, str, str | None], list[Case]] = {}
    for case in cases:
        key = (case["label"], _problem(case), case["backend"], case["path_wanted"], case["path"])
        rows.setdefault(key, []).append(case)
    lines = []
    for row in rows.values():
        line = [row[0]["label"], shape(row[0]), row[0]["dtype"], path_cell(row[0])]
        for scope in ("forward", "both"):
            found = {case["how"]: case for case in row if case["scope"] == scope}
            graph, called = found.get("graph"), found.get("called")
            of_called = "" if ratio_cell(called) == NOTHING else f" ({ratio_cell(called)} of {_expected_cell(called)})"
            line += [time_cell(graph), _expected_cell(graph), ratio_cell(graph), time_cell(called) + of_called]
        lines.append([*line, notes_cell(row)])
    header = ["case", "shape", "dtype", "path"]
    for name in ("forward", "both"):
        header += [f"{name}, graph", "expected", "ratio", f"{name}, called"]
    return Table(title, [*header, "note"], lines)


def paths_table(forced: list[Case], planned: list[Case]) -> Table:
    """Forced paths side by side, the fastest of them, and what the planner takes (from `planned`). In us."""
    takes = {_problem(case): case["path"] for case in planned if case["path"] and case["backend"] == "cuda"}
    forced = [case for case in forced if case["path_wanted"] not in ("", "auto")]
    paths = _distinct(case["path_wanted"] for case in forced)
    rows: dict[tuple[Problem, str, str], dict[str, Case]] = {}
    for case in forced:
        rows.setdefault((_problem(case), case["scope"], case["how"]), {})[case["path_wanted"]] = case
    lines = []
    for (problem, scope, how), row in rows.items():
        times = {path: case["median_us"] for path, case in row.items() if case["median_us"] is not None}
        first = next(iter(row.values()))
        lines.append(
            [
                shape(first),
                first["dtype"],
                scope,
                how,
                *(time_cell(row.get(path)) for path in paths),
                min(times, key=lambda path: times[path]) if times else NOTHING,
                takes.get(problem) or first["note"].removeprefix("planned: ") or NOTHING,
            ]
        )
    return Table("Paths", ["shape", "dtype", "scope", "how", *paths, "fastest", "planner took"], lines)


def rivals_table(rivals: list[Case], own: list[Case]) -> Table:
    """What others take, as multiples of the CUDA backend's time for the same call; in us where there is none."""
    base: dict[tuple[Problem, str, str], Case] = {}
    for case in [*rivals, *own]:
        if case["backend"] == "cuda" and case["path_wanted"] in ("", "auto"):
            base.setdefault((_problem(case), case["scope"], case["how"]), case)
    others = [case for case in rivals if case["backend"] != "cuda"]
    names = _distinct(case["backend"] for case in others)
    rows: dict[tuple[Problem, str, str], dict[str, Case]] = {}
    for case in others:
        rows.setdefault((_problem(case), case["scope"], case["how"]), {})[case["backend"]] = case
    lines = []
    for (problem, scope, how), row in rows.items():
        ours = base.get((problem, scope, how))
        first = next(iter(row.values()))
        cells = [_multiple_cell(row.get(name), ours) for name in names]
        lines.append([shape(first), first["dtype"], scope, how, time_cell(ours), *cells, notes_cell(row.values())])
    header = ["shape", "dtype", "scope", "how", "cuda, us", *names, "note"]
    return Table("Rivals, as multiples of cuda", header, lines)


def train_table(cases: list[Case]) -> Table:
    """The loss in a training step, case by case. In us."""
    return Table(
        "Training step",
        ["case", "shape", "dtype", "backend", "scope", "how", "us", "note"],
        [
            [
                case["label"],
                shape(case),
                case["dtype"],
                case["backend"],
                case["scope"],
                case["how"],
                time_cell(case),
                case["note"] or NOTHING,
            ]
            for case in cases
        ],
    )


def kernels_table(kernels: list[Kernel]) -> Table:
    """What each kernel takes of its case, in us of one call."""
    totals: dict[tuple[str, str], float] = {}
    for kernel in kernels:
        key = (kernel["label"], kernel["scope"])
        totals[key] = totals.get(key, 0.0) + kernel["total_us"]
    lines = []
    for kernel in kernels:
        total = totals[kernel["label"], kernel["scope"]]
        share = f"{100 * kernel['total_us'] / total:.0f} %" if total > 0 else NOTHING
        calls = str(kernel["calls"])
        lines.append([kernel["label"], kernel["scope"], kernel["name"], calls, digits(kernel["total_us"]), share])
    return Table("Kernels", ["case", "scope", "kernel", "launches", "us", "share"], lines)


def prove_tables(record: Record) -> list[Table]:
    """All of a prove record, without empty tables."""
    probes = [probe_table(cast(Probe, step["data"])) for step in steps_of(record, "probe")]
    return [
        table for table in [steps_table(record), failures_table(record), compiled_table(record), *probes] if table.lines
    ]


def measure_tables(record: Record) -> list[Table]:
    """All of a measure record, without empty tables."""
    own = cases_of(record, "loss")
    tables = [
        steps_table(record),
        *(ceilings_table(cast("dict[str, Ceiling]", step["data"])) for step in steps_of(record, "ceilings")),
        cases_table("Loss, us", own),
        paths_table(cases_of(record, "paths"), own),
        rivals_table([case for kind in ("rivals", "compile", "triton") for case in cases_of(record, kind)], own),
        train_table(cases_of(record, "train")),
        kernels_table(kernels_of(record)),
        compiled_table(record),
    ]
    return [table for table in tables if table.lines]


def facts(provenance: Provenance) -> str:
    """Device, versions and commit in one line."""
    device, clocks = provenance["device"], provenance["device"]["clocks_mhz"]
    at = f", {clocks['sm']} of {clocks['sm_max']} MHz" if clocks else ""
    return (
        f"{device['name']}, capability {device['capability']}, {device['multiprocessors']} multiprocessors, "
        f"{device['memory_bytes'] / 2**30:.0f} GiB{at}, driver {device['driver']}; torch {provenance['torch']}, "
        f"CUDA {provenance['cuda']}, Triton {provenance['triton']}, Python {provenance['python']}; "
        f"sn_ops {provenance['sn_ops']}, commit {provenance['commit'][:10]}, {provenance['date']}"
    )
