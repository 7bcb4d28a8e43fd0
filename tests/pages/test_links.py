"""Every relative link and every file that a page names exists."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.pages import LINKED, ROOT, name_of, prose

LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = "|".join((r"\.ci", "benchmarks", "csrc", "docs", "sn_ops", "tests"))
# Paths from the root of the repository: in backquotes, and in fenced blocks and drawings with their suffix.
NAMED = re.compile(rf"`((?:{FOLDERS})/[\w./*-]*)")
DRAWN = re.compile(rf"(?<![\w./])((?:{FOLDERS})/[\w./-]+\.(?:cpp|cu|cuh|h|json|md|py|sh))\b")
# Native sources by the last part of their path, as pages of csrc name them.
SOURCE = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:cpp|cu|cuh|h))`")
# What appears only once something is built or run.
MADE = ("benchmarks/gpu/built", "build/")


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links to them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)).lower() for title in titles]
    return {title.strip().replace(" ", "-") for title in plain}


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"{link}: no such heading"


def missing_files(page: Path) -> Iterator[str]:
    for name in sorted({*NAMED.findall(prose(page)), *DRAWN.findall(page.read_text(encoding="utf-8"))}):
        path = posixpath.normpath(name.rstrip("."))
        if not path.startswith(MADE) and not any(ROOT.glob(path)):
            yield name
    for name in SOURCE.findall(prose(page)):
        if not name.startswith(tuple(FOLDERS.split("|"))) and not any(ROOT.glob(f"[bct]*/**/{name}")):
            yield name


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken_links(page))


@pytest.mark.parametrize("page", [*LINKED, *sorted((ROOT / "docs").glob("**/*.svg"))], ids=name_of)
def test_named_files_exist(page: Path) -> None:
    assert not list(missing_files(page))


def test_what_is_missing_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `thing`\n[a](page.md#one-thing) [b](nowhere.md) [c](#two)\n"
        "`csrc/cpu/nothing.cpp` `csrc/*` `no.cuh` `simd.h`\n"
        "```\npython tests/none.py\n```\n"
    )
    assert list(broken_links(page)) == ["nowhere.md: no such file", "#two: no such heading"]
    assert list(missing_files(page)) == ["csrc/cpu/nothing.cpp", "tests/none.py", "no.cuh"]
