"""`sn_loss` and `support_neighbors`: validation, defaults, choice of backend."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, NoReturn, cast, overload

import torch
from torch import Tensor

from . import ops, reference, triton

# The default loss options, the authors' recipe for Market-1501.
K = 10
ALPHA = 50.0
WEIGHT = 0.1

_SQUEEZE = {code.name.lower(): int(code) for code in reference.Squeeze}
_REDUCTION = {code.name.lower(): int(code) for code in reference.Reduction}
# The device types a backend serves (none: any), in the order in which "auto" asks.
_BACKEND_DEVICES: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "cpu": ("cpu",),
    "reference": (),
}

_FLOATING = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_INTEGER = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


class SNStats(NamedTuple):
    """What the loss saw in a batch: detached scalars (0-d tensors) on the features' device, computed without a sync.

    `valid_anchors` is int64, the others have the loss's dtype. A value that is undefined (a mean of nothing) is 0;
    with a NaN or Inf among the features the loss is NaN and none of these means anything.
    """

    valid_anchors: Tensor
    """How many anchors have a positive among their candidates."""
    positive_distance: Tensor
    """Mean distance over all P_i of valid anchors."""
    negative_distance: Tensor
    """Mean distance over all N_i of valid anchors."""
    nearest_is_positive: Tensor
    """Fraction of valid anchors whose nearest neighbour is a positive."""
    support_positives: Tensor
    """Mean number of positives inside the support set of a valid anchor (one added from outside does not count)."""


class SupportNeighbors(NamedTuple):
    """The support set of every anchor, detached; K = min(k, M)."""

    indices: Tensor
    """int64 `[N, K]`: candidates, the nearest first, ties by the lower index; -1 where unused."""
    distances: Tensor
    """`[N, K]`, float32 (float64 for float64 features): Euclidean distances, not below 1e-6; inf where unused."""
    is_positive: Tensor
    """bool `[N, K]`: the candidate has the anchor's label; False where unused."""
    nearest_positive: Tensor
    """int64 `[N]`: the nearest positive among all candidates, -1 where the anchor has none."""
    farthest_positive: Tensor
    """int64 `[N]`: the farthest positive among all candidates, -1 where the anchor has none."""


class BackendInfo(NamedTuple):
    """One entry of `backends()`."""

    usable: bool
    """It can serve tensors of its devices here."""
    reason: str
    """Why it is not usable; empty if it is."""
    devices: tuple[str, ...]
    """The device types it serves; empty for any."""


# ---- validation ---------------------------------------------------------------------------------
# Every check of the package is here. It runs on every call, so that it asks with cheap comparisons and leaves finding
# the words to functions that run on failure alone.


def _got(value: object) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f", {value.layout}"
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}{layout}"
    return f"{reprlib.repr(value)} of type {type(value).__name__}"


def _reject(argument: str, expected: str, value: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"sn_ops: {argument}: expected {expected}, got {_got(value)}")


def _reject_name(argument: str, allowed: tuple[str, ...], value: object) -> NoReturn:
    names = ", ".join(repr(name) for name in allowed)
    _reject(argument, f"one of {names}", value, ValueError if isinstance(value, str) else TypeError)


def _count(k: object) -> int:
    """`k` as an int."""
    if type(k) is not int and (isinstance(k, bool) or not isinstance(k, (numbers.Integral, torch.SymInt))):
        _reject("k", "an int >= 1", k, TypeError)
    if k < 1:
        _reject("k", "an int >= 1", k)
    return k if type(k) is int else cast(int, k) if isinstance(k, torch.SymInt) else int(k)


def _real(argument: str, value: object, positive: bool) -> float:
    """`value` as a finite float, > 0 or at least >= 0."""
    expected = "a finite number > 0" if positive else "a finite number >= 0"
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
            _reject(argument, expected, value, TypeError)
        try:
            value = float(value)
        except OverflowError:
            _reject(argument, expected, value)
    if not (0.0 < value < math.inf or (value == 0.0 and not positive)):
        _reject(argument, expected, value)
    return value


def check_options(
    k: object, alpha: object, weight: object, squeeze: object, reduction: object, backend: object
) -> tuple[int, float, float, int, int]:
    """The options of the loss as the operators take them: k, alpha, weight, squeeze and reduction codes.

    Raises:
        TypeError, ValueError: naming the option, what is allowed and what came.
    """
    if not isinstance(squeeze, str) or squeeze not in _SQUEEZE:
        _reject_name("squeeze", tuple(_SQUEEZE), squeeze)
    if not isinstance(reduction, str) or reduction not in _REDUCTION:
        _reject_name("reduction", tuple(_REDUCTION), reduction)
    if not isinstance(backend, str) or not (backend == "auto" or backend in _BACKEND_DEVICES):
        _reject_name("backend", ("auto", *_BACKEND_DEVICES), backend)
    return (
        _count(k),
        _real("alpha", alpha, positive=True),
        _real("weight", weight, positive=False),
        _SQUEEZE[squeeze],
        _REDUCTION[reduction],
    )


