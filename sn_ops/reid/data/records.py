"""What a data set is to the trainer: who is on which image, from which camera, and in which part of the split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

JUNK = -1
"""Identity of images that no score counts: bad detections."""
DISTRACTOR = 0
"""Identity of gallery images of nobody who is queried: they count as wrong."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image."""

    path: Path
    pid: int
    """Identity as in the data set's names: `JUNK`, `DISTRACTOR`, or a person."""
    camera: int
    """From 0."""


@dataclass(frozen=True)
class Split:
    """A data set, divided for training and retrieval. Each part is ordered by name or as the data set's lists have it,
    never as a file system does."""

    name: str
    """As in tables: "Market-1501"."""
    train: tuple[Sample, ...]
    query: tuple[Sample, ...]
    gallery: tuple[Sample, ...]
    multi: tuple[Sample, ...] = ()
    """Images of the queried (identity, camera) pairs for multiple query; empty where the data set has none."""
    synthetic: bool = False
    """Rendered images: every score on them is labelled so."""

    def identities(self) -> dict[int, int]:
        """The label, 0 to P - 1, of every training identity, in the order of the identities."""
        return {pid: label for label, pid in enumerate(sorted({sample.pid for sample in self.train}))}
