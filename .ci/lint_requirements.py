"""Prints the linters and their versions, the dependency group "lint" of pyproject.toml, one a line as pip reads them.

`pip install --group lint` does the same from pip 25.1 on; older ones come with the Pythons that the package serves.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def read_pyproject() -> dict[str, Any]:
    """All of pyproject.toml."""
    with PYPROJECT.open("rb") as file:
        return tomllib.load(file)


def lint_requirements() -> list[str]:
    """As pyproject.toml lists them."""
    requirements: list[str] = read_pyproject()["dependency-groups"]["lint"]
    return requirements


if __name__ == "__main__":
    print(*lint_requirements(), sep="\n")
