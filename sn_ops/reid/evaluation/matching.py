"""Who matches whom under the re-ID protocol, which `ranking` states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .distances import Distances


class Protocol:
    """Who matches whom, for Q queries and a gallery of G images.

    For a query of identity p under camera c, gallery images of p under c and images of a negative identity (junk) are
    left out. All other images of p are matches; all other images, distractors (identity 0) included, are not.

    Args:
        query_ids: integer `[Q]`, on any device; no negative identity.
        query_cameras: integer `[Q]`; None, then also for the gallery: no image is left out for its camera.
        gallery_ids: integer `[G]`.
        gallery_cameras: integer `[G]`, or None.
        device: where the protocol keeps its tensors: that of the distances.

    Raises:
        TypeError: not 1-D integer tensors.
        ValueError: lengths that differ, cameras on one side only, or a query of a negative identity.

    Source: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.
    """

    def __init__(
        self,
        query_ids: Tensor,
        query_cameras: Tensor | None,
        gallery_ids: Tensor,
        gallery_cameras: Tensor | None,
        device: torch.device,
    ) -> None:
        if (query_cameras is None) != (gallery_cameras is None):
            raise ValueError("sn_ops.reid: cameras: expected them for query and gallery or for neither, got one")
        self.query_ids = integer_vector("query_ids", query_ids, None, device)
        self.gallery_ids = integer_vector("gallery_ids", gallery_ids, None, device)
        self.query_cameras = self.gallery_cameras = None
        if query_cameras is not None and gallery_cameras is not None:
            self.query_cameras = integer_vector("query_cameras", query_cameras, len(self.query_ids), device)
            self.gallery_cameras = integer_vector("gallery_cameras", gallery_cameras, len(self.gallery_ids), device)
        if bool((self.query_ids < 0).any()):
            raise ValueError(
                f"sn_ops.reid: query_ids: expected none below 0 (junk), got {int((self.query_ids < 0).sum())}"
            )
        self.junk = (self.gallery_ids < 0).nonzero()[:, 0]
        # The gallery in order of identity: the images of one are a run.
        ids, self._order = self.gallery_ids.sort(stable=True)
        self._first = torch.searchsorted(ids, self.query_ids)
        self.same = torch.searchsorted(ids, self.query_ids, right=True) - self._first
        """`[Q]`: how many gallery images have the query's identity, under any camera."""

    def pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of a query and a gallery image of its identity, for consecutive queries.

        Args:
            start: the first query.
            stop: one past the last query.

        Returns:
            Rows int64 `[n]`, counted from `start`; columns int64 `[n]`; and bool `[n]`, whether the pair counts, which
            it does not under one camera. Sorted by row, then column.
        """
        counts = self.same[start:stop]
        rows = torch.arange(stop - start, device=counts.device).repeat_interleave(counts)
        within = torch.arange(rows.numel(), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        columns = self._order[self._first[start:stop][rows] + within]
        if self.query_cameras is None or self.gallery_cameras is None:
            return rows, columns, torch.ones_like(rows, dtype=torch.bool)
        return rows, columns, self.query_cameras[start:stop][rows] != self.gallery_cameras[columns]

    def blocks(self, rows_at_once: int, chunk: int) -> Iterator[tuple[int, int]]:
        """Runs of consecutive queries that are small enough to process at a time.

        Args:
            rows_at_once: the most queries of a run.
            chunk: the most places for matches of a run: queries times the most matches of one.

        Yields:
            (start, stop); a single query may exceed `chunk`.
        """
        same = self.same.tolist()
        start, widest = 0, 0
        for i, count in enumerate(same):
            widest = max(widest, count)
            if i > start and (i - start >= rows_at_once or (i + 1 - start) * widest > chunk):
                yield start, i
                start, widest = i, count
        if same:
            yield start, len(same)


def integer_vector(name: str, values: Tensor, length: int | None, device: torch.device) -> Tensor:
    """The values as int64 on the device.

    Raises:
        TypeError: not a 1-D integer tensor.
        ValueError: another length than `length`, if that is given.
    """
    if not isinstance(values, Tensor) or values.is_floating_point() or values.is_complex() or values.ndim != 1:
        got = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"sn_ops.reid: {name}: expected a 1-D integer tensor, got {got}")
    if length is not None and len(values) != length:
        raise ValueError(f"sn_ops.reid: {name}: expected {length} entries, got {len(values)}")
    return values.to(device, torch.int64)


def check_lengths(distances: Distances, protocol: Protocol) -> None:
    """Raises ValueError unless there is an identity for each query and each gallery row."""
    for name, ids, rows in zip(
        ("query_ids", "gallery_ids"), (protocol.query_ids, protocol.gallery_ids), distances.shape, strict=True
    ):
        if len(ids) != rows:
            raise ValueError(f"sn_ops.reid: {name}: expected {rows} entries, one a feature row, got {len(ids)}")
