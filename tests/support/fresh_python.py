"""Programs of a test that need an interpreter of their own."""

from __future__ import annotations

import os
import subprocess
import sys


def run(*command: str, patience: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the same sn_ops."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    return subprocess.run(
        [sys.executable, *command],
        env=variables,
        cwd=os.sep,  # not the checkout, whose sn_ops folder would hide an installed package
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )
