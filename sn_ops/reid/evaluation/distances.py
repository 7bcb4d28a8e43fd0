"""Sources of distances: features, a matrix, or re-ranking, a few queries and a few columns at a time.

A `Distances` yields the distances of some queries as tiles. A tile may be approximate if it states its error;
`Block.exact` gives the exact distance of a pair. So features go through one fast matrix product, and only pairs that
its rounding could swap are computed directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Metric = Literal["euclidean", "cosine"]

# Elements of differences that `squared` holds at a time: few enough for a CPU's cache, enough to fill a GPU.
_DIFFERENCES = {"cpu": 1 << 17, "cuda": 1 << 24}


@dataclass(frozen=True)
class Tile:
    """Distances of a block's queries to the gallery rows from `first` on."""

    first: int
    values: Tensor
    """`[c, w]` float32 or float64, finite; the receiver may overwrite it."""
    error: Tensor | None
    """`[c]`: how far a value of that query is from `Block.exact` at most; None: not at all."""


class Block(Protocol):
    """The distances of a run of queries."""

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`[n]`: the distance of query `rows[n]` (counted from the block's first) to gallery row `columns[n]`."""

    def tiles(self, edges: Sequence[int]) -> Iterator[Tile]:
        """All columns from left to right, one tile for each pair of consecutive edges."""


class Distances(Protocol):
    """Distances of Q queries to G gallery rows: what ranking needs of them.

    `FeatureDistances`, `MatrixDistances` and `RerankedDistances` are of this form; any other class may be.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(Q, G)."""

    @property
    def device(self) -> torch.device:
        """The device of the tiles."""

    def rows_at_once(self, chunk: int) -> int:
        """How many queries a block should have.

        Args:
            chunk: about how many distances may be held at a time.

        Returns:
            A number >= 1.
        """

    def block(self, start: int, stop: int) -> Block:
        """The distances of consecutive queries.

        Args:
            start: the first query.
            stop: one past the last query.

        Returns:
            The block, of `stop - start` queries.
        """

    def readable(self, values: Tensor) -> Tensor:
        """Distances to show, from those used for ordering.

        Args:
            values: floating point, any shape.

        Returns:
            The same shape.
        """


def squared(x: Tensor, rows: Tensor, z: Tensor, columns: Tensor) -> Tensor:
    """`sum_c (x[rows, c] - z[columns, c])^2` in float64, `[n]`: the definition of the order.

    The order of additions may depend on a tensor's shape, but not on its other rows. So every step here has the same
    shape: equal pairs of rows have equal distances in every call.
    """
    step = max(1, _DIFFERENCES.get(x.device.type, 1 << 20) // max(1, x.shape[1]))
    n = rows.numel()
    out = torch.empty(n, dtype=torch.float64, device=x.device)
    for first in range(0, n, step):
        here = min(step, n - first)
        i, j = rows[first : first + here], columns[first : first + here]
        if here < step:
            i, j = (torch.nn.functional.pad(index, (0, step - here)) for index in (i, j))
        difference = x[i].double() - z[j].double()
        out[first : first + here] = difference.square_().sum(1)[:here]
    return out


def prepare(name: str, features: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Features whose squared Euclidean distances order as the metric does, and the square norms of those given.

    For "cosine" these are float64 rows of unit length: half their squared distance is 1 - cos. Rows of zeros stay.

    Raises:
        TypeError, ValueError: features that are not a 2-D floating point tensor of finite rows, an unknown metric.
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = f"a {features.dtype} tensor" if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"sn_ops.reid: {name}: expected a floating point tensor [rows, D], got {got}")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"sn_ops.reid: {name}: expected shape [rows, D] with D >= 1, got {list(features.shape)}")
    if metric not in get_args(Metric):
        raise ValueError(f"sn_ops.reid: metric: expected one of {get_args(Metric)}, got {metric!r}")
    features = features.detach()
    norms = square_norms(features)
    if not bool(norms.isfinite().all()):
        count = int((~norms.isfinite()).sum())
        raise ValueError(f"sn_ops.reid: {name}: expected finite features, got {count} rows with NaN, Inf or overflow")
    if metric == "euclidean":
        return features, norms
    return features.double() / norms.sqrt().clamp(min=torch.finfo(torch.float64).tiny)[:, None], norms


def square_norms(features: Tensor) -> Tensor:
    """`|x|^2` in float64, `[rows]`, without a float64 copy of all rows."""
    norms = features.new_empty(len(features), dtype=torch.float64)
    for first in range(0, len(features), 4096):
        norms[first : first + 4096] = features[first : first + 4096].double().square().sum(1)
    return norms


def check_pair(query: Tensor, gallery: Tensor) -> None:
    """Raises ValueError unless the two have one width and one device."""
    if query.shape[1] != gallery.shape[1] or query.device != gallery.device:
        raise ValueError(
            f"sn_ops.reid: gallery: expected [G, {query.shape[1]}] on {query.device} like query, "
            f"got {list(gallery.shape)} on {gallery.device}"
        )


class FeatureDistances:
    """Distances between the rows of two feature matrices, ordered as direct float64 sums of squares order them.

    Args:
        query: features `[Q, D]`, floating point, finite.
        gallery: features `[G, D]`, floating point, finite, on query's device.
        metric: "euclidean", or "cosine" (1 - cos; a row of zeros has cosine 0 with every row).

    Raises:
        TypeError: features that are not floating point tensors.
        ValueError: other shapes or devices, rows that are not finite, or an unknown metric.
    """

    def __init__(self, query: Tensor, gallery: Tensor, metric: Metric = "euclidean") -> None:
        self.query, self.query_norms = prepare("query", query, metric)
        self.gallery, self.gallery_norms = prepare("gallery", gallery, metric)
        check_pair(self.query, self.gallery)
        self.shape = (len(query), len(gallery))
        self.device = query.device
        self.metric = metric
        zeros = (self.query_norms == 0, self.gallery_norms == 0) if metric == "cosine" else ()
        if metric == "cosine":
            self.query_norms, self.gallery_norms = square_norms(self.query), square_norms(self.gallery)
        self.zeros = zeros if any(bool(zero.any()) for zero in zeros) else ()
        """Rows of zeros, bool `[Q]` and `[G]`; empty where there are none, or where the metric is Euclidean."""

    def rows_at_once(self, chunk: int) -> int:
        """As `Distances.rows_at_once`: as many rows as columns, since the product of a square tile reads least."""
        return max(1, int(chunk**0.5))

    def block(self, start: int, stop: int) -> _FeatureBlock:
        """As `Distances.block`."""
        return _FeatureBlock(self, start, stop)

    def readable(self, values: Tensor) -> Tensor:
        """As `Distances.readable`: the Euclidean distance, or 1 - cos."""
        return values.sqrt() if self.metric == "euclidean" else values / 2


class _FeatureBlock:
    def __init__(self, source: FeatureDistances, start: int, stop: int) -> None:
        self.source = source
        self.x = source.query[start:stop].double()
        self.norms = source.query_norms[start:stop]
        self.zeros: Tensor | None = source.zeros[0][start:stop] if source.zeros else None
        self.gallery_zeros: Tensor | None = source.zeros[1] if source.zeros else None

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        values = squared(self.x, rows, self.source.gallery, columns)
        if self.zeros is None or self.gallery_zeros is None:
            return values
        return values.masked_fill_(self.zeros[rows] | self.gallery_zeros[columns], 2.0)  # their cosine is 0

    def tiles(self, edges: Sequence[int]) -> Iterator[Tile]:
        # With u = eps / 2 and N = |x|^2 + |z|^2: the product and the norms are off by less than (D + 3) u 2N together,
        # the direct sum by (D + 3) u d^2 <= (D + 3) u 2N. The bound is twice as large.
        relative = 4 * (self.x.shape[1] + 3) * torch.finfo(torch.float64).eps
        for first, end in pairwise(edges):
            z = self.source.gallery[first:end].double()
            norms = self.source.gallery_norms[first:end]
            values = torch.addmm(norms[None], self.x, z.T, alpha=-2).add_(self.norms[:, None])
            if self.zeros is not None and self.gallery_zeros is not None:
                values[self.zeros] = 2.0
                values[:, self.gallery_zeros[first:end]] = 2.0
            yield Tile(first, values, relative * (self.norms + norms.max()))


class MatrixDistances:
    """Distances that are already a matrix, ordered by its values.

    Args:
        matrix: `[Q, G]`, floating point. +inf is allowed; NaN and -inf are refused when their rows are read.

    Raises:
        TypeError: another type or shape.
        ValueError: from an evaluation, NaN or -inf.
    """

    def __init__(self, matrix: Tensor) -> None:
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point() or matrix.ndim != 2:
            got = f"{matrix.dtype} {list(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(f"sn_ops.reid: distances: expected a floating point tensor [Q, G], got {got}")
        self.matrix = matrix.detach()
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.device = matrix.device

    def rows_at_once(self, chunk: int) -> int:
        """As `Distances.rows_at_once`: whole rows, as they lie in memory."""
        return max(1, chunk // max(1, self.matrix.shape[1]))

    def block(self, start: int, stop: int) -> MatrixBlock:
        """As `Distances.block`."""
        return MatrixBlock(self.matrix[start:stop])

    def readable(self, values: Tensor) -> Tensor:
        """As `Distances.readable`: the values as given."""
        return values


class MatrixBlock:
    """Some rows of a distance matrix, as a `Block`."""

    def __init__(self, rows: Tensor) -> None:
        """rows `[c, G]`. Raises ValueError for NaN and -inf, which cannot be ordered as distances."""
        if rows.numel() > 0 and not bool(rows.min() > -torch.inf):  # the minimum with a NaN is NaN
            raise ValueError("sn_ops.reid: distances: expected numbers or +inf, got NaN or -inf")
        self.rows = rows
        wide = rows.dtype in (torch.float32, torch.float64)
        self._dtype = rows.dtype if wide else torch.float32

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The entries; +inf becomes the largest number, since inf marks pairs that do not count."""
        return self.rows[rows, columns].to(self._dtype).clamp(max=torch.finfo(self._dtype).max)

    def tiles(self, edges: Sequence[int]) -> Iterator[Tile]:
        """A copy of each column range."""
        for first, end in pairwise(edges):
            values = self.rows[:, first:end].to(self._dtype).clamp(max=torch.finfo(self._dtype).max)
            yield Tile(first, values, None)
