"""Checkpoints: written whole or not at all, checked when read, refused where they are of another run."""

from __future__ import annotations

import hashlib
import os
import random
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import Config, to_dict, training_values
from .data import Sample
from .files import replacing

FORMAT = "sn_ops.reid checkpoint"
VERSION = 1

_KEYS = {"format": str, "version": int, "config": dict, "fingerprint": str, "num_identities": int, "epoch": int,
         "model": dict}  # fmt: skip
_KEYS_OF_TRAINING: dict[str, type | tuple[type, ...]] = {
    "batch": int, "optimizer": dict, "scaler": dict, "memory": (dict, type(None)), "random": list, "data": str,
    "log": dict, "best": float, "due": bool,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is corrupt, of something else, or of another run."""


def save_checkpoint(path: Path, state: Mapping[str, Any], config: Config) -> None:
    """Replaces a checkpoint: at any moment, a power cut included, the file is the old one or the new one, whole.

    Args:
        path: the file; folders above it are made.
        state: tensors and plain values; at least num_identities, epoch (the number finished) and model, a state dict.
        config: of the run.
    """
    head = {"format": FORMAT, "version": VERSION, "config": to_dict(config), "fingerprint": config.fingerprint()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, unfinished.open("wb") as out:
        torch.save({**head, **state}, out)


def find_checkpoint(path: str | os.PathLike[str], which: str = "last") -> Path:
    """The checkpoint file of a path: the file itself, or `checkpoints/<which>.pt` in a run's folder.

    Raises:
        FileNotFoundError: neither; the message lists what was found.
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


def load_checkpoint(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads a checkpoint.

    No code in the file runs (`weights_only`), and all bytes are checked against the checksums of the archive, which
    PyTorch writes but does not read.

    Returns:
        The state, with "config" (sections of plain values), "fingerprint", "num_identities", "epoch", "model".

    Raises:
        FileNotFoundError: no such file.
        CheckpointError (a ValueError): not a checkpoint, a corrupt one, or one of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"sn_ops.reid: checkpoint: expected a file, got nothing at {path}")
    with path.open("rb") as stream:  # outside the try: an OSError here is no damage
        try:
            with zipfile.ZipFile(stream) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            stream.seek(0)
            state = torch.load(stream, map_location=map_location, weights_only=True)
        except Exception as error:  # damaged bytes raise errors of many types
            raise CheckpointError(
                f"sn_ops.reid: checkpoint: expected a checkpoint of sn_ops.reid, got {path}, which is corrupt or of "
                f"something else: {error}"
            ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"sn_ops.reid: checkpoint: expected a checkpoint of sn_ops.reid, got another file, {path}"
        )
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"sn_ops.reid: checkpoint: expected format version {VERSION}, got {state.get('version')!r} in {path}"
        )
    for key, kind in _KEYS.items():
        if not isinstance(state.get(key), kind):
            raise _lacks(key, state, path)
    return state


def _lacks(key: str, state: Mapping[str, Any], path: Path) -> CheckpointError:
    got = f"one of type {type(state[key]).__name__}" if key in state else "none"
    return CheckpointError(f"sn_ops.reid: checkpoint: expected {key!r} in {path}, got {got}")


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turns errors about a checkpoint's contents into a `CheckpointError`, while its parts are loaded.

    Raises:
        CheckpointError: in place of errors of PyTorch, NumPy and Python, with their text.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        text = " ".join(str(error).removeprefix("sn_ops.reid: ").split())
        what = f"no {text}" if isinstance(error, KeyError) else text
        raise CheckpointError(
            f"sn_ops.reid: checkpoint: expected contents that fit the configuration in {path}, got others: {what}"
        ) from error


def data_fingerprint(samples: Sequence[Sample]) -> str:
    """A SHA-256 over the training images: names, identities and cameras in their order, without the folder."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.path.name}\t{sample.pid}\t{sample.camera}\n".encode())
    return digest.hexdigest()


def check_resumable(state: Mapping[str, Any], path: Path, config: Config, data: str) -> None:
    """Checks that a run with this configuration and data may resume from the checkpoint.

    Raises:
        CheckpointError: another configuration (the message has the fields that differ), other training images, or a
            checkpoint that lacks the state of training or a part of it.
    """
    if "optimizer" not in state:
        raise CheckpointError(
            f"sn_ops.reid: resume: expected a checkpoint with the state of training, such as last.pt, got {path}, "
            "which has the network alone"
        )
    for key, kind in _KEYS_OF_TRAINING.items():
        if key not in state or not isinstance(state[key], kind):
            raise _lacks(key, state, path)
    if state["fingerprint"] != config.fingerprint():
        ours = training_values(config)
        theirs = {f"{section}.{key}": v for section, values in state["config"].items() for key, v in values.items()}
        differing = [
            f"{key} (checkpoint: {theirs.get(key)!r}, this run: {value!r})"
            for key, value in ours.items()
            if theirs.get(key) != value
        ]
        raise CheckpointError(
            f"sn_ops.reid: resume: expected a checkpoint of the same configuration, got {path}, which differs in "
            + (", ".join(differing) or "its fingerprint")
        )
    if state["data"] != data:
        raise CheckpointError(
            f"sn_ops.reid: resume: expected the training images that {path} was made with, got others: names, "
            "identities or cameras differ"
        )


# ---- random numbers -----------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The state of every generator of this process: Python, NumPy, PyTorch on the CPU and on the present GPU."""
    name, words, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one is saved
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(words).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores the generators from what `random_state` returned."""
    random.setstate(state["python"])
    name, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
