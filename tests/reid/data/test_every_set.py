"""What holds of every data set, on miniature trees with the true names and formats."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sn_ops.reid.data import DISTRACTOR, load_dataset
from support.splits import SMALL, WRITERS, keys, load


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
