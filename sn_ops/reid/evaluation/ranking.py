"""Ranks of the matches of every query under the re-ID protocol.

The protocol, for a query of identity p seen by camera c: gallery images of p seen by c are left out, images of a
negative identity (junk) too; all others of p are matches, everything else (distractors, identity 0, as well) is not.
The gallery is ordered by (distance, gallery index): a tie goes to the lower index.

Ranks need no list of images. A match's rank is 1 + the number of kept images before it, so the distances of a query's
few matches are thresholds, whose places among the other distances are looked up. These are sorted as bare numbers,
which vector instructions do several times faster than sorting indices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .distances import Block, Distances, Tile
from .matching import Protocol, check_lengths

CHUNK = 1 << 21
"""Distances held at a time by default: 16 MB of float64, and a few copies."""


_FEW_DOUBTS = 8  # doubtful matches of a query up to which comparing with each is faster than searching


@dataclass(frozen=True)
class MatchRanks:
    """The ranks of the matches of the queries from start to stop."""

    start: int
    stop: int
    counts: Tensor
    """int64 `[c]`: the matches of each query."""
    ranks: Tensor
    """int64 `[stops, c, P]`: ranks from 1, ascending, for each prefix of the gallery; meaningless from counts on."""


def match_ranks(
    distances: Distances, protocol: Protocol, *, stops: Sequence[int] | None = None, chunk: int = CHUNK
) -> Iterator[MatchRanks]:
    """The rank of every match of every query, a few queries at a time.

    Args:
        distances: Q x G.
        protocol: for the same Q and G.
        stops: ascending sizes of prefixes of the gallery, to rank in each of them; all matches must lie in the first.
            Default: the whole gallery.
        chunk: about how many distances may be held at a time.

    Raises:
        ValueError: lengths that differ, stops that are not ascending or beyond the gallery, a match beyond the first.
    """
    check_lengths(distances, protocol)
    gallery = distances.shape[1]
    stops = [gallery] if stops is None else list(stops)
    if not stops or stops != sorted(set(stops)) or not 0 <= stops[0] <= stops[-1] <= gallery:
        raise ValueError(f"sn_ops.reid: stops: expected ascending sizes up to {gallery}, got {stops}")
    for start, stop in protocol.blocks(distances.rows_at_once(chunk), chunk):
        yield _block_ranks(distances.block(start, stop), protocol, start, stop, stops, chunk)


def _block_ranks(
    block: Block, protocol: Protocol, start: int, stop: int, stops: Sequence[int], chunk: int
) -> MatchRanks:
    c = stop - start
    rows, columns, counted = protocol.pairs(start, stop)
    thresholds = _Thresholds(block, rows[counted], columns[counted], c)
    if columns[counted].numel() > 0 and int(columns[counted].max()) >= stops[0]:
        raise ValueError(
            f"sn_ops.reid: stops: expected every match among the first {stops[0]} gallery rows, got one behind"
        )
    if thresholds.values.shape[1] == 0:
        return MatchRanks(start, stop, thresholds.counts, thresholds.before.new_zeros(len(stops), c, 0))
    ranks = [thresholds.ranks()] if stops[0] == 0 else []
    edges = tile_edges(stops, max(1, chunk // c))
    for tile, end in zip(block.tiles(edges), edges[1:], strict=True):
        # Images that do not count go behind every threshold.
        here = ((columns >= tile.first) & (columns < end)).nonzero()[:, 0]
        tile.values[rows[here], columns[here] - tile.first] = torch.inf
        junk = protocol.junk[(protocol.junk >= tile.first) & (protocol.junk < end)]
        tile.values[:, junk - tile.first] = torch.inf
        thresholds.count(tile, block)
        if end in stops:
            ranks.append(thresholds.ranks())
    return MatchRanks(start, stop, thresholds.counts, torch.stack(ranks))


def tile_edges(stops: Sequence[int], width: int) -> list[int]:
    """0 and up, in steps of at most width, with an edge at every stop."""
    edges = [0]
    for stop in stops:
        while edges[-1] < stop:
            edges.append(min(stop, edges[-1] + width))
    return edges


class _Thresholds:
    """The matches of each query of a block in order, and how many other images come before each."""

    def __init__(self, block: Block, rows: Tensor, columns: Tensor, c: int) -> None:
        exact = block.exact(rows, columns)
        # Stable sorts: pairs came sorted by row and column, so equal distances stay in order of the column.
        order = exact.argsort(stable=True)
        order = order[rows[order].argsort(stable=True)]
        self.counts = rows.bincount(minlength=c)
        slots = torch.arange(rows.numel(), device=rows.device) - (self.counts.cumsum(0) - self.counts)[rows]
        shape = (c, int(self.counts.max()) if c else 0)
        self.values = torch.full(shape, torch.inf, dtype=exact.dtype, device=rows.device)
        self.values[rows, slots] = exact[order]
        self._columns = torch.zeros(shape, dtype=torch.int64, device=rows.device)
        self._columns[rows, slots] = columns[order]
        self.before = torch.zeros(shape, dtype=torch.int64, device=rows.device)
        """`[c, P]`: how many images that are not matches come before each match."""

    def count(self, tile: Tile, block: Block) -> None:
        """Adds the images of a tile to `before`."""
        error = 0 if tile.error is None else tile.error[:, None]
        low, high = self.values - error, self.values + error
        ordered = _sorted(tile.values)
        sure = torch.searchsorted(ordered, low)
        self.before += sure
        possible = torch.searchsorted(ordered, high, right=True)
        doubts = (sure < possible) & (self.values < torch.inf)
        many = doubts.sum(1)
        doubtful = many.argsort(descending=True)[: int((many > 0).sum())]  # those with most doubts first
        if doubtful.numel() > 0:
            self._count_doubtful(doubtful, doubts[doubtful], low[doubtful], high[doubtful], tile, block)

    def _count_doubtful(
        self, doubtful: Tensor, doubts: Tensor, low: Tensor, high: Tensor, tile: Tile, block: Block
    ) -> None:
        """Counts the images between low and high `[n, P]` of the doubtful queries `[n]` by (exact distance, column)."""
        values = tile.values[doubtful]
        owners, places = _between(values, doubts, low, high).nonzero().unbind(1)
        step = max(1, CHUNK // low.shape[1])
        for first in range(0, owners.numel(), step):
            owner, place = owners[first : first + step], places[first : first + step]
            row, column = doubtful[owner], place + tile.first
            value, exact = values[owner, place][:, None], block.exact(row, column)[:, None]
            threshold = self.values[row]
            before = (exact < threshold) | ((exact == threshold) & (column[:, None] < self._columns[row]))
            before &= (low[owner] <= value) & (value <= high[owner])
            self.before.index_add_(0, row, before.long())

    def ranks(self) -> Tensor:
        """int64 `[c, P]`: a match's own place and the images in front of it."""
        return torch.arange(1, self.values.shape[1] + 1, device=self.before.device) + self.before


def _between(values: Tensor, doubts: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """bool `[n, w]`: which values `[n, w]` lie between low and high `[n, P]` of a doubtful match.

    doubts is bool `[n, P]`: the doubtful matches, rows with most of them first.
    """
    counts = doubts.sum(1)
    if int(counts.sum()) <= _FEW_DOUBTS * len(counts):
        slots = doubts.byte().argsort(dim=1, descending=True, stable=True)
        low, high = low.gather(1, slots), high.gather(1, slots)
        found = torch.zeros_like(values, dtype=torch.bool)
        for slot in range(int(counts[0])):
            n = int((counts > slot).sum())
            found[:n] |= (low[:n, slot, None] <= values[:n]) & (values[:n] <= high[:n, slot, None])
        return found
    # The first match that a value is not certainly behind: the value is doubtful unless it is certainly before it.
    match = torch.searchsorted(high, values)
    nearest = torch.nn.functional.pad(low, (0, 1), value=torch.inf).gather(1, match)
    return (nearest <= values) & (values < torch.inf)


def _sorted(values: Tensor) -> Tensor:
    """Each row in ascending order; numpy's sort of bare numbers is vectorised, PyTorch's on a CPU carries indices."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=1))
