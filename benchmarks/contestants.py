"""The contestants: every usable backend of sn_ops and the rivals, as small objects in one list.

A new rival (another library, say) is one more `Contestant` in `contestants()`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import baselines
import harness
import sn_ops
from baselines import Recipe
from inputs import Batch
from sn_ops import dispatch

# run(batch, feats, recipe, reduction) -> loss; feats stands for batch.feats, and for its own candidates.
Run = Callable[[Batch, Tensor, Recipe, str], Tensor]

EAGER_BYTES_PER_PAIR = 60
LOOP_ANCHORS = 256
CDIST_PAIRS = 1 << 20
COMPILE_PAIRS = 1 << 20
EAGER_PAIRS = 1 << 24
EAGER_PRODUCTS = 1 << 34
REFERENCE_PRODUCTS = {"quick": 30_000_000, "default": 300_000_000, "slow": 10_000_000_000}


@dataclass(frozen=True)
class Setting:
    """What the limit of a contestant may depend on besides the batch."""

    threads: int
    first_threads: int  # the thread count that all contestants are measured with
    pace: str  # "quick", "default" or "slow": what may be left out to keep the run short
    device: torch.device


@dataclass(frozen=True)
class Contestant:
    """One way to compute the loss.

    `support` gives its selection [N, K] (None: it does not say), `limit` a reason to leave it out of a case or None,
    `enter` runs untimed before its samples, `ours` marks sn_ops, `scales` those timed with every thread count.
    """

    name: str
    note: str
    run: Run
    support: Callable[[Batch, Recipe], Tensor] | None
    limit: Callable[[Batch, Recipe, Setting], str | None]
    enter: Callable[[], None] = harness.nothing
    ours: bool = False
    scales: bool = False
    compiled: bool = False


def _rival(
    name: str, note: str, limit: Callable[[Batch, Recipe, Setting], str | None], scales: bool = False
) -> Contestant:
    function = baselines.RIVALS[name]

    def run(batch: Batch, feats: Tensor, recipe: Recipe, reduction: str) -> Tensor:
        return function(feats, batch.labels, batch.candidates, batch.candidate_labels, recipe, reduction)[0]

    def support(batch: Batch, recipe: Recipe) -> Tensor:
        with torch.no_grad():
            return function(batch.feats, batch.labels, batch.candidates, batch.candidate_labels, recipe, "none")[1]

    return Contestant(name, note, run, support, limit, scales=scales)


def _compiled() -> Contestant:
    function: Any = None

    def run(batch: Batch, feats: Tensor, recipe: Recipe, reduction: str) -> Tensor:
        nonlocal function
        if function is None:
            # dynamic: one compilation serves every shape; specializing costs one more per shape.
            function = torch.compile(baselines.eager, dynamic=True)
        loss: Tensor = function(feats, batch.labels, batch.candidates, batch.candidate_labels, recipe, reduction)[0]
        return loss

    def limit(batch: Batch, recipe: Recipe, setting: Setting) -> str | None:
        if setting.pace == "quick":
            return "--quick: compiling takes longer than the run"
        if setting.pace != "slow" and batch.n * batch.m > COMPILE_PAIRS:
            return "close to eager; above 1024 x 1024 pairs only with --slow"
        if setting.device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            return "torch.compile needs a C++ compiler (g++ or clang++) and there is none"
        return _eager_limit(batch, recipe, setting)

    return Contestant("compile", "torch.compile(eager, dynamic=True)", run, None, limit, compiled=True)


def _eager_limit(batch: Batch, recipe: Recipe, setting: Setting) -> str | None:
    products = batch.n * batch.m * batch.d
    if setting.pace != "slow" and (batch.n * batch.m > EAGER_PAIRS or products > EAGER_PRODUCTS):
        return "seconds a call; above 4096 x 4096 pairs or 2^34 products only with --slow"
    needed = batch.n * batch.m * EAGER_BYTES_PER_PAIR
    if setting.device.type == "cpu" and needed > 0.8 * harness.available_bytes():
        return f"would need about {needed / 2**30:.0f} GiB for its N x M buffers"
    return None


def _cdist_limit(batch: Batch, recipe: Recipe, setting: Setting) -> str | None:
    if setting.pace != "slow" and batch.n * batch.m > CDIST_PAIRS:
        return "close to eager; above 1024 x 1024 pairs only with --slow"
    return _eager_limit(batch, recipe, setting)


def _loop_limit(batch: Batch, recipe: Recipe, setting: Setting) -> str | None:
    if setting.pace != "slow" and batch.n > LOOP_ANCHORS:
        return f"a Python iteration an anchor; above {LOOP_ANCHORS} anchors only with --slow"
    return None


def _symmetric_limit(batch: Batch, recipe: Recipe, setting: Setting) -> str | None:
    if batch.candidates is not None:
        return "candidates that are not the anchors: the product has no symmetry"
    needed = 4 * batch.n * batch.m
    if setting.device.type == "cpu" and needed > 0.5 * harness.available_bytes():
        return f"would need {needed / 2**30:.0f} GiB for its N x N buffer"
    return None


def _no_limit(batch: Batch, recipe: Recipe, setting: Setting) -> str | None:
    return None


def _reference_limit(batch: Batch, recipe: Recipe, setting: Setting) -> str | None:
    most = REFERENCE_PRODUCTS[setting.pace]
    if batch.n * batch.m * batch.d > most:
        return f"direct differences of all pairs, not made for speed: left out above {most:.0e} of them"
    return None


def _backend(name: str, label: str, enter: Callable[[], None]) -> Contestant:
    def options(batch: Batch, recipe: Recipe) -> dict[str, Any]:
        return {
            "k": recipe.k,
            "candidates": batch.candidates,
            "candidate_labels": batch.candidate_labels,
            "backend": name,
        }

    def run(batch: Batch, feats: Tensor, recipe: Recipe, reduction: str) -> Tensor:
        loss: Tensor = sn_ops.sn_loss(
            feats,
            batch.labels,
            alpha=recipe.alpha,
            weight=recipe.weight,
            reduction=reduction,
            **options(batch, recipe),
        )
        return loss

    def support(batch: Batch, recipe: Recipe) -> Tensor:
        indices: Tensor = sn_ops.support_neighbors(batch.feats, batch.labels, **options(batch, recipe)).indices
        return indices

    limit = _reference_limit if name == "reference" else _no_limit
    fused = name != "reference"
    return Contestant(label, f'sn_ops, backend="{name}"', run, support, limit, enter, ours=True, scales=fused)


def _capability_hook(capability: str) -> Callable[[], None]:
    core: Any = dispatch.CORE

    def enter() -> None:
        if core.cpu_capability() != capability:
            core.set_cpu_capability(capability)

    return enter


def backend_contestants(names: list[str], capabilities: list[str], device: torch.device) -> list[Contestant]:
    """The backends of sn_ops that serve the device; several CPU capabilities make several contestants of "cpu".

    Raises:
        ValueError: for a backend that is not usable here, saying why, and for a capability that this CPU lacks.
    """
    found = []
    known = sn_ops.backends()
    for name in names or [name for name, info in known.items() if info.usable]:
        if name not in known:
            raise ValueError(f"--backends: expected names among {', '.join(known)}, got {name!r}")
        info = known[name]
        if not info.usable:
            raise ValueError(f"--backends: {name} is not usable here: {info.reason}")
        if info.devices and device.type not in info.devices:
            if names:
                raise ValueError(f"--backends: {name} serves {', '.join(info.devices)}, not {device.type}")
            continue
        if name != "cpu":
            found.append(_backend(name, name, harness.nothing))
            continue
        core: Any = dispatch.CORE
        default = core.cpu_capability()
        for capability in capabilities or [default]:
            usable = core.cpu_capabilities()
            if capability not in usable:
                raise ValueError(f"--cpu-capability: expected names among {', '.join(usable)}, got {capability!r}")
            label = "cpu" if capability == default else f"cpu {capability}"
            # With one capability there is nothing to switch between samples.
            hook = _capability_hook(capability) if capabilities else harness.nothing
            found.append(_backend("cpu", label, hook))
    return found


def rival_contestants() -> list[Contestant]:
    """The plain PyTorch rivals, slowest kind last."""
    return [
        _rival("blocked", "strongest plain PyTorch without an N x M buffer", _no_limit, scales=True),
        _rival(
            "symmetric", "strongest plain PyTorch: half the product, an N x N buffer", _symmetric_limit, scales=True
        ),
        _rival("eager", "vectorised PyTorch, autograd", _eager_limit),
        _rival("cdist", "eager with torch.cdist", _cdist_limit),
        _compiled(),
        _rival("loop", "the paper's structure: a Python loop over anchors", _loop_limit),
    ]
