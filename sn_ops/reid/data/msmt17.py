"""MSMT17 (Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-Identification, CVPR 2018)."""

from __future__ import annotations

import itertools
import os
from pathlib import Path, PurePosixPath

from .layout import Origin, people
from .records import Sample, Split

ORIGIN = Origin(
    "MSMT17",
    "Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-Identification, CVPR 2018; the authors' page "
    "of the set at Peking University (PKU-VMC, pkuvmc.com), which sends it on a signed agreement",
)
FOLDERS = {"V1": ("MSMT17_V1", "train", "test"), "V2": ("MSMT17_V2", "mask_train_v2", "mask_test_v2")}
LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
CAMERAS = 15
TRAIN_IDENTITIES = 1041
TEST_IDENTITIES = 3060


def load(root: str | os.PathLike[str], *, version: str = "V1", check_counts: bool = True) -> Split:
    """MSMT17. Training images are those of `list_train.txt` and `list_val.txt` together (the same identities), as in
    the paper: 32621.

    The lists number training and test identities from 0 each. Here they are distinct, and none is 0, the identity of
    distractors: training identity p of the lists becomes p + 1, test identity p becomes p + 1042.

    Args:
        root: the folder with the lists, or the folder that contains `MSMT17_V1` or `MSMT17_V2`.
        version: "V1", or "V2" (the same images with faces blurred).
        check_counts: images and identities of the authors' archive.

    Raises:
        FileNotFoundError: a folder, list or listed image is missing; the message names it and where to get it.
        ValueError: another version; lines, names, numbers or identities that are not the set's.
    """
    if version not in FOLDERS:
        raise ValueError(f"sn_ops.reid: MSMT17: expected version V1 or V2, got {version!r}")
    folder, train_images, test_images = FOLDERS[version]
    place = ORIGIN.locate(root, folder, (train_images, test_images, *LISTS))
    train, val = (_listed(place / name, place / train_images, 1, TRAIN_IDENTITIES) for name in LISTS[:2])
    query, gallery = (
        _listed(place / name, place / test_images, TRAIN_IDENTITIES + 1, TEST_IDENTITIES) for name in LISTS[2:]
    )
    for first, second, names in ((train, val, LISTS[:2]), (query, gallery, LISTS[2:])):
        both = {sample.path for sample in first} & {sample.path for sample in second}
        if both:
            raise ORIGIN.wrong(f"no image in both {names[0]} and {names[1]}", min(both))
    train = tuple(sorted(train + val, key=_name))
    if check_counts:
        ORIGIN.check_numbers(
            {
                "images in list_train.txt and list_val.txt": (32621, len(train)),
                "images in list_query.txt": (11659, len(query)),
                "images in list_gallery.txt": (82161, len(gallery)),
                "training identities": (TRAIN_IDENTITIES, people(train)),
                "query identities": (TEST_IDENTITIES, people(query)),
                "gallery identities": (TEST_IDENTITIES, people(gallery)),
            }
        )
    ORIGIN.check_identities(train, query, gallery)
    return Split(f"{ORIGIN.name} {version}", train, query, gallery)


def _listed(file: Path, folder: Path, first: int, identities: int) -> tuple[Sample, ...]:
    """The images of a list, by name: lines like `0000/0000_000_01_0303morning_0008_0.jpg 0` (identity 0, camera 1)."""
    samples = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        # An image's folder repeats its identity; the third part of its name is the camera.
        parts = PurePosixPath(fields[0]).name.split("_")
        try:
            pid, camera = int(fields[1]), int(parts[2])
            repeated = int(PurePosixPath(fields[0]).parent.name)
        except (IndexError, ValueError):
            raise ORIGIN.wrong(
                "lines like '0000/0000_000_01_0303morning_0008_0.jpg 0'", f"{line!r} in {file}, line {number}"
            ) from None
        if not 1 <= camera <= CAMERAS:
            raise ORIGIN.wrong(f"cameras from 1 to {CAMERAS}", f"{line!r} in {file}, line {number}")
        if pid != repeated or not 0 <= pid < identities:
            raise ORIGIN.wrong(
                f"an identity from 0 to {identities - 1} that is also the image's folder",
                f"{line!r} in {file}, line {number}",
            )
        samples.append(Sample(folder / fields[0], pid + first, camera - 1))
    samples.sort(key=_name)
    for before, after in itertools.pairwise(samples):
        if before.path == after.path:
            raise ORIGIN.wrong(f"every image once in {file}", f"{after.path} twice")
    absent = [sample.path for sample in samples if not sample.path.is_file()]
    if absent:
        raise ORIGIN.missing(f"the {len(samples)} images of {file}", f"no {absent[0]} ({len(absent)} missing)")
    return tuple(samples)


def _name(sample: Sample) -> str:
    return str(sample.path)
