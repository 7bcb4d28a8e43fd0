"""A ranked list of images as an HTML file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..files import replacing
from ..inference.rank import Ranked
from . import page


def write_ranking(file: str | os.PathLike[str], query: str | os.PathLike[str], ranking: Sequence[Ranked]) -> Path:
    """Writes a ranked list as one self-contained HTML file, atomically.

    Args:
        file: the file; its folder must exist.
        query: the image file that was searched for.
        ranking: the list, the nearest first.

    Returns:
        The file.

    Raises:
        ImportError: pillow is missing.
        OSError: an image cannot be read, or the file cannot be written.
    """
    file, query = Path(file), Path(query)
    figures = [page.picture(query, ["query", query.name], "asked")]
    figures += [
        page.picture(found.path, [str(place), f"{found.distance:.3f}", found.path.name], "")
        for place, found in enumerate(ranking, start=1)
    ]
    text = f"The images most like {query}, the nearest first, with the distance of their embeddings."
    body = page.section("Ranked list", text, f'<div class="strip wide">{"".join(figures)}</div>')
    with replacing(file) as unfinished:
        unfinished.write_text(page.document(f"Ranking for {query.name}", [body]), encoding="utf-8")
    return file
