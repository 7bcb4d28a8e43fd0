"""The operators of the loss by the CUDA kernels on the host harness, for CPU tensors.

`load` takes the library that the CMake target sn_simt builds and defines the operators of `sn_simt`, with the schemas
of those of `sn_ops`. `settings` says how they run: the schedule, the error of the products or the model of the tensor
core, the device that the plan is made for, the path, changes to the plan. A fault that the harness finds is a
RuntimeError with its text.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sn_ops.reference import (
    BackwardArguments,
    ForwardArguments,
    GraphLayout,
    LossArguments,
    LossBackwardArguments,
    accumulation_dtype,
)
from support.cuda_paths import PATHS

MMA_ERRORS = ("none", "random", "extreme", "plus", "minus")
MMA_MODELS = ("none", "hopper", "ampere", "volta", "crude")
PARTITIONS = ("auto", "never", "always", "resident")

_PATHS = ("auto", *PATHS)
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_STATS_SIZE = 6
_EXTRA_EDGES = 2
_NO_REDUCTION = 2

_FORWARD_SCHEMA = (
    "forward(Tensor feats, Tensor labels, Tensor? candidates, Tensor? candidate_labels, Tensor? self_index, "
    "SymInt self_offset, SymInt k, float alpha, float weight, int squeeze, int reduction, bool want_squared) -> "
    "(Tensor loss, Tensor indices, Tensor coefficients, Tensor nearest_positive, Tensor farthest_positive, "
    "Tensor squared, Tensor stats)"
)
_BACKWARD_SCHEMA = (
    "backward(Tensor grad_loss, Tensor feats, Tensor? candidates, Tensor indices, Tensor coefficients, Tensor stats, "
    "int reduction, bool need_feats, bool need_candidates) -> (Tensor grad_feats, Tensor grad_candidates)"
)
_LOSS_SCHEMA = (
    "loss(Tensor feats, Tensor labels, Tensor? candidates, Tensor? candidate_labels, Tensor? self_index, "
    "SymInt self_offset, SymInt k, float alpha, float weight, int squeeze, int reduction) -> "
    "(Tensor loss, Tensor graph, Tensor stats)"
)
_LOSS_BACKWARD_SCHEMA = (
    "loss_backward(Tensor grad_loss, Tensor feats, Tensor? candidates, Tensor graph, Tensor stats, SymInt k, "
    "int reduction, bool need_feats, bool need_candidates) -> Tensor[]"
)


# ---- how calls are run ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """`sn_simt_settings` of capi.h."""

    seed: int = 1
    mma_seed: int = 1
    mma_error_scale: float = 1.0
    mma_error: str = "random"
    path: str = "auto"
    partition: str = "auto"
    major: int = 9
    minor: int = 0
    multiprocessors: int = 132
    shared_bytes: int = 232448
    max_cluster: int = 16
    strip_rows: int = 0
    slice_elements: int = 0
    score_tile: int = 0
    sample_stride: int = 0
    sample_group: int = 0
    far_capacity: int = 0
    mma_model: str = "none"
    positive_anchors: int = 0
    positive_segments: int = 0
    shared_reduction: int = 0
    lane_bytes: int = 0
    target_lanes: int = 0
    buffer_capacity: int = 0
    no_rescreen: int = 0
    few_rows: int = 0
    bucket_shift: int = 0
    select_threads: int = 0
    selection: int = 0


@dataclass(frozen=True)
class Report:
    """The path that the last call took, and its counts."""

    path: str
    partitioned: bool
    lane_bytes: int
    target_lanes: int
    resident: int
    launches: int
    workspace_bytes: int
    refined: int
    fallen_back: int
    rescreened: int
    certified: int
    slices_summed: int


settings = Settings()
last_report: Report | None = None


@contextmanager
def using(**changes: object) -> Iterator[None]:
    """Settings changed for a while: `with backend.using(path="screen", seed=3): ...`"""
    global settings
    before = settings
    settings = replace(before, **changes)  # type: ignore[arg-type]
    try:
        yield
    finally:
        settings = before


# ---- the plain structures of sn_types.h and capi.h -----------------------------------------------


class _FeatureView(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("rows", ctypes.c_int64), ("row_stride", ctypes.c_int64)]


class _SelfMap(ctypes.Structure):
    _fields_ = [("index", ctypes.c_void_p), ("offset", ctypes.c_int64)]


class _LossOptions(ctypes.Structure):
    _fields_ = [
        ("k", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("weight", ctypes.c_double),
        ("squeeze", ctypes.c_int32),
        ("reduction", ctypes.c_int32),
    ]


class _ForwardArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("dims", ctypes.c_int64),
        ("anchors", _FeatureView),
        ("candidates", _FeatureView),
        ("anchor_labels", ctypes.c_void_p),
        ("candidate_labels", ctypes.c_void_p),
        ("self_map", _SelfMap),
        ("symmetric", ctypes.c_bool),
        ("options", _LossOptions),
        ("loss", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("nearest_positive", ctypes.c_void_p),
        ("farthest_positive", ctypes.c_void_p),
        ("squared", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
    ]


class _BackwardArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("dims", ctypes.c_int64),
        ("edges", ctypes.c_int64),
        ("anchors", _FeatureView),
        ("candidates", _FeatureView),
        ("symmetric", ctypes.c_bool),
        ("reduction", ctypes.c_int32),
        ("grad_loss", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("grad_anchors", ctypes.c_void_p),
        ("grad_candidates", ctypes.c_void_p),
    ]


class _Settings(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("mma_seed", ctypes.c_uint64),
        ("mma_error_scale", ctypes.c_double),
        ("mma_error", ctypes.c_int32),
        ("path", ctypes.c_int32),
        ("partition", ctypes.c_int32),
        ("major", ctypes.c_int32),
        ("minor", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("max_cluster", ctypes.c_int32),
        ("strip_rows", ctypes.c_int32),
        ("slice_elements", ctypes.c_int32),
        ("score_tile", ctypes.c_int32),
        ("sample_stride", ctypes.c_int32),
        ("sample_group", ctypes.c_int32),
        ("far_capacity", ctypes.c_int32),
        ("mma_model", ctypes.c_int32),
        ("positive_anchors", ctypes.c_int32),
        ("positive_segments", ctypes.c_int32),
        ("shared_reduction", ctypes.c_int32),
        ("lane_bytes", ctypes.c_int32),
        ("target_lanes", ctypes.c_int32),
        ("buffer_capacity", ctypes.c_int32),
        ("no_rescreen", ctypes.c_int32),
        ("few_rows", ctypes.c_int32),
        ("bucket_shift", ctypes.c_int32),
        ("select_threads", ctypes.c_int32),
        ("selection", ctypes.c_int32),
    ]


class _Control(ctypes.Structure):
    _fields_ = [
        ("nonfinite", ctypes.c_uint32),
        ("ticket", ctypes.c_uint32),
        ("queued", ctypes.c_uint32),
        ("unscreenable", ctypes.c_uint32),
        ("largest", ctypes.c_uint32),
        ("exponent", ctypes.c_int32),
        ("refined", ctypes.c_uint32),
        ("fallen_back", ctypes.c_uint32),
        ("large_identities", ctypes.c_uint32),
        ("last_null", ctypes.c_uint32),
        ("waiting", ctypes.c_uint32),
        ("rescreen_tiles", ctypes.c_uint32),
        ("rescreened", ctypes.c_uint32),
        ("certified", ctypes.c_uint32),
        ("slices_summed", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


class _Report(ctypes.Structure):
    _fields_ = [
        ("workspace_bytes", ctypes.c_int64),
        ("planned_launches", ctypes.c_int64),
        ("launches", ctypes.c_int64),
        ("switches", ctypes.c_int64),
        ("path", ctypes.c_int32),
        ("partitioned", ctypes.c_int32),
        ("lane_bytes", ctypes.c_int32),
        ("target_lanes", ctypes.c_int32),
        ("resident", ctypes.c_int32),
        ("control", _Control),
        ("fault", ctypes.c_char * 8192),
    ]


def _run(function: ctypes._NamedFuncPointer, args: ctypes.Structure) -> None:
    global last_report
    names = {"mma_error": MMA_ERRORS, "path": _PATHS, "partition": PARTITIONS, "mma_model": MMA_MODELS}
    plain = _Settings(**{f: names[f].index(v) if f in names else v for f, v in vars(settings).items()})
    report = _Report()
    error = function(ctypes.byref(args), ctypes.byref(plain), ctypes.byref(report))
    last_report = Report(
        path=_PATHS[report.path],
        partitioned=bool(report.partitioned),
        lane_bytes=report.lane_bytes,
        target_lanes=report.target_lanes,
        resident=report.resident,
        launches=report.launches,
        workspace_bytes=report.workspace_bytes,
        refined=report.control.refined,
        fallen_back=report.control.fallen_back,
        rescreened=report.control.rescreened,
        certified=report.control.certified,
        slices_summed=report.control.slices_summed,
    )
    if error != 0:
        raise RuntimeError(f"sn_simt: {report.fault.decode()} ({settings})")


# ---- the operators -------------------------------------------------------------------------------


def _unit_stride(x: Tensor) -> Tensor:
    """The tensor with unit stride along its last dimension; rows may lie anywhere."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _view(rows: Tensor) -> _FeatureView:
    return _FeatureView(rows.data_ptr(), rows.shape[0], rows.stride(0))


