"""Embeddings of images, and their files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..data.images import SUFFIXES, read_image
from ..data.loading import outlive_stop_signals
from ..files import replacing

Transform = Callable[[Any], Tensor]
"""From a `PIL.Image.Image` in RGB to a float tensor `[3, H, W]`, the model's input."""


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """All images below a folder, by suffix, sorted by name.

    Raises:
        FileNotFoundError: no such folder, or no image below it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"sn_ops.reid: images: expected a folder, got {folder}")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise FileNotFoundError(f"sn_ops.reid: images: expected {', '.join(sorted(SUFFIXES))} in {folder}, got none")
    return found


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


class _Images(torch.utils.data.Dataset[Tensor]):
    def __init__(self, paths: Sequence[Path], transform: Transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(read_image(self.paths[index]))


@torch.inference_mode()
def embed_images(
    model: nn.Module,
    paths: Sequence[str | os.PathLike[str]],
    transform: Transform,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 0,
    normalize: bool = True,
    tick: Callable[[int], None] | None = None,
) -> Tensor:
    """Embeddings of image files.

    Args:
        model: maps float32 `[n, 3, H, W]` to `[n, D]` in eval mode. It is moved to the device, and its mode restored.
        paths: image files, in the order of the result.
        transform: from a `PIL.Image.Image` in RGB to float32 `[3, H, W]`.
        batch_size: images at a time.
        device: where to compute; None: where the model's first parameter is.
        workers: processes that read images; 0 reads in this one.
        normalize: give rows unit length, as the loss and retrieval do.
        tick: called with the number of images after each batch, for a progress bar.

    Returns:
        Embeddings, float32 `[len(paths), D]` on the CPU.

    Raises:
        UnreadableImageError: a file is missing or not an image, an OSError; the message has its path.
        ValueError: no path, or a model that does not return `[n, D]`.
        ImportError: pillow is missing.
    """
    if not paths:
        raise ValueError("sn_ops.reid: images: expected at least one path, got none")
    if device is None:
        device = device_of(model)
    images = _Images([Path(path) for path in paths], transform)
    loader = torch.utils.data.DataLoader(
        images, batch_size=batch_size, num_workers=workers, worker_init_fn=outlive_stop_signals
    )
    training = model.training
    model.to(device).eval()
    rows = []
    try:
        for batch in loader:
            out = model(batch.to(device))
            if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(batch):
                got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(f"sn_ops.reid: model: expected output [{len(batch)}, D], got {got}")
            rows.append((nn.functional.normalize(out.float()) if normalize else out.float()).cpu())
            if tick is not None:
                tick(len(batch))
    finally:
        model.train(training)
    return torch.cat(rows)


class Image(Protocol):
    """What the report needs of an image; `data.Sample` has it."""

    @property
    def path(self) -> Path:
        """The image file."""

    @property
    def pid(self) -> int:
        """The identity; -1 is junk, 0 a distractor."""

    @property
    def camera(self) -> int:
        """The camera, from 0."""


@dataclass(frozen=True)
class Embedded:
    """Images and their features, row by row.

    Raises:
        ValueError: at construction, features that are not one row an image.
    """

    samples: Sequence[Image]
    features: Tensor
    """`[n, D]`, floating point, on the CPU."""

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or len(self.samples) != len(self.features):
            raise ValueError(
                f"sn_ops.reid: features: expected [{len(self.samples)}, D], one row a sample, "
                f"got {list(self.features.shape)}"
            )

    @property
    def ids(self) -> Tensor:
        """Identities, int64 `[n]`."""
        return torch.tensor([sample.pid for sample in self.samples], dtype=torch.int64)

    @property
    def cameras(self) -> Tensor:
        """Cameras, int64 `[n]`."""
        return torch.tensor([sample.camera for sample in self.samples], dtype=torch.int64)


@dataclass(frozen=True)
class Embeddings:
    """Embeddings and the paths of their images.

    Raises:
        ValueError: at construction, features that are not one floating point row a path.
    """

    paths: Sequence[str]
    features: Tensor
    """Floating point `[n, D]`."""

    def __post_init__(self) -> None:
        features = self.features
        if features.ndim != 2 or len(features) != len(self.paths) or not features.is_floating_point():
            raise ValueError(
                f"sn_ops.reid: embeddings: expected floating point features [{len(self.paths)}, D], one row a path, "
                f"got {features.dtype} {list(features.shape)}"
            )


def save_embeddings(file: str | os.PathLike[str], embeddings: Embeddings) -> Path:
    """Writes an .npz with `features` float32 `[n, D]` and `paths` `[n]` (text, no pickles), atomically.

    Args:
        file: the file, with suffix .npz; its folder must exist.
        embeddings: features and paths.

    Returns:
        The file.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    file = Path(file)
    if file.suffix != ".npz":
        raise ValueError(f"sn_ops.reid: embeddings: expected a file name that ends in .npz, got {file}")
    with replacing(file) as unfinished, unfinished.open("wb") as out:
        np.savez(out, features=embeddings.features.float().cpu().numpy(), paths=np.array(embeddings.paths, dtype=str))
    return file


def load_embeddings(file: str | os.PathLike[str]) -> Embeddings:
    """Reads a file of `save_embeddings`.

    Args:
        file: the .npz.

    Returns:
        Features float32 `[n, D]` on the CPU, and the paths of the images.

    Raises:
        ValueError: another, an incomplete or a damaged file.
        OSError: a file that is missing or may not be read.
    """
    try:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("got an .npy file of a single array")
        with loaded as arrays:
            paths, features = arrays["paths"], arrays["features"]
        if paths.ndim != 1 or paths.dtype.kind != "U":
            raise ValueError(f"got paths {paths.dtype} {list(paths.shape)}, not text [n]")
        if features.ndim != 2 or features.dtype.kind != "f" or len(features) != len(paths):
            raise ValueError(
                f"got features {features.dtype} {list(features.shape)}, not floating point [{len(paths)}, D]"
            )
        return Embeddings([str(path) for path in paths], torch.from_numpy(features.astype(np.float32)))
    except Exception as error:  # damaged files raise errors of zipfile, zlib and numpy
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"sn_ops.reid: embeddings: expected arrays features and paths in {file}: {error}") from error
