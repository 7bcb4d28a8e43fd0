"""Figures of a run as SVG text, by matplotlib's object interface, without global state."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation import Scores
from ..requirements import need

BLUE, RED, GREEN, GREY = "#2f6fde", "#c8372d", "#1d8a4a", "#8a8f98"


def _svg(size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """The SVG of a figure that `draw` fills, of this size in inches. The same input gives the same text."""
    matplotlib, figures = need("matplotlib"), need("matplotlib.figure")
    style = {"svg.hashsalt": "sn_ops", "font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=size, layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def training_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """One small diagram for each number that occurs at least twice in the log, over epochs (or steps, or lines).

    Args:
        history: records of metrics.jsonl; keys may differ from record to record.
    """
    axis = next((key for key in ("epoch", "step") if any(key in record for record in history)), None)
    series: dict[str, list[tuple[float, float]]] = {}
    for line, record in enumerate(history):
        for key, value in record.items():
            if key not in ("epoch", "step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool):
                series.setdefault(key, []).append((float(record.get(axis, line) if axis else line), float(value)))
    series = {key: points for key, points in series.items() if len(points) > 1}

    def draw(figure: Any) -> None:
        columns = 3
        rows = max(1, -(-len(series) // columns))
        for place, (key, points) in enumerate(series.items(), start=1):
            axes = figure.add_subplot(rows, columns, place)
            axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=1.2, marker="." if len(points) < 30 else None)
            axes.set_title(key, fontsize=9, loc="left")
            axes.set_xlabel(axis or "record")
            axes.grid(alpha=0.25)

    return _svg((9.6, 2.2 * max(1, -(-len(series) // 3))), draw)


def cmc_curves(results: Mapping[str, Scores]) -> str:
    """CMC of every result."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, scores in results.items():
            ranks = range(1, len(scores.cmc) + 1)
            label = (
                f"{name}: rank-1 {100 * scores.rank1:.1f} %, mAP ({scores.average_precision}) {100 * scores.mAP:.1f} %"
            )
            axes.plot(ranks, (100 * scores.cmc).tolist(), label=label, linewidth=1.5)
        axes.set_xlabel("rank")
        axes.set_ylabel("queries with a match up to here, %")
        axes.set_xlim(left=1)
        axes.set_ylim(top=101)
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right", frameon=False)

    return _svg((6.4, 3.6), draw)


def distractor_curve(results: Sequence[Scores], mark: str = "") -> str:
    """mAP and rank-1 against the size of the gallery; the mark is added to their labels."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        sizes = [scores.gallery for scores in results]
        axes.plot(sizes, [100 * s.rank1 for s in results], color=BLUE, marker="o", label=f"rank-1{mark}")
        definition = results[0].average_precision
        axes.plot(sizes, [100 * s.mAP for s in results], color=RED, marker="s", label=f"mAP ({definition}){mark}")
        axes.set_xscale("log")
        axes.set_xlabel("gallery images")
        axes.set_ylabel("%")
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False)

    return _svg((6.4, 3.6), draw)


def distance_histogram(positive: Tensor, negative: Tensor, name: str) -> str:
    """Histograms of the distances `[n]` of matches and `[m]` of non-matches, as densities."""
    both = torch.cat([positive, negative]).double()
    low, high = (float(both.min()), float(both.max())) if both.numel() else (0.0, 1.0)
    if high <= low:
        low, high = low - 0.5, high + 0.5

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for values, colour, label in ((positive, GREEN, "same person"), (negative, RED, "another person")):
            if values.numel() > 0:
                axes.hist(
                    values.double().tolist(), bins=60, range=(low, high), density=True, color=colour, alpha=0.55,
                    label=f"{label} ({values.numel()} pairs, median {float(values.double().median()):.3f})",
                )  # fmt: skip
        axes.set_xlabel(name)
        axes.set_ylabel("density")
        axes.legend(frameon=False)

    return _svg((6.4, 3.2), draw)


def embedding_plot(points: Tensor, groups: Sequence[str], marks: Sequence[str]) -> str:
    """Points `[n, 2]` in the plane, coloured by group, with a marker for each mark (camera)."""
    colours = need("matplotlib").colormaps["tab20"]
    shapes = "osD^v<>PX*hp"
    names, kinds = list(dict.fromkeys(groups)), sorted(set(marks))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name in names:
            for kind in kinds:
                chosen = [i for i in range(len(groups)) if groups[i] == name and marks[i] == kind]
                if chosen:
                    axes.scatter(
                        points[chosen, 0].tolist(), points[chosen, 1].tolist(), s=22, linewidths=0.4,
                        edgecolors="white", color=colours(names.index(name) % 20),
                        marker=shapes[kinds.index(kind) % len(shapes)],
                    )  # fmt: skip
        axes.set_axis_off()
        axes.set_aspect("equal", adjustable="datalim")

    return _svg((6.4, 5.2), draw)


def plane(features: Tensor, *, perplexity: float = 12.0, steps: int = 400) -> Tensor:
    """The rows `[n, D]` laid out in the plane by t-SNE, `[n, 2]` float64, started from their principal components.

    Exact and repeatable, for up to about a thousand rows: time and memory grow with n^2.

    Source: van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 2008.
    """
    x = features.detach().cpu().double()
    x = x - x.mean(0)
    n = len(x)
    if n < 4:
        return torch.nn.functional.pad(torch.arange(n, dtype=torch.float64)[:, None], (0, 1))
    affinities = _affinities(torch.cdist(x, x).square(), min(perplexity, (n - 1) / 3))
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    y = torch.nn.functional.pad(u[:, :2] * s[:2], (0, max(0, 2 - len(s))))
    y = 1e-2 * y / y.std().clamp(min=1e-12)
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    own = torch.eye(n, dtype=torch.bool)
    for step in range(steps):
        kernel = (1 / (1 + torch.cdist(y, y).square())).masked_fill(own, 0)
        early = 12.0 if step < steps // 4 else 1.0
        pull = (early * affinities - kernel / kernel.sum()) * kernel
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gains = torch.where((gradient > 0) == (velocity > 0), 0.8 * gains, gains + 0.2).clamp(min=0.01)
        velocity = (0.5 if step < steps // 4 else 0.8) * velocity - n / 4 * gains * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y


def _affinities(squared: Tensor, perplexity: float) -> Tensor:
    """Symmetric joint probabilities whose rows have this perplexity, by bisection for each row's scale."""
    n = len(squared)
    own = torch.eye(n, dtype=torch.bool)
    squared = squared - squared.masked_fill(own, torch.inf).amin(1, keepdim=True)
    spread = squared.masked_fill(own, 0).mean(1, keepdim=True).clamp(min=1e-300)
    low, high = torch.full((n, 1), -60.0).double(), torch.full((n, 1), 60.0).double()  # log2 of the scale
    for _ in range(60):
        middle = (low + high) / 2
        p = torch.exp(-squared / spread * 2**middle).masked_fill(own, 0)
        p = p / p.sum(1, keepdim=True)
        entropy = -(p * p.clamp(min=1e-300).log()).sum(1, keepdim=True)
        wide = entropy > torch.tensor(perplexity).double().log()
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return ((p + p.T) / (2 * n)).clamp(min=1e-300)
