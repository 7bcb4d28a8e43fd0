"""Checks comments, docstrings and Markdown: no line over 120 characters, no word alone on the last line of a paragraph.

    python .ci/prose.py [path ...]      files or folders; the whole tree without any

Tables, fenced code, HTML and the targets of links in Markdown may be as wide as they are. The exit status is 1 when
there is something to correct.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

WIDTH = 120
ORPHAN = 12  # a longer word may stand alone: wrapping often leaves no other way


class Line(NamedTuple):
    """One line of prose: where it stands, how far its text is indented behind the comment's marker, and the text."""

    number: int
    indent: int
    text: str


class Finding(NamedTuple):
    path: str
    line: int
    what: str


Block = list[Line]  # consecutive lines of one comment, docstring or Markdown file


def line_of(number: int, text: str) -> Line:
    stripped = text.strip()
    return Line(number, len(text) - len(text.lstrip()) if stripped else 0, stripped)


# ---- blocks of each language ---------------------------------------------------------------------------------------


class Comment(NamedTuple):
    """A comment that begins and ends on one line."""

    number: int
    column: int
    alone: bool  # nothing else is on its line
    text: str  # without the marker


def join_comments(comments: list[Comment]) -> Iterator[Block]:
    """Comments on consecutive lines and in the same column are one block, which may begin behind code."""
    block: list[Comment] = []
    for comment in comments:
        last = block[-1] if block else None
        follows = last is not None and comment.alone and comment[:2] == (last.number + 1, last.column)
        if not follows:
            yield [line_of(part.number, part.text) for part in block]
            block = []
        block.append(comment)
    yield [line_of(part.number, part.text) for part in block]


