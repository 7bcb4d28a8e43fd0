"""Sizes that keep the sources easy to find one's way in (CONTRIBUTING.md, "Words and style")."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES_A_FILE = 600
FILES_A_FOLDER = 20
KERNEL = re.compile(r"^\s*(?:template\s*<[^;{]*>\s*)?__global__\b", re.MULTILINE)


def sources() -> list[Path]:
    """Source files of csrc and sn_ops; prose, tables and build products are none."""
    endings = {".py", ".h", ".cuh", ".cpp", ".cu"}
    return [file for part in ("csrc", "sn_ops") for file in (ROOT / part).rglob("*") if file.suffix in endings]


def too_long(lines: dict[str, int]) -> list[str]:
    return [f"{name}: {count} lines" for name, count in lines.items() if count > LINES_A_FILE]


def too_full(files: Iterable[Path]) -> list[str]:
    counts = Counter(file.parent for file in files)
    return [f"{folder}: {count} source files" for folder, count in counts.items() if count > FILES_A_FOLDER]


def kernels(text: str) -> int:
    return len(KERNEL.findall(text))


def test_the_rules_can_fail() -> None:
    assert too_long({"a": LINES_A_FILE, "b": LINES_A_FILE + 1}) == ["b: 601 lines"]
    assert too_full([Path(f"a/{i}.h") for i in range(21)] + [Path("b/x.h")]) == ["a: 21 source files"]
    assert kernels("__global__ void a();\ntemplate <class T>\n__global__ void b();\n// of __global__ memory\n") == 2


def test_no_file_is_too_long_and_no_folder_too_full() -> None:
    files = sources()
    assert len(files) > 150
    assert too_long({str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files}) == []
    assert too_full(files) == []


def test_one_kernel_a_file() -> None:
    found = {
        file.name: kernels(file.read_text(encoding="utf-8")) for file in sources() if file.suffix in (".cu", ".cuh")
    }
    assert len(found) > 30
    assert {name: count for name, count in found.items() if count != name.endswith(".cu")} == {}
