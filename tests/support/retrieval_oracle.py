"""Retrieval scores written a second time, straight from their definitions, to compare the package with.

NumPy and plain loops, one query and one pair at a time, lists sorted in full. It shares no code with the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass
class Result:
    """Means over the queries that have a match, and what each query scored (None: no match)."""

    cmc: list[float]
    mean_ap: float
    mean_ap_market: float
    mean_inp: float
    per_query: list[tuple[float, float, float, int] | None]


def euclidean(x: Array, z: Array) -> Array:
    """[Q, G] squared distances, pair by pair."""
    out = np.empty((len(x), len(z)))
    for i in range(len(x)):
        for j in range(len(z)):
            out[i, j] = math.fsum((float(a) - float(b)) ** 2 for a, b in zip(x[i], z[j], strict=True))
    return out


def cosine(x: Array, z: Array) -> Array:
    """[Q, G] of 1 - cos, where a row of zeros has cosine 0 to everything."""
    out = np.empty((len(x), len(z)))
    for i in range(len(x)):
        for j in range(len(z)):
            dot = math.fsum(float(a) * float(b) for a, b in zip(x[i], z[j], strict=True))
            lengths = math.sqrt(math.fsum(float(a) ** 2 for a in x[i]) * math.fsum(float(b) ** 2 for b in z[j]))
            out[i, j] = 1 - (dot / lengths if lengths > 0 else 0)
    return out


def hits(
    distances: Array, query_ids: Array, query_cameras: Array, gallery_ids: Array, gallery_cameras: Array
) -> list[list[bool]]:
    """Each query's list after filtering, the nearest first: is it a match?"""
    lists = []
    for i in range(len(distances)):
        order = sorted(range(distances.shape[1]), key=lambda j: (distances[i, j], j))
        kept = [
            j
            for j in order
            if gallery_ids[j] >= 0 and not (gallery_ids[j] == query_ids[i] and gallery_cameras[j] == query_cameras[i])
        ]
        lists.append([bool(gallery_ids[j] == query_ids[i]) for j in kept])
    return lists


def average_precision(row: list[bool]) -> float:
    """Precision at each match, averaged."""
    found, total = 0, 0.0
    for position, is_match in enumerate(row, start=1):
        if is_match:
            found += 1
            total += found / position
    return total / found


def average_precision_market(row: list[bool]) -> float:
    """Area under precision over recall by trapezoids, as the official Market-1501 code walks down the list."""
    matches = sum(row)
    area, old_recall, old_precision, found = 0.0, 0.0, 1.0, 0
    for position, is_match in enumerate(row, start=1):
        found += is_match
        recall, precision = found / matches, found / position
        area += (recall - old_recall) * (old_precision + precision) / 2
        old_recall, old_precision = recall, precision
    return area


def score(lists: list[list[bool]], max_rank: int) -> Result:
    """Scores of filtered lists."""
    per_query: list[tuple[float, float, float, int] | None] = []
    for row in lists:
        if not any(row):
            per_query.append(None)
            continue
        ranks = [position for position, is_match in enumerate(row, start=1) if is_match]
        per_query.append((average_precision(row), average_precision_market(row), len(ranks) / ranks[-1], ranks[0]))
    counted = [values for values in per_query if values is not None]
    n = len(counted)
    return Result(
        cmc=[sum(values[3] <= k for values in counted) / n for k in range(1, max_rank + 1)],
        mean_ap=sum(values[0] for values in counted) / n,
        mean_ap_market=sum(values[1] for values in counted) / n,
        mean_inp=sum(values[2] for values in counted) / n,
        per_query=per_query,
    )


def reranked(x: Array, z: Array, k1: int, k2: int, lam: float) -> Array:
    """[Q, G] re-ranked distances by the definition, with sets and dictionaries."""
    both = np.concatenate([x, z]).astype(np.float64)
    n, q = len(both), len(x)
    d = euclidean(both, both)
    lists = [[i, *sorted((j for j in range(n) if j != i), key=lambda j: (d[i, j], j))] for i in range(n)]
    scaled = [[d[i, j] / max(d[i]) if max(d[i]) > 0 else 0.0 for j in range(n)] for i in range(n)]

    def neighbours(i: int, k: int) -> set[int]:
        return set(lists[i][: k + 1])

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in neighbours(i, k) if i in neighbours(j, k)}

    encoding: list[dict[int, float]] = []
    for i in range(n):
        base = reciprocal(i, k1)
        full = set(base)
        for j in base:
            other = reciprocal(j, round(k1 / 2))
            if len(other & base) > 2 / 3 * len(other) + 1e-9:
                full |= other
        weights = {j: math.exp(-scaled[i][j]) for j in full}
        total = sum(weights.values())
        encoding.append({j: w / total for j, w in weights.items()})
    expanded: list[dict[int, float]] = []
    for i in range(n):
        near = lists[i][:k2]
        columns = {j for m in near for j in encoding[m]}
        expanded.append({j: sum(encoding[m].get(j, 0.0) for m in near) / len(near) for j in columns})
    out = np.empty((q, n - q))
    for i in range(q):
        for j in range(q, n):
            a, b = expanded[i], expanded[j]
            least = sum(min(a.get(m, 0.0), b.get(m, 0.0)) for m in a.keys() | b.keys())
            most = sum(max(a.get(m, 0.0), b.get(m, 0.0)) for m in a.keys() | b.keys())
            out[i, j - q] = (1 - lam) * (1 - least / most) + lam * scaled[i][j]
    return out
