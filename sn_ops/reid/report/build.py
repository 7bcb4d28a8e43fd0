"""The report of a run, from the files in its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config, from_yaml
from ..data import Split, load_split
from ..data.sampler import IdentitySampler
from ..evaluation import Scores
from ..inference.embed import Embedded
from ..inference.scoring import EmbeddedSplit, Embedder, Tick, embed_split, label, network_embedder, score_split
from ..inference.trained import open_trained
from ..models import ReIDModel
from .html import Report, write_report

NOTICE = (
    "Synthetic: rendered pedestrians, not photographs. These numbers say that the trainer works and compare its "
    "settings; they say nothing about accuracy on real people and are not comparable with any published figure."
)


def read_history(file: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a last line that a killed run left unfinished.

    Raises:
        FileNotFoundError: no such file.
        ValueError: any other line that is not a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"sn_ops.reid: report: expected a run's log at {file}, got nothing of that name")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"sn_ops.reid: report: expected a JSON object, got line {number} of {file}") from error
        if not isinstance(record, dict):
            raise ValueError(f"sn_ops.reid: report: expected a JSON object, got line {number} of {file}")
        records.append(record)
    return records


# Numbers of the log that are not drawn: times, and sizes of the data set.
_NO_CURVES = frozenset({"epoch", "seconds", "valid_anchors", "rank20", "queries", "skipped", "gallery"})
_SCORES = ("mAP", "mINP", "rank")


def curves(history: Sequence[Mapping[str, Any]], mark: str = "") -> list[dict[str, Any]]:
    """The numbers of a log to draw, without terms that equal the loss; the mark is added to the names of scores."""
    losses = [record for record in history if "loss" in record]
    whole = {key for record in losses[:1] for key in record if all(r.get(key) == r["loss"] for r in losses)} - {"loss"}
    return [
        {key + mark * key.startswith(_SCORES): v for key, v in record.items() if key not in _NO_CURVES | whole}
        for record in history
    ]


def without_neck(model: nn.Module) -> nn.Module:
    """The network without its neck, in the mode of `model`: the metric loss takes these embeddings, retrieval those
    after the neck, whose distances differ."""
    if not isinstance(model, ReIDModel):
        return model
    return nn.Sequential(model.backbone, model.projection).train(model.training)


def training_batch(embed: Embedder, split: Split, config: Config) -> Embedded | None:
    """The first batch of the first epoch, with the network's present features; None without training images.

    Args:
        embed: an embedder of `without_neck`.
        split: the data set.
        config: its `data` has the sampler's settings.
    """
    if not split.train:
        return None
    labels = split.identities()
    sampler = IdentitySampler(
        [labels[sample.pid] for sample in split.train],
        [sample.camera for sample in split.train],
        identities=config.data.identities,
        images=config.data.images,
        seed=config.run.seed,
        camera_balanced=config.data.camera_balanced,
    )
    # Without repeats: an image that is drawn twice would be its own neighbour.
    samples = [split.train[i] for i in dict.fromkeys(next(iter(sampler)))]
    return Embedded(samples, embed([sample.path for sample in samples]))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested settings as "loss.k": 10."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def build_report(
    title: str,
    split: Split,
    config: Config,
    embedded: EmbeddedSplit,
    scores: Mapping[str, Scores],
    *,
    history: Sequence[Mapping[str, Any]] = (),
    distractors: Sequence[Scores] = (),
    anchors: Embedded | None = None,
) -> Report:
    """The report of a network on a split, for `write_report`."""
    return Report(
        title=title,
        notice=NOTICE if split.synthetic else "",
        mark=label(split, ""),
        configuration=flat(dataclasses.asdict(config)),
        history=curves(history, label(split, "")),
        scores=scores,
        distractors=distractors,
        query=embedded.query,
        gallery=embedded.gallery,
        anchors=anchors,
        k=config.loss.k,
    )


def write_run_report(
    run: Path,
    *,
    checkpoint: str = "last",
    model: nn.Module | None = None,
    split: Split | None = None,
    scores: Mapping[str, Scores] | None = None,
    device: torch.device | str | None = None,
    workers: int | None = None,
    out: Path | None = None,
    tick: Tick | None = None,
) -> Path:
    """Writes the report of a run from its config.yaml, metrics.jsonl and a checkpoint.

    Args:
        run: the run's folder.
        checkpoint: the network to show, "best" or "last".
        model: that network, if it is loaded already.
        split: the data set, if it is loaded already.
        scores: of that network on that split, if they are computed already.
        device: as `inference.scoring.network_embedder`.
        workers: as `inference.scoring.network_embedder`.
        out: the file; default: report.html in the folder.
        tick: as `inference.scoring.network_embedder`.

    Returns:
        The file.

    Raises:
        FileNotFoundError, ValueError: no such run, an incomplete one, or no such data set.
        ImportError: matplotlib or pillow is missing.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"sn_ops.reid: report: expected a run's config.yaml in {run}, got none")
    config = from_yaml(file)
    log = run / "metrics.jsonl"
    history = read_history(log) if log.is_file() else []
    if model is None:
        model = open_trained(run, which=checkpoint, device=device or "cpu").model
    split = split or load_split(config.data)
    embed = network_embedder(model, config, device=device, workers=workers, tick=tick)
    multi = config.eval.multi_query and bool(split.multi)
    embedded = embed_split(embed, split, multi_query=multi and scores is None)
    if scores is None:
        scores = score_split(embedded, split, config, rerank=config.eval.rerank)
    report = build_report(
        f"{run.name}: {split.name}",
        split,
        config,
        embedded,
        scores,
        history=history,
        anchors=training_batch(
            network_embedder(without_neck(model), config, device=device, workers=workers, tick=tick), split, config
        ),
    )
    return write_report(out or run / "report.html", report)
