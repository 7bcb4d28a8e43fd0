"""Imports of the packages of the extra `reid`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

# The operators that torchvision's import needs even if its compiled library did not load.
_DETECTION = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@functools.cache
def _admit_torchvision() -> torch.library.Library | None:
    """Lets torchvision be imported where its compiled library does not load.

    The package index has torchvision for one build of PyTorch, the CUDA one. Beside a CPU build its library cannot
    load, and its import fails, because two operators for object detection are unknown. Nothing here uses them, and its
    transforms and models are plain Python: declared, without a kernel, they let the import through.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
        return None
    except OSError:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in _DETECTION:
            declared.define(f"{name}{_SCHEMA}")
        return declared  # cached, since its end would remove the declarations


def need(module: str) -> ModuleType:
    """Imports a module of a package that may be missing.

    Raises:
        ImportError: it is not installed; the message names the extra to install.
    """
    package = module.partition(".")[0]
    if package in ("torchvision", "timm"):
        _admit_torchvision()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"sn_ops.reid: expected the package {package!r}, got: {error}. "
            "Install what sn_ops.reid needs with: pip install 'sn_ops[reid]' (in a checkout: pip install '.[reid]')"
        ) from error
