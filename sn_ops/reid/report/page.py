"""Pieces of an HTML page: one file without scripts or external resources."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..data.images import read_image
from ..requirements import need

STYLE = """
:root { color-scheme: light; --ink: #1c2128; --soft: #5d6571; --line: #dfe3e8; --right: #1d8a4a; --wrong: #c8372d; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.2rem 4rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: #fff; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { margin: .4rem 0 .9rem; color: var(--soft); max-width: 75ch; }
.notice { color: #7a4b00; background: #fff3d6; border-left: 4px solid #e0a100; padding: .5rem .8rem; }
table { border-collapse: collapse; margin-bottom: 1rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .8rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
img.figure { display: block; max-width: 100%; height: auto; }
.strip { display: flex; gap: .45rem; overflow-x: auto; padding: .35rem 0 .7rem; align-items: flex-start; }
figure { margin: 0; flex: none; width: 72px; font-size: 11px; line-height: 1.3; text-align: center; }
figcaption { overflow-wrap: anywhere; }
figure img { display: block; width: 72px; height: 144px; object-fit: fill; border: 4px solid var(--line); }
figure.right img { border-color: var(--right); }
figure.wrong img { border-color: var(--wrong); border-style: dashed; }
figure.right b { color: var(--right); }
figure.wrong b { color: var(--wrong); }
figure.asked { margin-right: .8rem; }
.strip.wide { flex-wrap: wrap; }
figure.asked img { border-color: var(--ink); }
details pre { background: #f5f6f8; padding: .8rem; overflow-x: auto; }
"""


def document(title: str, body: Iterable[str]) -> str:
    """A page; title is plain text, body is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def section(heading: str, text: str, *content: str) -> str:
    """A heading, a plain-text explanation, and HTML."""
    explanation = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(heading)}</h2>{explanation}{''.join(content)}</section>"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Plain text in cells."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def figure(svg: str, description: str) -> str:
    """A diagram as an image, so that ids of different SVGs cannot collide."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img class="figure" alt="{html.escape(description)}" src="data:image/svg+xml;base64,{data}">'


def facts(values: Mapping[str, object]) -> str:
    """Names and values, collapsed."""
    text = "\n".join(f"{name}: {value}" for name, value in values.items())
    return f"<details><summary>Show</summary><pre>{html.escape(text)}</pre></details>"


def picture(path: Path, lines: Iterable[str], kind: str) -> str:
    """A small copy of a pedestrian image with a caption.

    Args:
        path: the image file.
        lines: plain text below it; the first is set bold.
        kind: the frame: "right", "wrong", "asked" or "". Frames differ in form as well as in colour.
    """
    first, *rest = (html.escape(line) for line in lines)
    caption = "<br>".join([f"<b>{first}</b>", *rest])
    return (
        f'<figure class="{kind}"><img alt="{html.escape(path.name)}" src="{thumbnail(path)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def thumbnail(path: Path, size: tuple[int, int] = (64, 128)) -> str:
    """The image at `size` (width, height) as a data URI, JPEG.

    Raises:
        UnreadableImageError: the file is missing or not an image, an OSError; the message has its path.
    """
    image = need("PIL.Image")
    small = read_image(path).resize(size, image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
