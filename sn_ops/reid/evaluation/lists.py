"""Ranked lists: the nearest gallery images of every query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .distances import Distances
from .matching import Protocol, check_lengths
from .ranking import CHUNK


@dataclass(frozen=True)
class RankedLists:
    """The nearest gallery images of every query, the nearest first, on the device of the distances."""

    indices: Tensor
    """int64 `[Q, top]`: gallery rows, -1 where the list ends."""
    distances: Tensor
    """float64 `[Q, top]`, inf where the list ends."""
    matches: Tensor
    """bool `[Q, top]`: whether the image is a match; False where the list ends."""


def ranked_lists(distances: Distances, protocol: Protocol, *, top: int = 10, chunk: int = CHUNK) -> RankedLists:
    """The `top` nearest images that the protocol keeps, for every query, ordered by (distance, gallery index).

    Args:
        distances: of Q queries to G gallery images.
        protocol: for the same queries and images, on the same device.
        top: the length of each list, >= 1.
        chunk: about how many distances are held at a time.

    Returns:
        The lists, of length `top`; those with fewer images end early.

    Raises:
        ValueError: lengths that differ, or top < 1.
    """
    check_lengths(distances, protocol)
    if top < 1:
        raise ValueError(f"sn_ops.reid: top: expected an int >= 1, got {top}")
    queries, gallery = distances.shape
    device = distances.device
    lists = RankedLists(
        torch.full((queries, top), -1, device=device),
        torch.full((queries, top), torch.inf, dtype=torch.float64, device=device),
        torch.zeros((queries, top), dtype=torch.bool, device=device),
    )
    for start, stop in protocol.blocks(max(1, chunk // max(1, gallery)), chunk) if gallery else ():
        block = distances.block(start, stop)
        (tile,) = block.tiles([0, gallery])
        rows, columns, counted = protocol.pairs(start, stop)
        tile.values[rows[~counted], columns[~counted]] = torch.inf
        tile.values[:, protocol.junk] = torch.inf
        last = tile.values.topk(min(top, gallery), largest=False).values[:, -1:]
        reach = last if tile.error is None else last + 2 * tile.error[:, None]
        rows, columns = ((tile.values <= reach) & (tile.values < torch.inf)).nonzero().unbind(1)
        exact = block.exact(rows, columns)
        order = exact.argsort(stable=True)
        order = order[rows[order].argsort(stable=True)]
        counts = rows.bincount(minlength=stop - start)
        slots = torch.arange(rows.numel(), device=device) - (counts.cumsum(0) - counts)[rows]
        kept = slots < top
        place = (rows[kept] + start, slots[kept])
        lists.indices[place] = columns[order][kept]
        lists.distances[place] = distances.readable(exact[order][kept]).double()
        lists.matches[place] = protocol.gallery_ids[columns[order][kept]] == protocol.query_ids[place[0]]
    return lists
