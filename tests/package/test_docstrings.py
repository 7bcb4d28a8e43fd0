"""Docstrings of the public names: complete, in the sections that docs/api.md is rendered from.

Every public name has one. Its section Args names each parameter and nothing else, Returns says what comes back, Raises
names the exceptions. Fields of tuples and data classes are in Args or have a docstring of their own.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple, NoReturn, get_type_hints

import pytest

MODULES = ("sn_ops", "sn_ops.distributed", "sn_ops.metric_learning", "sn_ops.reid", "sn_ops.reid.evaluation")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")


def sections_of(text: str) -> dict[str, set[str]]:
    """The entries of each section of a docstring: parameters or exceptions; what Returns says has no names."""
    found: dict[str, set[str]] = {}
    current = ""
    for line in inspect.cleandoc(text).splitlines():
        if line and not line.startswith(" "):
            name = line.removesuffix(":")
            current = name if line.endswith(":") and name in SECTIONS else ""
            if current:
                found[current] = set()
        elif current and (entry := re.match(r" {4}(\*{0,2}\w+(?:, \w+)*)(?: \([^)]*\))?: ", line)):
            found[current] |= {name.lstrip("*") for name in entry[1].split(", ")}
    return found


def never_returns(function: object) -> bool:
    try:
        return get_type_hints(function).get("return") is NoReturn
    except (NameError, TypeError):
        return False


def raised_by(function: Callable[..., Any]) -> tuple[set[type], bool]:
    """The exceptions that a function's own code raises by name, and whether it raises at all."""
    plain = inspect.unwrap(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
    kinds: set[type] = set()
    raises = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            raises = True
            if isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                kind = plain.__globals__.get(node.exc.func.id, getattr(builtins, node.exc.func.id, None))
                if isinstance(kind, type):  # not a function that makes an exception
                    kinds.add(kind)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            raises |= never_returns(plain.__globals__.get(node.func.id))
    return kinds, raises


@dataclass(frozen=True)
class Subject:
    """A public function, method or class, and what its docstring is to say."""

    name: str
    text: str
    parameters: frozenset[str] = frozenset()
    returns: bool = False
    raises: bool = False
    raised: frozenset[type] = frozenset()

    def faults(self) -> Iterator[str]:
        if not self.text.strip():
            yield f"{self.name}: no docstring"
            return
        sections = sections_of(self.text)
        documented = sections.get("Args", set()) | sections.get("Attributes", set())
        if missing := self.parameters - documented:
            yield f"{self.name}: Args does not name {', '.join(sorted(missing))}"
        if unknown := documented - self.parameters:
            yield f"{self.name}: Args names {', '.join(sorted(unknown))}, which it does not take"
        if self.returns and self.parameters and not {"Returns", "Yields"} & sections.keys():
            yield f"{self.name}: no section Returns"
        named = sections.get("Raises", set())
        if self.raises and not named:
            yield f"{self.name}: it raises, and has no section Raises"
            return
        for kind in self.raised:
            if not named & {base.__name__ for base in kind.__mro__}:
                yield f"{self.name}: Raises does not name {kind.__name__}"


def of_function(name: str, function: Callable[..., Any]) -> Subject:
    signature = inspect.signature(function)
    parameters = signature.parameters.keys() - {"self", "cls"}
    raised, raises = raised_by(function)
    returns = signature.return_annotation not in (None, "None", "NoReturn")
    return Subject(name, function.__doc__ or "", frozenset(parameters), returns, raises, frozenset(raised))


def fields_with_docstrings(kind: type) -> set[str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = set()
    for field, behind in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(behind, ast.Expr):
            found.add(field.target.id)
    return found


def documented_elsewhere(kind: type, member: str, protocols: Sequence[type]) -> bool:
    """Whether a base class of sn_ops, or a public protocol that the class follows, has the method and its sections."""
    bases = [base for base in kind.__mro__[1:] if base.__module__.startswith("sn_ops.")]
    bases += [protocol for protocol in protocols if protocol is not kind]
    return any(member in vars(base) for base in bases)


def of_class(name: str, kind: type, protocols: Sequence[type]) -> Iterator[Subject]:
    members = dict(vars(kind))
    text = kind.__doc__ or ""
    if issubclass(kind, tuple) or is_dataclass(kind):
        if text.startswith(f"{kind.__name__}("):  # what dataclass and NamedTuple write where nobody wrote anything
            text = ""
        inherited = {field for base in kind.__mro__[1:] for field in vars(base).get("__annotations__", {})}
        fields = set(vars(kind).get("__annotations__", {})) - inherited - fields_with_docstrings(kind)
        fields = {field for field in fields if not field.startswith("_")}
        check = members.get("__post_init__")
        raised, raises = raised_by(check) if check else (set(), False)
        yield Subject(name, text, frozenset(fields), False, raises, frozenset(raised))
    elif "__init__" in members and kind not in protocols:
        built = of_function(name, members["__init__"])
        yield Subject(name, text, built.parameters, False, built.raises, built.raised)
    else:
        yield Subject(name, text)
    for member, value in members.items():
        if member.startswith("_"):
            continue
        if isinstance(value, property) or documented_elsewhere(kind, member, protocols):
            yield Subject(f"{name}.{member}", inspect.getdoc(value) or "")
        elif isinstance(value, (staticmethod, classmethod)):
            yield of_function(f"{name}.{member}", value.__func__)
        elif inspect.isfunction(value):
            yield of_function(f"{name}.{member}", value)


def subjects_of(module: str) -> Iterator[Subject]:
    home = importlib.import_module(module)
    values = {name: getattr(home, name) for name in home.__all__}
    protocols = [value for value in values.values() if getattr(value, "_is_protocol", False)]
    for name, value in values.items():
        if inspect.isclass(value):
            yield from of_class(f"{module}.{name}", value, protocols)
        elif callable(value):
            yield of_function(f"{module}.{name}", value)


def bare(rows: int) -> int:
    return rows


def incomplete(rows: int, *more: int, **options: int) -> int:
    """A sum.

    Args:
        rows: one number.
        columns: another.
    """
    if rows < 0:
        raise ValueError("too few")
    return rows + len(more) + len(options)


def wrong_error(rows: int) -> int:
    """Rows.

    Args:
        rows: one number.

    Returns:
        The same.

    Raises:
        TypeError: never.
    """
    if rows < 0:
        raise OverflowError("too few")
    return rows


def complete(*rows: int) -> int:
    """Rows.

    Args:
        *rows: numbers.

    Returns:
        How many.

    Raises:
        ArithmeticError: none.
    """
    if not rows:
        raise OverflowError("too few")
    return len(rows)


class Pair(NamedTuple):
    """Two numbers."""

    left: int
    """One."""
    right: int


def test_faults_are_found() -> None:
    """The rules, on functions and a class that break each of them, and on one that does not."""

    def faults(subject: Subject) -> list[str]:
        return list(subject.faults())

    assert faults(of_function("f", bare)) == ["f: no docstring"]
    assert faults(of_function("f", incomplete)) == [
        "f: Args does not name more, options",
        "f: Args names columns, which it does not take",
        "f: no section Returns",
        "f: it raises, and has no section Raises",
    ]
    assert faults(of_function("f", wrong_error)) == ["f: Raises does not name OverflowError"]
    assert faults(of_function("f", complete)) == []
    (pair,) = of_class("Pair", Pair, ())
    assert faults(pair) == ["Pair: Args does not name right"]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_are_complete(module: str) -> None:
    if module == "sn_ops.metric_learning":
        pytest.importorskip("pytorch_metric_learning")
    subjects = list(subjects_of(module))
    assert subjects
    faults = [fault for subject in subjects for fault in subject.faults()]
    assert not faults, "\n" + "\n".join(faults)
