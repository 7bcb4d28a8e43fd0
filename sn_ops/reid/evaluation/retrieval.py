"""`evaluate`: from features of queries and gallery to scores."""

from __future__ import annotations

from torch import Tensor

from .distances import Distances, FeatureDistances, MatrixDistances, Metric
from .matching import Protocol
from .metrics import AveragePrecision, Scores, Unmatched, scores
from .ranking import CHUNK
from .rerank import ReRank, RerankedDistances


def distances_of(
    query: Tensor, gallery: Tensor, metric: Metric = "euclidean", rerank: ReRank | None = None
) -> Distances:
    """The distances that `evaluate` ranks by.

    Args:
        query: features `[Q, D]`, floating point.
        gallery: features `[G, D]`, floating point, on query's device.
        metric: "euclidean", or "cosine" (1 - cos).
        rerank: the constants of k-reciprocal re-ranking; None: no re-ranking.

    Returns:
        `FeatureDistances` or `RerankedDistances`.

    Raises:
        TypeError, ValueError: as those.
        ImportError: scipy is missing, with `rerank`.
    """
    if rerank is None:
        return FeatureDistances(query, gallery, metric)
    return RerankedDistances(query, gallery, rerank, metric)


def evaluate(
    query: Tensor,
    query_ids: Tensor,
    query_cameras: Tensor | None,
    gallery: Tensor,
    gallery_ids: Tensor,
    gallery_cameras: Tensor | None,
    *,
    metric: Metric = "euclidean",
    max_rank: int = 50,
    average_precision: AveragePrecision = "standard",
    unmatched: Unmatched = "skip",
    chunk: int = CHUNK,
    rerank: ReRank | None = None,
) -> Scores:
    """Scores of a retrieval, by the protocol of Market-1501, DukeMTMC-reID, MSMT17 and CUHK03 (new protocol).

    For a query of identity p under camera c, gallery images of p under c and images of a negative identity (junk) are
    left out; identity 0 (distractors) needs no special case, no query has it. Gallery images are ordered by (distance,
    index in the gallery): a tie goes to the lower index. Distances are direct float64 sums over the features as given,
    so neither `chunk` nor threads nor other rows change a rank.

    Args:
        query: features `[Q, D]`, floating point, CPU or GPU.
        query_ids: identities, integer `[Q]`, any device.
        query_cameras: cameras, integer `[Q]`, any device; None, then also for the gallery: no image is left out for its
            camera.
        gallery: features `[G, D]`, floating point, on query's device.
        gallery_ids: identities, integer `[G]`; below 0: junk.
        gallery_cameras: cameras, integer `[G]`, or None.
        metric: "euclidean", or "cosine" (1 - cos).
        max_rank: length of the CMC, >= 1.
        average_precision: the definition of `Scores.mAP`: "standard", or "market" (the official Market-1501 code's).
            The result has both under their names.
        unmatched: "skip" leaves queries without a match out; "zero" counts them 0, as the official Market-1501 code.
        chunk: about how many distances are held at a time. Memory beyond the features is about 50 bytes times that
            plus O(Q + G), and does not grow with Q x G.
        rerank: the constants of k-reciprocal re-ranking; None: no re-ranking.

    Returns:
        CMC, mAP in both definitions, mINP, the counts, and the scores of each query.

    Raises:
        TypeError: features or identities of another type.
        ValueError: shapes, lengths, devices or options that do not fit, or no query with a match.
        ImportError: scipy is missing, with `rerank`.

    Source: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015 (protocol, CMC, mAP); Ye et al.,
    "Deep Learning for Person Re-identification: A Survey and Outlook", 2020 (mINP).
    """
    distances = distances_of(query, gallery, metric, rerank)
    protocol = Protocol(query_ids, query_cameras, gallery_ids, gallery_cameras, distances.device)
    return scores(distances, protocol, max_rank, average_precision, unmatched, chunk=chunk)[0]


def evaluate_matrix(
    matrix: Tensor,
    query_ids: Tensor,
    query_cameras: Tensor | None,
    gallery_ids: Tensor,
    gallery_cameras: Tensor | None,
    *,
    max_rank: int = 50,
    average_precision: AveragePrecision = "standard",
    unmatched: Unmatched = "skip",
    chunk: int = CHUNK,
) -> Scores:
    """As `evaluate`, for distances that are already a matrix.

    Args:
        matrix: distances `[Q, G]`, floating point; +inf is allowed, NaN and -inf are not.
        query_ids: identities, integer `[Q]`, any device.
        query_cameras: cameras, integer `[Q]`, or None on both sides.
        gallery_ids: identities, integer `[G]`; below 0: junk.
        gallery_cameras: cameras, integer `[G]`, or None.
        max_rank: as `evaluate`.
        average_precision: as `evaluate`.
        unmatched: as `evaluate`.
        chunk: as `evaluate`.

    Returns:
        As `evaluate`.

    Raises:
        TypeError: a matrix or identities of another type.
        ValueError: lengths or options that do not fit, NaN or -inf, or no query with a match.

    Source: as `evaluate`.
    """
    distances = MatrixDistances(matrix)
    protocol = Protocol(query_ids, query_cameras, gallery_ids, gallery_cameras, distances.device)
    return scores(distances, protocol, max_rank, average_precision, unmatched, chunk=chunk)[0]
