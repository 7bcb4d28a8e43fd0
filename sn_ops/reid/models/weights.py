"""A backbone's parameters from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Prefixes of parameters that are not loaded: the classifier is trained anew.
_CLASSIFIER = ("fc.", "classifier.", "head.", "heads.")
# Keys of the parameters in checkpoints that have more than these.
_NESTED = ("model", "state_dict")


def load_weights(backbone: nn.Module, file: str | Path) -> None:
    """Loads a backbone's parameters from a file: torchvision's or timm's download, or a checkpoint of this trainer.

    Only tensors are read (`weights_only`): the file cannot run code. Its parameters may be below "model" or
    "state_dict", and their names may begin with "module." (DistributedDataParallel) or "backbone." (this trainer's).
    Those of a classifier are skipped; every other name and shape must be the backbone's.

    Raises:
        FileNotFoundError, PermissionError: no such file, or one that may not be read.
        ValueError: not a file of PyTorch tensors, or not those of this backbone; the message has the differences.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f'sn_ops.reid: model.weights: expected none, "imagenet" or a file, got {file}')
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # other bytes make the unpickler raise errors of many types
        if isinstance(error, OSError) and error.filename is not None:
            raise
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"sn_ops.reid: model.weights: expected a file of tensors that torch.save wrote, got {file}: {first_line}"
        ) from error
    wanted = backbone.state_dict()
    state = _backbone_state(found, wanted)
    if not state:
        raise ValueError(f"sn_ops.reid: model.weights: expected parameters by name in {file}, got none")
    # Old checkpoints lack this counter, which only a momentum of None uses.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in wanted]
    misshapen = [
        f"{name} {list(state[name].shape)} for {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {"missing": missing, "unknown": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        text = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for what, names in problems.items()
            if names
        )
        raise ValueError(
            f"sn_ops.reid: model.weights: expected the {len(wanted)} tensors of {type(backbone).__name__} in {file}, "
            f"got {text}"
        )
    backbone.load_state_dict(state, strict=False)


def _backbone_state(found: Any, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors in what a file holds, by the backbone's names, which are those of `wanted`."""
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        return {}
    state = {str(name).removeprefix("module."): value for name, value in found.items() if isinstance(value, Tensor)}
    own = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    if own:  # the rest is this trainer's: projection, neck, classifier
        return own
    # Some backbones have parts of that name themselves (ConvNeXt: head.norm).
    return {name: value for name, value in state.items() if name in wanted or not name.startswith(_CLASSIFIER)}
