"""Networks from images to embeddings."""

from __future__ import annotations

from .networks import Output, ReIDModel, SmallNet, build_model
from .weights import load_weights

__all__ = ["Output", "ReIDModel", "SmallNet", "build_model", "load_weights"]
