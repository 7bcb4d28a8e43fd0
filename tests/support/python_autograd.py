"""The backend "cpu_in_python" of the suite: the CPU backend with its autograd in Python.

The node in C++ serves only the torch that the package was built for; on every other, this serves all backends.
"""

from __future__ import annotations

from functools import cache

from sn_ops import dispatch, ops


@cache
def enable() -> None:
    """Registers the backend with sn_ops, for CPU tensors. Once."""
    ops.OPERATORS["cpu_in_python"] = ops.OPERATORS["cpu"]._replace(node=None)
    dispatch.add_backend("cpu_in_python", ("cpu",))
