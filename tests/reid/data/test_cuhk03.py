"""CUHK03: images in a MATLAB matrix, splits in another file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from sn_ops.reid.data import cuhk03, load_dataset
from support import miniature
from support.splits import Names, keys, load


@pytest.mark.parametrize("boxes", ["detected", "labeled"])
def test_cuhk03_images_are_those_of_the_matrix(tmp_path: Path, boxes: str) -> None:
    split = load("cuhk03", miniature.cuhk03(tmp_path), boxes=boxes)
    assert split.name == f"CUHK03 {boxes}"
    assert split.identities() == {1: 0, 4: 1}
    assert keys(split.train)[4:6] == [("1_001_1_05.png", 1, 0), ("1_001_2_06.png", 1, 1)]
    assert keys(split.query) == [
        ("1_002_1_01.png", 2, 0),
        ("1_002_2_10.png", 2, 1),
        ("2_001_1_01.png", 3, 0),
        ("2_001_2_10.png", 3, 1),
    ]
    assert (len(split.train), len(split.gallery)) == (15, 7 + 8)
    for sample in (*split.train, *split.query, *split.gallery):
        pair, person, _, number = (int(field) for field in sample.path.stem.split("_"))
        with Image.open(sample.path) as opened:
            assert opened.size == (4, 6)  # width, height
            assert np.array_equal(np.asarray(opened), miniature.cuhk03_pixels(pair, person, number))


def test_cuhk03_extracts_once_and_whole(tmp_path: Path) -> None:
    root = miniature.cuhk03(tmp_path / "set")
    cache = tmp_path / "cache"
    split = load("cuhk03", root, cache=cache)
    assert sorted(path.name for path in cache.iterdir()) == ["images_detected"]  # nothing unfinished
    assert not list(root.glob("images_*"))
    assert len(list((cache / "images_detected").iterdir())) == 34  # 40 cells, 6 of them empty
    written = [(path, path.stat().st_mtime_ns) for path in sorted((cache / "images_detected").iterdir())]
    assert load("cuhk03", root, cache=cache) == split
    assert [(path, path.stat().st_mtime_ns) for path, _ in written] == written
    lost = cache / "images_detected" / "1_001_1_01.png"
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=r"1_001_1_01.png in .*delete that folder"):
        load("cuhk03", root, cache=cache)


def test_cuhk03_an_interrupted_extraction_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = miniature.cuhk03(tmp_path)
    saved = Image.Image.save
    left = [10]

    def save(self: Image.Image, *args: object, **options: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("no space left")
        saved(self, *args, **options)  # type: ignore[arg-type]

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        with pytest.raises(OSError, match=r"^no space left$"):
            load("cuhk03", root)
    assert sorted(tmp_path.iterdir()) == before
    assert len(load("cuhk03", root).train) == 15


def test_cuhk03_processes_may_extract_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have written their images before either names its folder."""
    root = miniature.cuhk03(tmp_path)
    gate = threading.Barrier(2)
    rename = Path.rename

    def wait(self: Path, target: Path) -> Path:
        gate.wait(20)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", wait)
    matrix, folder = root / "cuhk03_release/cuhk-03.mat", root / "images_detected"
    other = threading.Thread(target=cuhk03.extract, args=(matrix, "detected", folder))
    other.start()
    cuhk03.extract(matrix, "detected", folder)
    other.join()
    assert len(list(folder.iterdir())) == 34
    assert not list(root.glob(".images*"))


def test_cuhk03_a_file_in_the_place_of_the_images(tmp_path: Path) -> None:
    root = miniature.cuhk03(tmp_path)
    (root / "images_detected").write_text("mine")
    with pytest.raises(OSError, match=r"images_detected"):
        load("cuhk03", root)
    assert (root / "images_detected").read_text() == "mine"
    assert not list(root.glob(".images*"))


def test_cuhk03_a_matrix_without_images(tmp_path: Path) -> None:
    root = miniature.cuhk03(tmp_path)
    cells = [(1, 1, number) for number in range(1, 11)]
    miniature.cuhk03_matrix(root / "cuhk03_release/cuhk-03.mat", (1,), cells)
    with pytest.raises(ValueError, match=r"expected images 'detected' in .*cuhk-03.mat, got none"):
        load("cuhk03", root)


def test_cuhk03_a_split_without_a_variable_or_with_too_few_labels(tmp_path: Path) -> None:
    root = miniature.cuhk03(tmp_path)
    config = root / "cuhk03_new_protocol_config_detected.mat"
    whole = {name: value for name, value in scipy.io.loadmat(config).items() if not name.startswith("__")}
    scipy.io.savemat(config, {name: value for name, value in whole.items() if name != "gallery_idx"})
    with pytest.raises(ValueError, match=r"the variables filelist, .* in .*, got no gallery_idx"):
        load("cuhk03", root)
    scipy.io.savemat(config, whole | {"labels": whole["labels"][1:]})
    with pytest.raises(ValueError, match=r"as many labels as names in .*, got 33 for 34 names"):
        load("cuhk03", root)


