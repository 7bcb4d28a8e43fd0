"""The images of the set, by name: the split, camera and frame of each person."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .config import Stream, SyntheticConfig, generator

TRAIN, QUERY, GALLERY, BOXES = FOLDERS = ("bounding_box_train", "query", "bounding_box_test", "gt_bbox")

# Frame numbers as in Market-1501's names: of a video with 25 frames a second, one second apart.
_STEP = 25
# The seconds of video in which a person's passage may begin.
_SECONDS = 3000


class Kind(Enum):
    """The content of an image."""

    PERSON = "person"
    DISTRACTOR = "distractor"
    JUNK = "junk"


@dataclass(frozen=True)
class Image:
    """One image of the set. It depends on the seed, size and occlusion of the configuration and on these fields."""

    folder: str
    kind: Kind
    identity: int
    """A person's identity, from 1. Distractors and junk: which one, from 0."""
    camera: int
    """From 0."""
    frame: int
    """From 0, within the person's passage under the camera."""
    box: int
    """0: the box was drawn by hand and is tight. 1: a detector found it."""
    shown: int = 0
    """Junk: the person in the badly placed box."""

    def name(self, seed: int) -> str:
        """The file name: identity, camera and sequence, frame number, box."""
        if self.kind is Kind.PERSON:
            start = generator(seed, Stream.TRACK, self.identity, self.camera).integers(_SECONDS)
            second, label = int(start) + self.frame, f"{self.identity:04d}"
        else:
            second, label = self.identity, "0000" if self.kind is Kind.DISTRACTOR else "-1"
        sequence = 1 + second * 6 // (_SECONDS + 50)
        return f"{label}_c{self.camera + 1}s{min(sequence, 6)}_{1 + _STEP * second:06d}_{self.box:02d}.jpg"


def identities(config: SyntheticConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Training and test identities, each sorted and disjoint; near-twins are in the same split."""
    train_pairs = (config.train_identities + 1) // 2
    pairs = train_pairs + (config.test_identities + 1) // 2
    order = generator(config.seed, Stream.SPLIT).permutation(pairs).tolist()

    def members(chosen: list[int], count: int) -> tuple[int, ...]:
        people = [identity for pair in chosen for identity in (2 * pair + 1, 2 * pair + 2)]
        return tuple(sorted(people[:count]))

    return members(order[:train_pairs], config.train_identities), members(order[train_pairs:], config.test_identities)


def cameras_of(config: SyntheticConfig, identity: int) -> tuple[int, ...]:
    """The cameras that see a person, sorted."""
    order = generator(config.seed, Stream.SPLIT, identity).permutation(config.cameras)
    return tuple(sorted(order[: config.cameras_each].tolist()))


def plan(config: SyntheticConfig) -> tuple[Image, ...]:
    """All images of the set."""
    train, test = identities(config)
    images = []
    for identity in train:
        for camera in cameras_of(config, identity):
            images += [Image(TRAIN, Kind.PERSON, identity, camera, frame, 1) for frame in range(config.train_frames)]
    for identity in test:
        for camera in cameras_of(config, identity):
            # The query is the first frame's hand-drawn box, which is in gt_bbox too, as in Market-1501.
            images.append(Image(QUERY, Kind.PERSON, identity, camera, 0, 0))
            images += [Image(BOXES, Kind.PERSON, identity, camera, frame, 0) for frame in range(config.box_frames)]
            images += [
                Image(GALLERY, Kind.PERSON, identity, camera, frame, 1) for frame in range(1, 1 + config.gallery_frames)
            ]
    images += [Image(GALLERY, Kind.DISTRACTOR, i, i % config.cameras, 0, 1) for i in range(config.distractors)]
    for i in range(config.junk):
        shown = test[i % len(test)]
        seen = cameras_of(config, shown)
        images.append(Image(GALLERY, Kind.JUNK, i, seen[i // len(test) % len(seen)], 0, 1, shown))
    return tuple(images)
