"""The commands of `sn-reid`: a function each, which takes the options that `cli` parsed."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import Config, DataConfig, from_yaml, keys, preset, to_dict
from .data import load_split
from .ddp import pick_device
from .evaluation import Scores
from .files import replace_json
from .inference.embed import Embeddings, image_files, load_embeddings, save_embeddings
from .inference.scoring import (
    Tick,
    baseline_scores,
    check_evaluation,
    embed_split,
    label,
    network_embedder,
    score_distractors,
    score_split,
    scores_record,
    show_scores,
)
from .inference.trained import Trained, open_trained
from .requirements import need

# ---- shared by commands --------------------------------------------------------------------------


def configuration(options: argparse.Namespace) -> Config:
    """The configuration of the options: a preset or a file, changed by --data, --root and --set in that order."""
    if options.config is not None:
        config = from_yaml(options.config)
    else:
        config = preset("quick" if options.quick else options.preset or options.usual_preset)
    return _assigned(config, options)


def _assigned(config: Config, options: argparse.Namespace) -> Config:
    assignments = []
    if options.data is not None:
        if options.data != config.data.name:  # the old folder and loader options do not apply to it
            root = DataConfig().root if options.data == DataConfig().name else "data"
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=root, options={}))
        assignments.append(f"data.name={options.data}")
    if options.root is not None:
        assignments.append(f"data.root={options.root}")
    return config.override(*assignments, *options.set)


def _open(options: argparse.Namespace) -> Trained:
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"sn_ops.reid: --workers: expected an int >= 0, got {options.workers}")
    return open_trained(options.trained, which=options.checkpoint, device=pick_device(options.device))


@contextlib.contextmanager
def progress(what: str) -> Iterator[Tick]:
    """A count of images on stderr, where that is a terminal."""
    with need("tqdm").tqdm(desc=what, unit=" images", file=sys.stderr, disable=None, leave=False) as bar:
        yield bar.update


# ---- train, compare, render ---------------------------------------------------------------------


def train(options: argparse.Namespace) -> None:
    """Trains, and prints the scores and the paths of scores.json and the report."""
    from . import training

    if options.resume is not None and options.out is not None:
        raise ValueError("sn_ops.reid: --out: expected none with --resume, which goes on in the run's own folder")
    config: Config | None = None
    if options.resume is None or options.config or options.preset or options.quick:
        config = configuration(options)
    elif options.data or options.root or options.set:
        config = _assigned(from_yaml(_run_of(options.resume) / "config.yaml"), options)
    if options.out is not None and config is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(options.out)))
    run = training.train(config, resume=options.resume, progress=not options.no_progress)
    if os.environ.get("RANK", "0") == "0":
        record = json.loads((run / "scores.json").read_text(encoding="utf-8"))
        print(show_scores(record["scores"]))
        print(run / "scores.json")
        print(run / "report.html")


def _run_of(path: Path) -> Path:
    """The folder of a run, from its path or that of one of its checkpoints."""
    return path.parent.parent if path.is_file() else path


def compare(options: argparse.Namespace) -> None:
    """Trains every variant and prints the table."""
    from .compare import chosen, compare_losses

    comparison = compare_losses(
        configuration(options),
        chosen(options.losses),
        options.seeds,
        options.out,
        baseline=options.baseline,
        progress=not options.no_progress,
    )
    print(comparison.markdown())
    print(options.out / "compare.json")
    print(options.out / "compare.md")


def render(options: argparse.Namespace) -> None:
    """Renders the synthetic set, unless it is complete."""
    from .data.synthetic import SyntheticConfig
    from .data.synthetic import render as render_set

    values: dict[str, Any] = {}
    known = [field.name for field in dataclasses.fields(SyntheticConfig)]
    for assignment in options.set:
        key, equals, text = assignment.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"sn_ops.reid: --set: expected KEY=NUMBER with one of {', '.join(known)}, got {assignment!r}"
            )
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            raise ValueError(f"sn_ops.reid: --set: expected a number for {key}, got {text!r}") from None
    config = SyntheticConfig.quick() if options.quick else SyntheticConfig()
    print(render_set(options.out, dataclasses.replace(config, **values), workers=options.workers))


# ---- evaluate, report ---------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> None:
    """Writes scores to stdout and scores.json, and the report with pictures."""
    trained, device = _open(options), pick_device(options.device)
    config = _assigned(trained.config, options)
    if options.rerank:
        config = config.override("eval.rerank=true")
    if options.average_precision is not None:
        config = config.override(f"eval.average_precision={options.average_precision}")
    split = load_split(config.data)
    check_evaluation(split)
    multi_query = options.multi_query or (config.eval.multi_query and bool(split.multi))
    curve: list[Scores] = []
    with progress("embedding") as tick:
        embed = network_embedder(trained.model, config, workers=options.workers, tick=tick)
        embedded = embed_split(embed, split, multi_query=multi_query)
        scores = score_split(embedded, split, config, rerank=config.eval.rerank, device=device)
        if options.distractors is not None:
            curve = score_distractors(embedded, embed, options.distractors, config, device=device)
    if options.baseline:
        with progress("colour histograms") as tick:
            scores |= baseline_scores(split, config, tick)
    record = {"checkpoint": str(trained.checkpoint), "epoch": trained.epoch, **scores_record(scores, split)}
    sizes = {label(split, f"single query, gallery of {score.gallery}"): score for score in curve}
    record["distractors"] = scores_record(sizes, split)["scores"]
    print(f"{trained.checkpoint}, epoch {trained.epoch}, on {split.name}")
    print(show_scores(record["scores"] | record["distractors"]))
    out = options.out or (trained.run or trained.checkpoint.parent) / "evaluation"
    print(replace_json(out / "scores.json", record))
    if not options.no_report:
        from .report import build_report, write_report

        title = f"{trained.run.name if trained.run else trained.checkpoint.name}: {split.name}"
        print(
            write_report(out / "report.html", build_report(title, split, config, embedded, scores, distractors=curve))
        )


def report(options: argparse.Namespace) -> None:
    """Rebuilds a run's report."""
    from .report import write_run_report

    trained = _open(options)
    if trained.run is None:
        raise FileNotFoundError(f"sn_ops.reid: report: expected a run's folder, got the checkpoint {options.trained}")
    with progress("embedding") as tick:
        file = write_run_report(trained.run, model=trained.model, workers=options.workers, out=options.out, tick=tick)
    print(file)