def _check_features(argument: str, feats: object) -> None:
    if not isinstance(feats, Tensor):
        _reject(argument, "a tensor", feats, TypeError)
    if feats.dtype not in _FLOATING or feats.layout is not torch.strided:
        _reject(argument, "a dense float64, float32, float16 or bfloat16 tensor", feats, TypeError)
    if feats.dim() != 2:
        _reject(argument, "a 2-D tensor, one row a sample", feats)


def _check_index(argument: str, index: object, feats: Tensor, rows_of: str) -> Tensor:
    """`index` as an int64 tensor, one entry for each row of `feats`, the argument `rows_of`."""
    if not isinstance(index, Tensor):
        _reject(argument, "an integer tensor", index, TypeError)
    if index.dtype not in _INTEGER:
        _reject(argument, "an integer tensor", index, TypeError)
    if index.dim() != 1 or index.shape[0] != feats.shape[0]:
        _reject(argument, f"shape [{feats.shape[0]}], one entry for each row of {rows_of}", index)
    if index.device != feats.device:
        _reject(argument, f"a tensor on {feats.device}, where {rows_of} is", index)
    return index if index.dtype is torch.int64 else index.to(torch.int64)


def _check_self_index(self_index: object, feats: Tensor, candidates: Tensor) -> tuple[Tensor | None, int]:
    """The self_index and self_offset of the operators."""
    n, m = feats.shape[0], candidates.shape[0]
    if isinstance(self_index, Tensor):
        index = _check_index("self_index", self_index, feats, "feats")
        # Looking at the values needs them on the host: a GPU would have to be waited for, a tracer has none.
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if not traced and type(index) is Tensor and index.device.type == "cpu" and n > 0:
            low, high = (int(bound) for bound in index.aminmax())
            if low < -1 or high >= m:
                outside = low if low < -1 else high
                _reject("self_index", f"entries from -1 (none) to {m - 1}, a row of candidates", outside)
        return index, -1
    if isinstance(self_index, bool) or not isinstance(self_index, (numbers.Integral, torch.SymInt)):
        _reject("self_index", "None, an int or an integer tensor", self_index, TypeError)
    offset = self_index if isinstance(self_index, torch.SymInt) else int(self_index)
    if offset < 0 or offset + n > m:
        _reject("self_index", f"an offset with rows offset to offset + {n} inside the {m} candidates", offset)
    return None, offset  # type: ignore[return-value]


