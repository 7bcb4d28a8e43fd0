"""A user's own images: folders train, query and gallery, or a CSV file that lists them."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .images import SUFFIXES
from .layout import image_names, of_queries
from .records import DISTRACTOR, JUNK, Sample, Split

PARTS = ("train", "query", "gallery", "multi")
_NAME = re.compile(r"(-1|\d+)_c(\d+)(?!\d)")
_CAMERA = re.compile(r"(?:^|_)c(\d+)(?!\d)")
_INTEGER = re.compile(r"-1|\d+")


@dataclass(frozen=True)
class _Row:
    """An image as its folder or line describes it, and where that is, for errors."""

    part: str
    path: Path
    identity: str
    camera: str | None
    where: str


def load(root: str | os.PathLike[str], *, csv: str | os.PathLike[str] | None = None) -> Split:
    """A user's own data set.

    As folders: `train`, `query`, `gallery` and, for multiple query, `multi` in root. An image is in a folder of its
    person (`gallery/anna/0001_c2.jpg`; the camera is the number after `_c` or a leading `c`), or its name begins with
    person and camera as in Market-1501 (`gallery/0007_c2_0001.jpg`).

    As a CSV file: UTF-8, a line of headings, columns `path` (relative to root), `identity`, `part` (train, query,
    gallery, multi) and optionally `camera`.

    Identities are integers, where -1 is junk (left out of the gallery) and 0 a distractor; or they are names, which
    are numbered from 1 in sorted order. Cameras are integers. If no image has a camera, every image gets a camera of
    its own, so that no match is left out; if only some have one, that is an error.

    Args:
        root: the folder with the images.
        csv: the CSV file, relative to the working directory or to root; None: folders.

    Raises:
        FileNotFoundError: a folder, the CSV file or an image of it is missing.
        ValueError: names, lines or identities that are not as above; a person in training and in query or gallery;
            an image twice.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"sn_ops.reid: folder: expected a folder of images, got no folder {root}")
    rows = _folder_rows(root) if csv is None else _csv_rows(root, Path(csv).expanduser())
    pids = _numbered(rows)
    cameras = _cameras(rows)
    parts: dict[str, list[Sample]] = {part: [] for part in PARTS}
    for row, camera in zip(rows, cameras, strict=True):
        pid = pids[row.identity]
        if pid < 1 and row.part in ("train", "query"):
            raise ValueError(
                f"sn_ops.reid: folder: expected people among the {row.part} images, got identity {pid} in {row.where}"
            )
        if pid != JUNK:
            parts[row.part].append(Sample(row.path, pid, camera))
    for part in ("train", "query", "gallery"):
        if not parts[part]:
            raise ValueError(f"sn_ops.reid: folder: expected {part} images in {csv or root}, got none")
    known = {sample.pid: sample.path for sample in parts["train"]}
    for part in ("query", "gallery"):
        for sample in parts[part]:
            if sample.pid in known:
                raise ValueError(
                    f"sn_ops.reid: folder: expected no person in both train and {part}, got "
                    f"{known[sample.pid]} and {sample.path}"
                )
    train, query, gallery, drawn = (tuple(parts[part]) for part in PARTS)
    multi, absent = of_queries(query, drawn)
    if drawn and absent:
        raise ValueError(
            f"sn_ops.reid: folder: expected images for multiple query of every queried person and camera, got none for "
            f"{len(absent)}, the first identity {min(absent)[0]}, camera {min(absent)[1]}"
        )
    return Split("folder", train, query, gallery, multi)


