"""Forwards of the Triton backend by a path of the test's choice."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from sn_ops import ops
from sn_ops.reference import Graph
from sn_ops.triton import tuning
from support import judge
from support.problems import Case


def forward(case: Case, squeeze: int = 0, reduction: int = 2) -> Graph:
    """The forward operator with squared distances."""
    case = case.on("triton")
    tensor = case.self_index if isinstance(case.self_index, torch.Tensor) else None
    offset = 0 if case.candidates is None else case.self_index if isinstance(case.self_index, int) else -1
    return ops.forward(
        "triton", case.feats, case.labels, case.candidates, case.candidate_labels, tensor, offset,
        case.k, 5.0, 0.1, squeeze, reduction, True,
    )  # fmt: skip


def small_screens(monkeypatch: pytest.MonkeyPatch, every: int = 0, **changed: Any) -> None:
    """Batches of a few dozen rows take the path of thousands, in small strips and with buffers as given.

    One candidate of `every` is in the sample; by default one or two, so that there are groups enough.
    """

    def plan(
        anchors: int, candidates: int, dims: int, neighbours: int, wide: bool, device: tuning.Device
    ) -> tuning.ScreenPlan | None:
        if wide or anchors == 0 or candidates < 2 * neighbours + 4:
            return None
        list_size = tuning.power_of_two(max(neighbours, 2))
        stride = every or (2 if candidates >= 16 * (neighbours + 1) else 1)
        samples = candidates // stride
        usual = tuning.ScreenPlan(
            strip=64, stride=stride, samples=samples, group_size=4, groups=tuning.cdiv(samples, 32) * 8,
            capacity=max(64, 16 * list_size), short=max(32, 4 * list_size), list_size=list_size, tile=(32, 32, 64),
            stages=1, warps=4, registers=None, unroll=2, fallback_segments=4, fallback_programs=3,
        )  # fmt: skip
        return replace(usual, **changed)

    monkeypatch.setattr(tuning, "screen_plan", plan)


def unscreened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct sums of all pairs, whatever the size."""
    monkeypatch.setattr(tuning, "screen_plan", lambda *_, **__: None)


def assert_same(found: Graph, expected: Graph) -> None:
    """Every output to the bit: the loss too, since it is computed from the same selection by the same code."""
    for name, a, b in zip(
        ("loss", "indices", "coefficients", "nearest", "farthest", "squared", "stats"), found, expected, strict=True
    ):
        assert judge.same_bits(a, b), name


class StoppedError(Exception):
    """Behind the launch that a test wants to see."""


def launched(monkeypatch: pytest.MonkeyPatch, case: Case, last: str = "") -> dict[str, tuple[Any, ...]]:
    """The grid and arguments of each kernel of the screening in a forward, of its last launch; only up to a first
    launch of the kernel `last`, if that is given."""
    from sn_ops.triton import screening

    kernels = {id(kernel): name for name, kernel in vars(screening).items() if name.endswith("_kernel")}
    found: dict[str, tuple[Any, ...]] = {}
    launch = type(screening.sample_kernel).__getitem__

    def note(self: Any, grid: Any) -> Any:
        run = launch(self, grid)

        def call(*arguments: Any, **options: Any) -> Any:
            name = kernels.get(id(self), "")
            found[name] = (grid, *arguments)
            result = run(*arguments, **options)
            if last and name == last:
                raise StoppedError
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(type(screening.sample_kernel), "__getitem__", note)
        with suppress(StoppedError):
            forward(case)
    return found
