"""The list of tests/mutants does not rot: each mutant applies, and its tests exist. CONTRIBUTING.md: how it is run."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from mutants.catalogue import MUTANTS
from mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]


@cache
def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


def fault(mutant: Mutant) -> str:
    """Why the mutant cannot be run; empty if it can."""
    if (count := (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)) != 1:
        return f"its text occurs {count} times in {mutant.file}"
    if mutant.old == mutant.new or not mutant.why:
        return "it changes nothing, or nobody knows why that is wrong"
    for killer in mutant.killers:
        file, _, name = killer.partition("::")
        if not (ROOT / file).is_file() or name.partition("[")[0] not in functions(ROOT / file):
            return f"there is no test {killer}"
    return "" if mutant.killers else "no test kills it"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_run(mutant: Mutant) -> None:
    assert fault(mutant) == ""


def test_names_are_distinct() -> None:
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []


def test_a_mutant_that_no_longer_applies_is_found() -> None:
    one = MUTANTS[0]
    for broken in (
        Mutant("a", one.file, "no such text", "x", "y", one.killers),
        Mutant("a", one.file, "float", "x", "y", one.killers),
        Mutant("a", one.file, one.old, one.old, "y", one.killers),
        Mutant("a", one.file, one.old, "x", "y", ("tests/package/test_mutants.py::test_nothing",)),
        Mutant("a", one.file, one.old, "x", "y", ()),
    ):
        assert fault(broken) != ""