def _check_batch(
    feats: Tensor,
    labels: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    self_index: int | Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """labels, candidate_labels, self_index and self_offset as the operators take them."""
    _check_features("feats", feats)
    labels = _check_index("labels", labels, feats, "feats")
    if candidates is None:
        if candidate_labels is not None:
            _reject("candidates", "a tensor, since candidate_labels is given", candidates)
        if self_index is not None:
            _reject("self_index", "None without candidates (an anchor is itself among the anchors)", self_index)
        return labels, None, None, 0

    _check_features("candidates", candidates)
    if candidate_labels is None:
        _reject("candidate_labels", "an integer tensor, since candidates is given", candidate_labels)
    if candidates.dtype is not feats.dtype:
        _reject("candidates", f"a {feats.dtype} tensor like feats", candidates)
    if candidates.device != feats.device:
        _reject("candidates", f"a tensor on {feats.device}, where feats is", candidates)
    if candidates.shape[1] != feats.shape[1]:
        _reject("candidates", f"{feats.shape[1]} columns like feats", candidates)
    candidate_labels = _check_index("candidate_labels", candidate_labels, candidates, "candidates")
    if self_index is None:
        return labels, candidate_labels, None, -1
    index, offset = _check_self_index(self_index, feats, candidates)
    return labels, candidate_labels, index, offset


# ---- choice of backend --------------------------------------------------------------------------


def backends() -> dict[str, BackendInfo]:
    """Which backends this installation has, in the order in which "auto" asks them.

    Returns:
        Backend name -> (usable, reason if not, device types it serves; none stands for any).
    """
    return {
        name: BackendInfo(name not in ops.LOAD_ERROR, ops.LOAD_ERROR.get(name, ""), _devices_of(name))
        for name in _BACKEND_DEVICES
    }


def add_backend(name: str, devices: tuple[str, ...]) -> None:
    """A backend from elsewhere, whose operators `ops.register` has; "auto" asks it last for tensors on `devices`."""
    _BACKEND_DEVICES[name] = devices


def _devices_of(backend: str) -> tuple[str, ...]:
    """The device types a backend serves when it is named: for Triton the CPU under its interpreter, which "auto" never
    takes."""
    return triton.DEVICES if backend == "triton" else _BACKEND_DEVICES[backend]


def _choose_backend(backend: str, feats: Tensor) -> str:
    device = feats.device.type
    if backend == "auto":
        for name, devices in _BACKEND_DEVICES.items():
            if device in devices and name not in ops.LOAD_ERROR and not ops.unfit(name, feats.device):
                backend = name
                break
        else:
            return "reference"
    elif backend == "reference":
        return backend
    elif backend in ops.LOAD_ERROR:
        raise ValueError(f"sn_ops: backend: {backend!r} is not usable: {ops.LOAD_ERROR[backend]}")
    elif device not in _devices_of(backend):
        served = " or ".join(_devices_of(backend))
        _reject("backend", f"one that serves {device} tensors, as feats is ({backend!r} serves {served})", backend)
    elif reason := ops.unfit(backend, feats.device):
        raise ValueError(f"sn_ops: backend: {backend!r} cannot serve {feats.device}: {reason}")
    ops.refuse_transforms()
    return backend


# ---- the public functions -----------------------------------------------------------------------


@overload
def sn_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    k: int = ...,
    alpha: float = ...,
    weight: float = ...,
    squeeze: str = ...,
    candidates: Tensor | None = ...,
    candidate_labels: Tensor | None = ...,
    self_index: int | Tensor | None = ...,
    reduction: str = ...,
    backend: str = ...,
    group: Any = ...,
    sizes: Sequence[int] | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def sn_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    k: int = ...,
    alpha: float = ...,
    weight: float = ...,
    squeeze: str = ...,
    candidates: Tensor | None = ...,
    candidate_labels: Tensor | None = ...,
    self_index: int | Tensor | None = ...,
    reduction: str = ...,
    backend: str = ...,
    group: Any = ...,
    sizes: Sequence[int] | None = ...,
    return_stats: bool,
) -> Tensor | tuple[Tensor, SNStats]: ...
def sn_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    k: int = K,
    alpha: float = ALPHA,
    weight: float = WEIGHT,
    squeeze: str = "span",
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    self_index: int | Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    group: Any = None,
    sizes: Sequence[int] | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SNStats]:
    """The Support Neighbor loss of a batch of embeddings.

    With d the Euclidean distance, S_i the `k` nearest candidates of anchor i (itself excluded), P_i the members of S_i
    that share its label (the nearest positive of all candidates if S_i has none) and N_i the others::

        L_i = -log( sum_{P_i} exp(-alpha d) / sum_{P_i + N_i} exp(-alpha d) ) + weight * squeeze_i

    Anchors without a positive among their candidates contribute 0 and are not counted. With no valid anchor the loss
    and every gradient are 0; a NaN or Inf anywhere in the features makes the loss and every gradient NaN.

    Args:
        feats: `[N, D]` embeddings, float64, float32, float16 or bfloat16, any strides. L2-normalise them, as the paper
            does: `alpha=50` saturates otherwise.
        labels: `[N]` identities, any integer dtype, on the device of feats.
        k: size of the support set, an int >= 1; may exceed the number of candidates.
        alpha: inverse temperature, 1 / distance, > 0.
        weight: factor of the squeeze, >= 0.
        squeeze: "span", d(farthest positive) - d(nearest positive) over all candidates (the paper's abstract);
            "support", the same within P_i, or d(nearest positive) if P_i has one member; "nearest", d(nearest positive)
            (the authors' released code); "none", 0.
        candidates: `[M, D]` embeddings to look for neighbours in, of the dtype and on the device of feats, with
            candidate_labels `[M]`. Default: the anchors themselves. Gradients flow to both.
        self_index: with candidates only: which candidate an anchor is itself. None, none is; an int o, anchor i is
            candidate o + i; an integer tensor `[N]`, anchor i is candidate self_index[i], -1 for none.
        reduction: "mean" over the valid anchors, "sum", or "none" for the anchors' losses `[N]`.
        backend: "auto" or a name in `backends()`; a named backend that cannot serve raises. "reference" is plain
            PyTorch, the others are fused: fast, deterministic, and without N x M matrices for large batches.
        group: a `torch.distributed` process group, or `sn_ops.distributed.Exchange` for a say in how rows travel.
            Every rank passes its own batch, of any size; neighbours are looked for in the batches of all ranks, in rank
            order, and the loss and the statistics are those of one process that holds them all ("none": this rank's
            anchors). A rank's gradients are world size times that process's, so that DistributedDataParallel's average
            is exact. `candidates` are then a bank of this rank alone, behind the gathered rows, and self_index says
            where an anchor is in that bank too. Options must be the same on every rank, and backward() must run on
            every rank or on none.
        sizes: with group only: the rows of every rank in rank order, if they are known. Ranks then agree on nothing
            beforehand, which saves a collective and, on a GPU, a wait for it; but neither do they notice that sizes or
            options differ, and when one raises on bad input the others wait for the group's timeout.
        return_stats: also return `SNStats`.

    Returns:
        The loss, 0-d (or `[N]`), float32, or float64 for float64 features; gradients have the dtype of the features.
        With return_stats a pair (loss, `SNStats`). Second derivatives, forward-mode derivatives and torch.func
        transforms need `backend="reference"`; the fused backends raise a RuntimeError that says so.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, a named backend that cannot serve, or ranks whose options differ.
        RuntimeError: another rank of the group was given bad input, which the message quotes.

    Source: Li, Ding, Li, Zhang and Fu, "Support Neighbor Loss for Person Re-Identification", ACM MM 2018,
    arXiv 1808.06030. `sn_ops/reference.py` is the definition in plain PyTorch.
    """

    def checked() -> tuple[Any, ...]:
        options = check_options(k, alpha, weight, squeeze, reduction, backend)
        own_labels, bank_labels, index, offset = _check_batch(feats, labels, candidates, candidate_labels, self_index)
        chosen = _choose_backend(backend, feats)
        return chosen, feats, own_labels, candidates, bank_labels, index, offset, *options

    if group is not None:
        from . import distributed  # imports torch.distributed, which most processes do not need

        # Checked inside: what is wrong with this rank's arguments must reach the other ranks, which wait for it.
        def prepare() -> distributed.Call:
            return distributed.Call(bool(return_stats), *checked())

        loss, stats = distributed.loss(group, sizes, prepare)
    else:
        if sizes is not None:
            _reject("sizes", "None without a group", sizes)
        chosen, *arguments = checked()
        loss, stats = reference.loss(*arguments) if chosen == "reference" else ops.loss(chosen, *arguments)
    if not return_stats:
        return loss
    return loss, SNStats(stats[0].long(), *stats[1:5].to(loss.dtype).unbind())


