"""Drawing at a multiple of the resolution: shapes in pixels, of one colour or with a cloth's pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...requirements import need
from .appearance import Colour

Pixel = tuple[float, float]

SUPERSAMPLING = 3
"""Pixels drawn for each pixel of the image, along each axis."""


def shade(colour: Colour, factor: float) -> Colour:
    """Darker (below 1) or lighter (above)."""
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in colour)
    return red, green, blue


class Canvas:
    """An image being drawn, and the mask of the people on it, for their lighting."""

    def __init__(self, background: Any) -> None:
        self._images, self._draws = need("PIL.Image"), need("PIL.ImageDraw")
        self.image = background
        self.size: tuple[int, int] = background.size
        self.mask = self._images.new("L", self.size, 0)
        self._colours = self._draws.Draw(self.image)
        self._covers = self._draws.Draw(self.mask)

    def polygon(self, points: Sequence[Pixel], colour: Colour, texture: Any = None, edge: float = 0.0) -> None:
        """A filled polygon with a darker edge that wide. A texture is an image of the canvas's size."""
        if edge >= 1:
            closed = [*points, points[0], points[1]]
            self._colours.line(closed, fill=shade(colour, 0.6), width=round(2 * edge), joint="curve")
            self._covers.line(closed, fill=255, width=round(2 * edge), joint="curve")
        self._covers.polygon(points, fill=255)
        if texture is None:
            self._colours.polygon(points, fill=colour)
            return
        shape = self._images.new("L", self.size, 0)
        self._draws.Draw(shape).polygon(points, fill=255)
        self.image.paste(texture, mask=shape)

    def rectangle(self, corner: Pixel, opposite: Pixel, colour: Colour, edge: float = 0.0) -> None:
        """Between the upper left and the lower right corner, with a darker edge that wide."""
        (left, top), (right, bottom) = corner, opposite
        self.polygon([corner, (right, top), opposite, (left, bottom)], colour, edge=edge)

    def limb(
        self,
        one: Pixel,
        other: Pixel,
        radii: tuple[float, float],
        colour: Colour,
        texture: Any = None,
        edge: float = 0.0,
    ) -> None:
        """A rod with round ends, of the first radius at `one` and of the second at `other`."""
        outline = _rod(one, other, (radii[0] + edge, radii[1] + edge))
        self._fill(self._colours, *outline, shade(colour, 0.6))
        self._fill(self._covers, *outline, 255)
        inner = _rod(one, other, radii)
        if texture is None:
            self._fill(self._colours, *inner, colour)
            return
        shape = self._images.new("L", self.size, 0)
        self._fill(self._draws.Draw(shape), *inner, 255)
        self.image.paste(texture, mask=shape)

    def ellipse(self, centre: Pixel, across: float, down: float, colour: Colour, edge: float = 0.0) -> None:
        """A filled ellipse of these half axes with a darker edge that wide."""
        for draw, half, fill in (
            (self._colours, edge, shade(colour, 0.6)),
            (self._covers, edge, 255),
            (self._colours, 0.0, colour),
        ):
            draw.ellipse(_around(centre, across + half, down + half), fill=fill)

    @staticmethod
    def _fill(draw: Any, quad: Sequence[Pixel], ends: Sequence[tuple[Pixel, float]], fill: Colour | int) -> None:
        draw.polygon(quad, fill=fill)
        for centre, radius in ends:
            draw.ellipse(_around(centre, radius, radius), fill=fill)


def _around(centre: Pixel, across: float, down: float) -> tuple[float, float, float, float]:
    across, down = max(across, 0.5), max(down, 0.5)
    return centre[0] - across, centre[1] - down, centre[0] + across, centre[1] + down


def _rod(one: Pixel, other: Pixel, radii: tuple[float, float]) -> tuple[list[Pixel], list[tuple[Pixel, float]]]:
    """Its middle as a quadrilateral, and its round ends as circles."""
    along = (other[0] - one[0], other[1] - one[1])
    length = max(float(np.hypot(*along)), 1e-6)
    x, y = -along[1] / length, along[0] / length
    a, b = radii
    quad = [
        (one[0] + a * x, one[1] + a * y),
        (other[0] + b * x, other[1] + b * y),
        (other[0] - b * x, other[1] - b * y),
        (one[0] - a * x, one[1] - a * y),
    ]
    return quad, [(one, a), (other, b)]


def texture(
    size: tuple[int, int],
    pattern: str,
    one: Colour,
    other: Colour,
    origin: Pixel,
    unit: float,
    turn: float,
    facing: float,
) -> Any:
    """A cloth's pattern over the whole canvas.

    Args:
        size: of the canvas.
        pattern: one of PATTERNS but "plain", or of the LEG_PATTERNS.
        one: the ground colour.
        other: the colour of the pattern.
        origin: the pixel of the middle of the shoulders (trousers: of the hips).
        unit: pixels for a person's height.
        turn: how far the cloth has turned around the body, in persons' heights.
        facing: cosine of the yaw: prints on chest and back narrow as the person turns.
    """
    images = need("PIL.Image")
    across = ((np.arange(size[0], dtype=np.float32) - origin[0]) / unit)[None, :]
    down = ((np.arange(size[1], dtype=np.float32) - origin[1]) / unit)[:, None]
    around = across + turn
    flat = np.zeros((size[1], size[0]), np.float32)
    if pattern == "hoops":
        share = flat + (down % 0.075 < 0.034)
    elif pattern == "stripes":
        share = flat + (around % 0.05 < 0.021)
    elif pattern == "check":
        share = flat + 0.5 * (down % 0.07 < 0.035) + 0.5 * (around % 0.07 < 0.035)
    elif pattern == "dots":
        row = np.floor(down / 0.045)
        share = flat + (((around + 0.0225 * row) % 0.045 - 0.0225) ** 2 + (down % 0.045 - 0.0225) ** 2 < 0.013**2)
    elif pattern == "yoke":
        share = flat + (down < 0.125)
    elif pattern == "emblem":
        share = flat + ((np.abs(across) < 0.05 * abs(facing)) & (down > 0.06) & (down < 0.16))
    elif pattern == "side":
        share = flat + (np.abs(np.abs(around) % 0.12 - 0.06) < 0.012)
    else:
        raise ValueError(f"sn_ops.reid: synthetic: pattern: expected the name of one, got {pattern!r}")
    cover = images.fromarray(np.rint(255 * share).astype(np.uint8))
    return images.composite(images.new("RGB", size, other), images.new("RGB", size, one), cover)
