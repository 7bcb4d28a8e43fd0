"""Image files: which files are images, reading one, and the error for one that cannot be read."""

from __future__ import annotations

import os
from typing import Any

from ..requirements import need

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


class UnreadableImageError(OSError):
    """A file is missing or not an image; the message has its path, in a process that reads for a DataLoader too.

    A DataLoader raises the error of a worker once more in the main process, as `type(error)(text)` with the worker's
    traceback as the text. Its last line is the message that was meant for the user: that is what becomes of the text.

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
    except Exception as error:  # OSError for the most part; damage also gives SyntaxError, ValueError, TypeError, ...
        raise UnreadableImageError(f"sn_ops.reid: images: expected an image, got {path}: {error}") from error
