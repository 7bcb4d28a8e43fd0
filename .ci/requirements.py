"""Prints requirements of pyproject.toml, one a line as pip reads them: a dependency group, or an extra.

    python .ci/requirements.py lint    the linters, in exact versions
    python .ci/requirements.py docs    what builds the site

`pip install --group` reads groups itself from pip 25.1 on; older ones come with the Pythons that the package serves.
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


def requirements(name: str) -> list[str]:
    """Those of a dependency group or, where there is no group of that name, of an extra.

    Raises:
        KeyError: for a name that is neither.
    """
    pyproject = read_pyproject()
    groups: dict[str, list[str]] = {**pyproject["project"]["optional-dependencies"], **pyproject["dependency-groups"]}
    return groups[name]


if __name__ == "__main__":
    print(*requirements(sys.argv[1]), sep="\n")
