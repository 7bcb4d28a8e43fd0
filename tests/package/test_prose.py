"""The check of comments, docstrings and Markdown (.ci/prose.py): what it finds in each language, what it lets pass."""

from __future__ import annotations

from pathlib import Path

import pytest

import prose

WIDE = "wide " * 24 + "line"
assert len(WIDE) == prose.WIDTH + 4


def found(folder: Path, name: str, text: str) -> list[tuple[int, str]]:
    """Lines with something to correct, and the first word of what."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return [(finding.line, finding.what.split()[0].strip("'")) for finding in prose.check(str(path))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "# A comment of two lines, the second of which is\n# short.\n"),
        ("a.py", 'def f():\n    """A docstring of two lines, the second of which is\n    short."""\n'),
        ("a.py", 'x = 1\n"""An attribute of two lines, the second of which is\nshort."""\n'),
        ("a.cpp", "int x;  // A comment behind code, of which the rest is\n        // short.\n"),
        ("a.cu", "/* A comment of two lines, the second of which is\n   short. */\n"),
        ("a.cu", "/**\n * A comment of some lines, the last of which is\n * short.\n */\n"),
        ("a.cuh", "// - an item of a list with a second line that is\n//   short.\n"),
        ("a.h", "//   name    what it is, with a second line that is\n//           short.\n"),
        ("CMakeLists.txt", "# A comment of two lines, the second of which is\n# short.\n"),
        ("run", "#!/usr/bin/env bash\n# A comment of two lines, which is not\n# short.\n"),
        ("a.toml", "[a]\n# A comment of two lines, the second of which is\n# short.\n"),
        ("a.md", "# Title\n\nA paragraph of two lines, the second of which is\nshort.\n\nAnother one.\n"),
        ("a.md", "1. First of all\n2. An item of a list with a second line that is\n   short.\n"),
    ],
)
def test_a_word_alone_on_the_last_line(tmp_path: Path, name: str, text: str) -> None:
    line = next(number for number, each in enumerate(text.splitlines(), 1) if "short." in each)
    assert found(tmp_path, name, text) == [(line, "short.")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", f"# {WIDE}\n"),
        ("a.py", f'"""{WIDE}"""\n'),
        ("a.py", f"x = 1  # {WIDE}\n"),
        ("a.cpp", f"// {WIDE}\n"),
        ("a.cpp", f"/* {WIDE} */\n"),
        ("a.sh", f"# {WIDE}\n"),
        ("a.md", f"{WIDE}\n"),
        ("a.md", f"- {WIDE}\n"),
        ("a.md", f"> {WIDE}\n"),
    ],
)
def test_a_line_that_is_too_wide(tmp_path: Path, name: str, text: str) -> None:
    assert found(tmp_path, name, text) == [(1, str(len(text) - 1))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "# One line.\n"),
        ("a.py", "# These two lines are\n# as they should be.\n"),
        ("a.py", "# A long word may stand alone on the\n# last_line_of_all\n"),
        ("a.py", "# A formula is no word:\n# 2**31\n"),
        ("a.py", "# One comment of its own.\n\n# Another\n"),
        ("a.py", '"""Arguments.\n\nArgs:\n    first\n    second\n"""\n'),
        ("a.py", '"""An example:\n\n>>> two words\nshort\n"""\n'),
        ("a.py", f'text = "# {WIDE}"\n'),
        ("a.py", f"x = 1  # type: ignore[assignment]  {WIDE}\n"),
        ("a.cpp", f'auto text = "// {WIDE}";\n'),
        ("a.cpp", "int big = 1'000'000;  // two words\nint small = 1'000;    // alone\n"),
        ("a.cpp", f'auto text = R"(\n// {WIDE}\n)";\n'),
        ("a.md", f"| {WIDE} | a cell |\n"),
        ("a.md", f"```\n{WIDE}\n\ntwo words\nalone\n```\n"),
        ("a.md", f"[two words](https://example.org/{'x' * 120})\n"),
        ("a.md", "Two words and then\n\nalone.\n"),
        ("a.json", f'"# {WIDE}"\n'),
    ],
)
def test_what_passes(tmp_path: Path, name: str, text: str) -> None:
    assert found(tmp_path, name, text) == []
