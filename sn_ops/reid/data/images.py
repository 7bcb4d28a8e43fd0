"""Image files: their suffixes, reading one, and the error for an unreadable one."""

from __future__ import annotations

import os
from typing import Any

from ..requirements import need

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


class UnreadableImageError(OSError):
    """A file is missing or not an image; the message has its path, in worker processes of a DataLoader too.

    A DataLoader raises a worker's error again in the main process, as `type(error)(text)` with the worker's traceback
    as the text. The last line of that text is the message for the user, and the only one that is kept.

    Args:
        text: the message, or PyTorch's text around it.
    """

    def __init__(self, text: str) -> None:
        if text.startswith("Caught "):  # torch._utils.ExceptionWrapper.reraise
            _, _, text = text.rpartition(f"{type(self).__qualname__}: ")
        super().__init__(text.rstrip("\n"))


def read_image(path: str | os.PathLike[str]) -> Any:
    """The `PIL.Image.Image` of a file, in RGB.

    Raises:
        UnreadableImageError: the file is missing or not an image.
        ImportError: pillow is missing.
    """
    image = need("PIL.Image")
    try:
        with image.open(path) as opened:
            return opened.convert("RGB")
    except Exception as error:  # mostly OSError; damaged files also give SyntaxError, ValueError, TypeError, ...
        raise UnreadableImageError(f"sn_ops.reid: images: expected an image, got {path}: {error}") from error
