"""Data sets by name."""

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
"""From the folder of a data set, and options by keyword, to its split."""


def load_synthetic(root: str | os.PathLike[str], /, *, quick: bool = False, workers: int = 1, **fields: Any) -> Split:
    """Rendered pedestrians, which are rendered first where the folder does not have them yet.

    Args:
        root: the folder that has, or is to have, the images.
        quick: start from `SyntheticConfig.quick()`, the small set.
        workers: processes that render.
        fields: of `SyntheticConfig`, in place of its defaults.

    Raises:
        TypeError, ValueError: a field that `SyntheticConfig` does not have or take; a folder with other images.
    """
    from .synthetic import SyntheticConfig, render  # it draws with packages of the extra

    start = SyntheticConfig.quick() if quick else SyntheticConfig()
    known = [field.name for field in dataclasses.fields(start)]
    for field in fields:
        if field not in known:
            raise TypeError(
                f"sn_ops.reid: options of synthetic: expected quick, workers, {', '.join(known)}, got {field!r}"
            )
    config = dataclasses.replace(start, **fields)
    # A set that is there already takes no second, and shows no bar; nor does what is not a terminal.
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
"""What options may be, for `_check_options` and in its words."""


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Options come from command lines and YAML, where a word is text: `False`, taken as it is, would be true.

    Raises:
        TypeError: an option that the loader of `name` does not have, or of another type than its signature says. The
            loader itself checks what it takes as `**fields`.
    """
    parameters = inspect.signature(DATASETS[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    hints = typing.get_type_hints(DATASETS[name])
    for option, value in options.items():
        if option in known:
            parts = typing.get_args(hints[option]) or (hints[option],)
            kinds: list[type] = [typing.get_origin(part) or part for part in parts]
            # True is an int to Python, and to nobody who counts.
            if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
                expected = " or ".join(_KINDS[kind] for kind in kinds)
                raise TypeError(
                    f"sn_ops.reid: options of {name}: {option}: expected {expected}, got {value!r} of type "
                    f"{type(value).__name__}"
                )
        elif not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise TypeError(f"sn_ops.reid: options of {name}: expected {', '.join(known)}, got {option!r}")


# By position alone: `root` and `name` among the options are options that no set has.
def load_dataset(name: str, root: str | os.PathLike[str], /, **options: Any) -> Split:
    """The split of a data set.

    Args:
        name: one of `DATASETS`.
        root: its folder, or the one that its archive was unpacked in.
        options: by keyword, as the set's loader has them.

    Raises:
        ValueError: another name; names or numbers of images that are not the set's.
        TypeError: an option that the set does not have, or of another type than the set's loader says.
        FileNotFoundError: what is missing, and where to get it.
    """
    if name not in DATASETS:
        raise ValueError(f"sn_ops.reid: data set: expected one of {', '.join(DATASETS)}, got {name!r}")
    _check_options(name, options)
    return DATASETS[name](root, **options)


def load_split(data: DataConfig) -> Split:
    """The data set that a configuration names.

    Raises:
        FileNotFoundError, ValueError: as `load_dataset`.
    """
    return load_dataset(data.name, Path(data.root), **data.options)
