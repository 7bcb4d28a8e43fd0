"""DukeMTMC-reID, which is read as Market-1501 is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sn_ops.reid.data import load_dataset
from support import miniature
from support.splits import Names, check_every_number, keys, load, people_of


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
