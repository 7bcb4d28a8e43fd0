"""The layers of sn_ops and sn_ops.reid: imports point down, in the order of their docstrings, and form no circle.

Modules are parsed, not imported: imports inside functions and those for type checkers count too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "sn_ops"
SOURCES = {
    ".".join(("sn_ops", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in PACKAGE.rglob("*.py")
}
# The parts of sn_ops that its users may import; what is not here is the core's own.
PUBLIC = {"sn_ops", "sn_ops.distributed", "sn_ops.metric_learning"}


def imported(name: str, source: str, known: Mapping[str, object]) -> set[str]:
    """The modules of `known` that a module imports; a package is its __init__."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*name.split(".")[: -node.level], *filter(None, [node.module])] if node.level else [node.module or ""]
            )
            # `from . import page` imports a module, `from .html import Report` a name of one.
            parts = {".".join([*base, alias.name]) for alias in node.names}
            found |= {part for part in parts if part in known or f"{part}.__init__" in known}
            found |= {".".join(base)} if parts - found else set()
    whole = {f"{module}.__init__" if f"{module}.__init__" in known else module for module in found}
    return {module for module in whole if module in known}


def layers(package: str) -> list[str]:
    text = ast.get_docstring(ast.parse(SOURCES[f"{package}.__init__"].read_text(encoding="utf-8"))) or ""
    named = re.search(r"^Layers, from the bottom up; [^:]*:(.*?)\.$", text, re.MULTILINE | re.DOTALL)
    assert named is not None
    return named[1].replace("\n", " ").strip().split(", ")


@cache
def edges() -> dict[str, set[str]]:
    return {name: imported(name, file.read_text(encoding="utf-8"), SOURCES) for name, file in SOURCES.items()}


def test_imports_are_found() -> None:
    known = dict.fromkeys(["a.__init__", "a.b.__init__", "a.b.c", "a.b.d", "a.e"])
    lines = [
        "import os, a.e",
        "if x:",
        "  from . import d",
        "  from .d import x, y",
        "  from .. import b",
        "  from ..e import z",
    ]
    assert imported("a.b.c", "\n".join(lines), known) == {"a.e", "a.b.d", "a.b.__init__"}
    package = imported("a.b.__init__", "from .c import x\nfrom . import d, e\n", known)
    assert package == {"a.b.c", "a.b.d", "a.b.__init__"}
    assert imported("a.e", "import a\nfrom a.b import c, x\n", known) == {"a.__init__", "a.b.__init__", "a.b.c"}


@pytest.mark.parametrize("package", ["sn_ops", "sn_ops.reid"])
def test_imports_point_down(package: str) -> None:
    order = layers(package)
    apart = {"__init__", "__main__"}
    depth = package.count(".") + 1
    assert {name.split(".")[depth] for name in SOURCES if name.startswith(f"{package}.")} - apart == set(order)
    upwards = [
        f"{name} imports {target}"
        for name, targets in edges().items()
        for target in targets
        if name.startswith(f"{package}.") and target.startswith(f"{package}.")
        and (layer := name.split(".")[depth]) not in apart | {"reid"}
        and ((below := target.split(".")[depth]) in apart or order.index(below) > order.index(layer))
    ]  # fmt: skip
    assert upwards == []


def test_no_circle() -> None:
    graph = edges()
    # The package's __init__ names everything, for type checkers; at run time it imports nothing before it is asked.
    del graph["sn_ops.reid.__init__"]
    TopologicalSorter(graph).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter(graph | {"sn_ops.reid.files": {"sn_ops.reid.commands"}}).prepare()


def test_the_core_knows_no_trainer_and_the_trainer_the_public_core_alone() -> None:
    for name, targets in edges().items():
        inside = name.startswith("sn_ops.reid.")
        for target in targets:
            if inside and not target.startswith("sn_ops.reid."):
                assert target.removesuffix(".__init__") in PUBLIC, f"{name} imports {target}"
            assert inside or not target.startswith("sn_ops.reid."), f"{name} imports {target}"
