"""Named configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .config import Config, DataConfig, EvalConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
from .fields import ConfigError


def _default() -> Config:
    """The embedded synthetic set and a small network: minutes on two CPU cores, nothing to download."""
    return Config(
        data=DataConfig(identities=24, images=4, pad=8),
        model=ModelConfig(neck=True),
        loss=LossConfig(identity=1.0),
        optim=OptimConfig(epochs=100, warmup_epochs=5.0, decay_floor=0.01),
        eval=EvalConfig(every=20),
    )


def _quick() -> Config:
    """As "default", but over in a minute: a look at what a run leaves behind, with scores that mean little."""
    base = _default()
    return replace(
        base,
        data=replace(base.data, root="data/synthetic-quick", options={"quick": True}, identities=20),
        optim=replace(base.optim, epochs=15, warmup_epochs=2.0),
        run=RunConfig(log_every=1),
        eval=EvalConfig(every=0),
    )


def _metric() -> Config:
    """As "default", but the metric term alone, no neck, no identity loss, half as long: for comparing losses."""
    base = _default()
    return replace(
        base,
        model=replace(base.model, neck=False),
        loss=replace(base.loss, identity=0.0),
        optim=replace(base.optim, epochs=50),
        eval=EvalConfig(every=0),
    )


def _paper() -> Config:
    """The authors' recipe for Market-1501: ResNet50 with last stride 1, no neck, the SN loss alone, 800 epochs."""
    return Config(
        data=DataConfig(
            name="market1501", root="data", height=256, width=128, identities=32, images=4, flip=0.5, workers=4
        ),
        model=ModelConfig(name="resnet50", weights="imagenet", last_stride=1, neck=False),
        loss=LossConfig(metric="sn", alpha=50.0, k=10, weight=0.1, squeeze="span", normalize=True, identity=0.0),
        optim=OptimConfig(
            name="adam", lr=5e-5, weight_decay=5e-4, epochs=800, schedule="paper", decay_start=76, decay_floor=0.001,
            warmup_epochs=0.0,
        ),
        eval=EvalConfig(every=50),
    )  # fmt: skip


def _modern() -> Config:
    """The present-day baseline (BNNeck, identity loss with label smoothing, random erasing, warm-up and cosine,
    bfloat16) with the SN loss as its metric term.

    Source of the baseline's values: fast-reid's BoT ResNet50 and Luo, Gu, Liao, Lai and Jiang, "Bag of Tricks and a
    Strong Baseline for Deep Person Re-Identification", arXiv 1903.07071.
    """
    return Config(
        data=DataConfig(
            name="market1501", root="data", height=256, width=128, identities=16, images=4, flip=0.5, erase=0.5, pad=10,
            workers=4,
        ),
        model=ModelConfig(name="resnet50", weights="imagenet", last_stride=1, neck=True),
        loss=LossConfig(metric="sn", alpha=50.0, k=10, weight=0.1, squeeze="span", identity=1.0, label_smoothing=0.1),
        optim=OptimConfig(
            name="adam", lr=3.5e-4, weight_decay=5e-4, epochs=120, schedule="cosine", decay_floor=0.002,
            warmup_epochs=10.0, warmup_start=0.1, amp="bf16",
        ),
        eval=EvalConfig(every=20),
    )  # fmt: skip


PRESETS: dict[str, Callable[[], Config]] = {
    "default": _default,
    "quick": _quick,
    "metric": _metric,
    "paper": _paper,
    "modern": _modern,
}


def preset(name: str) -> Config:
    """A named configuration.

    Args:
        name: "default" (rendered pedestrians and a small network, minutes on two CPU cores), "quick" (the same in a
            minute), "metric" (the metric term alone, for comparing losses), "paper" (the authors' recipe for
            Market-1501) or "modern" (a present-day baseline).

    Returns:
        The configuration, to be used as it is or changed by `Config.override`.

    Raises:
        ConfigError: another name, a ValueError.

    Source: "paper" is the recipe of the SN loss's authors; "modern" follows fast-reid's BoT ResNet50 and Luo, Gu, Liao,
    Lai and Jiang, "Bag of Tricks and a Strong Baseline for Deep Person Re-Identification", arXiv 1903.07071.
    """
    if name not in PRESETS:
        raise ConfigError(f"sn_ops.reid: preset: expected one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    return PRESETS[name]()


def about(name: str) -> str:
    """The first sentence about a preset, for help texts.

    Raises:
        ConfigError: no such preset, a ValueError.
    """
    preset(name)
    return " ".join((PRESETS[name].__doc__ or "").split("\n\n")[0].split())
