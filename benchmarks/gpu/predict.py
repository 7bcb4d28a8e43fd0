"""Write the tables of predicted times in csrc/cuda/README.md, or check that they are up to date.

    python benchmarks/gpu/predict.py           write them
    python benchmarks/gpu/predict.py --check   fail, with the difference, if they are not what would be written

Predictions are those of this build's cost model (csrc/cuda/plan/cost.cpp, through `sn_ops._C.cuda_plan`) for an H200;
measured times beside them are medians of the record that a table's marker names. So a measurement contradicts the model
line by line. Needs the package built, no GPU.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import records
import render
from records import Record

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "csrc" / "cuda" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
COMMAND = "python benchmarks/gpu/predict.py"

_C: Any = importlib.import_module("sn_ops._C")

PATHS = ("cluster", "square", "tickets", "direct", "dense", "screen", "bank")
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}


class Shape(NamedTuple):
    """N anchors of D dimensions against M candidates, or themselves. `bank`: these have labels of their own; else N < M
    means that the anchors are the first of the candidates, as where batches are gathered from several processes."""

    N: int
    D: int
    M: int = 0
    bank: bool = False
    dtype: str = "float32"
    k: int = 10

    @property
    def candidates(self) -> int:
        """M, which is N in the self case."""
        return self.M or self.N

    @property
    def label(self) -> str:
        """How records call it."""
        kind = "bank " if self.bank else "gather " if self.M else ""
        against = f" x {self.M}" if self.M else ""
        return f"{kind}{self.N}{against} x {self.D} {self.dtype}" + (f" k {self.k}" if self.k != 10 else "")

    @property
    def text(self) -> str:
        """How the table calls it."""
        middle = f" against {self.M}" if self.M else ""
        tail = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"{self.N}{middle} x {self.D}{tail}" + ("" if self.k == 10 else f", k = {self.k}")


SHAPES = (
    Shape(16, 64),
    Shape(32, 512),
    Shape(64, 2048),
    Shape(128, 2048),
    Shape(256, 2048),
    Shape(512, 2048),
    Shape(768, 2048),
    Shape(1024, 2048),
    Shape(1024, 512, k=100),
    Shape(1536, 128),
    Shape(2048, 512),
    Shape(2048, 2048),
    Shape(4096, 512),
    Shape(8192, 512),
    Shape(8192, 2048),
    Shape(8192, 2048, dtype="bfloat16"),
    Shape(65536, 128, dtype="bfloat16"),
    Shape(65536, 2048),
    Shape(100000, 128, dtype="bfloat16"),
    Shape(64, 128, 16384, bank=True),
    Shape(64, 128, 65536, bank=True),
    Shape(64, 2048, 16384, bank=True),
    Shape(64, 2048, 65536, bank=True),
    Shape(128, 2048, 16384, bank=True),
    Shape(128, 2048, 65536, bank=True),
    Shape(256, 128, 65536, bank=True),
    Shape(256, 2048, 4096, bank=True),
    Shape(256, 2048, 16384, bank=True),
    Shape(256, 2048, 65536, bank=True),
    Shape(512, 2048, 8192),
    Shape(4096, 512, 512, bank=True),
    Shape(16384, 512, 256, bank=True),
)
"""Those of the table: what the goals name, and both sides of where the plan changes its mind."""


def planned(shape: Shape, path: str = "auto", batch: str = "random") -> dict[str, Any]:
    """What `cuda_plan` says of a forward on an H200. Raises ValueError where a forced path cannot serve."""
    return dict(
        _C.cuda_plan(
            N=shape.N,
            M=shape.candidates,
            D=shape.D,
            k=shape.k,
            dtype=DTYPES[shape.dtype],
            symmetric=shape.candidates == shape.N and not shape.bank,
            path=path,
            batch=batch,
        )
    )


def predicted_us(shape: Shape, path: str = "auto") -> float | None:
    """Of a forward in a CUDA graph; None where the path cannot serve."""
    with suppress(ValueError):
        return float(planned(shape, path)["predicted_us"])
    return None


def measured(record: Record) -> dict[tuple[Shape, str], float]:
    """(shape, path) -> microseconds of a forward in a graph: forced paths, else what the planner of that time took."""
    found: dict[tuple[Shape, str], float] = {}
    for step in ("loss", "paths"):
        for case in render.cases_of(record, step):
            if (case["backend"], case["scope"], case["how"]) != ("cuda", "forward", "graph"):
                continue
            if case["median_us"] is None or case["path"] is None:
                continue
            M = 0 if case["M"] == case["N"] and not case["bank"] else case["M"]
            shape = Shape(case["N"], case["D"], M, case["bank"], case["dtype"], case["k"])
            found[shape, case["path"]] = case["median_us"]
    return found


def costs(record: str) -> list[list[str]]:
    """Rows of the table: each path that serves, predicted, the planned one bold, and measured in brackets."""
    times = measured(records.read(RESULTS / record))
    rows = []
    for shape in SHAPES:
        chosen = planned(shape)["path"]
        row = [shape.text]
        for path in PATHS:
            us = predicted_us(shape, path)
            cell = "" if us is None else render.digits(us)
            if path == chosen:
                cell = f"**{cell}**"
            if (shape, path) in times:
                cell += f" ({render.digits(times[shape, path])})"
            row.append(cell)
        rows.append(row)
    return rows


HARD = (
    ("8 clusters of 256, nearly duplicates", Shape(2048, 512), "clusters"),
    ("the same, each cluster one identity", Shape(2048, 512), "large clusters"),
    ("features collapsed to one point and roundings", Shape(8192, 2048), "clusters"),
    ("32 clusters of 256, each one identity", Shape(8192, 2048), "large clusters"),
    ("all rows identical, identities of up to 128", Shape(8192, 2048), "identical"),
    ("all rows identical, identities of 1024", Shape(8192, 2048), "large identical"),
)
"""Batches that the first screening cannot decide, and what the model takes them for (csrc/cuda/plan/cost.h)."""


def hard_batches() -> list[list[str]]:
    """Rows of the table: predicted for the batch, for random features of its shape, and their ratio."""
    rows = []
    for name, shape, batch in HARD:
        hard, random = (float(planned(shape, batch=each)["predicted_us"]) for each in (batch, "random"))
        rows.append([name, shape.text, render.digits(hard), render.digits(random), f"{hard / random:.2f}"])
    return rows


TABLES: dict[str, tuple[list[str], Callable[..., list[list[str]]]]] = {
    "costs": (["N x D", *PATHS], costs),
    "hard-batches": (["batch", "N x D", "forward", "random", "ratio"], hard_batches),
}
"""Marker of a table -> its header, and what makes its rows from the marker's arguments."""


