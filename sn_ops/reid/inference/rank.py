"""Ranking the images of a folder by similarity to one image."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..evaluation import FeatureDistances, Protocol, ranked_lists
from ..evaluation.distances import Metric
from .embed import Embeddings, Transform, embed_images, image_files


@dataclass(frozen=True)
class Ranked:
    """An image of a ranked list."""

    path: Path
    """The image file."""
    distance: float
    """Of its embedding from the query's, both of unit length."""


def rank_images(
    model: nn.Module,
    transform: Transform,
    query: str | os.PathLike[str],
    images: str | os.PathLike[str] | Embeddings,
    *,
    top: int = 10,
    metric: Metric = "euclidean",
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 0,
    tick: Callable[[int], None] | None = None,
) -> list[Ranked]:
    """The images most similar to the query, the nearest first, ties in order of the name.

    Args:
        model: maps float32 `[n, 3, H, W]` to `[n, D]` in eval mode, as `embed_images`.
        transform: from a `PIL.Image.Image` in RGB to float32 `[3, H, W]`.
        query: an image file; left out of the list if it is among the images.
        images: a folder, searched recursively, or saved embeddings (`load_embeddings`).
        top: the length of the list; fewer if there are fewer images.
        metric: "euclidean", or "cosine" (1 - cos), between embeddings of unit length.
        batch_size: images at a time.
        device: where to compute; None: where the model's first parameter is.
        workers: processes that read images; 0 reads in this one.
        tick: called with the number of images after each batch, for a progress bar.

    Returns:
        Paths and distances.

    Raises:
        FileNotFoundError: no such folder, or no other image in it.
        OSError, ValueError, ImportError: as `embed_images`.
    """
    if not isinstance(images, Embeddings):
        paths = image_files(images)
        features = embed_images(
            model, paths, transform, batch_size=batch_size, device=device, workers=workers, tick=tick
        )
        images = Embeddings([str(path) for path in paths], features)
    own = os.path.realpath(query)
    kept = [i for i, path in enumerate(images.paths) if os.path.realpath(path) != own]
    if not kept:
        raise FileNotFoundError(f"sn_ops.reid: images: expected another image than {query}, got none")
    asked = embed_images(model, [query], transform, device=device)
    others = nn.functional.normalize(images.features[kept])
    distractors = torch.zeros(len(kept), dtype=torch.int64)
    distances = FeatureDistances(asked, others, metric)
    protocol = Protocol(torch.ones(1, dtype=torch.int64), None, distractors, None, distances.device)
    lists = ranked_lists(distances, protocol, top=min(top, len(kept)))
    return [
        Ranked(Path(images.paths[kept[i]]), distance)
        for i, distance in zip(lists.indices[0].tolist(), lists.distances[0].tolist(), strict=True)
    ]
