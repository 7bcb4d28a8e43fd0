"""Splits of miniature data sets, and file names in the numbers of the full sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sn_ops.reid.data import Sample, Split, load_dataset
from support import miniature

WRITERS: dict[str, Callable[[Path], Path]] = {
    "market1501": miniature.market1501,
    "dukemtmc-reid": miniature.duke,
    "msmt17": miniature.msmt17,
    "cuhk03": miniature.cuhk03,
    "cuhk01": miniature.cuhk01,
}


SMALL = {"cuhk01": {"test_identities": 2}}


def load(name: str, root: Path, **options: object) -> Split:
    """The split of a miniature tree."""
    return load_dataset(name, root, check_counts=False, **SMALL.get(name, {}), **options)


def keys(samples: tuple[Sample, ...]) -> list[tuple[str, int, int]]:
    """Name, identity and camera."""
    return [(sample.path.name, sample.pid, sample.camera) for sample in samples]


def spread(people: range, total: int) -> list[int]:
    """The number of images of each person, `total` in all."""
    least, more = divmod(total, len(people))
    return [least + (n < more) for n in range(len(people))]


Names = dict[str, list[str]]


def people_of(
    name: Callable[[int, list[int], int], list[str]], cameras: int, parts: dict[str, tuple[range, int]]
) -> Names:
    """File names for these people and numbers of images, part by part."""
    return {
        part: [
            each
            for pid, images in zip(people, spread(people, total), strict=True)
            for each in name(pid, [pid % cameras + 1], images)
        ]
        for part, (people, total) in parts.items()
    }


def check_every_number(
    dataset: str, listed: Callable[[Names], Path], names: Names, images: dict[str, int], identities: dict[str, int]
) -> None:
    """The error names the part that has an image less, or one person less."""
    for part, total in images.items():
        root = listed(names | {part: names[part][1:]})
        with pytest.raises(ValueError, match=f"expected {total} images in {part}, got {total - 1};"):
            load_dataset(dataset, root)
    for part, total in identities.items():
        first, second = sorted({name[:4] for name in names[part]} - {"0000", "-1_c"})[:2]
        merged = [name.replace(f"{first}_", f"{second}_", 1) for name in names[part]]
        with pytest.raises(ValueError, match=f"expected {total} identities in {part}, got {total - 1};"):
            load_dataset(dataset, listed(names | {part: merged}))
