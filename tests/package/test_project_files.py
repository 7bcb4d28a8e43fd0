"""What files at the root say twice, or of other files: linters' versions, the package's version."""

from __future__ import annotations

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
