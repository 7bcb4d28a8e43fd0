"""Re-ranking by k-reciprocal encoding, sparse: no matrix of all images against all images.

Definition (Zhong, Zheng, Cao and Li, "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, and
the authors' code). All Q + G images are taken together; d is the squared Euclidean distance.

1. `N(p, k)`: p itself and its k nearest others, by (d, index).
2. `R(p, k)`: those q in N(p, k) with p in N(q, k).
3. `R*(p)`: R(p, k1), and R(q, k1 / 2) for every q of it that has more than two thirds of R(q, k1 / 2) in R(p, k1).
4. `V[p, q] = exp(-d(p, q) / max_r d(p, r))` for q in R*(p), 0 elsewhere; every row is divided by its sum.
5. Local query expansion: `V[p]` becomes the mean of `V[q]` over p itself and its k2 - 1 nearest others (all that there
   are where k2 > N), whichever of k1 and k2 is larger.
6. Jaccard distance of query p and gallery image g: `J = 1 - s / (2 - s)`, `s = sum_q min(V[p, q], V[g, q])`.
7. The distance that ranks: `(1 - lambda) J + lambda d(p, g) / max_r d(p, r)`.

Steps 1 and the maximum come from `sn_ops.support_neighbors`, which keeps no matrix; V has some dozens of entries a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import sn_ops

from ..requirements import need
from .distances import FeatureDistances, MatrixBlock, Metric, check_pair, prepare, squared
from .ranking import CHUNK, tile_edges

_ANCHORS = 8192  # anchors of one neighbour search
_ENTRIES = 1 << 22  # entries that one step over neighbour lists or V compares
_CHUNKS = 8  # a block holds so many chunks: each block reads the whole gallery, so large ones read less


@dataclass(frozen=True)
class ReRank:
    """The constants of k-reciprocal re-ranking; the defaults are the paper's for Market-1501.

    Raises:
        ValueError: at construction, k1 < 1, k2 < 1, or lam not from 0 to 1.

    Source: Zhong, Zheng, Cao and Li, "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.
    """

    k1: int = 20
    """Neighbours for k-reciprocal sets, >= 1."""
    k2: int = 6
    """Neighbours for local query expansion, the image itself included, >= 1."""
    lam: float = 0.3
    """Weight of the original distance, 0 to 1; the Jaccard distance has the rest."""

    def __post_init__(self) -> None:
        if self.k1 < 1 or self.k2 < 1 or not 0 <= self.lam <= 1:
            raise ValueError(f"sn_ops.reid: rerank: expected k1 >= 1, k2 >= 1 and 0 <= lam <= 1, got {self}")


class RerankedDistances:
    """Re-ranked distances of queries to gallery rows, computed for a few queries at a time.

    Construction searches all neighbours. Memory beyond the features is a copy of them, O(Q + G) lists, and a sparse
    matrix with some dozens of entries a row.

    Args:
        query: features `[Q, D]`, floating point, finite, Q >= 1.
        gallery: features `[G, D]`, floating point, finite, on query's device, G >= 1.
        rerank: the constants.
        metric: "euclidean", or "cosine": rows are normalised first.
        backend: of `sn_ops.support_neighbors`.

    Raises:
        TypeError: as `FeatureDistances`.
        ValueError: as `FeatureDistances`; no query or no gallery row; "cosine" with a row of zeros.
        ImportError: scipy is missing.

    Source: Zhong, Zheng, Cao and Li, "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, and
    the authors' code.
    """

    def __init__(
        self, query: Tensor, gallery: Tensor, rerank: ReRank, metric: Metric = "euclidean", *, backend: str = "auto"
    ) -> None:
        double = torch.float64 in (query.dtype, gallery.dtype)
        parts = [prepare("query", query, metric)[0], prepare("gallery", gallery, metric)[0]]
        check_pair(*parts)
        if not all(len(part) for part in parts):
            raise ValueError(f"sn_ops.reid: rerank: expected Q >= 1 and G >= 1, got {len(query)} and {len(gallery)}")
        if metric == "cosine" and any(bool((part == 0).all(1).any()) for part in parts):
            raise ValueError("sn_ops.reid: rerank: expected no row of zeros with metric 'cosine', got some")
        if metric == "cosine" and not double:
            parts = [part.float() for part in parts]
        dtype = torch.promote_types(parts[0].dtype, parts[1].dtype)
        features = torch.cat([part.to(dtype) for part in parts])
        self._rerank = rerank
        self._features = FeatureDistances(features[: len(query)], features[len(query) :])
        self.shape, self.device = self._features.shape, self._features.device
        lists, self._largest = _neighbours(features, max(rerank.k1, rerank.k2 - 1), backend)
        encoding = _encode(features, lists, self._largest, rerank)
        self._query_rows = encoding[: len(query)]
        self._gallery_columns = encoding[len(query) :].tocsc()

    def rows_at_once(self, chunk: int) -> int:
        """As `Distances.rows_at_once`: whole rows."""
        return max(1, _CHUNKS * chunk // self.shape[1])

    def block(self, start: int, stop: int) -> MatrixBlock:
        """As `Distances.block`: `[c, G]` float32, so that distances that differ only by rounding become equal."""
        jaccard = torch.from_numpy(self._jaccard(start, stop)).to(self.device)
        largest = self._largest[start:stop, None]
        width = max(1, CHUNK // (stop - start))
        for tile in self._features.block(start, stop).tiles(tile_edges([self.shape[1]], width)):
            part = jaccard[:, tile.first : tile.first + tile.values.shape[1]]
            original = tile.values.clamp_(min=0).div_(largest)
            part.mul_(1 - self._rerank.lam).add_(original, alpha=self._rerank.lam)
        return MatrixBlock(jaccard.float())

    def readable(self, values: Tensor) -> Tensor:
        """As `Distances.readable`: the values as they are, between 0 and 1."""
        return values

    def _jaccard(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Step 6 for some queries, `[c, G]`."""
        rows = self._query_rows[start:stop]
        columns = self._gallery_columns
        gallery = self.shape[1]
        shared = np.zeros((stop - start) * gallery)
        # Every entry V[p, q] meets the gallery's entries in column q.
        entries = np.diff(columns.indptr)[rows.indices]
        owner = np.repeat(np.arange(stop - start), np.diff(rows.indptr))
        for part in _runs(entries, _ENTRIES):
            count = entries[part]
            ends = count.cumsum()
            place = np.arange(ends[-1]) + np.repeat(columns.indptr[rows.indices[part]] - (ends - count), count)
            least = np.minimum(np.repeat(rows.data[part], count), columns.data[place])
            pair = np.repeat(owner[part] * gallery, count) + columns.indices[place]
            low, high = int(owner[part][0]) * gallery, (int(owner[part][-1]) + 1) * gallery
            shared[low:high] += np.bincount(pair - low, weights=least, minlength=high - low)
        shared /= 2 - shared
        return np.subtract(1, shared, out=shared).reshape(stop - start, gallery)


