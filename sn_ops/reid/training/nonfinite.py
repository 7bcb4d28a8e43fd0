"""Stopping a run whose loss is not finite, with a report of the batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import Sample
from ..files import replace_json

EXIT_NONFINITE = 76


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient is NaN or infinite; a report of the batch is written."""

    exit_status = EXIT_NONFINITE

    def __init__(self, text: str, report: Path) -> None:
        super().__init__(text)
        self.report = report


def report_nonfinite(
    folder: Path,
    *,
    rank: int,
    position: dict[str, int],
    values: dict[str, float],
    samples: list[Sample],
    embedding: Tensor,
    model: nn.Module,
) -> NonFiniteLossError:
    """Writes nonfinite.json (nonfinite-rank<r>.json for ranks other than 0) to the run's folder.

    It has the step, the loss and its terms; every image of this rank's batch with identity, camera, and the norm and
    the number of non-finite entries of its embedding; and the names of non-finite parameters and gradients.

    Args:
        folder: of the run.
        rank: of this process.
        position: "epoch" and "step", from 1.
        values: the loss and its terms.
        samples: the images of this rank's batch.
        embedding: `[n, D]`, of these images.
        model: the network, with the gradients of this step.

    Returns:
        The error to raise.
    """
    norms = embedding.detach().float().norm(dim=1).tolist()
    bad_entries = (~torch.isfinite(embedding.detach())).sum(1).tolist()
    parameters = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    gradients = [
        name
        for name, value in model.named_parameters()
        if value.grad is not None and not bool(torch.isfinite(value.grad).all())
    ]
    bad_values = [name for name, value in values.items() if not _finite(value)]
    file = folder / ("nonfinite.json" if rank == 0 else f"nonfinite-rank{rank}.json")
    replace_json(
        file,
        {
            **position,
            "rank": rank,
            "values": {name: _plain(value) for name, value in values.items()},
            "nonfinite_values": bad_values,
            "nonfinite_parameters": parameters,
            "nonfinite_gradients": gradients,
            "images": [
                {
                    "path": str(sample.path),
                    "pid": sample.pid,
                    "camera": sample.camera,
                    "embedding_norm": _plain(norm),
                    "nonfinite_entries": bad,
                }
                for sample, norm, bad in zip(samples, norms, bad_entries, strict=True)
            ],
        },
    )
    bad_images = sum(bad > 0 for bad in bad_entries)
    return NonFiniteLossError(
        f"sn_ops.reid: loss: expected finite numbers, got {', '.join(f'{n} {values[n]}' for n in bad_values)} in step "
        f"{position['step']} (epoch {position['epoch']}); {bad_images} of {len(samples)} embeddings, {len(parameters)} "
        f"parameters and {len(gradients)} gradients are not finite; the batch is described in {file}",
        file,
    )


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _plain(value: float) -> float | str:
    """The value, or its text where it is not finite: JSON has no NaN and no infinity."""
    return value if _finite(value) else str(value)
