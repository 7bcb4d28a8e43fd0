"""What was measured, and the tables that show it."""

from __future__ import annotations

import dataclasses
import math

import harness
from accuracy import Accuracy
from inputs import Spec


@dataclasses.dataclass
class Row:
    """One contestant in one case."""

    contestant: str
    skipped: str | None = None
    forward: harness.Timing | None = None
    both: harness.Timing | None = None
    forward_samples: list[float] = dataclasses.field(default_factory=list)
    both_samples: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None
    peak_skipped: str | None = None
    accuracy: Accuracy | None = None
    accuracy_skipped: str | None = None


@dataclasses.dataclass
class Case:
    """One batch with one thread count."""

    title: str
    spec: Spec
    n: int
    m: int
    d: int
    threads: int
    mm: harness.Timing
    mm_ready: harness.Timing
    rows: list[Row]


def table(header: list[str], lines: list[list[str]]) -> str:
    """Text columns, the first left and the others right aligned."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rows = [header, ["-" * width for width in widths], *lines]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def ms(seconds: float) -> str:
    """Milliseconds with three significant digits."""
    value = seconds * 1e3
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-9))))}f}" if value < 100 else f"{value:.0f}"


def percent(timing: harness.Timing) -> str:
    """The spread."""
    return f"{100 * timing.spread:.0f}%"


def plural(threads: int) -> str:
    """1 thread, 2 threads."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


class Notes:
    """Footnotes: a number for each distinct text."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """The cell for something that is not there, and why."""
        if text not in self.texts:
            self.texts.append(text)
        return f"- [{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        """The footnotes, to print below the tables."""
        return [f"[{number}] {text}" for number, text in enumerate(self.texts, start=1)]


def case_table(case: Case, notes: Notes) -> str:
    """One case: a line for each contestant."""
    lines = []
    for name, timing in (("torch.mm(X, X.T)", case.mm), ("torch.mm, out ready", case.mm_ready)):
        unit = f"{timing.median / case.mm.median:.2f}"
        lines.append([name, ms(timing.median), percent(timing), "", "", unit, str(timing.samples), "", "", "", ""])
    for row in case.rows:
        if row.forward is None or row.both is None:
            lines.append([row.contestant, notes.mark(row.skipped or ""), *[""] * 9])
            continue
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
        if row.peak_skipped is not None:
            peak = notes.mark(row.peak_skipped)
        errors = ["", "", ""]
        if row.accuracy is not None:
            a = row.accuracy
            errors = [
                f"{a.loss_error:.0e}",
                "none" if a.gradient_error is None else f"{a.gradient_error:.0e}",
                f"{100 * a.same_selection:.0f}%",
            ]
        elif row.accuracy_skipped is not None:
            errors[0] = notes.mark(row.accuracy_skipped)
        times = [ms(row.forward.median), percent(row.forward), ms(row.both.median), percent(row.both)]
        multiple = f"{row.both.median / case.mm.median:.2f}"
        lines.append([row.contestant, *times, multiple, str(row.both.samples), peak, *errors])
    title = f"{case.title}, {plural(case.threads)}"
    if case.spec.kind == "file":
        title += f" ({case.n} anchors, {case.m} candidates, {case.d} dimensions)"
    header = [
        "",
        "fwd ms",
        "IQR",
        "fwd+bwd ms",
        "IQR",
        "x mm",
        "samples",
        "peak MB",
        "loss err",
        "grad err",
        "same sel",
    ]
    return f"\n{title}\n" + table(header, lines)


def summary(cases: list[Case], names: list[str], notes: Notes) -> str:
    """fwd + bwd of everything as multiples of torch.mm, then what more threads bring."""
    parts = []
    first = cases[0].threads
    for threads in dict.fromkeys(case.threads for case in cases):
        lines = []
        for case in (c for c in cases if c.threads == threads):
            cells = []
            by_name = {row.contestant: row for row in case.rows}
            for name in names:
                row = by_name[name]
                cells.append(f"{row.both.median / case.mm.median:.2f}" if row.both else notes.mark(row.skipped or ""))
            lines.append([case.title, ms(case.mm.median), *cells])
        parts.append(
            f"\nForward + backward in multiples of one fp32 torch.mm(X, X.T), {plural(threads)}\n"
            + table(["", "mm ms", *names], lines)
        )
        if threads == first:
            continue
        lines = []
        for case in (c for c in cases if c.threads == threads):
            base = next((c for c in cases if c.threads == first and c.spec == case.spec), None)
            if base is None:
                continue
            cells = []
            for name in names:
                old = next(row for row in base.rows if row.contestant == name).both
                new = next(row for row in case.rows if row.contestant == name).both
                cells.append(f"{old.median / new.median:.2f}" if old and new else "")
            lines.append([case.title, f"{base.mm.median / case.mm.median:.2f}", *cells])
        parts.append(f"\nSpeed-up of {threads} threads over {first}\n" + table(["", "mm", *names], lines))
    return "\n".join(parts)
