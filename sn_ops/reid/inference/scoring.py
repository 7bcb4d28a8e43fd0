"""Scores of a trained network on a split: features are computed once, then all scores, by name.

The names of scores on rendered pedestrians contain "synthetic", in every output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import Config
from ..data import Sample, Split
from ..data.loading import eval_transform
from ..evaluation import ReRank, Scores, evaluate, evaluate_with_distractors, multi_query_features
from ..evaluation.metrics import AveragePrecision
from .embed import Embedded, device_of, embed_images, image_files
from .histograms import colour_histograms

Tick = Callable[[int], None]
Embedder = Callable[[Sequence[Path]], Tensor]
"""From image files to unit rows, float32 `[n, D]` on the CPU."""


@dataclass(frozen=True)
class EmbeddedSplit:
    """The test images of a split with their features."""

    query: Embedded
    gallery: Embedded
    multi: Embedded | None = None
    """Images that multiple query averages; None without multiple query."""


def network_embedder(
    model: nn.Module,
    config: Config,
    *,
    device: torch.device | str | None = None,
    workers: int | None = None,
    tick: Tick | None = None,
) -> Embedder:
    """`embed_images` with the image size, batch size and workers of a configuration.

    Args:
        model: maps `[n, 3, height, width]` to `[n, D]` in eval mode.
        config: its `data` has the image size, its `eval` the batch size.
        device: where to compute; default: where the model is.
        workers: processes that read images; default: `config.data.workers`.
        tick: called with the number of images after each batch.
    """
    transform = eval_transform(config.data)

    def embed(paths: Sequence[Path]) -> Tensor:
        return embed_images(
            model,
            paths,
            transform,
            batch_size=config.eval.batch_size,
            device=device,
            workers=config.data.workers if workers is None else workers,
            tick=tick,
        )

    return embed


def check_evaluation(split: Split) -> None:
    """Checks that a split can be evaluated, before training.

    Raises:
        ValueError: no query, or an empty gallery.
    """
    for name, samples in (("query", split.query), ("gallery", split.gallery)):
        if not samples:
            raise ValueError(f"sn_ops.reid: {name}: expected at least one image in {split.name}, got none")


def _need_multi(split: Split) -> None:
    if not split.multi:
        raise ValueError(
            f"sn_ops.reid: multiple query: expected a data set with several images of a query (Market-1501 has them "
            f"in gt_bbox), got none in {split.name}"
        )


def embed_split(embed: Embedder, split: Split, *, multi_query: bool = False) -> EmbeddedSplit:
    """Features of a split's queries and gallery, and for multiple query of the other images of its queries.

    Raises:
        ValueError: multi_query without images for it.
        OSError: a file is missing or not an image.
    """
    if multi_query:
        _need_multi(split)

    def part(samples: Sequence[Sample]) -> Embedded:
        return Embedded(samples, embed([sample.path for sample in samples]))

    return EmbeddedSplit(part(split.query), part(split.gallery), part(split.multi) if multi_query else None)


def label(split: Split, name: str) -> str:
    """The name of a score on this split, marked if the split is synthetic."""
    return f"{name} (synthetic)" if split.synthetic else name


def score_split(
    embedded: EmbeddedSplit, split: Split, config: Config, *, rerank: bool, device: torch.device | str = "cpu"
) -> dict[str, Scores]:
    """Scores of the features, by name; "single query" is the first.

    Args:
        embedded: from `embed_split`; multiple query is scored if it has the images.
        split: the data set.
        config: its `eval` has the definition of average precision and the length of the CMC.
        rerank: score also after k-reciprocal re-ranking, k1 = 20, k2 = 6, lambda = 0.3.
        device: where to compute distances.

    Raises:
        ValueError: no query with a match.
    """
    query, gallery = embedded.query, embedded.gallery
    rows = gallery.features.to(device)
    features = {"single query": query.features}
    if embedded.multi is not None:
        multi = embedded.multi
        features["multiple query"] = multi_query_features(
            query.ids, query.cameras, multi.features, multi.ids, multi.cameras
        )
    scores = {}
    for suffix, constants in [("", None), *([(", re-ranked", ReRank())] if rerank else [])]:
        for name, queries in features.items():
            scores[label(split, name + suffix)] = evaluate(
                queries.to(device),
                query.ids,
                query.cameras,
                rows,
                gallery.ids,
                gallery.cameras,
                max_rank=config.eval.max_rank,
                average_precision=_definition(config),
                rerank=constants,
            )
    return scores


def _definition(config: Config) -> AveragePrecision:
    return cast(AveragePrecision, config.eval.average_precision)


def evaluate_model(
    model: nn.Module,
    split: Split,
    config: Config,
    *,
    device: torch.device | str | None = None,
    workers: int | None = None,
    rerank: bool | None = None,
    multi_query: bool | None = None,
    tick: Tick | None = None,
) -> dict[str, Scores]:
    """Scores of a network on a split, by name; the first is that of single query.

    Args:
        model: maps float32 `[n, 3, height, width]` to `[n, D]` in eval mode; its mode is restored.
        split: queries, gallery, and images for multiple query.
        config: its `data` has the image size and the number of workers, its `eval` the batch size, the definition of
            average precision and the length of the CMC.
        device: where to compute; None: where the model is.
        workers: processes that read images; None: `config.data.workers`.
        rerank: score also after k-reciprocal re-ranking; None: `config.eval.rerank`.
        multi_query: score also multiple query; None: `config.eval.multi_query`, if the split has images for it.
        tick: called with the number of images after each batch, for a progress bar.

    Returns:
        Name -> scores: "single query", "multiple query" and these with ", re-ranked"; with " (synthetic)" added for
        rendered images.

    Raises:
        ValueError: multiple query without images for it, or no query with a match.
        OSError: a file is missing or not an image.
        ImportError: a package is missing: torchvision, pillow, or scipy for re-ranking.

    Source: the protocol of Market-1501, see `evaluation.evaluate`.
    """
    embed = network_embedder(model, config, device=device, workers=workers, tick=tick)
    if multi_query is None:
        multi_query = config.eval.multi_query and bool(split.multi)
    embedded = embed_split(embed, split, multi_query=multi_query)
    if device is None:
        device = device_of(model)
    return score_split(embedded, split, config, rerank=config.eval.rerank if rerank is None else rerank, device=device)


def score_distractors(
    embedded: EmbeddedSplit,
    embed: Embedder,
    folder: Path,
    config: Config,
    *,
    device: torch.device | str = "cpu",
) -> list[Scores]:
    """Scores of single query with more and more images of a folder in the gallery, as distractors.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        OSError: a file is not an image.
    """
    query, gallery = embedded.query, embedded.gallery
    return evaluate_with_distractors(
        query.features.to(device),
        query.ids,
        query.cameras,
        gallery.features.to(device),
        gallery.ids,
        gallery.cameras,
        embed(image_files(folder)).to(device),
        max_rank=config.eval.max_rank,
        average_precision=_definition(config),
    )


def baseline_scores(split: Split, config: Config, tick: Tick | None = None) -> dict[str, Scores]:
    """Scores of colour histograms, without training, on a split, by name."""
    embedded = embed_split(lambda paths: colour_histograms(paths, tick=tick), split)
    (score,) = score_split(embedded, split, config, rerank=False).values()
    return {label(split, "colour histograms"): score}


def scores_record(scores: Mapping[str, Scores], split: Split) -> dict[str, Any]:
    """Scores as plain values for a JSON file: the data set, whether it is synthetic, and for each score its numbers,
    fractions of 1, the definition of `mAP`, and the whole CMC.
    """
    return {
        "data": split.name,
        "synthetic": split.synthetic,
        "scores": {
            name: {
                "average_precision": score.average_precision,
                "mAP": score.mAP,
                **score.as_dict(),
                "cmc": [float(value) for value in score.cmc],
            }
            for name, score in scores.items()
        },
    }


def show_scores(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The "scores" of `scores_record` as a table in per cent, with the definition of mAP."""
    width = max(map(len, scores))
    columns = {
        "mAP_standard": "mAP standard", "mAP_market": "mAP market", "mINP": "mINP", "rank1": "rank-1",
        "rank5": "rank-5", "rank10": "rank-10",
    }  # fmt: skip
    heads = [*columns.values(), "queries", "gallery"]
    lines = [" " * width + "".join(f"{head:>{len(head) + 2}}" for head in heads)]
    for name, values in scores.items():
        cells = [f"{100 * values[key]:.2f}" if key in values else "" for key in columns]
        cells += [str(values["queries"]), str(values["gallery"])]
        lines.append(f"{name:<{width}}" + "".join(f"{c:>{len(h) + 2}}" for c, h in zip(cells, heads, strict=True)))
    chosen = next(iter(scores.values()))["average_precision"]
    lines.append(
        f"Per cent. The mAP of this run is the {chosen} one (standard: mean precision at the matches; market: area "
        "under the curve, as the official Market-1501 code)."
    )
    skipped = max(values["skipped"] for values in scores.values())
    if skipped:
        lines.append(f"{skipped} queries without a match under another camera are not counted.")
    return "\n".join(lines)
