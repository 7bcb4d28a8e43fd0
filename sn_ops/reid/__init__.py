"""Person re-identification on the public API of sn_ops: data sets, training, evaluation, reports, inference, export.

`sn-reid train` (or `python -m sn_ops.reid train`) renders a set of pedestrians, trains on it and writes a report;
`sn-reid --help` lists the other commands. `pip install '.[reid]'` in a checkout installs what they need beyond PyTorch.

From Python::

    from sn_ops import reid

    config = reid.preset("paper").override("data.name=market1501", "data.root=/data")
    run = reid.train(config)                          # the run's folder, with a report
    trained = reid.open_trained(run)
    split = reid.load_split(trained.config.data)
    scores = reid.evaluate_model(trained.model, split, trained.config)
    print(scores["single query"])

Subpackages with more: `sn_ops.reid.evaluation` (scores from features), `sn_ops.reid.report` (the HTML report),
`sn_ops.reid.data` (data sets), `sn_ops.reid.losses` (metric terms).

Layers, from the bottom up; a module imports from its own layer, from those before it, and the public API of `sn_ops`:
requirements, files, config, data, evaluation, ddp, models, losses, checkpoint, inference, report, training, compare,
commands, cli.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the table below, as type checkers read it
    from .config import Config as Config
    from .config import from_yaml as from_yaml
    from .config import preset as preset
    from .config import to_yaml as to_yaml
    from .data import Sample as Sample
    from .data import Split as Split
    from .data import load_dataset as load_dataset
    from .data import load_split as load_split
    from .inference import embed_images as embed_images
    from .inference import evaluate_model as evaluate_model
    from .inference import export_onnx as export_onnx
    from .inference import load_embeddings as load_embeddings
    from .inference import open_trained as open_trained
    from .inference import rank_images as rank_images
    from .inference import save_embeddings as save_embeddings
    from .models import build_model as build_model
    from .training import train as train

_PUBLIC: dict[str, tuple[str, ...]] = {
    "config": ("Config", "from_yaml", "preset", "to_yaml"),
    "data": ("Sample", "Split", "load_dataset", "load_split"),
    "inference": ("embed_images", "evaluate_model", "export_onnx", "load_embeddings", "open_trained", "rank_images",
                  "save_embeddings"),
    "models": ("build_model",),
    "training": ("train",),
}  # fmt: skip
"""The public names of each subpackage, which is imported when one of its names is first used."""

_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
