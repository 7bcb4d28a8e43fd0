"""A hook of mkdocs: pages of docs/ may link to files of the repository outside docs/, as GitHub lets them.

What such a link names is copied into the site below `repository/`; a Markdown file becomes a page there, and its own
links are followed in turn. Links are rewritten to where their targets went.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIES = "repository"
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^\s*(`{3,}).*?^\s*\1$", re.MULTILINE | re.DOTALL)


def place_of(target: str) -> str:
    """Where a file of the repository is in the site; both from their roots."""
    return target.removeprefix("docs/") if target.startswith("docs/") else f"{COPIES}/{target}"


def source_of(place: str) -> str:
    """The other way round."""
    return place.removeprefix(f"{COPIES}/") if place.startswith(f"{COPIES}/") else f"docs/{place}"


def target_of(page: str, link: str) -> str:
    """What a relative link on a page means, from the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds what pages link to outside docs/."""
    pages = [source_of(file.src_uri) for file in files.documentation_pages()]
    pages += ["CHANGELOG.md"]
    files.append(File.generated(config, place_of("CHANGELOG.md"), abs_src_path=str(ROOT / "CHANGELOG.md")))
    while pages:
        page = pages.pop()
        text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for _open, link, _anchor, _close in LINK.findall(text):
            target = target_of(page, link)
            place = place_of(target)
            if not (ROOT / target).is_file() or files.get_file_from_path(place) is not None:
                continue  # a link to nothing is left to mkdocs, which refuses it
            files.append(File.generated(config, place, abs_src_path=os.fspath(ROOT / target)))
            if target.endswith(".md"):
                pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of one page."""
    here = page.file.src_uri

    def moved(found: re.Match[str]) -> str:
        target = target_of(source_of(here), found[2])
        if not (ROOT / target).is_file():
            return found[0]
        link = posixpath.relpath(place_of(target), posixpath.dirname(here) or ".")
        return f"{found[1]}{link}{found[3] or ''}{found[4]}"

    parts = re.split(r"(^\s*(?:`{3,}).*?^\s*`{3,}$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if at % 2 else LINK.sub(moved, part) for at, part in enumerate(parts))