def _runs(sizes: npt.NDArray[np.integer], most: int) -> Iterator[slice]:
    """Consecutive slices whose sizes add up to at most `most`, or that hold one item."""
    ends = sizes.cumsum(dtype=np.int64)
    start = 0
    while start < len(sizes):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + most, side="right")))
        if ends[stop - 1] > done:
            yield slice(start, stop)
        start = stop


def _neighbours(features: Tensor, k: int, backend: str) -> tuple[npt.NDArray[np.int64], Tensor]:
    """N(p, k) of all rows `[N, K + 1]` with K = min(k, N - 1), and the largest d of each row `[N]` float64."""
    n = len(features)
    # One label for all: the farthest positive is then the farthest row.
    labels = torch.zeros(n, dtype=torch.int64, device=features.device)
    lists, largest = [], []
    step = n if _halves(features, backend) else _ANCHORS
    for start in range(0, n, step):
        anchors = features[start : start + step]
        bank: dict[str, Any] = {"candidates": features, "candidate_labels": labels, "self_index": start}
        found = sn_ops.support_neighbors(
            anchors, labels[: len(anchors)], k=min(k, n - 1), backend=backend, **(bank if len(anchors) < n else {})
        )
        own = torch.arange(start, start + len(anchors), device=features.device)
        lists.append(torch.cat([own[:, None], found.indices], 1).cpu())
        largest.append(squared(features, own, features, found.farthest_positive))
    # Where all rows are equal all distances are 0: any divisor will do.
    return torch.cat(lists).numpy(), torch.cat(largest).clamp(min=torch.finfo(torch.float64).tiny)


