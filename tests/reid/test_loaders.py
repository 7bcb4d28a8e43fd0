"""Loaders on miniature trees with the true names and formats, and what they say about trees that are not whole."""

from __future__ import annotations

import csv
import inspect
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from reid import miniature
from sn_ops.reid.data import DATASETS, DISTRACTOR, JUNK, Sample, Split, cuhk01, cuhk03, load_dataset, market1501
from sn_ops.reid.evaluation import multi_query_features

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


@pytest.fixture(params=sorted(WRITERS))
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Every data set with its miniature tree."""
    return request.param, WRITERS[request.param](tmp_path)


# What holds of every set.


def test_a_split_is_whole_disjoint_and_in_order(tree: tuple[str, Path]) -> None:
    name, root = tree
    split = load(name, root)
    for part in (split.train, split.query, split.gallery):
        assert part
        assert [sample.path for sample in part] == sorted(sample.path for sample in part)
        assert all(sample.path.is_file() and sample.camera >= 0 for sample in part)
    trained = {sample.pid for sample in split.train}
    assert min(trained) > DISTRACTOR
    assert not trained & {sample.pid for sample in (*split.query, *split.gallery)}
    assert {sample.pid for sample in split.query} <= {sample.pid for sample in split.gallery}
    assert split.identities() == {pid: label for label, pid in enumerate(sorted(trained))}
    assert not split.synthetic


def test_the_order_of_the_file_system_does_not_matter(tree: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    name, root = tree
    before = load(name, root)
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed(path)[::-1])
    reverse = load(name, root)
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listed(path), key=lambda entry: hash((7, entry))))
    assert before == reverse == load(name, root)


def test_the_folder_of_the_set_itself_is_a_root_too(tree: tuple[str, Path], tmp_path: Path) -> None:
    name, root = tree
    within = {
        "market1501": "Market-1501-v15.09.15",
        "dukemtmc-reid": "DukeMTMC-reID",
        "msmt17": "MSMT17_V1",
        "cuhk03": "cuhk03_release",
        "cuhk01": "campus",
    }[name]
    assert load(name, root / within) == load(name, root)
    # Renamed, where its files stand in it: CUHK03's splits are no part of its archive.
    if name != "cuhk03":
        (root / within).rename(root / "mine")
        renamed = load(name, root / "mine")
        assert keys(renamed.train) == keys(load(name, root / "mine").train)


def test_no_folder_and_an_empty_folder_say_where_to_get_the_set(tmp_path: Path, tree: tuple[str, Path]) -> None:
    name, _ = tree
    with pytest.raises(
        FileNotFoundError, match=r"^sn_ops\.reid: .* got no folder .*nowhere\. Where to get it: .*20\d\d"
    ):
        load(name, tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"^sn_ops\.reid: .* got none.*Where to get it: .*20\d\d"):
        load(name, empty)


def test_the_numbers_are_checked_unless_one_asks_not_to(tree: tuple[str, Path]) -> None:
    name, root = tree
    expected = {
        "market1501": "12936 images in bounding_box_train, got 12;",
        "dukemtmc-reid": "16522 images in bounding_box_train, got 8;",
        "msmt17": r"32621 images in list_train.txt and list_val.txt, got 12;",
        "cuhk03": "7365 detected training images, got 15;",
        "cuhk01": "971 people, got 5;",
    }[name]
    remedy = r"check_counts=False \(on the command line --set data\.options\.check_counts=false\)"
    with pytest.raises(ValueError, match=rf"expected {expected} {remedy} takes .*Where to get the whole set: "):
        load_dataset(name, root, **SMALL.get(name, {}))


@pytest.mark.parametrize(
    ("name", "folder", "remedy"),
    [
        ("market1501", "Market-1501-v15.09.15/bounding_box_train", "Market-1501 Dataset"),
        ("market1501", "Market-1501-v15.09.15/query", "Market-1501 Dataset"),
        ("market1501", "Market-1501-v15.09.15/bounding_box_test", "Market-1501 Dataset"),
        ("dukemtmc-reid", "DukeMTMC-reID/query", "DukeMTMC-reID_evaluation"),
        ("msmt17", "MSMT17_V1/test", "Peking University"),
        ("msmt17", "MSMT17_V1/list_val.txt", "Peking University"),
        ("cuhk03", "cuhk03_release/cuhk-03.mat", "Xiaogang Wang"),
        ("cuhk03", "cuhk03_new_protocol_config_detected.mat", "zhunzhong07/person-re-ranking"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, name: str, folder: str, remedy: str) -> None:
    lost = WRITERS[name](tmp_path) / folder
    if lost.is_dir():
        shutil.rmtree(lost)
    else:
        lost.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path)
    said = str(caught.value)
    assert lost.name in said.partition("Where to get it")[0], said
    assert remedy in said.partition("Where to get it")[2], said


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("market1501", "Market-1501-v15.09.15/query/someone.jpg"),
        ("market1501", "Market-1501-v15.09.15/bounding_box_test/c1s1_000001_00.jpg"),
        ("market1501", "Market-1501-v15.09.15/bounding_box_train/0002_c0s1_000001_00.jpg"),
        ("dukemtmc-reid", "DukeMTMC-reID/bounding_box_train/0001-c2_f0046182.jpg"),
        ("dukemtmc-reid", "DukeMTMC-reID/bounding_box_train/0001_c9_f0046182.jpg"),
        ("cuhk01", "campus/00010001.png"),
        ("cuhk01", "campus/0001005.png"),
    ],
)
def test_a_wrong_name_is_named(tmp_path: Path, name: str, file: str) -> None:
    path = WRITERS[name](tmp_path) / file
    path.touch()
    with pytest.raises(ValueError, match=rf"^sn_ops.reid: .*expected .*, got {path.name}"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        (
            "market1501",
            "bounding_box_train/-1_c1s1_000001_00.jpg",
            "identities from 1 among the training images, got -1",
        ),
        ("market1501", "query/0000_c1s1_000001_00.jpg", "identities from 1 among the query images, got 0 in"),
        ("market1501", "query/0002_c1s1_000001_00.jpg", "no identity in both training and query images, got 2 in"),
        ("market1501", "bounding_box_test/0007_c1s1_000001_00.jpg", "no identity in both training and gallery images"),
        ("market1501", "query/0999_c1s1_000001_00.jpg", "every queried identity in the gallery, got 999 in"),
        ("dukemtmc-reid", "bounding_box_test/-1_c1_f0000001.jpg", "identities from 1 in bounding_box_test, got -1"),
        ("dukemtmc-reid", "bounding_box_train/0005_c1_f0000001.jpg", "no identity in both training and query images"),
    ],
)
def test_a_foreign_identity_is_named(tmp_path: Path, name: str, file: str, words: str) -> None:
    place = next(WRITERS[name](tmp_path).iterdir())
    (place / file).touch()
    with pytest.raises(ValueError, match=words) as caught:
        load(name, tmp_path)
    assert Path(file).name in str(caught.value)


# Market-1501 and DukeMTMC-reID.


def test_market1501_parts(tmp_path: Path) -> None:
    split = load("market1501", miniature.market1501(tmp_path))
    assert split.name == "Market-1501"
    assert keys(split.train)[:3] == [
        ("0002_c1s1_000001_01.jpg", 2, 0),
        ("0002_c1s1_000026_01.jpg", 2, 0),
        ("0002_c3s1_000001_01.jpg", 2, 2),
    ]
    assert split.identities() == {2: 0, 7: 1, 10: 2}
    assert [(sample.pid, sample.camera) for sample in split.query] == [(1, 0), (1, 1), (3, 0), (3, 1)]


def test_market1501_junk_is_left_out_and_distractors_stay(tmp_path: Path) -> None:
    split = load("market1501", miniature.market1501(tmp_path))
    assert len(list((tmp_path / "Market-1501-v15.09.15/bounding_box_test").glob("-1_*.jpg"))) == 6
    assert [sum(sample.pid == pid for sample in split.gallery) for pid in (JUNK, DISTRACTOR, 1, 3)] == [0, 6, 6, 6]


def test_market1501_multiple_query_is_of_queried_people_and_cameras(tmp_path: Path) -> None:
    split = load("market1501", miniature.market1501(tmp_path))
    assert {(sample.pid, sample.camera) for sample in split.multi} == {(1, 0), (1, 1), (3, 0), (3, 1)}
    assert len(split.multi) == 12
    assert all(sample.path.parent.name == "gt_bbox" for sample in split.multi)

    def column(samples: tuple[Sample, ...], name: str) -> torch.Tensor:
        return torch.tensor([getattr(sample, name) for sample in samples])

    # The evaluation takes it as it is: a mean over the three images of each query's person and camera.
    means = multi_query_features(
        column(split.query, "pid"),
        column(split.query, "camera"),
        torch.arange(12.0)[:, None],
        column(split.multi, "pid"),
        column(split.multi, "camera"),
    )
    assert means[:, 0].tolist() == [1, 4, 7, 10]


def test_market1501_without_drawn_boxes_has_no_multiple_query(tmp_path: Path) -> None:
    place = miniature.market1501(tmp_path) / "Market-1501-v15.09.15"
    for path in (place / "gt_bbox").glob("0003_c2*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"none for 1 of them, the first identity 3, camera 2"):
        load("market1501", tmp_path)
    shutil.rmtree(place / "gt_bbox")
    assert load("market1501", tmp_path).multi == ()


def test_market1501_distractors_join_the_gallery_at_its_end(tmp_path: Path) -> None:
    plain = load("market1501", miniature.market1501(tmp_path / "set"))
    folder = miniature.touch(tmp_path / "images", ["b.png", "a.jpg", "notes.txt"])
    more = load("market1501", tmp_path / "set", distractors=str(folder))
    assert more.gallery[: len(plain.gallery)] == plain.gallery
    assert keys(more.gallery[len(plain.gallery) :]) == [("a.jpg", DISTRACTOR, 0), ("b.png", DISTRACTOR, 0)]
    assert market1501.distractor_images(folder) == more.gallery[-2:]
    with pytest.raises(FileNotFoundError, match=r"a folder of distractor images at .*nowhere, got nothing"):
        load("market1501", tmp_path / "set", distractors=tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"got no image"):
        load("market1501", tmp_path / "set", distractors=tmp_path / "none")


def test_another_set_in_the_layout_may_have_more_cameras(tmp_path: Path) -> None:
    place = miniature.market1501(tmp_path) / "Market-1501-v15.09.15"
    name = miniature.market_names(12, (11,), 1)[0]
    (place / "bounding_box_train" / name).touch()
    assert keys(load("market1501", tmp_path).train)[-1] == (name, 12, 10)
    with pytest.raises(ValueError, match=rf"cameras from 1 to 6 in .*, got {name}"):
        load_dataset("market1501", tmp_path)


def test_names_of_folders_do_not_count(tmp_path: Path) -> None:
    """A pattern searched for in the whole path would read identity and camera from the folder."""
    assert {s.pid for s in load("market1501", miniature.market1501(tmp_path / "0099_c5s1")).train} == {2, 7, 10}


def spread(people: range, total: int) -> list[int]:
    """How many images each has, so that there are total of them."""
    least, more = divmod(total, len(people))
    return [least + (n < more) for n in range(len(people))]


Names = dict[str, list[str]]


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Names], Path]:
    """Folders that say they have these names: as many files as in the whole sets would take too long to make."""

    def pretend(names: Names) -> Path:
        for part in names:
            (tmp_path / part).mkdir(exist_ok=True)
        monkeypatch.setattr(os, "listdir", lambda folder: names[Path(folder).name])
        return tmp_path

    return pretend


def people_of(
    name: Callable[[int, list[int], int], list[str]], cameras: int, parts: dict[str, tuple[range, int]]
) -> Names:
    """Names of as many images of these people in each part."""
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
    """With an image less in one part, or one person's images under another's number, that part is named."""
    for part, total in images.items():
        root = listed(names | {part: names[part][1:]})
        with pytest.raises(ValueError, match=f"expected {total} images in {part}, got {total - 1};"):
            load_dataset(dataset, root)
    for part, total in identities.items():
        first, second = sorted({name[:4] for name in names[part]} - {"0000", "-1_c"})[:2]
        merged = [name.replace(f"{first}_", f"{second}_", 1) for name in names[part]]
        with pytest.raises(ValueError, match=f"expected {total} identities in {part}, got {total - 1};"):
            load_dataset(dataset, listed(names | {part: merged}))


def test_all_of_market1501_passes_the_check(listed: Callable[[Names], Path]) -> None:
    names = people_of(
        miniature.market_names,
        6,
        {
            "bounding_box_train": (range(752, 1503), 12936),
            "query": (range(1, 751), 3368),
            "bounding_box_test": (range(1, 751), 13115),
            "gt_bbox": (range(1, 1502), 25259),
        },
    )
    names["bounding_box_test"] += miniature.market_names(0, [1], 15913 - 13115)
    names["bounding_box_test"] += miniature.market_names(-1, [1], 19732 - 15913)
    split = load_dataset("market1501", listed(names))
    assert (len(split.train), len(split.query), len(split.gallery)) == (12936, 3368, 15913)
    assert len(split.identities()) == 751
    images = {"bounding_box_train": 12936, "query": 3368, "bounding_box_test": 19732, "gt_bbox": 25259}
    identities = {"bounding_box_train": 751, "query": 750, "bounding_box_test": 750}
    check_every_number("market1501", listed, names, images, identities)
    names["bounding_box_test"][-1] = "0000" + names["bounding_box_test"][-1][2:]
    with pytest.raises(ValueError, match=r"15913 images of people or distractors in bounding_box_test, got 15914;"):
        load_dataset("market1501", listed(names))


def test_all_of_dukemtmc_passes_the_check(listed: Callable[[Names], Path]) -> None:
    names = people_of(
        miniature.duke_names,
        8,
        {
            "bounding_box_train": (range(1, 703), 16522),
            "query": (range(703, 1405), 2228),
            "bounding_box_test": (range(703, 1813), 17661),
        },
    )
    split = load_dataset("dukemtmc-reid", listed(names))
    assert (len(split.train), len(split.query), len(split.gallery)) == (16522, 2228, 17661)
    images = {"bounding_box_train": 16522, "query": 2228, "bounding_box_test": 17661}
    identities = {"bounding_box_train": 702, "query": 702, "bounding_box_test": 1110}
    check_every_number("dukemtmc-reid", listed, names, images, identities)


def test_dukemtmc_keeps_gallery_people_whom_nobody_asks_for(tmp_path: Path) -> None:
    split = load("dukemtmc-reid", miniature.duke(tmp_path))
    assert keys(split.train)[0] == ("0001_c2_f0046000.jpg", 1, 1)
    assert {sample.pid for sample in split.gallery} == {5, 6, 11}
    assert {sample.pid for sample in split.query} == {5, 6}


# MSMT17.


@pytest.mark.parametrize(("version", "folders"), [("V1", ("train", "test")), ("V2", ("mask_train_v2", "mask_test_v2"))])
def test_msmt17_versions(tmp_path: Path, version: str, folders: tuple[str, str]) -> None:
    split = load("msmt17", miniature.msmt17(tmp_path, version), version=version)
    assert split.name == f"MSMT17 {version}"
    assert {sample.path.parent.parent.name for sample in split.train} == {folders[0]}
    assert {sample.path.parent.parent.name for sample in (*split.query, *split.gallery)} == {folders[1]}
    assert (len(split.train), len(split.query), len(split.gallery)) == (12, 4, 6)  # training with list_val.txt
    assert keys(split.train)[1] == ("0000_001_15_0303morning_0009_0.jpg", 1, 14)
    other = {"V1": "V2", "V2": "V1"}[version]
    with pytest.raises(FileNotFoundError, match=rf"MSMT17_{other}"):
        load("msmt17", tmp_path, version=other)


def test_msmt17_people_of_training_and_test_are_never_mixed(tmp_path: Path) -> None:
    """The lists give training and test people the same numbers, and 0, elsewhere the distractor, to one of each."""
    split = load("msmt17", miniature.msmt17(tmp_path))
    assert split.identities() == {1: 0, 2: 1, 3: 2}
    assert {sample.pid for sample in split.query} == {1042, 1043} == {sample.pid for sample in split.gallery}


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        (
            "train",
            "0000/0000_009_01_0303morning_0017_0.jpg",
            "lines like .*, got '0000/0000_009.*list_train.txt, line 10",
        ),
        ("train", "0000/0000.jpg 0", "lines like"),
        ("train", "0000/0000_009_16_0303morning_0017_0.jpg 0", "cameras from 1 to 15"),
        (
            "query",
            "0001/0001_009_01_0303morning_0017_0.jpg 0",
            "an identity from 0 to 3059 that is also the image's folder",
        ),
        ("train", "1041/1041_009_01_0303morning_0017_0.jpg 1041", "an identity from 0 to 1040"),
        ("val", miniature.msmt_line(0, 0, 1), "no image in both list_train.txt and list_val.txt, got"),
        ("gallery", miniature.msmt_line(0, 0, 1), "no image in both list_query.txt and list_gallery.txt, got"),
        ("query", miniature.msmt_line(0, 0, 1), "every image once in .*list_query.txt, got .* twice"),
        ("query", miniature.msmt_line(7, 0, 1), "every queried identity in the gallery, got 1049"),
    ],
)
def test_msmt17_wrong_lines_are_named(tmp_path: Path, name: str, line: str, words: str) -> None:
    place = miniature.msmt17(tmp_path) / "MSMT17_V1"
    path = place / {"train": "train", "val": "train"}.get(name, "test") / line.split()[0]
    miniature.touch(path.parent, [path.name])
    with (place / f"list_{name}.txt").open("a") as out:
        out.write(f"{line}\n")
    with pytest.raises(ValueError, match=words):
        load("msmt17", tmp_path)


def test_msmt17_listed_images_are_looked_for(tmp_path: Path) -> None:
    lost = miniature.msmt17(tmp_path) / "MSMT17_V1/test" / miniature.msmt_line(1, 3, 9).split()[0]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=rf"the 6 images of .*list_gallery.txt, got no {lost} \(1 missing\)"):
        load("msmt17", tmp_path)


def test_all_of_msmt17_passes_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "MSMT17_V2"
    for folder in ("mask_train_v2", "mask_test_v2"):
        (place / folder).mkdir(parents=True)
    parts = {
        "train": (range(1041), 30248, 0),
        "val": (range(1041), 2373, 100),
        "query": (range(3060), 11659, 0),
        "gallery": (range(3060), 82161, 100),
    }
    for name, (people, total, first) in parts.items():
        counts = zip(people, spread(people, total), strict=True)
        lines = [miniature.msmt_line(pid, first + n, n % 15 + 1) for pid, images in counts for n in range(images)]
        (place / f"list_{name}.txt").write_text("\n".join(lines))
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # 126441 files would take too long to make
    split = load_dataset("msmt17", tmp_path, version="V2")
    assert (len(split.train), len(split.query), len(split.gallery)) == (32621, 11659, 82161)
    assert len(split.identities()) == 1041
    with (place / "list_gallery.txt").open("a") as out:
        out.write(f"\n{miniature.msmt_line(5, 999, 3)}\n")
    with pytest.raises(ValueError, match=r"expected 82161 images in list_gallery.txt, got 82162;"):
        load_dataset("msmt17", tmp_path, version="V2")


def test_msmt17_another_version(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"MSMT17: expected version V1 or V2, got 'V3'"):
        load("msmt17", tmp_path, version="V3")


# CUHK03.


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


# CUHK01.


def test_cuhk01_single_shot_split(tmp_path: Path) -> None:
    split = load("cuhk01", miniature.cuhk01(tmp_path))
    assert len(split.train) == 3 * 4
    assert [sample.pid for sample in split.query] == [sample.pid for sample in split.gallery]
    assert len(split.query) == 2
    for part, camera in ((split.query, 0), (split.gallery, 1)):
        assert {sample.camera for sample in part} == {camera}
        assert all((int(sample.path.stem[4:]) - 1) // 2 == camera for sample in part)
    both = load("cuhk01", tmp_path, shots=2)
    assert (len(both.query), len(both.gallery)) == (4, 4)
    assert both.train == split.train


def test_cuhk01_splits_are_drawn_with_the_seed_the_same_everywhere(tmp_path: Path) -> None:
    miniature.cuhk01(tmp_path, people=40)

    def drawn(seed: int) -> list[int]:
        split = load_dataset("cuhk01", tmp_path, split_seed=seed, test_identities=6, check_counts=False)
        return [sample.pid for sample in split.query]

    # As drawn once: another version of Python, or a change here, must not draw other people.
    assert drawn(0) == [4, 13, 16, 26, 33, 36]
    assert len({tuple(drawn(seed)) for seed in range(5)}) == 5


def test_cuhk01_all_of_it_passes_the_check(tmp_path: Path) -> None:
    miniature.cuhk01(tmp_path, people=971)
    split = load_dataset("cuhk01", tmp_path)
    assert (len(split.train), len(split.query), len(split.gallery)) == (4 * 485, 486, 486)
    few = cuhk01.load(tmp_path, test_identities=100, shots=2)
    assert (len(few.train), len(few.query), len(few.gallery)) == (4 * 871, 200, 200)
    (tmp_path / "campus/0500003.png").unlink()
    with pytest.raises(ValueError, match=r"expected 3884 images, got 3883;"):
        load_dataset("cuhk01", tmp_path)


def test_cuhk01_arguments_and_one_sided_people(tmp_path: Path) -> None:
    miniature.cuhk01(tmp_path)
    with pytest.raises(ValueError, match=r"expected test_identities from 1 to 4, got 5"):
        load_dataset("cuhk01", tmp_path, test_identities=5, check_counts=False)
    with pytest.raises(ValueError, match=r"expected shots 1 or 2, got 3"):
        load("cuhk01", tmp_path, shots=3)
    for image in (3, 4):
        (tmp_path / f"campus/000200{image}.png").unlink()
    with pytest.raises(ValueError, match=r"an image of every person in both views, got person 2 in one"):
        load("cuhk01", tmp_path)


# One's own images.


def own(root: Path, files: list[str]) -> Path:
    """Files of a plain folder."""
    for file in files:
        path = root / file
        miniature.touch(path.parent, [path.name])
    return root


def test_folder_of_people(tmp_path: Path) -> None:
    own(
        tmp_path,
        [
            "train/zoe/x_c1.jpg",
            "train/bob/x_c2.png",
            "query/anna/q_c1.jpg",
            "gallery/anna/g_c2.jpg",
            "gallery/carl/g_c10.WEBP",
            "gallery/0000/g_c3.jpg",
            "gallery/-1/g_c3.jpg",
            "multi/anna/m_c1.jpg",
            "gallery/readme.txt",
        ],
    )
    split = load_dataset("folder", tmp_path)
    assert keys(split.train) == [("x_c2.png", 2, 2), ("x_c1.jpg", 4, 1)]
    assert keys(split.query) == [("q_c1.jpg", 1, 1)]
    assert keys(split.gallery) == [("g_c3.jpg", DISTRACTOR, 3), ("g_c2.jpg", 1, 2), ("g_c10.WEBP", 3, 10)]
    assert keys(split.multi) == [("m_c1.jpg", 1, 1)]


def test_folder_of_names_as_in_market1501(tmp_path: Path) -> None:
    own(tmp_path, ["train/0009_c1_1.jpg", "query/3_c1.jpg", "gallery/0003_c2_1.jpg", "gallery/-1_c2_1.jpg"])
    split = load_dataset("folder", tmp_path)
    assert [keys(part) for part in (split.train, split.query, split.gallery)] == [
        [("0009_c1_1.jpg", 9, 1)],
        [("3_c1.jpg", 3, 1)],
        [("0003_c2_1.jpg", 3, 2)],
    ]


def test_folder_without_cameras_leaves_no_match_out(tmp_path: Path) -> None:
    split = load_dataset(
        "folder", own(tmp_path, ["train/b/1.jpg", "train/b/2.jpg", "query/a/1.jpg", "gallery/a/2.jpg"])
    )
    cameras = [sample.camera for sample in (*split.train, *split.query, *split.gallery)]
    assert len(set(cameras)) == 4


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["train/a/1.jpg", "query/b/1.jpg"], "the folders train, query and gallery in .*, got no gallery"),
        (["train/a/1.jpg", "query/b/1.jpg", "gallery/b/1.txt"], "expected gallery images in .*, got none"),
        (["train/a/1.jpg", "query/b/1.jpg", "gallery/b.jpg"], "or names like 0007_c2_0001.jpg, got .*b.jpg"),
        (["train/a/1.jpg", "query/a/1.jpg", "gallery/b/1.jpg"], "no person in both train and query"),
        (["train/a/1_c1.jpg", "query/b/1.jpg", "gallery/b/1_c1.jpg"], "of every image or of none, got none for 1 of 3"),
        (["train/a/day/1.jpg", "query/b/1.jpg", "gallery/b/1.jpg"], "images in one folder, got the folder .*a/day"),
        (["train/-1/1.jpg", "query/1/1.jpg", "gallery/1/1.jpg"], "people among the train images, got identity -1"),
        (
            ["train/a/1.jpg", "query/b/1.jpg", "gallery/b/1.jpg", "multi/b/1.jpg"],
            "cameras with images for multiple query",
        ),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, files: list[str], words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^sn_ops.reid: folder: .*{words}"):
        load_dataset("folder", own(tmp_path, files))


def table(root: Path, lines: list[list[str]], headings: str = "path,identity,camera,part") -> Path:
    """A CSV file, and the images of its lines."""
    own(root, [line[0] for line in lines if line[0].endswith(".jpg") and not line[0].startswith("lost")])
    with (root / "images.csv").open("w", newline="") as out:
        csv.writer(out).writerows([headings.split(","), *lines])
    return root / "images.csv"


LINES = [
    ["z/1.jpg", "bob", "2", "train"],
    ["a/2.jpg", "bob", "1", "train"],
    ["q.jpg", "anna", "1", "query"],
    ["with, comma.jpg", "anna", "2", "gallery"],
    ["junk.jpg", "-1", "2", "gallery"],
]


def test_csv(tmp_path: Path) -> None:
    file = table(tmp_path, LINES)
    split = load_dataset("folder", tmp_path, csv=file)
    assert keys(split.train) == [("2.jpg", 2, 1), ("1.jpg", 2, 2)]
    assert keys(split.query) == [("q.jpg", 1, 1)]
    assert keys(split.gallery) == [("with, comma.jpg", 1, 2)]
    # Neither the order of the lines, nor a spreadsheet's byte order mark, nor a name relative to root matters.
    table(tmp_path, LINES[::-1])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_dataset("folder", tmp_path, csv="images.csv") == split


def test_csv_without_cameras(tmp_path: Path) -> None:
    file = table(tmp_path, [[path, who, part] for path, who, _, part in LINES], "path,identity,part")
    split = load_dataset("folder", tmp_path, csv=file)
    assert len({sample.camera for sample in (*split.train, *split.query, *split.gallery)}) == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["lost.jpg", "1", "1", "train"], r"expected an image, got no file .*lost.jpg \(.*, line 7\)"),
        (["notes.txt", "1", "1", "train"], "expected an image .*, got .*notes.txt in .*, line 7"),
        (["x.jpg", "1", "1", "test"], "expected part train, query, gallery, multi, got 'test' in .*, line 7"),
        (["x.jpg", "", "1", "train"], "expected an identity, got none in .*, line 7"),
        (["x.jpg", "1", "left", "train"], "expected an integer camera, got 'left' in .*, line 7"),
        (["q.jpg", "1", "1", "gallery"], "q.jpg once, got it in .*, line 4 and .*, line 7"),
        (["x.jpg", "1", "1", "train", "who"], "expected 4 fields, got more in .*, line 7"),
        (["x.jpg", "9", "1", "multi"], "multiple query of every queried person and camera, got none for 1, the first"),
        (["x.jpg"], "expected part .*, got '' in .*, line 7"),
    ],
)
def test_lines_that_do_not_fit(tmp_path: Path, line: list[str], words: str) -> None:
    file = table(tmp_path, [*LINES, line])
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^sn_ops.reid: folder: .*{words}"):
        load_dataset("folder", tmp_path, csv=file)


def test_csv_columns_and_file(tmp_path: Path) -> None:
    file = table(tmp_path, LINES, "file,identity,camera,split")
    with pytest.raises(ValueError, match=r"expected the columns path, identity, part .*, got no path, no part"):
        load_dataset("folder", tmp_path, csv=file)
    file.write_text("path,identity,part\nJos\u00e9.jpg,1,train\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"^sn_ops.reid: folder: expected a CSV file in UTF-8, got .*images.csv"):
        load_dataset("folder", tmp_path, csv=file)
    with pytest.raises(FileNotFoundError, match=r"expected a CSV file, got no file .*other.csv"):
        load_dataset("folder", tmp_path, csv="other.csv")
    with pytest.raises(FileNotFoundError, match=r"expected a folder of images, got no folder"):
        load_dataset("folder", tmp_path / "nowhere")


# By name.


def test_the_registry_names_what_it_knows(tmp_path: Path) -> None:
    assert list(DATASETS) == ["market1501", "dukemtmc-reid", "msmt17", "cuhk03", "cuhk01", "folder", "synthetic"]
    with pytest.raises(ValueError, match=r"expected one of market1501, .*, synthetic, got 'market'"):
        load_dataset("market", tmp_path)
    with pytest.raises(TypeError, match=r"options of market1501: expected distractors, check_counts, got 'version'"):
        load_dataset("market1501", tmp_path, version="V2")
    with pytest.raises(TypeError, match=r"options of synthetic: expected quick, workers, seed, .*, got 'people'"):
        load_dataset("synthetic", tmp_path, people=3)


@pytest.mark.parametrize(
    ("name", "option", "value", "expected"),
    [
        ("market1501", "check_counts", "False", "true or false"),
        ("dukemtmc-reid", "check_counts", "no", "true or false"),
        ("cuhk03", "check_counts", 0, "true or false"),
        ("synthetic", "quick", "no", "true or false"),
        ("synthetic", "workers", "two", "an int"),
        ("synthetic", "workers", True, "an int"),
        ("market1501", "distractors", 5, "text or a path or none"),
        ("msmt17", "version", ["V1"], "text"),
        ("msmt17", "version", 1, "text"),
        ("cuhk03", "boxes", ["labeled"], "text"),
        ("cuhk03", "cache", 1.5, "text or a path or none"),
        ("cuhk01", "split_seed", "x", "an int"),
        ("cuhk01", "split_seed", None, "an int"),
        ("cuhk01", "test_identities", "half", "an int"),
        ("cuhk01", "shots", "2", "an int"),
        ("cuhk01", "shots", 1.0, "an int"),
        ("cuhk01", "shots", True, "an int"),
        ("folder", "csv", 5, "text or a path or none"),
    ],
)
def test_options_have_types(tmp_path: Path, name: str, option: str, value: object, expected: str) -> None:
    """A text is not true, whatever it says; and the check comes before anything is looked for."""
    message = (
        f"sn_ops.reid: options of {name}: {option}: expected {expected}, got {value!r} of type {type(value).__name__}"
    )
    with pytest.raises(TypeError) as caught:
        load_dataset(name, tmp_path / "nowhere", **{option: value})
    assert str(caught.value) == message


def test_every_option_has_a_type_that_is_checked(tmp_path: Path) -> None:
    """An option that somebody adds with a type that the check has no word for fails here."""
    for name, loader in DATASETS.items():
        for parameter in inspect.signature(loader).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                with pytest.raises(TypeError, match=f"^sn_ops.reid: options of {name}: {parameter.name}: expected "):
                    load_dataset(name, tmp_path, **{parameter.name: 1j})


@pytest.mark.parametrize("name", ["cuhk01", "synthetic"])
@pytest.mark.parametrize("option", ["root", "name"])
def test_what_load_dataset_itself_takes_is_no_option(tmp_path: Path, name: str, option: str) -> None:
    with pytest.raises(TypeError, match=rf"^sn_ops.reid: options of {name}: expected .*, got '{option}'"):
        load_dataset(name, tmp_path, **{option: "x"})


def test_the_synthetic_set_is_rendered_and_read_as_market1501(tmp_path: Path) -> None:
    options = {"height": 32, "width": 16, "train_identities": 2, "test_identities": 2, "distractors": 2, "junk": 2}
    split = load_dataset("synthetic", tmp_path / "set", quick=True, **options)
    assert split.synthetic and split.name == "synthetic"
    assert len(split.identities()) == 2
    assert {sample.pid for sample in split.query} and DISTRACTOR in {sample.pid for sample in split.gallery}
    assert JUNK not in {sample.pid for sample in split.gallery}
    assert {(s.pid, s.camera) for s in split.multi} == {(s.pid, s.camera) for s in split.query}
    assert load_dataset("synthetic", tmp_path / "set", quick=True, **options) == split
