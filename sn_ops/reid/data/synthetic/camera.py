"""A camera: its scene, and how it changes colours: white balance, contrast, blur, noise, JPEG."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...requirements import need
from .canvas import SUPERSAMPLING
from .config import Stream, SyntheticConfig, generator
from .scenes import SCENES, scene

# The width of the scene, in images: people stand at different places of it.
_BREADTH = 5


@dataclass(frozen=True)
class Camera:
    """One camera; the same for every image it takes."""

    scene: Any
    """`PIL.Image`, at the resolution of the canvas, `_BREADTH` images wide."""
    gains: NDArray[np.float32]
    """Of red, green and blue: white balance and exposure."""
    gamma: float
    saturation: float
    softness: float
    """Radius of the blur, in pixels."""
    noise: float
    """Standard deviation, of 255."""
    quality: int
    """Of the JPEG."""
    pitch: float
    """Radians: how far down it looks."""
    lamp: float
    """Where the light comes from, -1 (left) to 1 (right)."""

    def background(self, place: float, width: int) -> Any:
        """The part of the scene behind a person at that place, 0 to 1; width in pixels of the canvas."""
        left = round(place * (self.scene.width - width))
        return self.scene.crop((left, 0, left + width, self.scene.height))

    def expose(self, drawn: Any, mask: Any, light: float, random: np.random.Generator) -> bytes:
        """A JPEG of what was drawn.

        Args:
            drawn: `PIL.Image` in RGB, SUPERSAMPLING times the image's size.
            mask: of the same size, the pixels of people, which are lit from one side.
            light: brightness relative to the usual.
            random: for the sensor's noise.
        """
        images, filters = need("PIL.Image"), need("PIL.ImageFilter")
        small = drawn.reduce(SUPERSAMPLING).filter(filters.GaussianBlur(self.softness))
        pixels = np.asarray(small, dtype=np.float32) / 255
        near = mask.reduce(SUPERSAMPLING).filter(filters.GaussianBlur(small.width / 24))
        body = np.asarray(near, dtype=np.float32) / 255
        slope = np.zeros_like(body)
        slope[:, 1:-1] = body[:, :-2] - body[:, 2:]
        pixels = pixels * (1 + 1.6 * self.lamp * slope * body)[..., None]
        grey = pixels.mean(axis=2, keepdims=True)
        pixels = grey + self.saturation * (pixels - grey)
        pixels = np.clip(pixels * (self.gains * np.float32(light)), 0, 1) ** np.float32(self.gamma)
        grain = random.standard_normal(pixels.shape, dtype=np.float32)
        grain = 0.5 * grain + 0.8 * grain.mean(axis=2, keepdims=True)
        bytes_ = np.rint(np.clip(255 * pixels + self.noise * grain, 0, 255)).astype(np.uint8)
        out = io.BytesIO()
        images.fromarray(bytes_).save(out, "JPEG", quality=self.quality)
        return out.getvalue()


def camera(config: SyntheticConfig, number: int) -> Camera:
    """The camera of that number, from 0."""
    random = generator(config.seed, Stream.CAMERA, camera=number)
    # Consecutive numbers have different scenes: six cameras share none.
    first = int(generator(config.seed, Stream.CAMERA).integers(len(SCENES)))
    warm, green, exposure = random.normal(0, 0.1), random.normal(0, 0.03), random.normal(0, 0.1)
    gains = np.exp(np.array([warm, green, -warm]) + exposure).astype(np.float32)
    size = (_BREADTH * config.width * SUPERSAMPLING, config.height * SUPERSAMPLING)
    return Camera(
        scene=scene((first + number) % len(SCENES), size, random),
        gains=gains,
        gamma=float(np.exp(random.normal(0, 0.12))),
        saturation=float(random.uniform(0.7, 1.1)),
        softness=float(random.uniform(0.2, 1.0)),
        noise=float(random.uniform(2, 9)),
        quality=int(random.integers(45, 91)),
        pitch=float(random.uniform(0.02, 0.3)),
        lamp=float(random.choice([-1, 1]) * random.uniform(0.3, 1)),
    )
