"""Files that are replaced whole: a reader finds the old one or the new one, never a part."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors of folders that cannot be flushed: on network and FUSE file systems (EINVAL, ENOTSUP), or where the folder may
# be written to but not read (EACCES).
_NO_FLUSH = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EACCES})


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yields the path of a file to write, which takes the place of `path` when the block ends.

    If the block raises, `path` stays as it was, and the unfinished file is removed.

    Args:
        path: the file to make or to replace. Its folder must exist.
        flush: wait until the file and its name are on the disk. Without, a power cut can leave an empty file.

    Yields:
        `path` with the suffix `.part` added.

    Raises:
        OSError: the file cannot be written, flushed or renamed. A folder that cannot be flushed is no error.
    """
    unfinished = path.with_name(path.name + ".part")
    try:
        yield unfinished
        if flush:
            _flush(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if flush:
        try:
            _flush(path.parent)
        except OSError as error:
            if error.errno not in _NO_FLUSH:
                raise


def _flush(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def replace_text(file: Path, text: str) -> Path:
    """Replaces a text file in UTF-8; makes the folders above it.

    Raises:
        OSError: as `replacing`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return file


def replace_json(file: Path, record: object) -> Path:
    """Writes plain values as JSON, as `replace_text` does."""
    return replace_text(file, json.dumps(record, indent=1) + "\n")
