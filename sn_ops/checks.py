"""Checks of the arguments of `sn_loss`, `support_neighbors` and `SNLoss`.

These checks run on every call: comparisons are cheap, messages are built on failure only.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Collection
from typing import NoReturn, cast

import torch
from torch import Tensor

from . import reference

_SQUEEZE = {code.name.lower(): int(code) for code in reference.Squeeze}
_REDUCTION = {code.name.lower(): int(code) for code in reference.Reduction}

_FLOATING = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_INTEGER = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


_LARGEST = (1 << 63) - 1


def _got(value: object) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f", {value.layout}"
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}{layout}"
    return f"{reprlib.repr(value)} of type {type(value).__name__}"


def reject(argument: str, expected: str, value: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raises the error that names the argument, what was expected and what came."""
    raise error(f"sn_ops: {argument}: expected {expected}, got {_got(value)}")


def reject_name(argument: str, allowed: tuple[str, ...], value: object) -> NoReturn:
    """Raises the error for a name that is not allowed: a ValueError, or a TypeError for what is no string."""
    names = ", ".join(repr(name) for name in allowed)
    reject(argument, f"one of {names}", value, ValueError if isinstance(value, str) else TypeError)


def _count(k: object) -> int:
    """`k` as an int."""
    if type(k) is not int and (isinstance(k, bool) or not isinstance(k, (numbers.Integral, torch.SymInt))):
        reject("k", "an int >= 1", k, TypeError)
    if k < 1:
        reject("k", "an int >= 1", k)
    # The operators take 64 bits; nobody has so many candidates.
    return cast(int, k) if isinstance(k, torch.SymInt) else min(int(k), _LARGEST)


def _real(argument: str, value: object, positive: bool) -> float:
    """`value` as a finite float, > 0 or at least >= 0."""
    expected = "a finite number > 0" if positive else "a finite number >= 0"
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
            reject(argument, expected, value, TypeError)
        try:
            value = float(value)
        except OverflowError:
            reject(argument, expected, value)
    if not (0.0 < value < math.inf or (value == 0.0 and not positive)):
        reject(argument, expected, value)
    return value


def check_options(
    k: object,
    alpha: object,
    weight: object,
    squeeze: object,
    reduction: object,
    backend: object,
    backends: Collection[str],
) -> tuple[int, float, float, int, int]:
    """The options of the loss as the operators take them: k, alpha, weight, and the codes of squeeze and reduction.

    Args:
        k, alpha, weight, squeeze, reduction, backend: as `sn_loss` takes them.
        backends: the names that backend may have, besides "auto".

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option with a value that is not allowed.
    """
    if not isinstance(squeeze, str) or squeeze not in _SQUEEZE:
        reject_name("squeeze", tuple(_SQUEEZE), squeeze)
    if not isinstance(reduction, str) or reduction not in _REDUCTION:
        reject_name("reduction", tuple(_REDUCTION), reduction)
    if not isinstance(backend, str) or not (backend == "auto" or backend in backends):
        reject_name("backend", ("auto", *backends), backend)
    return (
        _count(k),
        _real("alpha", alpha, positive=True),
        _real("weight", weight, positive=False),
        _SQUEEZE[squeeze],
        _REDUCTION[reduction],
    )


def _check_features(argument: str, feats: object) -> None:
    if not isinstance(feats, Tensor):
        reject(argument, "a tensor", feats, TypeError)
    if feats.dtype not in _FLOATING or feats.layout is not torch.strided:
        reject(argument, "a dense float64, float32, float16 or bfloat16 tensor", feats, TypeError)
    if feats.dim() != 2:
        reject(argument, "a 2-D tensor, one row a sample", feats)


def _check_index(argument: str, index: object, feats: Tensor, rows_of: str) -> Tensor:
    """`index` as an int64 tensor, one entry for each row of `feats`, the argument `rows_of`."""
    if not isinstance(index, Tensor):
        reject(argument, "an integer tensor", index, TypeError)
    if index.dtype not in _INTEGER:
        reject(argument, "an integer tensor", index, TypeError)
    if index.dim() != 1 or index.shape[0] != feats.shape[0]:
        reject(argument, f"shape [{feats.shape[0]}], one entry for each row of {rows_of}", index)
    if index.device != feats.device:
        reject(argument, f"a tensor on {feats.device}, where {rows_of} is", index)
    return index if index.dtype is torch.int64 else index.to(torch.int64)


def _check_self_index(self_index: object, feats: Tensor, candidates: Tensor) -> tuple[Tensor | None, int]:
    """The self_index and self_offset of the operators."""
    n, m = feats.shape[0], candidates.shape[0]
    if isinstance(self_index, Tensor):
        index = _check_index("self_index", self_index, feats, "feats")
        # The values must be on the host: reading them would wait for a GPU, and a tracer has none.
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if not traced and type(index) is Tensor and index.device.type == "cpu" and n > 0:
            low, high = (int(bound) for bound in index.aminmax())
            if low < -1 or high >= m:
                outside = low if low < -1 else high
                reject("self_index", f"entries from -1 (none) to {m - 1}, a row of candidates", outside)
        return index, -1
    if isinstance(self_index, bool) or not isinstance(self_index, (numbers.Integral, torch.SymInt)):
        reject("self_index", "None, an int or an integer tensor", self_index, TypeError)
    offset = self_index if isinstance(self_index, torch.SymInt) else int(self_index)
    if offset < 0 or offset + n > m:
        reject("self_index", f"an offset with rows offset to offset + {n} inside the {m} candidates", offset)
    return None, offset  # type: ignore[return-value]


def check_batch(
    feats: Tensor,
    labels: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    self_index: int | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
    """feats, labels, candidates, candidate_labels, self_index and self_offset as the operators take them."""
    _check_features("feats", feats)
    labels = _check_index("labels", labels, feats, "feats")
    if candidates is None:
        if candidate_labels is not None:
            reject("candidates", "a tensor, since candidate_labels is given", candidates)
        if self_index is not None:
            reject("self_index", "None without candidates (an anchor is itself among the anchors)", self_index)
        return feats, labels, None, None, None, 0

    _check_features("candidates", candidates)
    if candidate_labels is None:
        reject("candidate_labels", "an integer tensor, since candidates is given", candidate_labels)
    if candidates.dtype is not feats.dtype:
        reject("candidates", f"a {feats.dtype} tensor like feats", candidates)
    if candidates.device != feats.device:
        reject("candidates", f"a tensor on {feats.device}, where feats is", candidates)
    if candidates.shape[1] != feats.shape[1]:
        reject("candidates", f"{feats.shape[1]} columns like feats", candidates)
    candidate_labels = _check_index("candidate_labels", candidate_labels, candidates, "candidates")
    if self_index is None:
        return feats, labels, candidates, candidate_labels, None, -1
    index, offset = _check_self_index(self_index, feats, candidates)
    return feats, labels, candidates, candidate_labels, index, offset
