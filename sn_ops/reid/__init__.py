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
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config, from_yaml, to_yaml
    from .data.records import Sample, Split
    from .data.registry import load_dataset
    from .embed import embed_images, load_embeddings, save_embeddings
    from .engine import train
    from .evaluating import evaluate_model
    from .models import build_model
    from .onnx import export_onnx
    from .presets import preset
    from .rank import rank_images
    from .trained import load_split, open_trained

# Where each public name lives: importing this package imports none of these modules.
_HOME = {
    "Config": "config",
    "Sample": "data.records",
    "Split": "data.records",
    "build_model": "models",
    "embed_images": "embed",
    "evaluate_model": "evaluating",
    "export_onnx": "onnx",
    "from_yaml": "config",
    "load_dataset": "data.registry",
    "load_embeddings": "embed",
    "load_split": "trained",
    "open_trained": "trained",
    "preset": "presets",
    "rank_images": "rank",
    "save_embeddings": "embed",
    "to_yaml": "config",
    "train": "engine",
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
