"""A trained network, found by the name of its run or of its checkpoint."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import load_checkpoint, restoring
from .config import Config, DataConfig, from_dict
from .data.records import Split
from .data.registry import load_dataset
from .models import ReIDModel, build_model


@dataclass(frozen=True)
class Trained:
    """A network in eval mode and what it was trained with."""

    model: ReIDModel
    config: Config
    checkpoint: Path
    run: Path | None
    """The run's folder; None for a checkpoint that was moved out of one."""
    epoch: int
    """How many epochs it was trained for."""


def find_checkpoint(path: str | os.PathLike[str], which: str = "last") -> Path:
    """The checkpoint file that a path means: the file itself, or `checkpoints/<which>.pt` of a run's folder.

    Raises:
        FileNotFoundError: neither; the message says what there is.
    """
    path = Path(path)
    if path.is_file():
        return path
    folder = path / "checkpoints"
    found = folder / f"{which}.pt"
    if found.is_file():
        return found
    there = ", ".join(sorted(file.name for file in folder.glob("*.pt"))) if folder.is_dir() else ""
    if there:
        raise FileNotFoundError(f"sn_ops.reid: run: expected {which}.pt in {folder}, got {there}")
    got = "a folder without checkpoints" if path.is_dir() else "nothing of that name"
    raise FileNotFoundError(f"sn_ops.reid: run: expected a run's folder or a checkpoint at {path}, got {got}")


def open_trained(path: str | os.PathLike[str], *, which: str = "last", device: torch.device | str = "cpu") -> Trained:
    """The network of a run or of a checkpoint, in eval mode.

    Args:
        path: a run's folder or a checkpoint file.
        which: "best" or "last", of a run's folder.
        device: where the network shall be.

    Raises:
        FileNotFoundError: no such run.
        ValueError: a checkpoint that is corrupt, or of something else.
    """
    file = find_checkpoint(path, which)
    state = load_checkpoint(file)
    config = from_dict(state["config"])
    # Its own weights follow; those that it started from need not be here.
    model = build_model(
        dataclasses.replace(config.model, weights=None),
        int(state["num_identities"]),
        image_size=(config.data.height, config.data.width),
    )
    with restoring(file):
        model.load_state_dict(state["model"])
    folder = file.parent.parent
    run = folder if (folder / "config.yaml").is_file() else None
    return Trained(model.to(device).eval(), config, file, run, int(state["epoch"]))


def load_split(data: DataConfig) -> Split:
    """The data set that a configuration names.

    Raises:
        FileNotFoundError, ValueError: as `load_dataset`.
    """
    return load_dataset(data.name, Path(data.root), **data.options)


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]{0,5}))?", name)
    if known is None:  # PyTorch has more, such as meta, which would run into errors of its own
        raise ValueError(f"sn_ops.reid: device: expected auto, cpu, cuda or cuda:<index>, got {name!r}")
    # Before PyTorch reads the index, which it keeps in a byte.
    if name != "cpu" and int(known[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"sn_ops.reid: device: expected a device that is here, got {name!r}")
    return torch.device(name)
