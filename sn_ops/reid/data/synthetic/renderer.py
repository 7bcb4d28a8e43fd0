"""Rendering one image of the set from its description in the plan."""

from __future__ import annotations

from dataclasses import replace
from math import copysign, pi

import numpy as np

from .appearance import Appearance, appearance, stranger
from .camera import Camera, camera
from .canvas import SUPERSAMPLING, Canvas, shade
from .config import Stream, SyntheticConfig, generator
from .figure import Figure
from .plan import Image, Kind
from .pose import Box, Moment, bad_box, detected_box, hand_drawn_box, moment

# Frames from here on are only for bad boxes: no plan has so many.
_LATER = 1000
# Added to the box, so that no two images share random numbers.
_BOXES_OF = {Kind.PERSON: 0, Kind.DISTRACTOR: 2, Kind.JUNK: 4}


class Renderer:
    """Draws images of one set; keeps the scenes of its cameras."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        self._cameras: dict[int, Camera] = {}

    def camera(self, number: int) -> Camera:
        """The camera of that number, from 0."""
        if number not in self._cameras:
            self._cameras[number] = camera(self.config, number)
        return self._cameras[number]

    def person(self, identity: int) -> Appearance:
        """The appearance of the person of that number, from 1."""
        return appearance(self.config.seed, identity, self.config.twins)

    def jpeg(self, image: Image) -> bytes:
        """The image as a JPEG file."""
        seed, seen = self.config.seed, self.camera(image.camera)
        place = image.identity, image.camera, image.frame, image.box + _BOXES_OF[image.kind]
        random = generator(seed, Stream.BOX, *place)
        who, when, box = self._subject(image, random)
        canvas = Canvas(seen.background(when.scene, self.config.width * SUPERSAMPLING))
        if who is not None:
            Figure(canvas, who, when, box, seen.pitch).draw()
            self._occlude(canvas, when, box, seen, random)
        return seen.expose(canvas.image, canvas.mask, when.light, generator(seed, Stream.SENSOR, *place))

    def _subject(self, image: Image, random: np.random.Generator) -> tuple[Appearance | None, Moment, Box]:
        """The person (None in some distractors), the moment, and the box of an image."""
        seed, occlusion = self.config.seed, self.config.occlusion
        if image.kind is Kind.PERSON:
            box = hand_drawn_box(random) if image.box == 0 else detected_box(random)
            return self.person(image.identity), moment(seed, image.identity, image.camera, image.frame, occlusion), box
        if image.kind is Kind.JUNK:
            when = moment(seed, image.shown, image.camera, _LATER + image.identity, occlusion)
            return self.person(image.shown), when, bad_box(random)
        when = moment(seed, image.identity, image.camera, 0, occlusion, Stream.PASSER_BY)
        share = random.random()
        who = stranger(seed, image.identity) if share > 0.3 else None
        return who, when, detected_box(random) if share > 0.65 else bad_box(random)

    def _occlude(self, canvas: Canvas, when: Moment, box: Box, seen: Camera, random: np.random.Generator) -> None:
        """Draws the moment's occluder, which covers at most a third of the person."""
        width, height = canvas.size
        middle, half = box.x * width, 0.16 * box.height * height
        x = middle + when.side * half
        if when.occluder == "post":
            canvas.rectangle((x, 0), (x + (0.04 + 0.06 * when.cover) * width, height), (88, 90, 92), edge=2)
        elif when.occluder == "box":
            left, top = middle + when.side * 0.5 * half - 1.4 * half, height * (0.9 - 0.25 * when.cover)
            grey = shade((150, 146, 138), 0.5 + when.cover)
            canvas.rectangle((left, top), (left + 2.8 * half, height), grey, edge=2)
        elif when.occluder == "bush":
            for _ in range(24):
                leaf = x + random.normal(0, 0.8) * half, height * (1 - abs(random.normal(0, 0.07 + 0.07 * when.cover)))
                canvas.ellipse(leaf, 0.05 * width, 0.045 * width, shade((74, 104, 58), random.uniform(0.6, 1.2)))
        elif when.occluder == "person":
            other = stranger(self.config.seed, int(random.integers(2**31)))
            beside = Box(box.x + copysign(0.42, when.side) + 0.1 * when.side, box.feet + 0.03, box.height, 0.0)
            turned = replace(when, yaw=when.yaw + float(random.choice([0, pi])), phase=when.phase + 1.3)
            Figure(canvas, other, turned, beside, seen.pitch).draw()
