"""Checkpoint files: written whole or not at all, checked when read, refused by another run; random generators."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from sn_ops.reid.checkpoint import (
    CheckpointError,
    check_resumable,
    data_fingerprint,
    load_checkpoint,
    random_state,
    restoring,
    save_checkpoint,
    set_random_state,
)
from sn_ops.reid.config import Config, from_dict
from sn_ops.reid.data.records import Sample

STATE: dict[str, Any] = {
    "num_identities": 3,
    "epoch": 2,
    "model": {"weight": torch.arange(3000.0)},
    "optimizer": {},
    "data": "d",
    "batch": 0,
    "scaler": {},
    "memory": None,
    "random": [],
    "log": {},
    "best": 0.5,
    "due": False,
}


def saved(tmp_path: Path, config: Config | None = None, **changes: Any) -> Path:
    """A checkpoint file."""
    file = tmp_path / "last.pt"
    save_checkpoint(file, {**STATE, **changes}, config or Config())
    return file


def test_round_trip(tmp_path: Path) -> None:
    config = Config().override("loss.k=7")
    state = load_checkpoint(saved(tmp_path, config))
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert from_dict(state["config"]) == config and state["epoch"] == 2
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_one(tmp_path: Path, where: str) -> None:
    file = saved(tmp_path)
    with mock.patch(where, side_effect=OSError("disk full")), pytest.raises(OSError, match="disk full"):
        save_checkpoint(file, {**STATE, "epoch": 3}, Config())
    assert load_checkpoint(file)["epoch"] == 2


def test_flushed_before_it_takes_the_place(tmp_path: Path) -> None:
    calls = mock.Mock()
    calls.fsync.side_effect, calls.replace.side_effect = os.fsync, os.replace
    with mock.patch("os.fsync", calls.fsync), mock.patch("os.replace", calls.replace):
        saved(tmp_path)
    assert [call[0] for call in calls.mock_calls] == ["fsync", "replace", "fsync"]  # the file, then its name


def test_damage_is_seen(tmp_path: Path) -> None:
    """One changed byte anywhere: the file is refused, or its contents are the same."""
    file = saved(tmp_path)
    whole = file.read_bytes()
    weights = whole.index(torch.arange(3000.0).numpy().tobytes())
    places = np.random.default_rng(0).integers(0, len(whole), 100).tolist()
    refused = 0
    for place in [weights, weights + 11_999, *places]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        try:
            state = load_checkpoint(file)
        except CheckpointError:
            refused += 1
        else:
            assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
            assert from_dict(state["config"]) == Config() and (state["epoch"], state["num_identities"]) == (2, 3)
            assert weights > place or place >= weights + 12_000
    assert refused > 60


@pytest.mark.parametrize("part", [0, 1, 100, 0.5, -1])
def test_truncated(tmp_path: Path, part: float) -> None:
    file = saved(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole)) if part == 0.5 else int(part)])
    with pytest.raises(CheckpointError, match="corrupt or of something else"):
        load_checkpoint(file)


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "other.pt"
    with pytest.raises(FileNotFoundError, match="expected a file"):
        load_checkpoint(file)
    for content in ({"weight": torch.zeros(3)}, torch.zeros(3), [1]):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=r"expected a checkpoint of sn_ops\.reid, got another file"):
            load_checkpoint(file)
    file.write_bytes(pickle.dumps({"format": "sn_ops.reid checkpoint"}))
    with pytest.raises(CheckpointError, match="corrupt or of something else"):
        load_checkpoint(file)
    save_checkpoint(file, {**STATE, "extra": _Bomb()}, Config())
    with pytest.raises(CheckpointError, match="corrupt or of something else"):
        load_checkpoint(file)
    assert not Path("exploded").exists()
    save_checkpoint(file, {**STATE, "version": 99}, Config())
    with pytest.raises(CheckpointError, match="expected format version 1, got 99"):
        load_checkpoint(file)
    save_checkpoint(file, {**STATE, "model": None}, Config())
    with pytest.raises(CheckpointError, match="expected 'model'"):
        load_checkpoint(file)


def test_of_another_run(tmp_path: Path) -> None:
    file = saved(tmp_path)
    state = load_checkpoint(file)
    check_resumable(state, file, Config().override("run.out=x", "run.threads=3"), "d")
    with pytest.raises(CheckpointError, match=r"differs in loss\.k \(checkpoint: 10, this run: 8\), optim\.lr"):
        check_resumable(state, file, Config().override("loss.k=8", "optim.lr=1"), "d")
    with pytest.raises(CheckpointError, match="training images"):
        check_resumable(state, file, Config(), "e")
    del state["optimizer"]
    with pytest.raises(CheckpointError, match="has the network alone"):
        check_resumable(state, file, Config(), "d")


@pytest.mark.parametrize("key", ["batch", "scaler", "memory", "random", "data", "log", "best", "due"])
def test_parts_of_training_that_are_missing(tmp_path: Path, key: str) -> None:
    file = saved(tmp_path)
    state = load_checkpoint(file)
    wrong = {**state, key: b"another"}
    with pytest.raises(CheckpointError, match=f"expected '{key}' in .*last.pt, got one of type bytes"):
        check_resumable(wrong, file, Config(), "d")
    del state[key]
    with pytest.raises(CheckpointError, match=f"^sn_ops.reid: checkpoint: expected '{key}' in .*last.pt, got none"):
        check_resumable(state, file, Config(), "d")


def test_an_int_is_the_float_that_it_is(tmp_path: Path) -> None:
    """An int and an equal float are the same setting, whichever way the configuration was made."""
    config = Config()
    whole = dataclasses.replace(config, loss=dataclasses.replace(config.loss, alpha=51, identity=1))
    file = saved(tmp_path, whole)
    state = load_checkpoint(file)
    assert from_dict(state["config"]).fingerprint() == whole.fingerprint()
    check_resumable(state, file, from_dict(state["config"]), "d")
    check_resumable(state, file, config.override("loss.alpha=51", "loss.identity=1.0"), "d")


def test_errors_of_the_parts() -> None:
    """Errors of the parts that read the state name the file; other errors pass unchanged."""
    for error, text in [(KeyError("rows"), "got others: no 'rows'"), (RuntimeError("a\n\tb"), "got others: a b")]:
        with pytest.raises(CheckpointError, match=text), restoring(Path("last.pt")):
            raise error
    for left in (KeyboardInterrupt(), OSError("disk")):
        with pytest.raises(type(left)), restoring(Path("last.pt")):
            raise left


def test_data_fingerprint() -> None:
    samples = [Sample(Path("a/1.jpg"), 1, 0), Sample(Path("a/2.jpg"), 2, 1)]
    moved = [Sample(Path("b") / sample.path.name, sample.pid, sample.camera) for sample in samples]
    assert data_fingerprint(samples) == data_fingerprint(moved)
    others = [samples[:1], samples[::-1], [samples[0], Sample(Path("a/2.jpg"), 2, 0)]]
    assert all(data_fingerprint(other) != data_fingerprint(samples) for other in others)


def test_generators(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]  # noqa: NPY002

    before = random_state()
    try:
        draw()
        file = saved(tmp_path, random=[random_state()])
        wanted = draw()
        set_random_state(load_checkpoint(file)["random"][0])
        assert draw() == wanted
    finally:
        set_random_state(before)