def _run_forward(
    library: ctypes.CDLL, args: ForwardArguments | LossArguments, outputs: Sequence[Tensor | None]
) -> None:
    """Runs a forward into the seven entries of a `Graph`; without squared distances if they are None."""
    feats, candidates, candidate_labels = args.feats, args.candidates, args.candidate_labels
    symmetric = candidates is None or candidate_labels is None
    anchors, own_labels = _unit_stride(feats), _unit_stride(args.labels)
    pool, pool_labels = anchors, own_labels
    if candidates is not None and candidate_labels is not None:
        pool, pool_labels = _unit_stride(candidates), _unit_stride(candidate_labels)
    own_rows = None if args.self_index is None else _unit_stride(args.self_index)
    loss, indices, coefficients, nearest, farthest, squared, stats = (
        None if x is None else x.data_ptr() for x in outputs
    )
    _run(
        library.sn_simt_forward,
        _ForwardArgs(
            dtype=_DTYPES[feats.dtype],
            dims=feats.shape[1],
            anchors=_view(anchors),
            candidates=_view(pool),
            anchor_labels=own_labels.data_ptr(),
            candidate_labels=pool_labels.data_ptr(),
            self_map=_SelfMap(None if own_rows is None else own_rows.data_ptr(), args.self_offset),
            symmetric=symmetric,
            options=_LossOptions(args.k, args.alpha, args.weight, args.squeeze, args.reduction),
            loss=loss,
            indices=indices,
            coefficients=coefficients,
            nearest_positive=nearest,
            farthest_positive=farthest,
            squared=squared,
            stats=stats,
        ),
    )


