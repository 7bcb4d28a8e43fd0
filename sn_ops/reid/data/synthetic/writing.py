"""Writing the set in Market-1501 layout."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from ...files import replacing
from .config import SyntheticConfig
from .plan import FOLDERS, Image, plan
from .renderer import Renderer

MANIFEST = "synthetic.json"
"""Written last, when the folder is complete."""
_STARTED = "synthetic.started.json"
_LOCK = "synthetic.lock"
# Images of a task: few enough for a steady progress bar, enough that drawing the scenes costs little.
_CHUNK = 400


def render(
    root: str | os.PathLike[str],
    config: SyntheticConfig = SyntheticConfig(),  # noqa: B008 - immutable
    *,
    workers: int = 1,
    tick: Callable[[int], None] | None = None,
) -> Path:
    """Renders the set into a folder, unless the folder has it already.

    The bytes of an image depend only on the settings and on its identity, camera and frame, not on the order or the
    number of processes (with the same versions of NumPy and Pillow on the same machine). An interrupted call is
    completed by the next. Several processes may call at once: one renders, the others wait.

    Args:
        root: the folder; it gets `bounding_box_train`, `query`, `bounding_box_test` and `gt_bbox`.
        config: the settings of the set.
        workers: processes; 1 renders in this one. With more, scripts need `if __name__ == "__main__"` around the call.
        tick: called with the number of new images after each few hundred, for a progress bar.

    Returns:
        root.

    Raises:
        FileExistsError: the folder has another set, or files that were not rendered here.
        ValueError: workers below 1.
        ImportError: pillow is missing.
    """
    root = Path(root)
    if workers < 1:
        raise ValueError(f"sn_ops.reid: synthetic: workers: expected at least 1, got {workers}")
    images = plan(config)
    # Without the lock, check only what does not change while another process renders.
    if (root / MANIFEST).is_file() and not _missing(root, config, images):
        return root
    if root.exists():
        _refuse_strangers(root, {path.name for path in root.iterdir()})
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        missing = _missing(root, config, images)  # another process may have rendered them while this one waited
        if missing:
            _write_json(root / _STARTED, config)
            for folder in FOLDERS:
                (root / folder).mkdir(exist_ok=True)
            for done in _write_images(root, config, missing, workers):
                if tick is not None:
                    tick(done)
            _write_json(root / MANIFEST, config)
            (root / _STARTED).unlink()
    return root


def _missing(root: Path, config: SyntheticConfig, images: Sequence[Image]) -> list[Image]:
    """The images that the folder lacks; raises if it has those of another set."""
    found = next((root / name for name in (MANIFEST, _STARTED) if (root / name).exists()), None)
    if found is None:
        _refuse_strangers(root, {path.name for path in root.iterdir()} - {_LOCK})
        return list(images)
    _compare(found, config)
    present = {folder: _names(root / folder) for folder in FOLDERS}
    return [image for image in images if image.name(config.seed) not in present[image.folder]]


def _refuse_strangers(root: Path, names: set[str]) -> None:
    """Raises if a folder with these names was not made by `render`, which writes its lock first."""
    if names and not names & {_LOCK, MANIFEST, _STARTED}:
        raise FileExistsError(
            f"sn_ops.reid: synthetic: expected a new or empty folder, or one rendered before, got {root}, "
            f"which holds {', '.join(sorted(names)[:4])}"
        )


def _compare(manifest: Path, config: SyntheticConfig) -> None:
    expected = config.as_dict()
    try:
        got = json.loads(manifest.read_text())
    except ValueError:
        got = None
    if not isinstance(got, dict):
        raise FileExistsError(f"sn_ops.reid: synthetic: expected the configuration of a set in {manifest}, got no JSON")
    if got != expected:
        other = [
            f"{key} {got.get(key)!r} instead of {expected.get(key)!r}"
            for key in sorted({*got, *expected})
            if got.get(key) != expected.get(key)
        ]
        raise FileExistsError(
            f"sn_ops.reid: synthetic: expected the set asked for in {manifest.parent}, got another one: "
            f"{', '.join(other)}. Choose another folder, or delete this one"
        )


def _names(folder: Path) -> frozenset[str]:
    """The names of files that are not empty: a power cut can leave empty ones."""
    if not folder.is_dir():
        return frozenset()
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if entry.stat().st_size > 0)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system releases when the process ends."""
    with (root / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_images(root: Path, config: SyntheticConfig, images: Sequence[Image], workers: int) -> Iterator[int]:
    """Renders, and yields the number of images of each finished task."""
    chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
    if workers == 1:
        renderer = Renderer(config)
        for chunk in chunks:
            yield _write_chunk(root, config, chunk, renderer)
        return
    # Not fork: the caller may have threads, as with PyTorch.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_write_chunk, root, config, chunk) for chunk in chunks]):
            yield future.result()


def _write_chunk(root: Path, config: SyntheticConfig, images: Sequence[Image], renderer: Renderer | None = None) -> int:
    renderer = renderer or Renderer(config)
    for image in images:
        _replace(root / image.folder / image.name(config.seed), renderer.jpeg(image))
    return len(images)


def _write_json(file: Path, config: SyntheticConfig) -> None:
    _replace(file, (json.dumps(config.as_dict(), indent=2) + "\n").encode())


def _replace(file: Path, content: bytes) -> None:
    """Without a flush, which takes longer than an image: `_names` ignores files that a power cut emptied."""
    with replacing(file, flush=False) as unfinished:
        unfinished.write_bytes(content)