def _folder_rows(root: Path) -> list[_Row]:
    absent = [part for part in PARTS[:3] if not (root / part).is_dir()]
    if absent:
        raise FileNotFoundError(
            f"sn_ops.reid: folder: expected the folders train, query and gallery in {root}, got no "
            f"{', no '.join(absent)}; or name a CSV file"
        )
    rows = []
    for part in PARTS:
        if not (root / part).is_dir():
            continue
        for name in image_names(root / part):
            path = root / part / name
            match = _NAME.match(name)
            if match is None:
                raise ValueError(
                    "sn_ops.reid: folder: expected images in a folder of their person, or names like "
                    f"0007_c2_0001.jpg, got {path}"
                )
            rows.append(_Row(part, path, match[1], match[2], str(path)))
        for person in _folders(root / part):
            deeper = _folders(root / part / person)
            if deeper:
                raise ValueError(
                    "sn_ops.reid: folder: expected a person's images in one folder, got the folder "
                    f"{root / part / person / deeper[0]}"
                )
            for name in image_names(root / part / person):
                path = root / part / person / name
                camera = _CAMERA.search(name)
                rows.append(_Row(part, path, person, None if camera is None else camera[1], str(path)))
    return rows


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _csv_rows(root: Path, file: Path) -> list[_Row]:
    file = file if file.is_absolute() or file.exists() else root / file
    if not file.is_file():
        raise FileNotFoundError(f"sn_ops.reid: folder: expected a CSV file, got no file {file}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"sn_ops.reid: folder: expected a CSV file in UTF-8, got {file}: {error}") from error
    with io.StringIO(text, newline="") as lines:
        table = csv.DictReader(lines)
        columns = table.fieldnames or ()
        absent = [name for name in ("path", "identity", "part") if name not in columns]
        if absent:
            raise ValueError(
                f"sn_ops.reid: folder: expected the columns path, identity, part (and camera) in {file}, got "
                f"no {', no '.join(absent)}"
            )
        rows = [_csv_row(root, line, f"{file}, line {table.line_num}") for line in table]
    seen: dict[Path, str] = {}
    for row in rows:
        if row.part != "multi" and seen.setdefault(row.path, row.where) != row.where:
            raise ValueError(
                f"sn_ops.reid: folder: expected {row.path} once, got it in {seen[row.path]} and {row.where}"
            )
    # Sorted by name, as folders are.
    return sorted(rows, key=lambda row: (PARTS.index(row.part), row.path.as_posix()))


def _csv_row(root: Path, line: Mapping[str | None, Any], where: str) -> _Row:
    if None in line:  # the reader's key for surplus fields
        raise ValueError(f"sn_ops.reid: folder: expected {len(line) - 1} fields, got more in {where}")
    values = {name: (value or "").strip() for name, value in line.items()}
    if values["part"] not in PARTS:
        raise ValueError(f"sn_ops.reid: folder: expected part {', '.join(PARTS)}, got {values['part']!r} in {where}")
    if not values["identity"]:
        raise ValueError(f"sn_ops.reid: folder: expected an identity, got none in {where}")
    path = root / values["path"]
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"sn_ops.reid: folder: expected an image ({', '.join(sorted(SUFFIXES))}), got {path} in {where}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"sn_ops.reid: folder: expected an image, got no file {path} ({where})")
    return _Row(values["part"], path, values["identity"], values.get("camera") or None, where)


def _numbered(rows: Iterable[_Row]) -> dict[str, int]:
    """The number of every identity: itself if all are integers, else its place among the sorted names, from 1."""
    names = sorted({row.identity for row in rows})
    integers = {name: int(name) for name in names if _INTEGER.fullmatch(name)}
    if len(integers) == len(names):
        return integers
    special = {name: pid for name, pid in integers.items() if pid in (JUNK, DISTRACTOR)}
    people = [name for name in names if name not in special]
    return special | {name: number for number, name in enumerate(people, 1)}


def _cameras(rows: Sequence[_Row]) -> list[int]:
    without = [row for row in rows if row.camera is None]
    if len(without) == len(rows):
        several = [row for row in rows if row.part == "multi"]
        if several:
            raise ValueError(
                "sn_ops.reid: folder: expected cameras with images for multiple query, which are of a person under one "
                f"camera, got none, as in {several[0].where}"
            )
        return list(range(len(rows)))
    if without:
        raise ValueError(
            f"sn_ops.reid: folder: expected a camera of every image or of none, got none for {len(without)} of "
            f"{len(rows)}, the first in {without[0].where}"
        )
    cameras = []
    for row in rows:
        if row.camera is None or not row.camera.isdecimal():
            raise ValueError(f"sn_ops.reid: folder: expected an integer camera, got {row.camera!r} in {row.where}")
        cameras.append(int(row.camera))
    return cameras
