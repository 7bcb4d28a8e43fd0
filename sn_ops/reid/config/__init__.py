"""What a run is made from: sections of checked fields, presets, YAML, overrides."""

from __future__ import annotations

from .config import (
    SECTIONS,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    from_dict,
    from_yaml,
    keys,
    to_dict,
    to_yaml,
    training_values,
)
from .fields import ConfigError
from .presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "SECTIONS",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "from_dict",
    "from_yaml",
    "keys",
    "preset",
    "to_dict",
    "to_yaml",
    "training_values",
]
