"""CUHK03 (Li et al., DeepReID, CVPR 2014) in the 767/700 protocol (Zhong et al., CVPR 2017)."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..requirements import need
from .layout import Origin, people
from .records import Sample, Split

ORIGIN = Origin(
    "CUHK03",
    "images (cuhk03_release.zip): Li et al., DeepReID: Deep Filter Pairing Neural Network for Person "
    "Re-identification, CVPR 2014, the CUHK person re-identification page of Xiaogang Wang's group; split "
    "(cuhk03_new_protocol_config_*.mat): Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, "
    "CVPR 2017, the GitHub repository zhunzhong07/person-re-ranking, folder evaluation/data/CUHK03",
)
FOLDER = "cuhk03_release"
MATRIX = "cuhk-03.mat"
COUNTS = {"detected": (7365, 1400, 5332), "labeled": (7368, 1400, 5328)}
VIEW_IMAGES = 5
TRAIN_IDENTITIES, TEST_IDENTITIES = 767, 700
_NAME = re.compile(r"([1-5])_(\d{3})_([12])_(\d{2})\.png")
_FIELDS = ("filelist", "labels", "train_idx", "query_idx", "gallery_idx")


def load(
    root: str | os.PathLike[str],
    *,
    boxes: str = "detected",
    cache: str | os.PathLike[str] | None = None,
    check_counts: bool = True,
) -> Split:
    """CUHK03, 767 training and 700 test identities. The camera is the view: 0 or 1.

    The archive has the images in one HDF5 file; the first call writes all of them as PNG files.

    Args:
        root: the folder with `cuhk03_release/cuhk-03.mat` (or with `cuhk-03.mat` itself) and
            `cuhk03_new_protocol_config_{detected,labeled}.mat`.
        boxes: whose bounding boxes: "detected" or "labeled" (drawn by hand).
        cache: where the folder `images_<boxes>` with the PNG files is, or is written; default: root.
        check_counts: images and identities of the protocol.

    Raises:
        FileNotFoundError: a file is missing; the message names it and where to get it.
        ValueError: other boxes; a file that cannot be read; names, numbers or identities that are not the protocol's.
        ImportError: h5py, scipy or pillow is missing.
    """
    if boxes not in COUNTS:
        raise ValueError(f"sn_ops.reid: CUHK03: expected boxes detected or labeled, got {boxes!r}")
    place = ORIGIN.locate(root, FOLDER, (MATRIX,))
    base = place.parent if place.name == FOLDER else place
    split = base / f"cuhk03_new_protocol_config_{boxes}.mat"
    if not split.is_file():
        raise ORIGIN.missing(f"{split.name} in {base}", "no such file")
    images = Path(cache or base).expanduser() / f"images_{boxes}"
    names, labels, parts = _read_split(split)
    if not images.is_dir():
        extract(place / MATRIX, boxes, images)
    train, query, gallery = (_samples(part, names, labels, images) for part in parts)
    if check_counts:
        for part, expected, found in zip(
            ("training", "query", "gallery"), COUNTS[boxes], (train, query, gallery), strict=True
        ):
            ORIGIN.check_numbers({f"{boxes} {part} images": (expected, len(found))})
        ORIGIN.check_numbers(
            {
                "training identities": (TRAIN_IDENTITIES, people(train)),
                "query identities": (TEST_IDENTITIES, people(query)),
            }
        )
    ORIGIN.check_identities(train, query, gallery)
    return Split(f"{ORIGIN.name} {boxes}", train, query, gallery)


def extract(matrix: str | os.PathLike[str], boxes: str, folder: str | os.PathLike[str]) -> Path:
    """Writes the images of a `cuhk-03.mat` as `{pair}_{person:03d}_{view}_{image:02d}.png`, all numbers from 1.

    They are written to a temporary folder, which is renamed when complete: interrupted or simultaneous calls leave no
    partial folder.

    MATLAB 7.3 files are HDF5 with reversed dimensions, and a cell array is an array of references: the variable is
    `[1, 5]` camera pairs, a pair `[10, people]` images (5 of each view), an image `[3, W, H]` uint8. A cell without an
    image is an array of fewer than three dimensions.

    Raises:
        ValueError: not such a file.
    """
    image = need("PIL.Image")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        images = _images(Path(matrix), boxes)
        for name, pixels in need("tqdm").tqdm(images, "CUHK03", unit=" images", disable=None, leave=False):
            image.fromarray(pixels).save(unfinished / name)
        unfinished.chmod(0o755)  # only its owner may read a temporary folder
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process wrote the same images first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _images(matrix: Path, boxes: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Name and pixels, uint8 `[H, W, 3]`, of every image."""
    count = 0
    try:
        with need("h5py").File(matrix, "r") as file:
            for pair, pair_reference in enumerate(file[boxes][0], 1):
                for person, row in enumerate(file[pair_reference][()].T, 1):
                    for number, reference in enumerate(row, 1):
                        pixels = file[reference][()]
                        if pixels.ndim == 3:
                            count += 1
                            view = 1 if number <= VIEW_IMAGES else 2
                            yield f"{pair}_{person:03d}_{view}_{number:02d}.png", np.ascontiguousarray(pixels.T)
    except (KeyError, OSError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ORIGIN.wrong(f"a MATLAB 7.3 file with images {boxes!r} at {matrix}", error) from error
    if not count:
        raise ORIGIN.wrong(f"images {boxes!r} in {matrix}", "none")


def _read_split(config: Path) -> tuple[list[str], list[int], list[list[int]]]:
    """File names, identities, and rows (from 0) of training, query and gallery images."""
    reader = need("scipy.io")
    try:
        fields = reader.loadmat(config, variable_names=_FIELDS)
    except (ValueError, NotImplementedError, TypeError, OSError, reader.matlab.MatReadError) as error:
        raise ORIGIN.wrong(f"a MATLAB 5 file at {config}", error) from error
    absent = [name for name in _FIELDS if name not in fields]
    if absent:
        raise ORIGIN.wrong(f"the variables {', '.join(_FIELDS)} in {config}", f"no {', no '.join(absent)}")
    names = [str(cell.item()) for cell in fields["filelist"].ravel()]
    labels = [int(label) for label in fields["labels"].ravel()]
    if len(names) != len(labels):
        raise ORIGIN.wrong(f"as many labels as names in {config}", f"{len(labels)} for {len(names)} names")
    parts = []
    for field in _FIELDS[2:]:
        rows = sorted(int(row) - 1 for row in fields[field].ravel())  # MATLAB counts from 1
        if rows and not 0 <= rows[0] <= rows[-1] < len(names):
            raise ORIGIN.wrong(f"{field} from 1 to {len(names)} in {config}", f"{rows[0] + 1} to {rows[-1] + 1}")
        parts.append(rows)
    every = [row for rows in parts for row in rows]
    if len(set(every)) != len(every):
        raise ORIGIN.wrong(f"each image in one part of {config}", f"{len(every) - len(set(every))} in several")
    return names, labels, parts


def _samples(rows: list[int], names: list[str], labels: list[int], images: Path) -> tuple[Sample, ...]:
    """The images of the rows, by name."""
    present = set(os.listdir(images))
    samples = []
    for name, pid in sorted((names[row], labels[row]) for row in rows):
        match = _NAME.fullmatch(name)
        if match is None or (int(match[4]) <= VIEW_IMAGES) != (match[3] == "1"):
            raise ORIGIN.wrong("names like 1_001_1_01.png, images up to 05 in view 1", name)
        if name not in present:
            raise ORIGIN.missing(
                f"{name} in {images}",
                f"{len(present)} others; if {MATRIX} is whole, delete that folder: it is rewritten",
            )
        samples.append(Sample(images / name, pid, int(match[3]) - 1))
    return tuple(samples)
