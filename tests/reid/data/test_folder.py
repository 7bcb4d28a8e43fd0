"""One's own images: folders of people, or a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from sn_ops.reid.data import DISTRACTOR, load_dataset
from support import miniature
from support.splits import keys


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
