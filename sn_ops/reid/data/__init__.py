"""Data sets: `load_dataset(name, root)` gives a `Split` of `Sample`s; what is missing in a copy is said by name."""

from __future__ import annotations

from .records import DISTRACTOR, JUNK, Sample, Split
from .registry import DATASETS, load_dataset, load_split

__all__ = ["DATASETS", "DISTRACTOR", "JUNK", "Sample", "Split", "load_dataset", "load_split"]
