"""MSMT17: lists of people numbered from 0 in training and test, two versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from sn_ops.reid.data import load_dataset
from support import miniature
from support.splits import keys, load, spread


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
    """The lists number training and test people alike, from 0, which is the distractor elsewhere."""
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