def test_cuhk03_files_that_are_not_matlabs_are_named(tmp_path: Path) -> None:
    root = miniature.cuhk03(tmp_path)
    config = root / "cuhk03_new_protocol_config_detected.mat"
    matrix = root / "cuhk03_release/cuhk-03.mat"
    whole = config.read_bytes()
    for content in (b"", b"nonsense" * 40, whole[:300], matrix.read_bytes()):
        config.write_bytes(content)
        with pytest.raises(ValueError, match=r"^sn_ops.reid: CUHK03: expected (a MATLAB 5 file at|the variables)"):
            load("cuhk03", root)
    config.write_bytes(whole)
    for content in (b"", b"nonsense", matrix.read_bytes()[:2000], whole):
        matrix.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"^sn_ops.reid: CUHK03: expected a MATLAB 7.3 file with images 'detected'"
        ):
            load("cuhk03", root)
    assert not list(root.glob("*images*"))


@pytest.mark.parametrize(
    ("names", "parts", "words"),
    [
        (["1_001_1_01.png"], {"train_idx": [2]}, "train_idx from 1 to 1 in .*, got 2 to 2"),
        (["1_001_1_01.png"], {"train_idx": [0]}, "train_idx from 1 to 1 in .*, got 0 to 0"),
        (["1_001_1_01.png"], {"train_idx": [1], "query_idx": [1]}, "each image in one part of .*, got 1 in several"),
        (["1_001_2_01.png"], {"train_idx": [1]}, "images up to 05 in view 1, got 1_001_2_01.png"),
        (["0001_c1_1_01.png"], {"train_idx": [1]}, "names like 1_001_1_01.png.*, got 0001_c1_1_01.png"),
        (["1_002_1_01.png", "1_002_2_06.png"], {"train_idx": [1], "query_idx": [2]}, "both training and query images"),
        (["1_002_1_04.png"], {"train_idx": [1]}, "1_002_1_04.png in .*images_detected"),
    ],
)
def test_cuhk03_splits_that_do_not_fit_are_named(
    tmp_path: Path, names: list[str], parts: dict[str, list[int]], words: str
) -> None:
    root = miniature.cuhk03(tmp_path)
    everything: dict[str, list[int]] = {"train_idx": [], "query_idx": [], "gallery_idx": [], **parts}
    miniature.cuhk03_split(root / "cuhk03_new_protocol_config_detected.mat", names, [7] * len(names), everything)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load("cuhk03", root)


@pytest.mark.parametrize(("boxes", "numbers"), [("detected", (7365, 1400, 5332)), ("labeled", (7368, 1400, 5328))])
def test_all_of_cuhk03_passes_the_check(
    tmp_path: Path, listed: Callable[[Names], Path], boxes: str, numbers: tuple[int, int, int]
) -> None:
    people = [(pair, person) for pair, many in enumerate((843, 440, 77, 58, 49), 1) for person in range(1, many + 1)]
    parts: dict[str, list[int]] = {"train_idx": [], "query_idx": [], "gallery_idx": []}
    names, labels = [], []
    left = dict(zip(parts, numbers, strict=True))
    for n in (0, 5, 1, 2, 3, 4, 6, 7, 8, 9):  # one image of each view is queried
        for label, (pair, person) in enumerate(people, 1):
            part = "train_idx" if label <= 767 else "query_idx" if n in (0, 5) else "gallery_idx"
            if left[part]:
                left[part] -= 1
                names.append(f"{pair}_{person:03d}_{1 if n < 5 else 2}_{n + 1:02d}.png")
                labels.append(label)
                parts[part].append(len(names))
    miniature.cuhk03_split(tmp_path / f"cuhk03_new_protocol_config_{boxes}.mat", names, labels, parts)
    miniature.touch(tmp_path / "cuhk03_release", ["cuhk-03.mat"])
    listed({f"images_{boxes}": names})  # as if extracted: the matrix is not read again
    split = load_dataset("cuhk03", tmp_path, boxes=boxes)
    assert (len(split.train), len(split.query), len(split.gallery)) == numbers
    parts["train_idx"].pop()
    miniature.cuhk03_split(tmp_path / f"cuhk03_new_protocol_config_{boxes}.mat", names, labels, parts)
    with pytest.raises(ValueError, match=f"expected {numbers[0]} {boxes} training images, got {numbers[0] - 1};"):
        load_dataset("cuhk03", tmp_path, boxes=boxes)


def test_cuhk03_other_boxes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CUHK03: expected boxes detected or labeled, got 'drawn'"):
        load("cuhk03", tmp_path, boxes="drawn")
