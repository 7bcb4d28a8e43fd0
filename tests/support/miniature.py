"""Writes data sets of a few images, with the names and formats of the authors' archives."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

from sn_ops.reid.requirements import need

h5py = need("h5py")

CELLS = 10
"""Images of a person in CUHK03: five of each view."""


def touch(folder: Path, names: Iterable[str]) -> Path:
    """Empty files, created in an order unlike that of their names; loaders read names, not images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(names, key=lambda name: name[::-1]):
        os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY))
    return folder


def market_names(pid: int, cameras: Iterable[int], images: int, box: int = 1) -> list[str]:
    """Names of a person's images, as in Market-1501."""
    label = f"{pid:04d}" if pid >= 0 else str(pid)
    return [f"{label}_c{camera}s1_{25 * n + 1:06d}_{box:02d}.jpg" for camera in cameras for n in range(images)]


def duke_names(pid: int, cameras: Iterable[int], images: int) -> list[str]:
    """Names of a person's images, as in DukeMTMC-reID."""
    return [f"{pid:04d}_c{camera}_f{46000 + 60 * n:07d}.jpg" for camera in cameras for n in range(images)]


def market1501(root: Path) -> Path:
    """Market-1501: 3 training and 2 test people, distractors, junk, hand-drawn boxes, and what a system leaves."""
    place = root / "Market-1501-v15.09.15"
    touch(
        place / "bounding_box_train",
        [name for pid in (2, 10, 7) for name in market_names(pid, (1, 3), 2)] + ["Thumbs.db"],
    )
    touch(place / "query", [name for pid in (1, 3) for name in market_names(pid, (1, 2), 1, box=0)])
    touch(
        place / "bounding_box_test",
        [name for pid in (1, 3, 0, -1) for name in market_names(pid, (1, 2, 6), 2)] + ["Thumbs.db"],
    )
    # Hand-drawn boxes are of training people and of all cameras too.
    touch(place / "gt_bbox", [name for pid in (1, 2, 3) for name in market_names(pid, (1, 2, 6), 3, box=0)])
    return root


def duke(root: Path) -> Path:
    """DukeMTMC-reID: 2 training and 2 test people, and one in the gallery whom no query asks for."""
    place = root / "DukeMTMC-reID"
    touch(place / "bounding_box_train", [name for pid in (1, 14) for name in duke_names(pid, (2, 8), 2)])
    touch(place / "query", [name for pid in (5, 6) for name in duke_names(pid, (2, 5), 1)])
    touch(place / "bounding_box_test", [name for pid in (5, 6, 11) for name in duke_names(pid, (2, 5), 2)])
    return root


def msmt_line(pid: int, image: int, camera: int) -> str:
    """A line of MSMT17's lists."""
    return f"{pid:04d}/{pid:04d}_{image:03d}_{camera:02d}_0303morning_{image + 8:04d}_0.jpg {pid}"


