"""Fixtures of the data sets' tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.splits import WRITERS, Names


@pytest.fixture(params=sorted(WRITERS))
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Every data set with its miniature tree."""
    return request.param, WRITERS[request.param](tmp_path)


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Names], Path]:
    """Folders that list these names; writing as many files as the full sets have would take too long."""

    def pretend(names: Names) -> Path:
        for part in names:
            (tmp_path / part).mkdir(exist_ok=True)
        monkeypatch.setattr(os, "listdir", lambda folder: names[Path(folder).name])
        return tmp_path

    return pretend
