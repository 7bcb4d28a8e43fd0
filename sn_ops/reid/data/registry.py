"""Data sets by name: `DATASETS` is the one list; a new data set is a line there."""

from __future__ import annotations

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..requirements import need
from . import cuhk01, cuhk03, duke, folder, market1501, msmt17
from .records import Split

if TYPE_CHECKING:
    from ..config import DataConfig

Loader = Callable[..., Split]
"""A data set's folder, and options by keyword, to its split."""


def load_synthetic(root: str | os.PathLike[str], /, *, quick: bool = False, workers: int = 1, **fields: Any) -> Split:
    """Rendered pedestrians; renders them first if the folder does not have them yet.

    Args:
        root: the folder of the images.
        quick: start from `SyntheticConfig.quick()`, the small set.
        workers: processes that render.
        fields: of `SyntheticConfig`, in place of its defaults.

    Raises:
        TypeError, ValueError: a field that `SyntheticConfig` does not have or take; a folder with other images.
    """
    from .synthetic import SyntheticConfig, render  # needs packages of the extra

    start = SyntheticConfig.quick() if quick else SyntheticConfig()
    known = [field.name for field in dataclasses.fields(start)]
    for field in fields:
        if field not in known:
            raise TypeError(
                f"sn_ops.reid: options of synthetic: expected quick, workers, {', '.join(known)}, got {field!r}"
            )
    config = dataclasses.replace(start, **fields)
    # No bar for an existing set, which loads within a second, nor where stderr is no terminal.
    with need("tqdm").tqdm(desc="rendering", unit=" images", delay=1, disable=None, leave=False) as bar:
        place = render(Path(root).expanduser(), config, workers=workers, tick=bar.update)
    split = market1501.load(place, check_counts=False)
    return dataclasses.replace(split, name="synthetic", synthetic=True)


DATASETS: Mapping[str, Loader] = MappingProxyType(
    {
        "market1501": market1501.load,
        "dukemtmc-reid": duke.load,
        "msmt17": msmt17.load,
        "cuhk03": cuhk03.load,
        "cuhk01": cuhk01.load,
        "folder": folder.load,
        "synthetic": load_synthetic,
    }
)
"""The loader of every data set."""


_KINDS: Mapping[type, str] = MappingProxyType(
    {bool: "true or false", int: "an int", str: "text", os.PathLike: "a path", type(None): "none"}
)
"""The types of options, and their names in error messages."""


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks options against the loader's signature.

    They may come from command lines and YAML as text, and the text "False" would count as true.

    Raises:
        TypeError: an option that the loader of `name` does not have, or of another type than in its signature. The
            loader itself checks its `**fields`.
    """
    parameters = inspect.signature(DATASETS[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    hints = typing.get_type_hints(DATASETS[name])
    for option, value in options.items():
        if option in known:
            parts = typing.get_args(hints[option]) or (hints[option],)
            kinds: list[type] = [typing.get_origin(part) or part for part in parts]
            # Python counts True as an int.
            if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
                expected = " or ".join(_KINDS[kind] for kind in kinds)
                raise TypeError(
                    f"sn_ops.reid: options of {name}: {option}: expected {expected}, got {value!r} of type "
                    f"{type(value).__name__}"
                )
        elif not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise TypeError(f"sn_ops.reid: options of {name}: expected {', '.join(known)}, got {option!r}")


# Positional only: `root` and `name` by keyword are then unknown options, with the error of these.
def load_dataset(name: str, root: str | os.PathLike[str], /, **options: Any) -> Split:
    """Loads a data set.

    Args:
        name: "market1501", "dukemtmc-reid", "msmt17", "cuhk03", "cuhk01", "folder" (your own images) or "synthetic"
            (rendered pedestrians).
        root: its folder, or the folder in which its archive was unpacked.
        options: keyword options of its loader, `sn_ops.reid.data.DATASETS[name]`.

    Returns:
        Its training, query and gallery images.

    Raises:
        ValueError: another name; file names or numbers of images that differ from the authors' archive.
        TypeError: an option that the loader does not have, or one of another type.
        FileNotFoundError: missing files; the message names them and where to get them.
        ImportError: a package that the data set needs is missing.
    """
    if name not in DATASETS:
        raise ValueError(f"sn_ops.reid: data set: expected one of {', '.join(DATASETS)}, got {name!r}")
    _check_options(name, options)
    return DATASETS[name](root, **options)


def load_split(data: DataConfig) -> Split:
    """Loads the data set of a configuration.

    Args:
        data: names the data set, its folder and the options of its loader.

    Returns:
        Its training, query and gallery images.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: as `load_dataset`.
    """
    return load_dataset(data.name, Path(data.root), **data.options)
