"""The manifest that `prepare.sh` leaves beside what it built: from which commit, with what, and the files' hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROGRAMS = HERE / "programs"
"""Folder of the steps' programs."""

BUILT = HERE / "built"
"""Folder of the compiled programs and of the manifest."""

PATH = BUILT / "manifest.json"


def read() -> dict[str, Any]:
    """The manifest; empty where nothing was prepared."""
    try:
        found: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file; empty where it is missing."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def state(known: dict[str, Any]) -> dict[str, Any] | None:
    """What the libraries here were built from, and whether they are still the files that were built."""
    if not known:
        return None
    files: dict[str, str] = known.get("files", {})
    changed = [name for name, hashed in files.items() if digest(ROOT / name) != hashed]
    return {name: known.get(name) for name in ("commit", "dirty", "architecture", "torch", "nvcc")} | {
        "changed_since": changed
    }