def page(text: str) -> str:
    """The page with its tables written anew. Raises ValueError for a marker without a table."""
    lines = text.splitlines()
    made: list[str] = []
    at = 0
    while at < len(lines):
        made.append(lines[at])
        name, *arguments = lines[at].removeprefix("<!-- table:").removesuffix(" -->").split() or [""]
        at += 1
        if not lines[at - 1].startswith("<!-- table:"):
            continue
        if name not in TABLES:
            raise ValueError(f"expected one of {', '.join(TABLES)} in {lines[at - 1]}")
        header, rows_of = TABLES[name]
        while at < len(lines) and lines[at].startswith("|"):
            at += 1
        made += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        made += [f"| {' | '.join(row)} |" for row in rows_of(*arguments)]
    return "\n".join(made) + "\n"


def main(arguments: list[str]) -> int:
    """Exit status: 0, or 1 if, with --check, the page differs."""
    parser = argparse.ArgumentParser(description="Write the predicted times of csrc/cuda/README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    options = parser.parse_args(arguments)
    present = PAGE.read_text(encoding="utf-8")
    wanted = page(present)
    if not options.check:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    sys.stdout.writelines(
        difflib.unified_diff(present.splitlines(True), wanted.splitlines(True), str(PAGE), "what the model says")
    )
    if present != wanted:
        print(f"FAILED {PAGE}: not what the model says; write it with {COMMAND}")
    return int(present != wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
