"""The report of a run: one HTML file with curves, scores, ranked lists, support neighbours and embeddings."""

from __future__ import annotations

from ..inference.embed import Embedded
from .build import build_report, write_run_report
from .html import Report, write_report
from .ranking import write_ranking

__all__ = ["Embedded", "Report", "build_report", "write_ranking", "write_report", "write_run_report"]
