"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path


def replace_text(file: Path, text: str) -> Path:
    """Writes a text file in UTF-8, with the folders above it, replacing it atomically.

    Raises:
        OSError: the system refuses.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)
    return file


def replace_json(file: Path, record: object) -> Path:
    """Writes plain values as JSON, as `replace_text` does."""
    return replace_text(file, json.dumps(record, indent=1) + "\n")
