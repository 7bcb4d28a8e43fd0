"""The baseline without training: colour histograms of the stripes of an image."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.images import read_image
from ..requirements import need

STRIPES = 6
BINS = (8, 4, 4)
"""Of hue, saturation and value."""


def colour_histograms(
    paths: Sequence[str | os.PathLike[str]],
    *,
    stripes: int = STRIPES,
    bins: tuple[int, int, int] = BINS,
    balance: bool = True,
    tick: Callable[[int], None] | None = None,
) -> Tensor:
    """Colour histograms of image files, for comparison by the Euclidean distance.

    An image is cut into horizontal stripes of equal height, as a person is into head, chest, hips and legs. Each gives
    a joint histogram over hue, saturation and value, and the square roots of its shares are the features: the Euclidean
    distance of two images is then proportional to the root of the sum of their stripes' squared Hellinger distances.
    A pixel weighs less towards the sides of the image (1 - x**2, with x from -1 to 1), where the background is.

    Args:
        paths: image files, in the order of the result.
        stripes: the number of stripes.
        bins: of hue, saturation and value.
        balance: scale red, green and blue to equal means first (grey world), against the cameras' white balance.
        tick: called with 1 after each image, for a progress bar.

    Returns:
        float32 `[len(paths), stripes * bins[0] * bins[1] * bins[2]]`, rows of unit length, on the CPU.

    Raises:
        OSError: a file is missing or not an image, or has fewer rows than stripes; the message has its path.
        ValueError: no path, no stripe, or fewer than one bin.
        ImportError: pillow is missing.

    Source: Gray and Tao, "Viewpoint Invariant Pedestrian Recognition with an Ensemble of Localized Features", ECCV 2008
    (colour histograms of six horizontal stripes).
    """
    if not paths:
        raise ValueError("sn_ops.reid: images: expected at least one path, got none")
    if stripes < 1 or min(bins) < 1:
        raise ValueError(f"sn_ops.reid: histograms: expected counts from 1, got stripes {stripes}, bins {bins}")
    rows = []
    for path in paths:
        rows.append(_histogram(_pixels(path, stripes, balance), stripes, bins))
        if tick is not None:
            tick(1)
    return torch.from_numpy(np.stack(rows))


def _pixels(path: str | os.PathLike[str], stripes: int, balance: bool) -> NDArray[np.uint8]:
    """The image as hue, saturation and value, `[H, W, 3]`."""
    images, image = need("PIL.Image"), read_image(path)
    if image.height < stripes:
        raise OSError(f"sn_ops.reid: images: expected at least {stripes} rows, got {image.height}: {path}")
    return np.asarray(_balanced(images, image) if balance else image.convert("HSV"))


def _balanced(images: Any, image: Any) -> Any:
    """Each channel with the mean of all three, in HSV."""
    pixels = np.asarray(image, dtype=np.float32)
    means = pixels.mean(axis=(0, 1))
    scaled = pixels * (means.mean() / np.maximum(means, 1))
    return images.fromarray(np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)).convert("HSV")


def _histogram(pixels: NDArray[np.uint8], stripes: int, bins: tuple[int, int, int]) -> NDArray[np.float32]:
    hue, saturation, value = (pixels[..., i].astype(np.int64) * bins[i] // 256 for i in range(3))
    cell = (hue * bins[1] + saturation) * bins[2] + value
    cells = bins[0] * bins[1] * bins[2]
    # Row y belongs to stripe y * stripes // H, so that heights differ by one row at most.
    stripe = np.arange(len(pixels))[:, None] * stripes // len(pixels)
    width = pixels.shape[1]
    weight = np.broadcast_to(1 - ((2 * np.arange(width) + 1) / width - 1) ** 2, cell.shape)
    counts = np.bincount((stripe * cells + cell).ravel(), weight.ravel(), minlength=stripes * cells)
    counts = counts.reshape(stripes, cells)
    shares = counts / counts.sum(axis=1, keepdims=True)
    return (np.sqrt(shares / stripes)).astype(np.float32).ravel()
