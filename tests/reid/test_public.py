"""The public face of sn_ops.reid: its names, and where they come from."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from sn_ops import reid


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse(Path(str(reid.__file__)).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    seen = {alias.asname: node.module for node in imports for alias in node.names if alias.asname == alias.name}
    assert seen == reid._HOME


def test_names_are_those_of_the_subpackages() -> None:
    assert len(reid.__all__) == sum(map(len, reid._PUBLIC.values())) == 17
    for name in reid.__all__:
        home = importlib.import_module(f"sn_ops.reid.{reid._HOME[name]}")
        assert getattr(reid, name) is getattr(home, name) and name in home.__all__ and name in dir(reid)
    with pytest.raises(AttributeError, match=r"^module 'sn_ops.reid' has no attribute 'Trainer'$"):
        reid.Trainer  # noqa: B018
