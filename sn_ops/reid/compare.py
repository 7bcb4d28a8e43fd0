"""Each loss, and each reading of the squeeze term, trained over several seeds: mAP and rank-1 with their spread."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sn_ops

from .config import Config, from_yaml
from .data import Split, load_split
from .files import replace_json, replace_text
from .inference.scoring import baseline_scores

VARIANTS: dict[str, tuple[str, ...]] = {
    "sn-span": ("loss.metric=sn", "loss.squeeze=span"),
    "sn-support": ("loss.metric=sn", "loss.squeeze=support"),
    "sn-nearest": ("loss.metric=sn", "loss.squeeze=nearest"),
    "sn-pair": ("loss.metric=sn", "loss.squeeze=pair"),
    "sn-none": ("loss.metric=sn", "loss.squeeze=none"),
    "triplet": ("loss.metric=triplet", "loss.margin=0.3"),
    "triplet-soft": ("loss.metric=triplet", "loss.margin=none"),
    "supcon": ("loss.metric=supcon",),
    "identity": ("loss.metric=none", "loss.identity=1"),
}
"""Variants: name -> overrides of the configuration."""

ABOUT = {
    "sn-span": "SN, squeeze d(far) - d(near): the paper's abstract",
    "sn-support": "SN, squeeze within the support set: the authors' first code",
    "sn-nearest": "SN, squeeze d(near): the authors' released code",
    "sn-pair": "SN, squeeze between near and far: the abstract read literally",
    "sn-none": "SN without squeeze",
    "triplet": "triplet, batch-hard, margin 0.3",
    "triplet-soft": "triplet, batch-hard, soft margin",
    "supcon": "SupCon",
    "identity": "identity loss alone (cross-entropy)",
}

METRICS = {"mAP_standard": "mAP (standard)", "mAP_market": "mAP (market)", "rank1": "rank-1", "mINP": "mINP"}
"""The columns of the table."""


def chosen(names: str | None) -> list[str]:
    """The variants of a list such as "sn-span,triplet"; None: all.

    Raises:
        ValueError: an unknown name.
    """
    if names is None:
        return list(VARIANTS)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in VARIANTS]
    if unknown or not wanted:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"sn_ops.reid: --losses: expected names among {', '.join(VARIANTS)}, got {got}")
    return list(dict.fromkeys(wanted))


@dataclass(frozen=True)
class Comparison:
    """The scores of all variants and seeds."""

    data: str
    synthetic: bool
    epochs: int
    runs: dict[str, list[dict[str, float]]]
    """Variant -> the scores of each seed, fractions of 1."""
    baseline: dict[str, float] | None
    """Scores of colour histograms, fractions of 1; None where they were not computed."""
    facts: Mapping[str, Any]
    """Versions and settings."""

    def spread(self, name: str, metric: str) -> tuple[float, float | None]:
        """Mean and sample standard deviation of a variant's metric over its seeds, fractions; None for one seed."""
        values = [run[metric] for run in self.runs[name]]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    def markdown(self) -> str:
        """The table, in the order of the variants."""
        least, most = (f({len(runs) for runs in self.runs.values()}) for f in (min, max))
        seeds = f"{most}" if least == most else f"{least} to {most}"  # while the comparison is running
        rendered = "**synthetic** (rendered pedestrians; not comparable with any published figure)"
        lines = [
            f"Data: {rendered if self.synthetic else self.data}. {self.epochs} epochs, "
            f"{seeds} seed{'s' if most != 1 else ''} each, single query, the network after the last epoch. "
            "Per cent, mean ± sample standard deviation over seeds.",
            "",
            f"| loss{' (synthetic data)' if self.synthetic else ''} | " + " | ".join(METRICS.values()) + " |",
            "|---" * (1 + len(METRICS)) + "|",
        ]
        for name in self.runs:
            cells = []
            for metric in METRICS:
                mean, deviation = self.spread(name, metric)
                cells.append(f"{100 * mean:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else ""))
            lines.append(f"| {ABOUT[name]} | " + " | ".join(cells) + " |")
        if self.baseline is not None:
            cells = [f"{100 * self.baseline[metric]:.2f}" for metric in METRICS]
            lines.append("| colour histograms, no training | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file: mean and spread, and the scores of every run."""
        summary: dict[str, dict[str, dict[str, float | None]]] = {}
        for name in self.runs:
            spreads = {metric: self.spread(name, metric) for metric in METRICS}
            summary[name] = {metric: {"mean": mean, "stdev": stdev} for metric, (mean, stdev) in spreads.items()}
        return {
            **dataclasses.asdict(self),
            "summary": summary,
            "variants": {name: VARIANTS[name] for name in self.runs},
        }


def compare_losses(
    config: Config,
    names: Sequence[str],
    seeds: int,
    out: Path,
    *,
    baseline: bool = False,
    progress: bool = True,
) -> Comparison:
    """Trains the variants over seeds `config.run.seed`, + 1, ... and writes compare.json and compare.md.

    Each run has its folder `<out>/<variant>/seed<n>`. Complete runs are reused and interrupted ones resumed: after an
    interruption, give the same command again.

    Args:
        config: the settings that the variants share.
        names: of `VARIANTS`.
        seeds: how many seeds.
        out: the folder.
        baseline: score colour histograms too.
        progress: print a line and a bar on stderr for each run.

    Raises:
        ValueError: seeds < 1, or a folder with a run of another configuration.
        Exception: as `train`.
    """
    if seeds < 1:
        raise ValueError(f"sn_ops.reid: --seeds: expected an int >= 1, got {seeds}")
    split = load_split(config.data)  # a missing data set is an error before any training
    histograms = _baseline(split, config) if baseline else None
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    # Seed by seed, so that a comparison that stops early has all variants. Settings that contradict each other raise
    # here, before any training.
    plan = [
        (name, config.override(*VARIANTS[name], f"run.seed={seed}", f"run.out={out / name / f'seed{seed}'}"))
        for seed in range(config.run.seed, config.run.seed + seeds)
        for name in names
    ]
    for number, (name, settings) in enumerate(plan, start=1):
        if progress:
            print(f"{number} of {len(plan)}: {name}, seed {settings.run.seed}", file=sys.stderr)
        runs[name].append(_scores(_trained_run(settings, Path(str(settings.run.out)), progress)))
        done = {name: list(scores) for name, scores in runs.items() if scores}
        comparison = Comparison(split.name, split.synthetic, config.optim.epochs, done, histograms, _facts(config))
        replace_json(out / "compare.json", comparison.as_dict())
        replace_text(out / "compare.md", comparison.markdown())
    return comparison


def _trained_run(config: Config, folder: Path, progress: bool) -> Path:
    """Completes a run of this configuration, and returns its folder."""
    from .training import train

    if not (folder / "config.yaml").is_file():
        return train(config, progress=progress)
    there = from_yaml(folder / "config.yaml")
    if there.fingerprint() != config.fingerprint():
        raise ValueError(
            f"sn_ops.reid: compare: expected runs of this configuration in {folder.parent.parent}, got another one in "
            f"{folder}: give another --out, or remove that folder"
        )
    if (folder / "scores.json").is_file():
        return folder
    if (folder / "checkpoints" / "last.pt").is_file():
        return train(config, resume=folder, progress=progress)
    shutil.rmtree(folder)  # killed before its first checkpoint, so nothing can be resumed
    return train(config, progress=progress)


def _scores(run: Path) -> dict[str, float]:
    """The single-query scores of a run."""
    record = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    single = next(iter(record["scores"].values()))
    return {metric: float(single[metric]) for metric in METRICS}


def _baseline(split: Split, config: Config) -> dict[str, float]:
    (score,) = baseline_scores(split, config).values()
    return {metric: value for metric, value in score.as_dict().items() if metric in METRICS}


def _facts(config: Config) -> dict[str, Any]:
    """Versions and settings, for repeating the comparison."""
    return {
        "sn_ops": sn_ops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "configuration": dataclasses.asdict(config),
    }
