"""The scenes of cameras: a wall or trees above, the ground below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...requirements import need
from .appearance import Colour
from .canvas import shade

Painter = Callable[[Any, Colour, tuple[int, int], np.random.Generator], None]
"""Draws on an `ImageDraw`, over a wall of a colour, down to a width and a height."""


def _bricks(draw: Any, wall: Colour, size: tuple[int, int], random: np.random.Generator) -> None:
    width, height = size
    tall = max(4, int(height / 12 * random.uniform(0.8, 1.2)))
    for row, y in enumerate(range(0, height, tall)):
        draw.line((0, y, width, y), fill=shade(wall, 0.8), width=2)
        for x in range(tall * (row % 2), width, 2 * tall):
            draw.line((x, y, x, y + tall), fill=shade(wall, 0.8), width=2)


def _trees(draw: Any, wall: Colour, size: tuple[int, int], random: np.random.Generator) -> None:
    width, height = size
    for _ in range(160):
        x, y, radius = random.uniform(0, width), random.uniform(0, height), random.uniform(0.05, 0.18) * height
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade(wall, random.uniform(0.55, 1.25)))
    for _ in range(9):
        x = random.uniform(0, width)
        draw.rectangle((x, 0, x + height * random.uniform(0.03, 0.08), height), fill=(84, 66, 50))


def _windows(draw: Any, wall: Colour, size: tuple[int, int], random: np.random.Generator) -> None:
    width, height = size
    unit = height / 12
    for x in np.arange(random.uniform(0, 3) * unit, width, 5 * unit):
        for y in np.arange(unit, height - 3 * unit, 5 * unit):
            glass = shade((96, 110, 124), random.uniform(0.7, 1.3))
            draw.rectangle((x, y, x + 3 * unit, y + 3.5 * unit), fill=glass)
            draw.line((x + 1.5 * unit, y, x + 1.5 * unit, y + 3.5 * unit), fill=shade(wall, 0.9), width=4)


def _pillars(draw: Any, wall: Colour, size: tuple[int, int], random: np.random.Generator) -> None:
    width, height = size
    unit = height / 12
    for x in np.arange(random.uniform(0, 5) * unit, width, 6 * unit):
        draw.rectangle((x, 0, x + 2 * unit, height), fill=shade(wall, 0.82))
        draw.rectangle((x, 0, x + unit / 2, height), fill=shade(wall, 0.7))
    draw.rectangle((0, height - unit, width, height), fill=shade(wall, 0.75))


def _shops(draw: Any, wall: Colour, size: tuple[int, int], random: np.random.Generator) -> None:
    width, height = size
    unit, x = height / 12, 0.0
    while x < width:
        wide = random.uniform(4, 9) * unit
        red, green, blue = (int(channel) for channel in random.integers(80, 170, 3))
        draw.rectangle((x, 3 * unit, x + wide, height), fill=shade((red, green, blue), 0.8))
        draw.rectangle((x, unit, x + wide, 3 * unit), fill=(blue, red, green))
        draw.rectangle((x + wide, 0, x + wide + unit, height), fill=shade(wall, 0.7))
        x += wide + unit


def _fence(draw: Any, wall: Colour, size: tuple[int, int], random: np.random.Generator) -> None:
    width, height = size
    unit = height / 12
    for x in np.arange(0, width, unit * random.uniform(0.8, 1.4)):
        draw.rectangle((x, 3 * unit, x + unit / 3, height), fill=shade(wall, 0.6))
    for y in (4 * unit, 9 * unit):
        draw.rectangle((0, y, width, y + unit / 2), fill=shade(wall, 0.55))


SCENES: tuple[tuple[Colour, Colour, Painter], ...] = (
    ((140, 116, 106), (116, 116, 118), _bricks),
    ((108, 122, 98), (122, 130, 104), _trees),
    ((154, 150, 142), (142, 138, 130), _windows),
    ((158, 158, 154), (130, 122, 114), _pillars),
    ((106, 110, 116), (108, 106, 108), _shops),
    ((136, 142, 150), (146, 138, 122), _fence),
)
"""The colours of wall and ground, and what is drawn on the wall. They are muted, so that people stand out."""


def scene(which: int, size: tuple[int, int], random: np.random.Generator) -> Any:
    """A scene of SCENES as a `PIL.Image` of that width and height."""
    images, draws = need("PIL.Image"), need("PIL.ImageDraw")
    wall, ground, paint = SCENES[which]
    width, height = size
    horizon = int(height * random.uniform(0.5, 0.72))
    image = images.new("RGB", size, wall)
    draw = draws.Draw(image)
    paint(draw, wall, (width, horizon), random)
    draw.rectangle((0, horizon, width, height), fill=ground)
    draw.rectangle((0, horizon, width, horizon + height // 60), fill=shade(ground, 0.7))
    for _ in range(14):  # joints of the paving, cracks, paint
        x, slope = random.uniform(0, width), random.normal(0, 0.8) * height
        fill = shade(ground, random.uniform(0.8, 1.15))
        draw.line((x, horizon, x + slope, height), fill=fill, width=max(1, height // 90))
    pixels = np.asarray(image, dtype=np.float32)
    for cells, strength in ((6, 0.12), (40, 0.07)):  # stains and shadows, large and small
        coarse = random.standard_normal((cells, cells * 2), dtype=np.float32)
        stains = np.asarray(images.fromarray(coarse).resize(size, images.Resampling.BICUBIC))
        pixels = pixels * (1 + np.float32(strength) * stains)[..., None]
    return images.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
