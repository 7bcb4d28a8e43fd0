"""CUHK01 (Li, Zhao and Wang, Human Reidentification with Transferred Metric Learning, ACCV 2012)."""

from __future__ import annotations

import os
import random
import re

from .layout import Origin, image_names
from .records import Sample, Split

ORIGIN = Origin(
    "CUHK01",
    "Li, Zhao and Wang, Human Reidentification with Transferred Metric Learning, ACCV 2012; the CUHK person "
    "re-identification page of Xiaogang Wang's group (archive CUHK01.zip, folder campus)",
)
FOLDER = "campus"
IDENTITIES, IMAGES_EACH = 971, 4
_NAME = re.compile(r"(\d{4})(\d{3})\.png")


def load(
    root: str | os.PathLike[str],
    *,
    split_seed: int = 0,
    test_identities: int = 486,
    shots: int = 1,
    check_counts: bool = True,
) -> Split:
    """CUHK01: 971 people, two images in each of two views; `0001003.png` is image 3 of person 1 (1 and 2 are of the
    first view, 3 and 4 of the second).

    The set defines no split: papers draw test people at random and report the mean over several draws (seeds). The
    first view is the query, the second the gallery.

    Args:
        root: the folder `campus`, or the folder that contains it.
        split_seed: of the draw of test people, and of their images where not all are taken. A seed gives the same split
            on every machine and version of Python.
        test_identities: 486, or 100 in the protocol with most people for training.
        shots: images of a test person in each view: 1 (single-shot) or 2.
        check_counts: 971 people with all four images.

    Raises:
        FileNotFoundError: no folder or image; the message names where to get it.
        ValueError: names or numbers that are not the set's; more test people than there are.
    """
    if shots not in (1, 2):
        raise ValueError(f"sn_ops.reid: CUHK01: expected shots 1 or 2, got {shots!r}")
    place = ORIGIN.locate(root, FOLDER, ())
    names = image_names(place)
    if not names:
        raise ORIGIN.missing(f"images like 0001001.png in {place}", "none")
    views: dict[int, tuple[list[Sample], list[Sample]]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None or not 1 <= int(match[2]) <= IMAGES_EACH or match[1] == "0000":
            raise ORIGIN.wrong(f"names like 0001001.png, images 001 to 004, in {place}", name)
        pid, camera = int(match[1]), (int(match[2]) - 1) // 2
        views.setdefault(pid, ([], []))[camera].append(Sample(place / name, pid, camera))
    if check_counts:
        ORIGIN.check_numbers(
            {
                "people": (IDENTITIES, len(views)),
                "images": (IDENTITIES * IMAGES_EACH, len(names)),
            }
        )
    for pid, sides in views.items():
        if not sides[0] or not sides[1]:
            raise ORIGIN.wrong("an image of every person in both views", f"person {pid} in one")
    if not 1 <= test_identities < len(views):
        raise ValueError(
            f"sn_ops.reid: CUHK01: expected test_identities from 1 to {len(views) - 1}, got {test_identities!r}"
        )
    # random() is the only method of `random` whose numbers Python promises to keep.
    numbers = random.Random(split_seed)
    test = set(sorted(views, key=lambda pid: numbers.random())[:test_identities])
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for pid in sorted(test):
        for part, side in zip(parts, views[pid], strict=True):
            drawn = sorted(side, key=lambda sample: numbers.random())[:shots]
            part.extend(sorted(drawn, key=lambda sample: sample.path.name))
    train = tuple(sample for pid in sorted(views) if pid not in test for side in views[pid] for sample in side)
    return Split(ORIGIN.name, train, tuple(parts[0]), tuple(parts[1]))
