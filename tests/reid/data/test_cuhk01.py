"""CUHK01: a split that is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from sn_ops.reid.data import cuhk01, load_dataset
from support import miniature
from support.splits import load


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
