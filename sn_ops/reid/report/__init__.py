"""The report of a run as one HTML file, and its figures."""

from __future__ import annotations

from .html import Embedded, Report, write_report

__all__ = ["Embedded", "Report", "write_report"]
