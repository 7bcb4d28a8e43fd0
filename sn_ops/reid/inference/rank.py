"""Ranks the images of a folder by their likeness to one image."""

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
    """One place of a list."""

    path: Path
    distance: float


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
    """The images that are most like the query, the nearest first, ties in order of the name.

    Args:
        model, transform, batch_size, device, workers, tick: as `embed_images`.
        query: an image file; left out of the list if it is among the images.
        images: a folder, searched to its depths, or embeddings from before.
        top: how many.
        metric: of the distance, between embeddings of unit length.

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
    nobody = torch.zeros(len(kept), dtype=torch.int64)
    distances = FeatureDistances(asked, others, metric)
    protocol = Protocol(torch.ones(1, dtype=torch.int64), None, nobody, None, distances.device)
    lists = ranked_lists(distances, protocol, top=min(top, len(kept)))
    return [
        Ranked(Path(images.paths[kept[i]]), distance)
        for i, distance in zip(lists.indices[0].tolist(), lists.distances[0].tolist(), strict=True)
    ]
