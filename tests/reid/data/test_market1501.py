"""Market-1501: its parts, junk, distractors and multiple query."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sn_ops.reid.data import DISTRACTOR, JUNK, Sample, load_dataset, market1501
from sn_ops.reid.evaluation import multi_query_features
from support import miniature
from support.splits import Names, check_every_number, keys, load, people_of


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
    """Identity and camera are read from the file name, not from a folder that looks like one."""
    assert {s.pid for s in load("market1501", miniature.market1501(tmp_path / "0099_c5s1")).train} == {2, 7, 10}


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
