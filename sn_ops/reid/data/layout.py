"""What the loaders share: finding a data set's folders, reading file names, and errors about a copy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .images import SUFFIXES
from .records import JUNK, Sample

MARKET_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
"""Folders of training, query and gallery images in Market-1501's layout."""
_SUFFIXES = tuple(SUFFIXES)
_NAME = re.compile(r"(-1|\d+)_c(\d+)(?!\d)")


@dataclass(frozen=True)
class Origin:
    """A data set's name and where to get it, for error messages."""

    name: str
    source: str
    """The paper and the authors' page."""

    def missing(self, expected: str, got: str) -> FileNotFoundError:
        """The error for a missing file or folder."""
        return FileNotFoundError(
            f"sn_ops.reid: {self.name}: expected {expected}, got {got}. Where to get it: {self.source}"
        )

    def wrong(self, expected: str, got: object) -> ValueError:
        """The error for a difference from the authors' archive."""
        return ValueError(
            f"sn_ops.reid: {self.name}: expected {expected}, got {got}. Where to get the whole set: {self.source}"
        )

    def check_numbers(self, numbers: Mapping[str, tuple[int, int]]) -> None:
        """Raises ValueError unless the two numbers of each kind, (expected, got), are equal."""
        for what, (expected, got) in numbers.items():
            if got != expected:
                remedy = (
                    "check_counts=False (on the command line --set data.options.check_counts=false) takes it as it is"
                )
                raise self.wrong(f"{expected} {what}", f"{got}; {remedy}")

    def locate(self, root: str | os.PathLike[str], folder: str, parts: Sequence[str]) -> Path:
        """The folder that has the parts: `root/folder`, or root itself if it was renamed.

        Args:
            root: where to look.
            folder: the name of the data set's folder.
            parts: names of folders or files in it; none: the first of the two folders that exists.

        Raises:
            FileNotFoundError: no root, or a part is in neither folder; the message names the missing parts.
        """
        root = Path(root).expanduser()
        if not root.is_dir():
            raise self.missing(f"a folder with {folder} in it", f"no folder {root}")
        places = (root / folder, root)
        if not parts:
            return places[0] if places[0].is_dir() else root
        found = max(places, key=lambda place: sum((place / part).exists() for part in parts))
        absent = [part for part in parts if not (found / part).exists()]
        if len(absent) == len(parts):
            raise self.missing(f"{', '.join(parts)} in {places[0]} or in {root}", "none of them")
        if absent:
            raise self.missing(f"{', '.join(parts)} in {found}", f"no {', no '.join(absent)}")
        return found

    def named_images(self, folder: Path, cameras: int | None) -> tuple[Sample, ...]:
        """The images of a folder in Market-1501's naming, by name: `0002_c1s1_000451_03.jpg` is identity 2, camera 0.

        Files with another suffix are skipped: Market-1501's own archive has a `Thumbs.db`.

        Args:
            folder: where the images are.
            cameras: how many cameras there are; None: any number.

        Raises:
            ValueError: an image's name does not begin with identity and camera, or has a camera beyond the last.
        """
        samples = []
        for name in image_names(folder):
            match = _NAME.match(name)
            if match is None:
                raise self.wrong(f"names like 0002_c1s1_000451_03.jpg in {folder}", name)
            camera = int(match[2])
            if camera < 1 or (cameras is not None and camera > cameras):
                raise self.wrong(f"cameras from 1 to {cameras or 'the last'} in {folder}", name)
            samples.append(Sample(folder / name, int(match[1]), camera - 1))
        return tuple(samples)

    def check_identities(self, train: Iterable[Sample], query: Iterable[Sample], gallery: Iterable[Sample]) -> None:
        """Raises ValueError where files must be in a wrong folder: a training or query identity that is no person, one
        in both training and test, or a query identity that is not in the gallery.
        """
        known, wanted = {s.pid: s.path for s in train}, {s.pid: s.path for s in query}
        found = {s.pid: s.path for s in gallery}
        for part, those in (("training", known), ("query", wanted)):
            for pid, path in those.items():
                if pid < 1:
                    raise self.wrong(f"identities from 1 among the {part} images", f"{pid} in {path}")
        for part, those in (("query", wanted), ("gallery", found)):
            for pid, path in those.items():
                if pid in known:
                    raise self.wrong(
                        f"no identity in both training and {part} images", f"{pid} in {known[pid]} and {path}"
                    )
        for pid, path in wanted.items():
            if pid not in found:
                raise self.wrong("every queried identity in the gallery", f"{pid} in {path} alone")


def image_names(folder: Path) -> list[str]:
    """The names of a folder's images, sorted, independent of the file system's order."""
    return sorted(name for name in os.listdir(folder) if name.lower().endswith(_SUFFIXES) and not name.startswith("."))


def without_junk(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """The images that count in a score."""
    return tuple(sample for sample in samples if sample.pid != JUNK)


def of_queries(query: Iterable[Sample], images: Iterable[Sample]) -> tuple[tuple[Sample, ...], set[tuple[int, int]]]:
    """The images of a queried (identity, camera), and the queried (identity, camera) pairs without an image."""
    wanted = {(sample.pid, sample.camera) for sample in query}
    multi = tuple(sample for sample in images if (sample.pid, sample.camera) in wanted)
    return multi, wanted - {(sample.pid, sample.camera) for sample in multi}


def people(samples: Iterable[Sample]) -> int:
    """The number of identities, without junk and distractors."""
    return len({sample.pid for sample in samples if sample.pid > 0})
