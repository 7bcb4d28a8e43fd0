"""The report of a run: one HTML file with curves, scores, ranked lists, support neighbours and embeddings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch

import sn_ops

from ..evaluation import Distances, FeatureDistances, Protocol, Scores, ranked_lists
from ..files import replacing
from ..inference.embed import Embedded
from . import page, plots


@dataclass(frozen=True)
class Report:
    """The contents of a report; parts without data are left out."""

    title: str
    notice: str = ""
    """A highlighted line under the title, such as that the images are synthetic."""
    mark: str = ""
    """Added to the labels of scores in figures, such as " (synthetic)"."""
    configuration: Mapping[str, object] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    """The records of metrics.jsonl."""
    scores: Mapping[str, Scores] = field(default_factory=dict)
    """By name: "single query", "multiple query", "re-ranked", ..."""
    distractors: Sequence[Scores] = ()
    """From `evaluate_with_distractors`."""
    query: Embedded | None = None
    gallery: Embedded | None = None
    anchors: Embedded | None = None
    """A training batch with the features that the loss takes, for its support neighbours; default: gallery images of
    some identities, with the features of retrieval."""
    k: int = 10
    """Size of the support set."""
    lists: int = 10
    """Ranked lists to show."""


def write_report(path: str | os.PathLike[str], report: Report) -> Path:
    """Writes the report as one self-contained HTML file, atomically.

    Args:
        path: the file; its folder must exist.
        report: the contents.

    Returns:
        The file.

    Raises:
        ImportError: matplotlib or pillow is missing.
        OSError: an image cannot be read, or the file cannot be written.
    """
    path = Path(path)
    parts = [f"<h1>{escape(report.title)}</h1>"]
    if report.notice:
        parts.append(f'<p class="notice">{escape(report.notice)}</p>')
    parts += _numbers(report)
    if report.query is not None and report.gallery is not None:
        parts += _retrieval(report, report.query, report.gallery)
    batch = report.anchors or _some_identities(report.gallery)
    if batch is not None and len(batch.samples) > 1:
        parts.append(_support(batch, report.k, training=report.anchors is not None))
    if report.configuration:
        parts.append(page.section("Configuration", "", page.facts(report.configuration)))
    with replacing(path) as unfinished:
        unfinished.write_text(page.document(report.title, parts), encoding="utf-8")
    return path


def _numbers(report: Report) -> list[str]:
    parts = []
    if report.scores:
        shown = ("mAP_standard", "mAP_market", "mINP", "rank1", "rank5", "rank10")
        rows = [
            [name, *(f"{100 * values[key]:.2f}" if key in values else "" for key in shown), *_counts(values)]
            for name, values in ((name, scores.as_dict()) for name, scores in report.scores.items())
        ]
        header = ["%", "mAP (standard)", "mAP (market)", "mINP", "rank-1", "rank-5", "rank-10", "queries", "gallery"]
        text = (
            "Standard mAP averages the precision at each match; market is the area under the curve as the official "
            "Market-1501 code computes it. Images of the query's own person and camera and junk are left out."
        )
        curve = page.figure(plots.cmc_curves(report.scores), "CMC curves")
        parts.append(page.section("Scores", text, page.table(header, rows), curve))
    if report.distractors:
        curve = page.figure(plots.distractor_curve(report.distractors, report.mark), "Accuracy against gallery size")
        parts.append(page.section("Accuracy against gallery size", "With more and more distractors.", curve))
    if len(report.history) > 1:
        curve = page.figure(plots.training_curves(report.history), "Training curves")
        parts.append(page.section("Training", "", curve))
    return parts


def _counts(values: Mapping[str, float]) -> list[str]:
    skipped = f" ({int(values['skipped'])} skipped)" if values["skipped"] else ""
    return [f"{int(values['queries'])}{skipped}", f"{int(values['gallery'])}"]


def _retrieval(report: Report, query: Embedded, gallery: Embedded) -> list[str]:
    distances = FeatureDistances(query.features, gallery.features)
    protocol = Protocol(query.ids, query.cameras, gallery.ids, gallery.cameras, distances.device)
    return [
        _ranked(distances, protocol, query, gallery, report.lists),
        _pair_distances(distances, protocol),
        _embedding(gallery),
    ]


def _ranked(distances: Distances, protocol: Protocol, query: Embedded, gallery: Embedded, count: int) -> str:
    """Lists of some queries, evenly from the worst to the best list."""
    lists = ranked_lists(distances, protocol, top=10)
    quality = lists.matches.double() @ (0.5 ** torch.arange(10, dtype=torch.float64))
    order = quality.argsort(stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()]
    strips = []
    for i in chosen.tolist():
        asked = query.samples[i]
        figures = [page.picture(asked.path, [f"query {asked.pid}", f"camera {asked.camera}"], "asked")]
        for j, distance, match in zip(
            lists.indices[i].tolist(), lists.distances[i].tolist(), lists.matches[i].tolist(), strict=True
        ):
            if j >= 0:
                found = gallery.samples[j]
                lines = [("✓ " if match else "✗ ") + _name(found.pid), f"camera {found.camera}", f"{distance:.3f}"]
                figures.append(page.picture(found.path, lines, "right" if match else "wrong"))
        strips.append(f'<div class="strip">{"".join(figures)}</div>')
    text = (
        "The ten nearest gallery images, with their Euclidean distance, of queries from the worst to the best list. "
        "Solid green and ✓: the same person under another camera. Dashed red and ✗: someone else."
    )
    return page.section("Ranked lists", text, *strips)


def _name(pid: int) -> str:
    return "distractor" if pid == 0 else str(pid)


def _pair_distances(distances: Distances, protocol: Protocol, most: int = 20_000) -> str:
    """Distances of up to `most` matches and as many other pairs that the protocol keeps, drawn at random."""
    queries = distances.shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(queries, generator=generator)[: max(1, most // max(1, int(protocol.same.double().mean())))]
    positive, negative = [], []
    valid = (protocol.gallery_ids >= 0).nonzero()[:, 0]
    each = max(1, most // len(rows)) if len(rows) else 0
    for i in rows.tolist():
        block = distances.block(i, i + 1)
        _, columns, counted = protocol.pairs(i, i + 1)
        positive.append(block.exact(torch.zeros_like(columns[counted]), columns[counted]))
        others = valid[torch.randperm(len(valid), generator=generator)[:each]]
        others = others[protocol.gallery_ids[others] != protocol.query_ids[i]]
        negative.append(block.exact(torch.zeros_like(others), others))
    empty = [torch.zeros(0, dtype=torch.float64)]
    pairs = [distances.readable(torch.cat([*empty, *values])) for values in (positive, negative)]
    return page.section(
        "Distances",
        "Between queries and gallery images: pairs of one person under two cameras, and pairs of two persons.",
        page.figure(plots.distance_histogram(pairs[0], pairs[1], "Euclidean distance"), "Distances of pairs"),
    )


def _some_identities(gallery: Embedded | None, people: int = 16, each: int = 12) -> Embedded | None:
    """Up to `each` images of each of `people` identities, evenly from those that have several images."""
    if gallery is None:
        return None
    rows: dict[int, list[int]] = {}
    for i, sample in enumerate(gallery.samples):
        if sample.pid > 0:
            rows.setdefault(sample.pid, []).append(i)
    several = sorted(pid for pid, members in rows.items() if len(members) > 1)
    step = max(1, -(-len(several) // people))
    chosen = [i for pid in several[::step] for i in rows[pid][:each]]
    return Embedded([gallery.samples[i] for i in chosen], gallery.features[chosen]) if chosen else None


def _embedding(gallery: Embedded) -> str:
    some = _some_identities(gallery)
    if some is None:
        return ""
    svg = plots.embedding_plot(
        plots.plane(some.features),
        [str(sample.pid) for sample in some.samples],
        [str(sample.camera) for sample in some.samples],
    )
    text = "Gallery images of some identities, laid out by t-SNE. A colour is a person, a shape is a camera."
    return page.section("Embedding", text, page.figure(svg, "Embedding in the plane"))


def _support(batch: Embedded, k: int, *, training: bool, anchors: int = 6) -> str:
    """The support sets of some anchors, evenly from a batch of training or gallery images."""
    found = sn_ops.support_neighbors(batch.features, batch.ids, k=k)
    strips = []
    rows = torch.linspace(0, len(batch.samples) - 1, min(anchors, len(batch.samples))).round().long().unique()
    for i in rows.tolist():
        asked = batch.samples[i]
        figures = [page.picture(asked.path, [f"anchor {asked.pid}", f"camera {asked.camera}"], "asked")]
        ends = {int(found.nearest_positive[i]): "nearest", int(found.farthest_positive[i]): "farthest"}
        members = [j for j in found.indices[i].tolist() if j >= 0]
        distance = dict(zip(members, found.distances[i].tolist(), strict=False))
        for j in [*members, *(j for j in ends if j >= 0 and j not in members)]:
            other = batch.samples[j]
            same = other.pid == asked.pid
            lines = [("✓ " if same else "✗ ") + _name(other.pid), f"camera {other.camera}"]
            lines.append(f"{distance[j]:.3f}" if j in distance else "not in the set")
            lines += [f"{ends[j]} positive"] if j in ends else []
            figures.append(page.picture(other.path, lines, "right" if same else "wrong"))
        strips.append(f'<div class="strip">{"".join(figures)}</div>')
    if training:
        text = (
            "What the loss sees in a training batch, by the features that it takes (before a neck, if there is one): "
        )
    else:
        text = "What the loss would see in a batch of some gallery images, by their features for retrieval: "
    text += (
        f"the {k} nearest images in the batch of some anchors, positives (✓) and negatives (✗) by "
        "identity, and the nearest and the farthest positive, whose distances it squeezes together."
    )
    return page.section("Support neighbours", text, *strips)
