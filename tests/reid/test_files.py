"""Files that are replaced whole: what is left where a write fails, and folders that cannot be flushed."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from sn_ops.reid.files import replace_json, replacing


def test_the_block_ends_or_the_old_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for text in ("old", "new"):
        with replacing(file) as unfinished:
            assert unfinished == tmp_path / "a.txt.part"
            unfinished.write_text(text)

    def interrupted() -> None:
        with replacing(file) as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As on network and FUSE file systems."""
    flushed, fsync = [], os.fsync

    def refuses_folders(opened: int) -> None:
        flushed.append(stat.S_ISDIR(os.fstat(opened).st_mode))
        if flushed[-1]:
            raise OSError(number, os.strerror(number))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    assert replace_json(tmp_path / "made" / "a.json", [1]).read_text() == "[\n 1\n]\n"
    assert flushed == [False, True]


@pytest.mark.parametrize("folder", [False, True])
def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool) -> None:
    def fails(opened: int) -> None:
        if stat.S_ISDIR(os.fstat(opened).st_mode) == folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        replace_json(tmp_path / "a.json", [1])
    assert os.listdir(tmp_path) == (["a.json"] if folder else [])


def test_without_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda opened: pytest.fail("flushed"))
    with replacing(tmp_path / "a", flush=False) as unfinished:
        unfinished.write_bytes(b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
