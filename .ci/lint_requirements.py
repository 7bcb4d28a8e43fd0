"""Prints the linters and their versions, the dependency group "lint" of pyproject.toml, one a line as pip reads them.

`pip install --group lint` does the same from pip 25.1 on; older ones come with the Pythons that the package serves.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lint_requirements(path: Path = PYPROJECT) -> list[str]:
    """As pyproject.toml lists them."""
    with path.open("rb") as file:
        requirements: list[str] = tomllib.load(file)["dependency-groups"]["lint"]
    return requirements


if __name__ == "__main__":
    print(*lint_requirements(), sep="\n")