def _sizes(args: ForwardArguments | LossArguments | LossBackwardArguments) -> tuple[int, int, torch.dtype]:
    """N, M and the accumulation type."""
    n = args.feats.shape[0]
    return n, n if args.candidates is None else args.candidates.shape[0], accumulation_dtype(args.feats.dtype)


def _forward(library: ctypes.CDLL, *arguments: Any) -> tuple[Tensor, ...]:
    args = ForwardArguments(*arguments)
    n, m, acc = _sizes(args)
    edges = n, min(args.k, m) + _EXTRA_EDGES
    loss = torch.empty((n,) if args.reduction == _NO_REDUCTION else (), dtype=acc)
    indices, coefficients = torch.empty(edges, dtype=torch.int32), torch.empty(edges, dtype=acc)
    nearest, farthest = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
    squared = torch.empty(edges if args.want_squared else (0,), dtype=acc)
    stats = torch.empty(_STATS_SIZE, dtype=torch.float64)
    outputs = loss, indices, coefficients, nearest, farthest, squared, stats
    _run_forward(library, args, [*outputs[:5], squared if args.want_squared else None, stats])
    return outputs


def _loss(library: ctypes.CDLL, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = LossArguments(*arguments)
    n, m, acc = _sizes(args)
    layout = GraphLayout.of(n, m, args.k, acc)
    loss = torch.empty((n,) if args.reduction == _NO_REDUCTION else (), dtype=acc)
    graph = torch.empty(layout.words, dtype=torch.int32)
    stats = torch.empty(_STATS_SIZE, dtype=torch.float64)
    _run_forward(library, args, [loss, *layout.unpack(graph, n, acc), None, stats])
    return loss, graph, stats


def _run_backward(
    library: ctypes.CDLL,
    args: BackwardArguments | LossBackwardArguments,
    indices: Tensor,
    coefficients: Tensor,
    grads: tuple[Tensor | None, Tensor | None],
) -> None:
    anchors = _unit_stride(args.feats)
    pool = anchors if args.candidates is None else _unit_stride(args.candidates)
    upstream, stats = args.grad_loss.contiguous(), args.stats.contiguous()
    if grads == (None, None):
        return
    _run(
        library.sn_simt_backward,
        _BackwardArgs(
            dtype=_DTYPES[anchors.dtype],
            dims=anchors.shape[1],
            edges=indices.shape[1],
            anchors=_view(anchors),
            candidates=_view(pool),
            symmetric=args.candidates is None,
            reduction=args.reduction,
            grad_loss=upstream.data_ptr(),
            indices=indices.data_ptr(),
            coefficients=coefficients.data_ptr(),
            stats=stats.data_ptr(),
            grad_anchors=None if grads[0] is None else grads[0].data_ptr(),
            grad_candidates=None if grads[1] is None else grads[1].data_ptr(),
        ),
    )


def _grads_of(args: BackwardArguments | LossBackwardArguments) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the gradients that are needed."""
    candidates = args.candidates if args.need_candidates else None
    return (
        torch.empty(args.feats.shape, dtype=args.feats.dtype) if args.need_feats else None,
        None if candidates is None else torch.empty(candidates.shape, dtype=args.feats.dtype),
    )


def _backward(library: ctypes.CDLL, *arguments: Any) -> tuple[Tensor, Tensor]:
    args = BackwardArguments(*arguments)
    grads = _grads_of(args)
    _run_backward(library, args, args.indices.contiguous(), args.coefficients.contiguous(), grads)
    feats, candidates = (torch.empty(0, dtype=args.feats.dtype) if x is None else x for x in grads)
    return feats, candidates


def _loss_backward(library: ctypes.CDLL, *arguments: Any) -> list[Tensor]:
    args = LossBackwardArguments(*arguments)
    n, m, acc = _sizes(args)
    grads = _grads_of(args)
    _run_backward(library, args, *GraphLayout.of(n, m, args.k, acc).unpack(args.graph.contiguous(), n, acc)[:2], grads)
    return [x for x in grads if x is not None]


_registered: list[object] = []  # a torch.library.Library lives as long as it is referenced


def load(path: Path) -> None:
    """Loads the library and defines the operators. Once a process."""
    if _registered:
        return
    library = ctypes.CDLL(str(path))
    operators = torch.library.Library("sn_simt", "DEF")
    for schema, function in (
        (_FORWARD_SCHEMA, _forward),
        (_BACKWARD_SCHEMA, _backward),
        (_LOSS_SCHEMA, _loss),
        (_LOSS_BACKWARD_SCHEMA, _loss_backward),
    ):
        operators.define(schema)
        operators.impl(schema.partition("(")[0], partial(function, library), "CPU")
    _registered.extend((library, operators))