# ---- embed, rank, export ------------------------------------------------------------------------


def embed(options: argparse.Namespace) -> None:
    """Writes the embeddings of a folder's images to an .npz."""
    trained = _open(options)
    paths = image_files(options.images)
    with progress("embedding") as tick:
        features = network_embedder(trained.model, trained.config, workers=options.workers, tick=tick)(paths)
    file = save_embeddings(options.out, Embeddings([str(path) for path in paths], features))
    print(f"{file}: {len(paths)} images, {features.shape[1]} dimensions")


def rank(options: argparse.Namespace) -> None:
    """Prints the ranked list, and writes it as HTML or CSV."""
    from .data.loading import eval_transform
    from .inference.rank import rank_images
    from .report import write_ranking

    files = [Path("ranking.html")] if options.out is None else options.out
    for file in files:
        if file.suffix not in (".html", ".csv"):
            raise ValueError(f"sn_ops.reid: --out: expected a file name that ends in .html or .csv, got {file}")
    if options.top < 1:
        raise ValueError(f"sn_ops.reid: --top: expected an int >= 1, got {options.top}")
    if not options.query.is_file():
        raise FileNotFoundError(f"sn_ops.reid: query: expected an image file, got {options.query}")
    trained = _open(options)
    images = load_embeddings(options.images) if options.images.is_file() else options.images
    with progress("embedding") as tick:
        ranking = rank_images(
            trained.model,
            eval_transform(trained.config.data),
            options.query,
            images,
            top=options.top,
            batch_size=trained.config.eval.batch_size,
            workers=trained.config.data.workers if options.workers is None else options.workers,
            tick=tick,
        )
    for place, found in enumerate(ranking, start=1):
        print(f"{place:4}  {found.distance:.4f}  {found.path}")
    for file in files:
        if file.suffix == ".html":
            write_ranking(file, options.query, ranking)
        else:
            with file.open("w", newline="", encoding="utf-8") as out:
                rows = csv.writer(out)
                rows.writerow(["rank", "distance", "path"])
                rows.writerows([place, found.distance, found.path] for place, found in enumerate(ranking, start=1))
        print(file)


def export(options: argparse.Namespace) -> None:
    """Writes ONNX, and prints its largest difference from PyTorch."""
    from .inference.onnx import check_onnx, export_onnx

    trained = _open(options)
    height, width = trained.config.data.height, trained.config.data.width
    file = options.out or (trained.run or trained.checkpoint.parent) / "model.onnx"
    export_onnx(trained.model, file, height=height, width=width, tolerance=options.tolerance)
    worst = check_onnx(trained.model, file, height=height, width=width, tolerance=options.tolerance)
    print(f"{file}: images [n, 3, {height}, {width}] to unit rows, within {worst:.1e} of PyTorch's")


def settings(options: argparse.Namespace) -> None:
    """Prints every setting with its value and meaning."""
    values = to_dict(configuration(options))
    about = keys()
    width = max(map(len, about))
    for key, text in about.items():
        section, _, name = key.partition(".")
        print(f"{key:<{width}}  {values[section][name]!s:<12}  {text}")
