"""Market-1501 (Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015)."""

from __future__ import annotations

import os
from pathlib import Path

from .layout import MARKET_FOLDERS, Origin, image_names, of_queries, people, without_junk
from .records import DISTRACTOR, Sample, Split

ORIGIN = Origin(
    "Market-1501",
    "Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015; Liang Zheng's project page "
    '"Market-1501 Dataset" (archive Market-1501-v15.09.15; the 500k distractors are an archive of their own there)',
)
FOLDER = "Market-1501-v15.09.15"
CAMERAS = 6


def load(
    root: str | os.PathLike[str], *, distractors: str | os.PathLike[str] | None = None, check_counts: bool = True
) -> Split:
    """Market-1501, or another set in its layout.

    The layout is `bounding_box_train`, `query`, `bounding_box_test`, and `gt_bbox` for multiple query; names are like
    `0002_c1s1_000451_03.jpg`: identity 2, camera 1. Junk (identity -1) is left out of the gallery, distractors
    (identity 0) are in it. A set without `gt_bbox` has no `Split.multi`.

    Args:
        root: the folder with the layout, or the folder that contains `Market-1501-v15.09.15`.
        distractors: a folder of images that match no query (the authors' 500k), to add to the gallery.
        check_counts: of the authors' archive: images, identities and cameras. False for other sets in the layout.

    Raises:
        FileNotFoundError: a folder is missing; the message names it and where to get it.
        ValueError: names, numbers or identities that are not the set's.
    """
    place = ORIGIN.locate(root, FOLDER, MARKET_FOLDERS)
    cameras = CAMERAS if check_counts else None
    train, query, everything = (ORIGIN.named_images(place / folder, cameras) for folder in MARKET_FOLDERS)
    gallery = without_junk(everything)
    drawn = ORIGIN.named_images(place / "gt_bbox", cameras) if (place / "gt_bbox").is_dir() else ()
    if check_counts:
        ORIGIN.check_numbers(
            {
                "images in bounding_box_train": (12936, len(train)), "images in query": (3368, len(query)),
                "images in bounding_box_test": (19732, len(everything)),
                "images of people or distractors in bounding_box_test": (15913, len(gallery)),
                "identities in bounding_box_train": (751, people(train)), "identities in query": (750, people(query)),
                "identities in bounding_box_test": (750, people(gallery)),
            }
        )  # fmt: skip
        if drawn:
            ORIGIN.check_numbers({"images in gt_bbox": (25259, len(drawn))})
    ORIGIN.check_identities(train, query, gallery)
    if distractors is not None:
        gallery += distractor_images(distractors)
    return Split(ORIGIN.name, train, query, gallery, _multiple_query(query, drawn, place / "gt_bbox"))


def distractor_images(folder: str | os.PathLike[str]) -> tuple[Sample, ...]:
    """Every image of a folder as a distractor, by name, with camera 0: the camera of a distractor does not matter.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    folder = Path(folder).expanduser()
    names = image_names(folder) if folder.is_dir() else []
    if not names:
        raise ORIGIN.missing(f"a folder of distractor images at {folder}", "no image" if folder.is_dir() else "nothing")
    return tuple(Sample(folder / name, DISTRACTOR, 0) for name in names)


def _multiple_query(query: tuple[Sample, ...], drawn: tuple[Sample, ...], folder: Path) -> tuple[Sample, ...]:
    """The hand-drawn boxes of every queried identity under the camera of its query."""
    if not drawn:
        return ()
    multi, absent = of_queries(query, drawn)
    if absent:
        pid, camera = min(absent)
        raise ORIGIN.wrong(
            f"an image in {folder} of every queried identity and camera",
            f"none for {len(absent)} of them, the first identity {pid}, camera {camera + 1}",
        )
    return multi
