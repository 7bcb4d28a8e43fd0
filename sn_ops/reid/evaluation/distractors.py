"""Accuracy against the size of the gallery: the paper's robustness figure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .distances import FeatureDistances, Metric
from .matching import Protocol
from .metrics import AveragePrecision, Scores, Unmatched, scores
from .ranking import CHUNK


def evaluate_with_distractors(
    query: Tensor,
    query_ids: Tensor,
    query_cameras: Tensor,
    gallery: Tensor,
    gallery_ids: Tensor,
    gallery_cameras: Tensor,
    distractors: Tensor,
    *,
    counts: Sequence[int] | None = None,
    seed: int | None = 0,
    metric: Metric = "euclidean",
    max_rank: int = 50,
    average_precision: AveragePrecision = "standard",
    unmatched: Unmatched = "skip",
    chunk: int = CHUNK,
) -> list[Scores]:
    """The scores with more and more distractors in the gallery, in one pass over the largest gallery.

    Args:
        query: features `[Q, D]`, floating point, CPU or GPU.
        query_ids: identities, integer `[Q]`, any device.
        query_cameras: cameras, integer `[Q]`, any device.
        gallery: features `[G, D]`, floating point, on query's device.
        gallery_ids: identities, integer `[G]`; below 0: junk.
        gallery_cameras: cameras, integer `[G]`.
        distractors: features `[M, D]` of images that match no query, on query's device.
        counts: how many distractors to add, ascending; each set contains the one before. Default: 0 and M, and in
            between 1, 2 and 5 times the powers of ten from 100.
        seed: of the order in which distractors are added; None: the order given.
        metric: as `evaluate`.
        max_rank: as `evaluate`.
        average_precision: as `evaluate`.
        unmatched: as `evaluate`.
        chunk: as `evaluate`.

    Returns:
        One `Scores` for each count; `Scores.gallery` is the size of that gallery.

    Raises:
        TypeError: as `evaluate`.
        ValueError: as `evaluate`; counts that are not ascending, or more than M.

    Source: the robustness figure of the SN loss's paper; the distractors are those of Zheng et al., "Scalable Person
    Re-identification: A Benchmark", ICCV 2015.
    """
    m = len(distractors)
    if counts is None:
        steps = {digit * 10**power for power in range(2, len(str(m)) + 1) for digit in (1, 2, 5)}
        counts = sorted({0, m} | {step for step in steps if step < m})
    if not counts or list(counts) != sorted(set(counts)) or not 0 <= counts[0] <= counts[-1] <= m:
        raise ValueError(f"sn_ops.reid: counts: expected ascending numbers up to {m} distractors, got {list(counts)}")
    if seed is not None:
        order = torch.randperm(m, generator=torch.Generator().manual_seed(seed)).to(distractors.device)
        distractors = distractors[order]
    # Distractors come after the gallery, so gallery images win ties against them.
    distances = FeatureDistances(query, torch.cat([gallery, distractors[: counts[-1]]]), metric)
    ids, cameras = gallery_ids.cpu().long(), gallery_cameras.cpu().long()
    # A new identity: 0 is a person in some data sets.
    stranger = int(torch.cat([ids, query_ids.cpu().long()]).amax()) + 1
    ids = torch.cat([ids, torch.full((counts[-1],), stranger)])
    cameras = torch.cat([cameras, torch.full((counts[-1],), -1)])
    protocol = Protocol(query_ids, query_cameras, ids, cameras, distances.device)
    stops = [len(gallery) + count for count in counts]
    return scores(distances, protocol, max_rank, average_precision, unmatched, stops=stops, chunk=chunk)
