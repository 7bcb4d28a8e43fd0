"""The settings of a rendered set, and its streams of random numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import IntEnum

import numpy as np

# Raise it with every change that alters an image, so that folders of older images are recognised.
VERSION = 1


class Stream(IntEnum):
    """Independent streams of random numbers, one for each property of the set."""

    SPLIT = 0
    APPEARANCE = 1
    TWIN = 2
    TRACK = 3
    MOMENT = 4
    BOX = 5
    CAMERA = 6
    PASSER_BY = 7
    SENSOR = 8


def generator(
    seed: int, stream: Stream, identity: int = 0, camera: int = 0, frame: int = 0, box: int = 0
) -> np.random.Generator:
    """Random numbers that depend only on these integers: not on the order of rendering, nor on the process."""
    return np.random.default_rng(np.random.SeedSequence((seed, stream, identity, camera, frame, box)))


@dataclass(frozen=True)
class SyntheticConfig:
    """The size and the difficulty of a rendered set.

    People come in pairs (1 and 2, 3 and 4, ...), whose members are in the same split. The members of some pairs differ
    in one small attribute.

    Raises:
        TypeError, ValueError: at construction; the message names the field, what was expected and what was given.
    """

    seed: int = 0
    """0 to 2**32 - 1. Each seed gives other people, cameras and frames."""
    height: int = 128
    width: int = 64
    """Pixels of every image."""
    train_identities: int = 120
    test_identities: int = 60
    cameras: int = 6
    cameras_each: int = 4
    """How many of the cameras see a person."""
    train_frames: int = 5
    """Training images of a person under each of those cameras."""
    gallery_frames: int = 3
    """Gallery images of a test person under each camera; the query is one more."""
    box_frames: int = 3
    """Hand-drawn boxes (`gt_bbox`) of a test person under each camera, the query's included."""
    distractors: int = 240
    """Gallery images of identity 0: background, parts of people, strangers."""
    junk: int = 60
    """Gallery images of identity -1: boxes that are badly placed on a test person."""
    twins: float = 0.5
    """Fraction of the pairs whose members are near-twins."""
    occlusion: float = 0.2
    """Fraction of frames with something in front of the person."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), field.type == "float")
        limits = {
            "seed": (0, 2**32 - 1),
            "height": (32, 1024),
            "width": (16, 512),
            "train_identities": (2, 700),
            "test_identities": (2, 700),
            "cameras": (2, 6),  # the loader allows up to 6
            "cameras_each": (2, self.cameras),
            "train_frames": (1, 50),
            "gallery_frames": (1, 50),
            "box_frames": (1, self.gallery_frames + 1),
            "distractors": (0, 100_000),
            "junk": (0, 100_000),
            "twins": (0, 1),
            "occlusion": (0, 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"sn_ops.reid: synthetic: {name}: expected {low} to {high}, got {value}")

    @classmethod
    def quick(cls, seed: int = 0) -> SyntheticConfig:
        """The settings of a few hundred images, rendered within seconds, for a first look and for tests."""
        return cls(
            seed=seed,
            train_identities=40,
            test_identities=20,
            cameras=4,
            cameras_each=3,
            train_frames=4,
            gallery_frames=2,
            box_frames=2,
            distractors=40,
            junk=12,
        )

    def as_dict(self) -> dict[str, int | float]:
        """The fields and the version of the renderer, which determine the images."""
        return {"version": VERSION, **asdict(self)}


def _check_type(name: str, value: object, real: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float) if real else int):
        expected = "a number" if real else "an integer"
        raise TypeError(f"sn_ops.reid: synthetic: {name}: expected {expected}, got {value!r}")
