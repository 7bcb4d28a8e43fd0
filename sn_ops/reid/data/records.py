"""A data set as the trainer sees it: identity and camera of each image, and the parts of the split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

JUNK = -1
"""Identity of images that scores leave out: bad detections."""
DISTRACTOR = 0
"""Identity of gallery images that match no query: they count as wrong."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set."""

    path: Path
    """The image file."""
    pid: int
    """Identity as in the data set's file names: `JUNK` (-1), `DISTRACTOR` (0), or a person."""
    camera: int
    """The camera, from 0."""


@dataclass(frozen=True)
class Split:
    """A data set, divided for training and retrieval.

    Each part is ordered by file name or as the data set's own lists, never in the order of a file system.
    """

    name: str
    """The name to show, such as "Market-1501"."""
    train: tuple[Sample, ...]
    """Training images."""
    query: tuple[Sample, ...]
    """Images to search for; their identities are not those of training."""
    gallery: tuple[Sample, ...]
    """Images to search in."""
    multi: tuple[Sample, ...] = ()
    """Images of the queried (identity, camera) pairs for multiple query; empty where the data set has none."""
    synthetic: bool = False
    """Whether the images are rendered: every score on them is then labelled so."""

    def identities(self) -> dict[int, int]:
        """The label of every training identity.

        Returns:
            Identity -> label, 0 to P - 1 in the order of the P identities.
        """
        return {pid: label for label, pid in enumerate(sorted({sample.pid for sample in self.train}))}
