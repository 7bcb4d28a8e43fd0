"""Inputs reach a backend's device as they were made, and a backend is skipped only for a good reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sn_ops
from support import backends, problems
from support.backends import device_of


@pytest.mark.parametrize("name", problems.CASES)
def test_moving_keeps_strides_offsets_and_what_shares_memory(name: str) -> None:
    """From CPU to CPU, which shows as much of the layout as any other device."""
    case = problems.CASES[name]()
    before = [x for x in vars(case).values() if isinstance(x, Tensor)]
    storages: dict[int, torch.UntypedStorage] = {}
    after = [problems.relocated(x, torch.device("cpu"), storages) for x in before]
    for x, moved in zip(before, after, strict=True):
        assert moved.dtype == x.dtype and moved.equal(x)
        assert (moved.shape, moved.stride(), moved.storage_offset()) == (x.shape, x.stride(), x.storage_offset())
        assert x.numel() == 0 or moved.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    owners = [[x.untyped_storage().data_ptr() for x in tensors] for tensors in (before, after)]
    for i in range(len(before)):
        assert [owners[0][i] == owner for owner in owners[0]] == [owners[1][i] == owner for owner in owners[1]]


def test_the_layouts_are_there_to_be_kept() -> None:
    """The cases named after a layout have it."""
    strides = {name: problems.CASES[name]().feats.stride() for name in problems.CASES}
    assert strides["columns-strided"] == (40, 2) and strides["rows-strided"] == (40, 1)
    assert strides["transposed"] == (1, 33) and strides["expanded"] == (0, 1)
    assert problems.CASES["columns-misaligned"]().feats.storage_offset() == 1


def test_gradients_are_asked_for_after_the_move(backend: str) -> None:
    """Enforced on the CPU too: otherwise a test would fail on a GPU only."""
    with pytest.raises(AssertionError, match="move first"):
        problems.self_case(5, 3, 2).leaves().on(backend)


def test_on_reaches_into_arguments(backend: str) -> None:
    """Whatever is no tensor stays as it is."""
    labels = torch.arange(3)
    arguments: dict[str, Any] = {"feats": [labels, None], "k": 3, "self_index": (labels, -1)}
    moved = problems.on(backend, arguments)
    assert moved["k"] == 3 and moved["feats"][1] is None and moved["self_index"][1] == -1
    for x in (moved["feats"][0], moved["self_index"][0]):
        assert isinstance(x, Tensor) and x.device.type == device_of(backend).type and x.cpu().equal(labels)


@pytest.mark.parametrize(
    ("gpu", "reason", "outcome"),
    [
        (False, "", "skipped"),
        (False, "_C_cuda.so does not load", "skipped"),
        (True, "not built: no CUDA toolkit", "skipped"),
        (True, "_C_cuda.so does not load", "failed"),
        (True, "", "runs"),
    ],
)
def test_only_good_reasons_skip(monkeypatch: pytest.MonkeyPatch, gpu: bool, reason: str, outcome: str) -> None:
    """Kernels that were built and do not load fail where there is a GPU, with the reason."""
    facts = {name: sn_ops.BackendInfo(not reason, reason, ("cuda",), "C++") for name in ("cuda", "triton")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(sn_ops, "backends", lambda: facts)
    for require in (backends.require, backends.require_gpu):
        if outcome == "runs":
            assert require("cuda") == "cuda"
        elif outcome == "failed":
            with pytest.raises(AssertionError, match=reason):
                require("cuda")
        else:
            with pytest.raises(pytest.skip.Exception, match=reason if gpu else "no GPU"):
                require("cuda")