def support_neighbors(
    feats: Tensor,
    labels: Tensor,
    *,
    k: int = K,
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    self_index: int | Tensor | None = None,
    backend: str = "auto",
) -> SupportNeighbors:
    """The support set, the nearest and the farthest positive of every anchor: what `sn_loss` is computed from.

    The abstract of the paper can also be read as squeezing `|| x_near - x_far ||`, the distance between the two
    positives instead of the difference of their distances. With `s = support_neighbors(feats, labels)` that is one
    line, differentiable in feats (`candidates[...]` if there are candidates). The mask leaves out the anchors without
    a positive: their indices are -1, which would mean the last row::

        (feats[s.nearest_positive] - feats[s.farthest_positive])[s.nearest_positive >= 0].norm(dim=1).mean()

    The norm has no derivative where near and far are the same sample; `.square().sum(1)` has.

    Args:
        feats, labels, k, candidates, candidate_labels, self_index, backend: as in `sn_loss`.

    Returns:
        `SupportNeighbors`, detached.

    Raises:
        TypeError, ValueError: as `sn_loss`.
    """
    k, alpha, weight, squeeze, reduction = check_options(k, ALPHA, WEIGHT, "none", "sum", backend)
    labels, candidate_labels, index, offset = _check_batch(feats, labels, candidates, candidate_labels, self_index)
    with torch.no_grad():
        _, edges, _, nearest, farthest, squared, _ = ops.forward(
            _choose_backend(backend, feats), feats, labels, candidates, candidate_labels, index, offset,
            k, alpha, weight, squeeze, reduction, True,
        )  # fmt: skip
        distances = reference.distances_of(squared[:, :-2])
        support = edges[:, :-2].long()
        neighbour_labels = reference.take(labels if candidate_labels is None else candidate_labels, support)
        is_positive = (neighbour_labels == labels[:, None]) & (support >= 0)
    return SupportNeighbors(support, distances, is_positive, nearest.long(), farthest.long())
