"""What files at the root say twice, or of other files: linters' versions, the package's version, paths in a page."""

from __future__ import annotations

import re

import pytest
import yaml

import requirements

ROOT = requirements.PYPROJECT.parent


def test_pre_commit_has_the_linters_of_pyproject() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "clang-format", "prose", "mypy"}
    pinned = {requirement for hook in hooks for requirement in hook.get("additional_dependencies", [])}
    mypy = {each for each in requirements.requirements("lint") if each.startswith("mypy")}
    assert pinned == {*requirements.requirements("lint")} - mypy


def test_citation_is_of_this_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = requirements.read_pyproject()["project"]
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert citation["repository-code"] == project["urls"]["Source"]
    assert citation["references"][0]["url"] == project["urls"]["Paper"]


def paths_in(page: str) -> list[str]:
    """What stands between backticks and looks like a path; `a/{b,c}` is two of them."""
    found = []
    for code in re.findall(r"`([^`\s]+)`", page):
        before, brace, rest = code.partition("{")
        inside, _, after = rest.partition("}")
        found += [f"{before}{name}{after}" for name in inside.split(",")] if brace else [code]
    return [name for name in found if "/" in name or re.search(r"\.(py|md|cpp|cuh?|h|sh|txt|toml|ya?ml|cff)$", name)]


def test_paths_of_a_page_are_found() -> None:
    page = "`a/{b,c}/d.cu`, `README.md`, `python a.py`, `name`, `sn_ops.reid`, `csrc/`"
    assert paths_in(page) == ["a/b/d.cu", "a/c/d.cu", "README.md", "csrc/"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md"])
def test_every_path_is_there(page: str) -> None:
    named = paths_in((ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []
