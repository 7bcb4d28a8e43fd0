"""`IdentitySampler`: exact epochs, repeatable, the same whatever the number of ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from sn_ops.reid.data.sampler import IdentitySampler


def collection(images_of: Sequence[int], cameras: int = 3, seed: int = 0) -> tuple[list[int], list[int]]:
    """Labels and cameras of identities that have so many images, shuffled; the labels have gaps."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(7 * np.arange(len(images_of)) + 3, images_of))
    return labels.tolist(), random.integers(0, cameras, len(labels)).tolist()


UNEVEN = [4, 1, 9, 2, 6, 3, 12, 5, 4, 4, 1, 7, 8]


def identities_of(batch: Sequence[int], labels: Sequence[int], images: int) -> list[int]:
    """The identity of each run of `images` rows, which must be one identity's."""
    assert len(batch) % images == 0
    runs = [{labels[index] for index in batch[i : i + images]} for i in range(0, len(batch), images)]
    assert all(len(run) == 1 for run in runs)
    return [run.pop() for run in runs]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("images", [1, 2, 4, 5])
@pytest.mark.parametrize("identities", [1, 3, 4, 13, 50])
def test_every_identity_once(identities: int, images: int, balanced: bool) -> None:
    labels, cameras = collection(UNEVEN)
    sampler = IdentitySampler(labels, cameras, identities, images, seed=1, camera_balanced=balanced)
    having = Counter(labels)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == sampler.batches == -(-13 // identities)
        seen = [identity for batch in batches for identity in identities_of(batch, labels, images)]
        assert sorted(seen) == sorted(having)
        sizes = [len(batch) // images for batch in batches]
        assert max(sizes) <= identities and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
        drawn = Counter(index for batch in batches for index in batch)
        for index, label in enumerate(labels):  # each image as often as the others, within one
            low = images // having[label]
            assert low <= drawn[index] <= low + (images % having[label] > 0)
        assert all(type(index) is int for batch in batches for index in batch)


def test_every_image_has_the_same_chance() -> None:
    labels, cameras = collection([10, 6])
    sampler = IdentitySampler(labels, cameras, 2, 4, seed=3)
    drawn: Counter[int] = Counter()
    for epoch in range(600):
        sampler.set_epoch(epoch)
        drawn.update(index for batch in sampler for index in batch)
    for index, label in enumerate(labels):
        chance = 4 / labels.count(label)
        deviation = abs(drawn[index] / 600 - chance) / (chance * (1 - chance) / 600) ** 0.5
        assert deviation < 4.5, f"image {index}: {drawn[index]} times in 600 epochs, chance {chance}"


def test_every_pair_of_identities_meets_as_often() -> None:
    """Each epoch divides the identities into new batches: a pair shares a batch by chance, 3 times in 11 here."""
    labels, cameras = collection([3] * 12)
    sampler = IdentitySampler(labels, cameras, 4, 1, seed=0)
    together: Counter[tuple[int, int]] = Counter()
    for epoch in range(500):
        sampler.set_epoch(epoch)
        for batch in sampler:
            together.update(itertools.combinations(sorted(labels[index] for index in batch), 2))
    chance = 3 / 11
    for pair in itertools.combinations(sorted(set(labels)), 2):
        assert abs(together[pair] / 500 - chance) < 4.5 * (chance * (1 - chance) / 500) ** 0.5, pair


def test_repeats_and_changes() -> None:
    labels, cameras = collection(UNEVEN)

    def epoch(seed: int, number: int) -> list[list[int]]:
        sampler = IdentitySampler(labels, cameras, 4, 4, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(5, 2) == epoch(5, 2)
    different = [epoch(5, 2), epoch(5, 3), epoch(6, 2)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_leaves_generators_alone() -> None:
    labels, cameras = collection(UNEVEN)
    state, numpy_state = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    list(IdentitySampler(labels, cameras, 4, 4, seed=0, camera_balanced=True))
    assert torch.equal(state, torch.get_rng_state())
    assert numpy_state == str(np.random.get_state())  # noqa: NPY002


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_together_are_one_process(world: int, balanced: bool) -> None:
    labels, cameras = collection(UNEVEN)
    whole = IdentitySampler(labels, cameras, 7, 3, seed=2, camera_balanced=balanced)
    shares = [
        IdentitySampler(labels, cameras, 7, 3, seed=2, camera_balanced=balanced, rank=rank, world=world)
        for rank in range(world)
    ]
    for epoch, start in ((0, 0), (1, 0), (1, 1), (2, 2)):
        for sampler in (whole, *shares):
            sampler.set_epoch(epoch, start)
        assert {len(share) for share in shares} == {len(whole)}
        parts = [list(share) for share in shares]
        assert {len(part) for part in parts} == {len(whole)}
        assert [list(itertools.chain(*batch)) for batch in zip(*parts, strict=True)] == list(whole)
        sizes = [[len(batch) for batch in part] for part in parts]
        assert all(max(step) - min(step) <= 3 and min(step) > 0 for step in zip(*sizes, strict=True))


def test_goes_on_in_an_epoch() -> None:
    labels, cameras = collection(UNEVEN)
    sampler = IdentitySampler(labels, cameras, 3, 4, seed=9)
    sampler.set_epoch(4)
    everything = list(sampler)
    for start in range(len(everything) + 1):
        sampler.set_epoch(4, start)
        assert len(sampler) == len(everything) - start
        assert list(sampler) == everything[start:]
    sampler.set_epoch(5)
    assert sampler.start_batch == 0 and len(sampler) == len(everything)


@pytest.mark.parametrize("images", [2, 4, 6])
def test_cameras_are_spread(images: int) -> None:
    """No camera gives a second more than another that still had an image to give."""
    labels, cameras = collection([20, 5, 3, 9, 14, 30, 2, 7], cameras=5, seed=4)
    cameras[labels.index(3)] = 11  # a camera that has one image
    sampler = IdentitySampler(labels, cameras, 4, images, seed=8, camera_balanced=True)
    fewest = 99
    for epoch in range(20):
        sampler.set_epoch(epoch)
        for batch in sampler:
            for i in range(0, len(batch), images):
                drawn = batch[i : i + images]
                own = [index for index, label in enumerate(labels) if label == labels[drawn[0]]]
                if len(own) < images:
                    continue
                assert len(set(drawn)) == images
                taken, have = Counter(cameras[index] for index in drawn), Counter(cameras[index] for index in own)
                for camera, count in have.items():
                    if taken[camera] < count:
                        assert taken[camera] >= max(taken.values()) - 1
                fewest = min(fewest, len(taken) - min(images, len(have)))
    assert fewest == 0  # and as many cameras as there can be


@pytest.mark.parametrize("images", [1, 2])
def test_cameras_and_their_images_have_the_same_chance(images: int) -> None:
    labels, cameras = [0] * 9, [0, 0, 0, 0, 0, 0, 1, 1, 1]
    sampler = IdentitySampler(labels, cameras, 1, images, seed=0, camera_balanced=True)
    drawn: Counter[int] = Counter()
    for epoch in range(900):
        sampler.set_epoch(epoch)
        drawn.update(next(iter(sampler)))
    for index in range(9):
        chance = images / 12 if index < 6 else images / 6
        assert abs(drawn[index] / 900 - chance) < 4.5 * (chance * (1 - chance) / 900) ** 0.5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cameras": [0]}, ValueError, "cameras: expected 66 entries like labels, got 1"),
        ({"labels": [], "cameras": []}, ValueError, "labels: expected at least one image, got none"),
        ({"identities": 0}, ValueError, "identities: expected an int >= 1, got 0"),
        ({"images": 1.5}, TypeError, "images: expected an int >= 1, got 1.5"),
        ({"seed": -1}, ValueError, "seed: expected an int >= 0, got -1"),
        ({"rank": 2, "world": 2}, ValueError, "rank: expected less than world"),
        ({"identities": 4, "world": 4}, ValueError, "expected at least 4 identities in every batch"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    labels, cameras = collection(UNEVEN)
    arguments: dict[str, Any] = {"labels": labels, "cameras": cameras, "identities": 4, "images": 4, "seed": 0}
    with pytest.raises(error, match=rf"^sn_ops\.reid: sampler: {message}"):
        IdentitySampler(**{**arguments, **change})


def test_refuses_a_batch_beyond_the_epoch() -> None:
    labels, cameras = collection(UNEVEN)
    sampler = IdentitySampler(labels, cameras, 4, 4, seed=0)
    with pytest.raises(ValueError, match="start_batch: expected at most 4, the batches of an epoch, got 5"):
        sampler.set_epoch(0, 5)
    with pytest.raises(ValueError, match="epoch: expected an int >= 0, got -1"):
        sampler.set_epoch(-1)
