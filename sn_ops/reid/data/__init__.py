"""Data sets: `load_dataset(name, root)` returns a `Split` of `Sample`s; errors name what a copy lacks."""

from __future__ import annotations

from .records import DISTRACTOR, JUNK, Sample, Split
from .registry import DATASETS, load_dataset, load_split

__all__ = ["DATASETS", "DISTRACTOR", "JUNK", "Sample", "Split", "load_dataset", "load_split"]
