"""Imports of what the extra `reid` installs."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(module: str) -> ModuleType:
    """The module.

    Raises:
        ImportError: it is not installed; the message names the extra that has it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"sn_ops.reid: expected the package {module.partition('.')[0]!r}, got: {error}. "
            "Install what sn_ops.reid needs with: pip install 'sn_ops[reid]' (in a checkout: pip install '.[reid]')"
        ) from error
