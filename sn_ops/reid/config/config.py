"""The configuration of a training run: dataclasses with checked fields, YAML, `section.field=value` overrides."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..requirements import need
from .fields import ConfigError, check, coerce, guess, option, parse, wrong

SQUEEZES = ("span", "support", "nearest", "none", "pair")
"""Readings of the squeeze term; "pair" is || x_near - x_far ||, the others are those of `sn_ops.sn_loss`."""


class _Section:
    """The base of sections: brings values to one form at construction."""

    def __post_init__(self) -> None:
        for name, hint in _HINTS[type(self)].items():
            value = getattr(self, name)
            one = coerce(hint, value)
            if one is not value:
                object.__setattr__(self, name, one)  # frozen, but not constructed yet


@dataclass(frozen=True)
class DataConfig(_Section):
    """The data set, its images and batches."""

    name: str = option("synthetic", "data set: a name of sn_ops.reid.data.registry.DATASETS")
    root: str = option("data/synthetic", "the data set's folder, or the folder in which its archive was unpacked")
    height: int = option(128, "image height, pixels", least=8)
    width: int = option(64, "image width, pixels", least=8)
    identities: int = option(16, "identities in a batch (P), over all ranks", least=1)
    images: int = option(4, "images of an identity in a batch (K)", least=1)
    camera_balanced: bool = option(False, "draw the images of an identity from as many cameras as it has")
    flip: float = option(0.5, "probability of a horizontal flip", least=0.0, most=1.0)
    erase: float = option(0.0, "probability of random erasing", least=0.0, most=1.0)
    pad: int = option(0, "pixels padded on every side before a random crop; 0 for no crop", least=0)
    workers: int = option(2, "processes that read images, a rank; 0 reads in the training process", least=0)
    options: dict[str, Any] = option({}, "options of the data set's loader, such as {version: V2}")  # noqa: RUF009


@dataclass(frozen=True)
class ModelConfig(_Section):
    """The network from image to embedding."""

    name: str = option("small", 'backbone: "small", "resnet50" or "timm:<name>"')
    weights: str | None = option(None, 'start from: none (random), "imagenet", or a local file')
    last_stride: int = option(1, "stride of the last stage", least=1)
    neck: bool = option(False, "batch norm between embedding and classifier; its output is retrieved with")
    dim: int | None = option(None, "embedding dimension; none: the backbone's own", least=1)


@dataclass(frozen=True)
class LossConfig(_Section):
    """The loss: metric_weight * metric + identity * cross-entropy."""

    metric: str = option("sn", "the metric term", choices=("sn", "triplet", "supcon", "none"))
    alpha: float = option(50.0, "SN: inverse temperature", above=0.0)
    k: int = option(10, "SN: size of the support set", least=1)
    weight: float = option(0.1, "SN: factor of the squeeze", least=0.0)
    squeeze: str = option("span", "SN: reading of the squeeze", choices=SQUEEZES)
    margin: float | None = option(0.3, "triplet: margin; none: soft margin", least=0.0)
    temperature: float = option(0.1, "SupCon: temperature", above=0.0)
    metric_weight: float = option(1.0, "factor of the metric term", least=0.0)
    identity: float = option(0.0, "factor of the identity loss (cross-entropy over training identities)", least=0.0)
    label_smoothing: float = option(0.1, "identity loss: label smoothing", least=0.0, below=1.0)
    normalize: bool = option(True, "L2-normalise embeddings for the metric term")
    memory: int = option(0, "rows of the cross-batch memory; 0 for none", least=0)
    backend: str = option("auto", "SN: backend of sn_ops")


@dataclass(frozen=True)
class OptimConfig(_Section):
    """The optimiser, its schedule and precision."""

    name: str = option("adam", "optimiser", choices=("adam", "adamw", "sgd"))
    lr: float = option(1e-3, "base learning rate", above=0.0)
    weight_decay: float = option(5e-4, "weight decay", least=0.0)
    momentum: float = option(0.9, "momentum of sgd", least=0.0)
    epochs: int = option(40, "epochs", least=1)
    schedule: str = option("cosine", "learning rate after the warm-up", choices=("paper", "cosine", "constant"))
    decay_start: int = option(76, '"paper": the first epoch (from 1) that decays', least=1)
    decay_floor: float = option(0.001, '"paper" and "cosine": last learning rate over the base', above=0.0, most=1.0)
    warmup_epochs: float = option(2.0, "epochs of linear warm-up", least=0.0)
    warmup_start: float = option(0.01, "first learning rate of the warm-up over the base", least=0.0)
    amp: str = option("off", "mixed precision", choices=("off", "bf16", "fp16"))
    accumulate: int = option(
        1, "chunks in which a batch goes through the network; the loss sees the whole batch", least=1
    )
    clip: float = option(0.0, "largest gradient norm; 0 for no clipping", least=0.0)


@dataclass(frozen=True)
class RunConfig(_Section):
    """Where a run takes place, and what it writes."""

    out: str | None = option(None, "run folder; none: the next free one in runs/")
    seed: int = option(0, "seed of everything random", least=0, most=2**63 - 1)
    device: str = option("auto", '"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:<index>"')
    threads: int = option(0, "CPU threads; 0 leaves PyTorch's number", least=0)
    log_every: int = option(10, "steps between lines of metrics.jsonl and TensorBoard", least=1)
    checkpoint_every: int = option(1, "epochs between checkpoints", least=1)
    tensorboard: bool = option(False, "write TensorBoard events")
    deterministic: bool = option(True, "deterministic algorithms, so that a run repeats bit for bit")
    sync_batchnorm: bool = option(True, "several ranks: batch norm takes the statistics of the whole batch")


@dataclass(frozen=True)
class EvalConfig(_Section):
    """How retrieval is measured."""

    every: int = option(10, "epochs between evaluations; 0 evaluates after the last epoch only", least=0)
    batch_size: int = option(128, "images at a time", least=1)
    rerank: bool = option(False, "k-reciprocal re-ranking too, after the last epoch")
    average_precision: str = option("standard", "definition of AP", choices=("standard", "market"))
    max_rank: int = option(50, "length of the CMC", least=1)
    multi_query: bool = option(False, "multiple query too, after the last epoch, where the data set has it")


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run; `preset` has useful ones.

    `sn-reid settings` prints every field with its meaning.

    Args:
        data: the data set, its images and batches.
        model: the network from image to embedding.
        loss: the loss.
        optim: the optimiser, its schedule and precision.
        run: where the run takes place, and what it writes.
        eval: how retrieval is measured.

    Raises:
        ConfigError: a value that a field does not allow, or fields that contradict each other; a ValueError.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for name, kind in SECTIONS.items():
            section = getattr(self, name)
            if not isinstance(section, kind):
                raise wrong(name, f"a {kind.__name__}", section)
            for item in dataclasses.fields(kind):
                check(f"{name}.{item.name}", item, _HINTS[kind][item.name], getattr(section, item.name))
        _check_together(self)

    def override(self, *assignments: str) -> Config:
        """A copy with some fields changed.

        Args:
            assignments: "section.field=value" each, such as "loss.k=8"; "data.options.key=value" sets one option of the
                data set's loader.

        Returns:
            The changed configuration.

        Raises:
            ConfigError: no such field (the message lists the known ones), or a value that is not allowed.
        """
        values = to_dict(self)
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise ConfigError(f"sn_ops.reid: override: expected section.field=value, got {assignment!r}")
            section, _, name = key.strip().partition(".")
            if section == "data" and name.startswith("options."):
                values["data"]["options"][name.partition(".")[2]] = guess(text.strip())
                continue
            hint = _hint(section, name)
            values[section][name] = parse(key.strip(), hint, text.strip())
        return from_dict(values)

    def fingerprint(self) -> str:
        """A hash of the fields that decide what is trained, not of where it runs or what it logs.

        Returns:
            A SHA-256 in hexadecimal digits.
        """
        text = json.dumps(training_values(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "optim": OptimConfig,
    "run": RunConfig,
    "eval": EvalConfig,
}
_HINTS: dict[type[Any], dict[str, Any]] = {kind: typing.get_type_hints(kind) for kind in SECTIONS.values()}

# Fields that may differ between a checkpoint and the run that resumes it.
_FREE = frozenset(
    {"data.root", "data.workers", "run.out", "run.device", "run.threads", "run.log_every", "run.checkpoint_every",
     "run.tensorboard"}
)  # fmt: skip


def training_values(config: Config) -> dict[str, Any]:
    """`section.field` -> value, for the fields that decide what is trained."""
    return {
        f"{section}.{name}": value
        for section, values in to_dict(config).items()
        for name, value in values.items()
        if section != "eval" and f"{section}.{name}" not in _FREE
    }


def keys() -> dict[str, str]:
    """`section.field` -> its meaning, for help and error messages."""
    return {
        f"{name}.{item.name}": str(item.metadata["about"])
        for name, kind in SECTIONS.items()
        for item in dataclasses.fields(kind)
    }


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Sections of plain values."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration of sections of plain values; missing fields keep their defaults.

    Raises:
        ConfigError: an unknown section or field (the message lists the known ones), or as `Config`.
    """
    sections: dict[str, Any] = {}
    for name, section in values.items():
        if name not in SECTIONS:
            raise _unknown(str(name))
        if not isinstance(section, Mapping):
            raise wrong(name, "a mapping from field to value", section)
        kind = SECTIONS[name]
        for key in section:
            _hint(name, str(key))  # raises if there is no such field
        sections[name] = kind(**section)
    return Config(**sections)


