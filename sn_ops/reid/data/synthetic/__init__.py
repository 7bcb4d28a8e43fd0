"""Procedurally rendered pedestrians in Market-1501 layout, for training without a download.

They are stylised figures, not photographs: a score on them shows that a pipeline works and how losses compare on this
set, but nothing about real people. Label such scores synthetic.
"""

from __future__ import annotations

from .config import SyntheticConfig
from .plan import FOLDERS, Image, plan
from .renderer import Renderer
from .writing import MANIFEST, render

__all__ = ["FOLDERS", "MANIFEST", "Image", "Renderer", "SyntheticConfig", "plan", "render"]
