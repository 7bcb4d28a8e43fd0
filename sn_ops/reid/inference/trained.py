"""Opening the trained network of a run or a checkpoint."""

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
    """A trained network and its origin."""

    model: ReIDModel
    """The network, in eval mode."""
    config: Config
    """The configuration that it was trained with."""
    checkpoint: Path
    """The checkpoint file."""
    run: Path | None
    """The run's folder; None for a checkpoint outside of one."""
    epoch: int
    """The number of epochs that it was trained for."""


def open_trained(path: str | os.PathLike[str], *, which: str = "last", device: torch.device | str = "cpu") -> Trained:
    """The network of a run or a checkpoint, in eval mode.

    Args:
        path: a run's folder or a checkpoint file.
        which: the checkpoint of a run's folder, "last" or "best" (chosen on the test images).
        device: where to put the network.

    Returns:
        The network with its configuration.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: a checkpoint that is corrupt or of another program.
        ImportError: torchvision or timm is missing, where the network is theirs.
    """
    file = find_checkpoint(path, which)
    state = load_checkpoint(file)
    config = from_dict(state["config"])
    # Without the weights that training started from: the checkpoint's replace them.
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
