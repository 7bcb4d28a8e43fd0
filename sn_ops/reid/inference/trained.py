"""A trained network, found by the name of its run or of its checkpoint."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import find_checkpoint, load_checkpoint, restoring
from ..config import Config, from_dict
from ..models import ReIDModel, build_model


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
