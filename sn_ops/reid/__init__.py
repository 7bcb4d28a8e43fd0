"""Person re-identification on the public API of sn_ops: data sets, training, evaluation, reports, use and export.

`python -m sn_ops.reid train` renders a set of pedestrians, trains on it and writes a report; `python -m sn_ops.reid
--help` has the other commands. `pip install 'sn_ops[reid]'` has what they need beyond PyTorch.

From Python::

    from sn_ops import reid

    config = reid.preset("paper").override("data.name=market1501", "data.root=/data")
    run = reid.train(config)                          # the run's folder, with a report
    trained = reid.open_trained(run)
    split = reid.load_split(trained.config.data)
    scores = reid.evaluate_model(trained.model, split, trained.config)
    print(scores["single query"])

Parts of their own: `sn_ops.reid.evaluation` (scores from features), `sn_ops.reid.report` (the HTML report),
`sn_ops.reid.data` (data sets), `sn_ops.reid.losses` (metric terms).

Layers, from the bottom up; a module imports from its own layer, from those before it, and the public API of `sn_ops`:
requirements, files, config, data, evaluation, ddp, models, losses, checkpoint, inference, report, training, compare,
commands, cli.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config, from_yaml, preset, to_yaml
    from .data import Sample, Split, load_dataset, load_split
    from .inference import (
        embed_images,
        evaluate_model,
        export_onnx,
        load_embeddings,
        open_trained,
        rank_images,
        save_embeddings,
    )
    from .models import build_model
    from .training import train

# Where each public name lives: importing this package imports none of these modules.
_HOME = {
    "Config": "config",
    "Sample": "data",
    "Split": "data",
    "build_model": "models",
    "embed_images": "inference",
    "evaluate_model": "inference",
    "export_onnx": "inference",
    "from_yaml": "config",
    "load_dataset": "data",
    "load_embeddings": "inference",
    "load_split": "data",
    "open_trained": "inference",
    "preset": "config",
    "rank_images": "inference",
    "save_embeddings": "inference",
    "to_yaml": "config",
    "train": "training",
}

__all__ = [
    "Config",
    "Sample",
    "Split",
    "build_model",
    "embed_images",
    "evaluate_model",
    "export_onnx",
    "from_yaml",
    "load_dataset",
    "load_embeddings",
    "load_split",
    "open_trained",
    "preset",
    "rank_images",
    "save_embeddings",
    "to_yaml",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
