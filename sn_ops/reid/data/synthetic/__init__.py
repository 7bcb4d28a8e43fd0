"""Procedurally rendered pedestrians in Market-1501 layout: something to train on without a download.

Stylised figures, not photographs: a score on them says that a pipeline works and how losses compare on this set, and
nothing about real people. Label it synthetic.
"""

from __future__ import annotations

from .config import SyntheticConfig
from .plan import FOLDERS, Image, plan
from .renderer import Renderer
from .writing import MANIFEST, render

__all__ = ["FOLDERS", "MANIFEST", "Image", "Renderer", "SyntheticConfig", "plan", "render"]
