"""The pages of the repository, in Markdown: their fenced blocks, tables and links, each with the marker before it.

A marker is an HTML comment on the line before a block or table, such as `<!-- snippet:loop -->`,
`<!-- not run: needs eight GPUs -->` or `<!-- table:compare compare_synthetic.json -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("CONTRIBUTING.md"), *(ROOT / "docs").glob("*.md")])
"""The pages whose snippets are run and whose tables are held to records."""
LINKED = sorted({*PAGES, ROOT / "CHANGELOG.md", *ROOT.glob("csrc/*/README.md"), *ROOT.glob("benchmarks/**/README.md")})
"""The pages whose links and named files must exist."""

_MARKER = re.compile(r"<!-- (.*) -->")


class Block(NamedTuple):
    """A fenced block or a table."""

    page: str  # from the root of the repository
    line: int  # of its first line, counted from 1
    language: str  # "python", "bash", ...; "table" for a table, "" for a fence without one
    marker: str  # the comment on the line before, without its delimiters; "" if there is none
    lines: tuple[str, ...]  # what is inside the fence; the rows of a table, header and rule included

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    def rows(self) -> list[list[str]]:
        """The cells of a table, without header and rule."""
        return [cells(line) for line in self.lines[2:]]


def name_of(page: Path) -> str:
    """A page as tests name it."""
    return page.relative_to(ROOT).as_posix()


def cells(line: str) -> list[str]:
    """The cells of one row of a table. A bar inside code or behind a backslash is no border."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks and the tables of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        fence = re.match(r"(\s*)(`{3,})(\w*)", lines[at])
        if fence is None and not lines[at].startswith("|"):
            at += 1
            continue
        found = _MARKER.fullmatch(lines[at - 1].strip()) if at > 0 else None
        marker = "" if found is None else found.group(1)
        start = at
        if fence is None:
            while at < len(lines) and lines[at].startswith("|"):
                at += 1
            yield Block(name_of(page), start + 1, "table", marker, tuple(lines[start:at]))
            continue
        at += 1
        while at < len(lines) and lines[at].strip() != fence.group(2):
            at += 1
        inside = tuple(line.removeprefix(fence.group(1)) for line in lines[start + 1 : at])
        yield Block(name_of(page), start + 1, fence.group(3), marker, inside)
        at += 1


def all_blocks(language: str) -> list[Block]:
    """Those of one language on all pages."""
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks, whose line breaks stay."""
    return re.sub(r"^\s*(`{3,}).*?^\s*\1$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