def _halves(features: Tensor, backend: str) -> bool:
    """Whether all rows at once take half the time: the cpu backend computes each pair of rows once, and no matrix."""
    return features.device.type == "cpu" and backend in ("auto", "cpu") and sn_ops.backends()["cpu"].usable


def _reciprocal(lists: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """`[len(rows), K + 1]`: which members q of N(p, k) have p in N(q, k)."""
    found = np.empty((len(rows), lists.shape[1]), dtype=bool)
    step = max(1, _ENTRIES // lists.shape[1] ** 2)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        found[start : start + step] = (lists[lists[part]] == part[:, None, None]).any(2)
    return found


def _expanded(lists: npt.NDArray[np.int64], k1: int) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Pairs (p, q) with q in R*(p), sorted, for some thousands of p at a time."""
    n = len(lists)
    half = lists[:, : round(k1 / 2) + 1]
    inner = _reciprocal(half, np.arange(n))
    step = max(1, _ENTRIES // (lists.shape[1] ** 2 * half.shape[1]))
    for start in range(0, n, step):
        rows = np.arange(start, min(n, start + step))
        own = np.where(_reciprocal(lists, rows), lists[rows], -1)  # R(p, k1)
        theirs = np.where(inner[own], half[own], -2)  # R(q, k1 / 2): [rows, K + 1, half]
        theirs[own < 0] = -2
        shared = (theirs[:, :, :, None] == own[:, None, None, :]).any(3).sum(2)
        taken = 3 * shared > 2 * (theirs >= 0).sum(2)
        theirs = np.where(taken[:, :, None], theirs, -2).reshape(len(rows), -1)
        members = np.sort(np.concatenate([own, theirs], 1), 1)
        first = np.ones_like(members, dtype=bool)
        first[:, 1:] = members[:, 1:] != members[:, :-1]
        row, column = np.nonzero(first & (members >= 0))
        yield rows[row], members[row, column]


def _encode(features: Tensor, lists: npt.NDArray[np.int64], largest: Tensor, rerank: ReRank) -> Any:
    """V after local query expansion, `[N, N]`, as a `scipy.sparse.csr_array` of float64.

    Args:
        features: `[N, D]`.
        lists: N(p, k) for a k that is enough for k1 and for the k2 of the expansion, `[N, K + 1]`.
        largest: largest d of each row, `[N]`.
        rerank: the constants.
    """
    sparse = need("scipy.sparse")
    n = len(lists)
    rows, columns, weights = [], [], []
    # The expansion may ask for more neighbours than R has.
    for row, column in _expanded(np.ascontiguousarray(lists[:, : rerank.k1 + 1]), rerank.k1):
        i, j = (torch.from_numpy(index).to(features.device) for index in (row, column))
        weight = torch.exp(-squared(features, i, features, j) / largest[i]).cpu().numpy()
        starts = np.searchsorted(row, row)  # of the row's run, for each of its entries
        sums = np.add.reduceat(weight, np.unique(starts))
        weights.append(weight / np.repeat(sums, np.diff(np.append(np.unique(starts), len(row)))))
        rows.append(row)
        columns.append(column)
    counts = np.bincount(np.concatenate(rows), minlength=n)
    pointers = np.concatenate([[0], counts.cumsum()])
    encoding = sparse.csr_array((np.concatenate(weights), np.concatenate(columns), pointers), shape=(n, n))
    k2 = min(rerank.k2, lists.shape[1])
    if k2 > 1:
        mean = sparse.csr_array(
            (np.full(n * k2, 1 / k2), np.ascontiguousarray(lists[:, :k2]).ravel(), np.arange(0, n * k2 + 1, k2)),
            shape=(n, n),
        )
        encoding = mean @ encoding
        encoding.sort_indices()
    return encoding
