"""The appearance of a person: the attributes that tell identities apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .config import Stream, generator

Colour = tuple[int, int, int]
"""sRGB, 0 to 255."""

# Few, and shared by all people: colours alone must not tell identities apart.
CLOTH: dict[str, Colour] = {
    "black": (36, 36, 40), "grey": (126, 128, 132), "white": (226, 226, 222), "red": (176, 42, 46),
    "blue": (48, 78, 150), "navy": (38, 46, 86), "green": (58, 118, 76), "yellow": (212, 180, 66),
    "pink": (214, 140, 160), "brown": (116, 82, 56),
}  # fmt: skip
LEGS = ("black", "grey", "navy", "blue", "brown", "white")
SKIN: tuple[Colour, ...] = ((246, 214, 190), (226, 180, 148), (190, 138, 104), (138, 94, 68), (88, 60, 46))
HAIR: dict[str, Colour] = {
    "black": (30, 26, 26), "brown": (84, 56, 38), "blond": (196, 160, 98), "red": (146, 70, 38),
    "grey": (160, 158, 156),
}  # fmt: skip

UPPER = ("tank", "tee", "shirt", "jacket", "coat")
LOWER = ("trousers", "shorts", "skirt", "long skirt")
PATTERNS = ("plain", "hoops", "stripes", "check", "dots", "yoke", "emblem")
LEG_PATTERNS = ("plain", "side", "check")
HAIR_STYLES = ("bald", "short", "bob", "long", "bun")
BAGS = ("none", "backpack", "satchel", "handbag")
HATS = ("none", "cap", "beanie", "brim")
SHOES = ("black", "white", "brown", "red")


@dataclass(frozen=True)
class Appearance:
    """One person.

    `tall` and `girth` are height and width of the body relative to the average person's, `legs` is the height of the
    hip as a fraction of the person's. Colours are keys of CLOTH and HAIR, skin is an index of SKIN.
    """

    tall: float
    girth: float
    legs: float
    skin: int
    hair: str
    hair_colour: str
    upper: str
    pattern: str
    upper_colour: str
    second_colour: str
    """Of the pattern, and of what a jacket or coat is open over."""
    lower: str
    leg_pattern: str
    lower_colour: str
    shoes: str
    bag: str
    bag_colour: str
    hat: str
    hat_colour: str


def appearance(seed: int, identity: int, twins: float) -> Appearance:
    """The person of that number, from 1.

    A fraction `twins` of the pairs (1 and 2, 3 and 4, ...) are near-twins, who differ in one attribute.
    """
    first = identity - 1 + identity % 2
    random = generator(seed, Stream.TWIN, first)
    if identity != first and random.random() < twins:
        return twin(_draw(generator(seed, Stream.APPEARANCE, first)), random)
    return _draw(generator(seed, Stream.APPEARANCE, identity))


def stranger(seed: int, number: int) -> Appearance:
    """A person who is not an identity of the set."""
    return _draw(generator(seed, Stream.PASSER_BY, number))


def _pick(random: np.random.Generator, values: Sequence[str], weights: Sequence[float] | None = None) -> str:
    share = None if weights is None else np.array(weights) / np.sum(weights)
    return values[int(random.choice(len(values), p=share))]


def _draw(random: np.random.Generator) -> Appearance:
    cloth = tuple(CLOTH)
    upper_colour = _pick(random, cloth)
    return Appearance(
        tall=float(random.uniform(0.9, 1.08)),
        girth=float(random.uniform(0.85, 1.3)),
        legs=float(random.uniform(0.49, 0.54)),
        skin=int(random.integers(len(SKIN))),
        hair=_pick(random, HAIR_STYLES, (1, 4, 3, 3, 2)),
        hair_colour=_pick(random, tuple(HAIR), (3, 3, 2, 1, 1)),
        upper=_pick(random, UPPER, (1, 3, 3, 3, 2)),
        pattern=_pick(random, PATTERNS, (3, 2, 2, 2, 1.5, 2, 2)),
        upper_colour=upper_colour,
        second_colour=_pick(random, [name for name in cloth if contrast(name, upper_colour)]),
        lower=_pick(random, LOWER, (6, 3, 2, 1.5)),
        leg_pattern=_pick(random, LEG_PATTERNS, (6, 1.5, 1)),
        lower_colour=_pick(random, LEGS),
        shoes=_pick(random, SHOES, (4, 3, 2, 1)),
        bag=_pick(random, BAGS, (3, 2.5, 2, 1.5)),
        bag_colour=_pick(random, ("black", "red", "blue", "brown", "yellow", "grey")),
        hat=_pick(random, HATS, (5, 1.5, 1, 1)),
        hat_colour=_pick(random, ("black", "red", "white", "navy", "yellow")),
    )


def contrast(one: str, other: str) -> bool:
    """Whether two cloth colours are far enough apart to be seen under every camera."""
    return sum(abs(a - b) for a, b in zip(CLOTH[one], CLOTH[other], strict=True)) > 130


def twin(who: Appearance, random: np.random.Generator) -> Appearance:
    """The person with one visible attribute changed."""
    choices: dict[str, Sequence[str]] = {
        "upper": _sleeves_apart(who.upper),
        "pattern": PATTERNS,
        "lower": LOWER,
        "shoes": SHOES if who.lower != "long skirt" else (),
        "bag": BAGS,
        "hat": HATS,
        "hair": [style for style in HAIR_STYLES if who.hat == "none" and (style == "long") != (who.hair == "long")],
        "lower_colour": [name for name in LEGS if contrast(name, who.lower_colour)],
        "hat_colour": [name for name in CLOTH if who.hat != "none" and contrast(name, who.hat_colour)],
        "bag_colour": [name for name in CLOTH if who.bag == "backpack" and contrast(name, who.bag_colour)],
    }
    others = {name: [v for v in values if v != getattr(who, name)] for name, values in choices.items()}
    name = _pick(random, [name for name, values in others.items() if values])
    changed: dict[str, Any] = {name: _pick(random, others[name])}
    return replace(who, **changed)


def _sleeves_apart(upper: str) -> Sequence[str]:
    """Upper garments that differ visibly: a jacket's twin is not a shirt of the same colour, seen from the back."""
    return {
        "tank": ("shirt",),
        "tee": ("shirt", "coat"),
        "shirt": ("tee", "coat"),
        "jacket": ("tee", "coat"),
        "coat": ("tee", "shirt"),
    }[upper]