def to_yaml(config: Config, file: str | os.PathLike[str] | None = None) -> str:
    """A configuration as YAML, with every field.

    Args:
        config: the configuration.
        file: where to write the YAML too; None: nowhere.

    Returns:
        The YAML.

    Raises:
        OSError: the file cannot be written.
        ImportError: PyYAML is missing.
    """
    text = str(need("yaml").safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
    if file is not None:
        Path(file).write_text(text, encoding="utf-8")
    return text


def from_yaml(file: str | os.PathLike[str]) -> Config:
    """The configuration in a YAML file, such as a run's config.yaml.

    Args:
        file: sections with fields; missing fields keep their defaults.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: not YAML, an unknown section or field (the message lists the known ones), or as `Config`.
        ImportError: PyYAML is missing.
    """
    yaml = need("yaml")
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date or number
        raise ConfigError(f"sn_ops.reid: configuration: expected YAML in {file}: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise wrong(f"configuration {file}", "a mapping with sections", values)
    return from_dict(values)


def _unknown(key: str) -> ConfigError:
    section = key.partition(".")[0]
    known = [name for name in keys() if name.startswith(f"{section}.")] or list(keys())
    return ConfigError(f"sn_ops.reid: configuration: expected one of {', '.join(known)}; got {key!r}")


def _hint(section: str, name: str) -> Any:
    kind = SECTIONS.get(section)
    if kind is None or name not in _HINTS[kind]:
        raise _unknown(f"{section}.{name}" if name else section)
    return _HINTS[kind][name]


def _check_together(config: Config) -> None:
    data, loss, optim = config.data, config.loss, config.optim
    metric = loss.metric != "none" and loss.metric_weight > 0
    if not metric and loss.identity == 0:
        raise ConfigError(
            'sn_ops.reid: loss: expected a metric term or an identity loss, got metric "none", identity 0'
        )
    if config.model.neck and loss.identity == 0:
        raise ConfigError(
            "sn_ops.reid: model.neck: expected loss.identity > 0 with it, since only the identity loss trains the "
            "neck, got 0"
        )
    if loss.memory and not metric:
        raise ConfigError('sn_ops.reid: loss.memory: expected a metric term that looks into it, got metric "none"')
    if optim.warmup_epochs > optim.epochs:
        raise wrong("optim.warmup_epochs", f"at most optim.epochs ({optim.epochs})", optim.warmup_epochs)
    if optim.accumulate > data.identities * data.images:
        batch = data.identities * data.images
        raise wrong("optim.accumulate", f"at most the {batch} images of a batch", optim.accumulate)
    if config.model.neck:
        check_neck(data.identities * data.images, optim.accumulate)


def check_neck(images: int, chunks: int, ranks: int = 1) -> None:
    """Checks that the neck, a batch norm, gets at least two images to take statistics of.

    Args:
        images: the size of a rank's smallest batch.
        chunks: in how many chunks it goes through the network, at most `images`.
        ranks: how many ranks take statistics together.

    Raises:
        ConfigError: a chunk would have one image.
    """
    if images // chunks * ranks < 2:
        raise ConfigError(
            "sn_ops.reid: model.neck: expected at least 2 images in every chunk of a batch, of which the neck's batch "
            f"norm takes statistics, got {images // chunks}: a rank's batch of {images} (data.identities, data.images) "
            f"in {chunks} (optim.accumulate)"
        )