def msmt17(root: Path, version: str = "V1") -> Path:
    """MSMT17: training identities 0 to 2 and test identities 0 to 1, each numbered from 0."""
    folder, train, test = {
        "V1": ("MSMT17_V1", "train", "test"),
        "V2": ("MSMT17_V2", "mask_train_v2", "mask_test_v2"),
    }[version]
    lists = {
        "train": [msmt_line(pid, n, camera) for pid in (0, 2, 1) for n, camera in enumerate((1, 15, 4))],
        "val": [msmt_line(pid, 3, 1) for pid in (0, 1, 2)],
        "query": [msmt_line(pid, n, camera) for pid in (0, 1) for n, camera in enumerate((1, 9))],
        "gallery": [msmt_line(pid, n + 2, camera) for pid in (1, 0) for n, camera in enumerate((1, 9, 12))],
    }
    for name, lines in lists.items():
        images = train if name in ("train", "val") else test
        for line in lines:
            path = root / folder / images / line.split()[0]
            touch(path.parent, [path.name])
        (root / folder / f"list_{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return root


def cuhk03_pixels(pair: int, person: int, number: int, height: int = 6, width: int = 4) -> np.ndarray[Any, Any]:
    """An image `[height, width, 3]` that differs from every other and from its own transpose."""
    generator = np.random.default_rng((pair, person, number))
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def cuhk03_matrix(
    file: Path, pairs: Iterable[int], absent: Iterable[tuple[int, int, int]] = (), height: int = 6, width: int = 4
) -> Path:
    """`cuhk-03.mat` as MATLAB 7.3 writes it: cells are references, all dimensions turned round, an empty cell its size.

    Args:
        pairs: how many people each camera pair saw.
        absent: (pair, person, image), from 1, of cells without an image.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    missing = set(absent)
    with h5py.File(file, "w", userblock_size=512) as out:  # MATLAB's own header stands before the HDF5 data
        store = out.create_group("#refs#")
        for boxes in ("detected", "labeled"):
            outer = out.create_dataset(boxes, (1, len(list(pairs))), dtype=h5py.ref_dtype)
            outer.attrs["MATLAB_class"] = np.bytes_("cell")
            for pair, people in enumerate(pairs, 1):
                cells = store.create_dataset(f"{boxes}{pair}", (CELLS, people), dtype=h5py.ref_dtype)
                cells.attrs["MATLAB_class"] = np.bytes_("cell")
                for person in range(1, people + 1):
                    for number in range(1, CELLS + 1):
                        name = f"{boxes}{pair}_{person}_{number}"
                        if (pair, person, number) in missing:
                            cell = store.create_dataset(name, data=np.zeros(2, np.uint64))
                            cell.attrs["MATLAB_empty"] = np.uint8(1)
                        else:
                            pixels = cuhk03_pixels(pair, person, number, height, width)
                            cell = store.create_dataset(name, data=pixels.T)
                        cells[number - 1, person - 1] = cell.ref
                outer[0, pair - 1] = cells.ref
    return file


def cuhk03_split(file: Path, names: list[str], labels: list[int], parts: dict[str, list[int]]) -> Path:
    """`cuhk03_new_protocol_config_*.mat`: columns, and rows counted from 1."""
    cells = np.empty((len(names), 1), dtype=object)
    for row, name in enumerate(names):
        cells[row, 0] = name
    columns = {"labels": labels, "camId": [int(name.split("_")[2]) for name in names], **parts}
    file.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(
        file,
        {"filelist": cells, **{name: np.array(column, np.float64)[:, None] for name, column in columns.items()}},
        oned_as="column",
    )
    return file


def cuhk03(root: Path) -> Path:
    """CUHK03: 2 people of pair 1 and one each of pairs 2 and 5. Person 2 has no image 4, the one of pair 5 one view."""
    pairs = (2, 1, 0, 0, 1)
    absent = [(1, 2, 4), *((5, 1, number) for number in range(6, 11))]
    cuhk03_matrix(root / "cuhk03_release" / "cuhk-03.mat", pairs, absent)
    keys = [
        (pair, person, n)
        for pair, people in enumerate(pairs, 1)
        for person in range(1, people + 1)
        for n in range(1, CELLS + 1)
        if (pair, person, n) not in absent
    ]
    names = [f"{pair}_{person:03d}_{1 if n <= 5 else 2}_{n:02d}.png" for pair, person, n in keys]
    people = sorted({key[:2] for key in keys})
    labels = [people.index(key[:2]) + 1 for key in keys]
    train = [row for row, label in enumerate(labels, 1) if label in (1, 4)]
    query = [row for row, key in enumerate(keys, 1) if labels[row - 1] in (2, 3) and key[2] in (1, 10)]
    gallery = sorted(set(range(1, len(keys) + 1)) - set(train) - set(query))
    for boxes in ("detected", "labeled"):
        parts = {"train_idx": train, "query_idx": query[::-1], "gallery_idx": gallery}
        cuhk03_split(root / f"cuhk03_new_protocol_config_{boxes}.mat", names, labels, parts)
    return root


def cuhk01(root: Path, people: int = 5) -> Path:
    """CUHK01: people with four images each."""
    touch(root / "campus", [f"{pid:04d}{image:03d}.png" for pid in range(1, people + 1) for image in range(1, 5)])
    return root


def save_image(path: Path, pixels: np.ndarray[Any, Any]) -> Path:
    """An image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