def python_blocks(source: str) -> Iterator[Block]:
    comments = [
        Comment(*token.start, alone=not token.line[: token.start[1]].strip(), text=token.string.lstrip("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    yield from join_comments(comments)
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for statement in body:  # any string that stands alone: docstrings, and those of attributes
            if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
                continue
            if not isinstance(statement.value.value, str) or statement.end_lineno is None:
                continue
            first = " " * statement.col_offset + lines[statement.lineno - 1].strip().lstrip("rRuU").lstrip("\"'")
            rest = lines[statement.lineno : statement.end_lineno]
            texts = [text.removesuffix('"""').removesuffix("'''") for text in (first, *rest)]
            yield [line_of(statement.lineno + place, text) for place, text in enumerate(texts)]


C_TOKEN = re.compile(
    r"""R"(?P<mark>[^(\s]*)\(.*?\)(?P=mark)"  # a raw string
    | "(?:\\.|[^"\\\n])*" | (?<!\w)'(?:\\.|[^'\\\n])+'  # a string, a character
    | //[^\n]* | /\*.*?\*/""",
    re.DOTALL | re.VERBOSE,
)


def c_blocks(source: str) -> Iterator[Block]:
    comments = []
    for match in C_TOKEN.finditer(source):
        token = match[0]
        number = source.count("\n", 0, match.start()) + 1
        before = source[source.rfind("\n", 0, match.start()) + 1 : match.start()]
        if token.startswith("//"):
            comments.append(Comment(number, len(before), not before.strip(), token.lstrip("/")))
        elif token.startswith("/*"):
            first, *rest = token[2:-2].splitlines()
            starred = all(text.lstrip().startswith("*") for text in rest if text.strip())
            rest = [text.lstrip().removeprefix("*") if starred else text for text in rest]
            first = first if starred else " " * (len(before) + 2) + first
            yield [line_of(number + place, text) for place, text in enumerate([first, *rest])]
    yield from join_comments(comments)


def hash_blocks(source: str) -> Iterator[Block]:
    """Shell, CMake, TOML and YAML: comments that have a line to themselves."""
    comments = []
    for number, line in enumerate(source.splitlines(), 1):
        text = line.lstrip()
        if text.startswith("#") and not text.startswith("#!"):
            comments.append(Comment(number, len(line) - len(text), True, text.lstrip("#")))
    yield from join_comments(comments)


def markdown_blocks(source: str) -> Iterator[Block]:
    lines = [line_of(number, re.sub(r"^\s*>", "", line)) for number, line in enumerate(source.splitlines(), 1)]
    yield [line._replace(text="") if line.text.startswith(("|", "<", "#", "!!!", "???")) else line for line in lines]


BLOCKS = {
    **dict.fromkeys([".py", ".pyi"], python_blocks),
    **dict.fromkeys([".cpp", ".h", ".cu", ".cuh"], c_blocks),
    **dict.fromkeys([".sh", ".cmake", ".toml", ".yaml", ".yml", ".cff", ".in"], hash_blocks),
    ".md": markdown_blocks,
}
NAMED = {"CMakeLists.txt": hash_blocks, ".clang-format": hash_blocks, ".gitignore": hash_blocks}


# ---- what is wrong with a block ------------------------------------------------------------------------------------

ITEM = re.compile(r"([-*+•]|\d+[.)])\s")
# What has its further lines indented: an item of a list, "name: text" of a docstring, "name    text" of a table.
HANGING = re.compile(r"([-*+•]|\d+[.)])\s|[\w`*., ]+(\([^)]*\))?:\s|\S+(\s\S+)*\s{2,}\S")
FENCE = re.compile(r"```|~~~")
PRAGMA = re.compile(r"(type:|noqa|NOLINT|clang-format)")  # for a tool, not for a reader
LINK = re.compile(r"\]\([^)]*\)|\]\[[^\]]*\]|<?https?://\S+")


def without_code(block: Block) -> Block:
    """The block with fenced code, and examples of a Python session, as empty lines."""
    inside = False
    prose = []
    for line in block:
        fence = FENCE.match(line.text) is not None
        prose.append(line._replace(text="") if fence or inside or line.text.startswith(">>>") else line)
        inside ^= fence
    return prose


def paragraphs(block: Block) -> Iterator[Block]:
    """Empty lines, items of a list and changes of the indentation part paragraphs."""
    current: Block = []
    for line in block:
        if not line.text:
            yield current
            current = []
            continue
        if current:
            hanging = len(current) == 1 and line.indent > current[0].indent and HANGING.match(current[0].text)
            if ITEM.match(line.text) or (line.indent != current[-1].indent and not hanging):
                yield current
                current = []
        current.append(line)
    yield current


def is_orphan(paragraph: Block) -> bool:
    if len(paragraph) < 2:
        return False
    before, last = paragraph[-2].text, paragraph[-1].text
    if " " in last or len(last) >= ORPHAN or " " not in before:  # a column of single words is a list
        return False
    return re.search(r"[^\W\d_]", last) is not None and LINK.search(last) is None


def check(path: str) -> Iterator[Finding]:
    source = Path(path).read_text(encoding="utf-8")
    name = Path(path)
    blocks = NAMED.get(name.name) or BLOCKS.get(name.suffix)
    if blocks is None and source.startswith("#!"):
        blocks = python_blocks if "python" in source.split("\n", 1)[0] else hash_blocks
    if blocks is None:
        return
    whole = source.splitlines()
    for block in blocks(source):
        prose = without_code(block)
        for line in prose:
            text = whole[line.number - 1] if line.text and not PRAGMA.match(line.text) else ""
            width = len(LINK.sub("]", text) if name.suffix == ".md" else text)
            if width > WIDTH:
                yield Finding(path, line.number, f"{width} characters, {WIDTH} at most")
        for paragraph in paragraphs(prose):
            if is_orphan(paragraph):
                last = paragraph[-1]
                yield Finding(path, last.number, f"{last.text!r} is alone on the last line")


def tracked(paths: list[str]) -> list[str]:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths]
    names = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in names if name and Path(name).is_file()]


def is_text(path: str) -> bool:
    with Path(path).open("rb") as file:
        return b"\0" not in file.read(4096)


def main(paths: list[str]) -> int:
    findings = sorted({finding for path in tracked(paths) if is_text(path) for finding in check(path)})
    for finding in findings:
        print(f"{finding.path}:{finding.line}: {finding.what}")
    if findings:
        print(f"{len(findings)} lines of prose to correct")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
