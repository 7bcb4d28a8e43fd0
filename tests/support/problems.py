"""The tests' inputs: how to make them, move them to a device and give them to the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from support import oracle
from support.backends import device_of

T = TypeVar("T")


def on(backend: str, x: T) -> T:
    """A tensor, or a dictionary, list or tuple of tensors and other things, on the backend's device.

    Every test moves its inputs with this, before it asks for gradients; a module moves with its own `to` and
    `device_of`. On the CPU nothing changes. Elsewhere tensors keep their strides and offsets, and tensors of one call
    that share memory still share it.
    """
    device, storages = device_of(backend), dict[int, torch.UntypedStorage]()

    def move(tensor: Tensor) -> Tensor:
        # Checked on the CPU too: on another device the gradient would not reach the original.
        assert not tensor.requires_grad, "move first, then ask for gradients"
        return tensor if tensor.device.type == device.type else relocated(tensor, device, storages)

    moved: T = tree_map_only(Tensor, move, x)
    return moved


def relocated(x: Tensor, device: torch.device, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A copy on a device with the same strides and offset, which `x.to` would not keep. `storages` maps the address of
    each storage moved so far to its copy."""
    source = x.untyped_storage()
    if source.data_ptr() not in storages:
        whole = torch.empty(0, dtype=torch.uint8, device=x.device).set_(source)
        storages[source.data_ptr()] = whole.to(device, copy=True).untyped_storage()
    there = torch.empty(0, dtype=x.dtype, device=device)
    return there.set_(storages[source.data_ptr()], x.storage_offset(), x.shape, x.stride())


@dataclass(frozen=True)
class Case:
    """Arguments of `sn_loss` but for the options that a test varies."""

    feats: Tensor
    labels: Tensor
    candidates: Tensor | None = None
    candidate_labels: Tensor | None = None
    self_index: int | Tensor | None = None
    k: int = 10

    def to(self, dtype: torch.dtype) -> Case:
        """The same in another type of features."""
        candidates = None if self.candidates is None else self.candidates.to(dtype)
        return replace(self, feats=self.feats.to(dtype), candidates=candidates)

    def on(self, backend: str) -> Case:
        """The same on the backend's device."""
        return replace(self, **on(backend, vars(self)))

    def leaves(self) -> Case:
        """Fresh leaves of the same strides that require gradients."""
        candidates = None if self.candidates is None else self.candidates.detach().requires_grad_()
        return replace(self, feats=self.feats.detach().requires_grad_(), candidates=candidates)

    def inputs(self) -> list[Tensor]:
        """The tensors whose gradients are asked for."""
        return [self.feats] if self.candidates is None else [self.feats, self.candidates]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments common to `sn_loss` and `support_neighbors`."""
        return dict(vars(self))


def accumulation_of(dtype: torch.dtype) -> np.dtype[Any]:
    """The type that sums are accumulated in."""
    return np.dtype(np.float64 if dtype == torch.float64 else np.float32)


def to_oracle(case: Case) -> oracle.Problem:
    """The case as the oracle reads it."""

    def wide(x: Tensor) -> oracle.Array:
        return x.detach().cpu().double().numpy().astype(np.longdouble if x.dtype == torch.float64 else np.float64)

    anchors, labels = wide(case.feats), case.labels.cpu().long().numpy()
    accumulation = accumulation_of(case.feats.dtype)
    if case.candidates is None or case.candidate_labels is None:
        everyone = np.arange(len(anchors))
        return oracle.Problem(anchors, labels, anchors, labels, everyone, True, accumulation)
    if isinstance(case.self_index, Tensor):
        self_of = case.self_index.cpu().long().numpy()
    elif case.self_index is not None:
        self_of = np.arange(len(anchors)) + case.self_index
    else:
        self_of = np.full(len(anchors), -1)
    candidates, candidate_labels = wide(case.candidates), case.candidate_labels.cpu().long().numpy()
    return oracle.Problem(anchors, labels, candidates, candidate_labels, self_of, False, accumulation)


def embeddings(
    rows: int, dims: int, labels: Tensor, *, seed: int, spread: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Unit rows around one random centre per label: positives are nearer than negatives, mostly."""
    generator = torch.Generator().manual_seed(seed)
    _, identity = labels.unique(return_inverse=True)
    centres = torch.randn(rows + 1, dims, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, dims, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(centres[identity] + spread * noise, dim=1).to(dtype)


def random_labels(rows: int, identities: int, *, seed: int) -> Tensor:
    """Identities of uneven sizes, some perhaps of one image."""
    return torch.randint(0, identities, (rows,), generator=torch.Generator().manual_seed(seed + 1000))


def self_case(rows: int, dims: int, identities: int, k: int = 10, *, seed: int = 0) -> Case:
    """A batch that is its own candidates."""
    labels = random_labels(rows, identities, seed=seed)
    return Case(embeddings(rows, dims, labels, seed=seed), labels, k=k)


def bank_case(
    anchors: int, candidates: int, dims: int, identities: int, k: int = 10, *, self_kind: str = "none", seed: int = 0
) -> Case:
    """Anchors against other candidates; `self_kind` is how anchors are found among them: none, offset or tensor."""
    pool = anchors + candidates
    labels = random_labels(pool, identities, seed=seed)
    rows = embeddings(pool, dims, labels, seed=seed)
    case = Case(rows[:anchors], labels[:anchors], rows[anchors:], labels[anchors:], k=k)
    if self_kind == "none":
        return case
    assert candidates >= anchors
    if self_kind == "offset":
        index = torch.arange(anchors) + (candidates - anchors) // 2
        self_index: int | Tensor = int(index[0])
    else:  # a bank that wraps around; every third anchor is not in it
        index = (torch.arange(anchors) + candidates - anchors // 2) % candidates
        self_index = torch.where(torch.arange(anchors) % 3 == 2, -1, index)
    bank, bank_labels = rows[anchors:].clone(), labels[anchors:].clone()
    present = self_index >= 0 if isinstance(self_index, Tensor) else torch.ones(anchors, dtype=torch.bool)
    bank[index[present]], bank_labels[index[present]] = rows[:anchors][present], labels[:anchors][present]
    return Case(rows[:anchors], labels[:anchors], bank, bank_labels, self_index, k)


def _duplicates(copies: int, k: int) -> Case:
    """Groups of identical rows whose labels differ within a group."""
    case = self_case(24, 33, 6, k, seed=5)
    order = torch.randperm(24 * copies, generator=torch.Generator().manual_seed(2))
    feats = case.feats.repeat(copies, 1)[order]
    return Case(feats, torch.arange(24 * copies) % 5, k=k)


def _grid(rows: int, dims: int, k: int) -> Case:
    """Small integers: many exact ties between different rows."""
    generator = torch.Generator().manual_seed(9)
    feats = torch.randint(0, 3, (rows, dims), generator=generator).float()
    return Case(feats, random_labels(rows, 7, seed=9), k=k)


def _relabelled(labels: Callable[[Tensor], Tensor]) -> Case:
    case = self_case(40, 17, 8, seed=6)
    return replace(case, labels=labels(case.labels))


def _extreme(labels: Tensor) -> Tensor:
    info = torch.iinfo(torch.int64)
    values = torch.tensor([info.min, info.min + 1, -1, 0, 1, info.max - 1, info.max, 2**32])
    return values[labels]


def _near_outside(rows: int, k: int) -> Case:
    """Positives far apart, negatives next to each other: the support sets hold no positive."""
    generator = torch.Generator().manual_seed(11)
    centres = torch.nn.functional.normalize(torch.randn(5, 48, generator=generator), dim=1)
    feats = centres[torch.arange(rows) % 5] + 0.01 * torch.randn(rows, 48, generator=generator)
    return Case(torch.nn.functional.normalize(feats, dim=1), torch.arange(rows) // 5, k=k)


# One list for every backend. Sizes sit beside powers of two, vector widths, tiles of 48 and chunks of 64 elements.
CASES: dict[str, Callable[[], Case]] = {
    # name: N x D, identities, k
    **{
        f"self-{n}x{d}-ids{ids}-k{k}": partial(self_case, n, d, ids, k, seed=n + d)
        for n, d, ids, k in [
            (1, 3, 1, 10),
            (2, 1, 1, 1),
            (2, 16, 1, 10),
            (3, 2, 2, 1),
            (7, 15, 2, 10),
            (8, 64, 3, 3),
            (15, 17, 4, 10),
            (16, 100, 4, 10),
            (17, 31, 5, 33),
            (31, 63, 6, 10),
            (33, 65, 8, 10),
            (47, 127, 12, 10),
            (48, 128, 8, 33),
            (49, 129, 9, 10),
            (63, 200, 30, 10),
            (64, 257, 16, 2),
            (65, 2048, 16, 10),
            (95, 31, 24, 33),
            (97, 64, 20, 128),
            (127, 100, 30, 10),
            (129, 128, 32, 10),
            (191, 16, 40, 128),
            (193, 65, 50, 10),
            (257, 129, 60, 128),
            (257, 3, 40, 1),
        ]
    },
    # name: N against M x D, how self is told
    **{
        f"bank-{n}-{m}x{d}-k{k}-{kind}": partial(bank_case, n, m, d, 9, k, self_kind=kind, seed=n + m)
        for n, m, d, k, kind in [
            (1, 1, 1, 10, "none"),
            (1, 257, 65, 10, "none"),
            (64, 1, 31, 10, "none"),
            (65, 7, 17, 10, "none"),
            (97, 33, 63, 33, "none"),
            (7, 193, 128, 10, "offset"),
            (33, 65, 100, 1, "tensor"),
            (48, 48, 127, 10, "offset"),
            (49, 129, 15, 128, "tensor"),
            (63, 64, 257, 10, "tensor"),
            (129, 191, 16, 33, "offset"),
            (17, 95, 2048, 10, "tensor"),
        ]
    },
    "none-anchors": lambda: Case(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)),
    "none-anchors-but-candidates": lambda: replace(
        bank_case(3, 9, 5, 2), feats=torch.empty(0, 5), labels=torch.empty(0, dtype=torch.int64)
    ),
    "no-candidates": lambda: Case(torch.ones(4, 5), torch.zeros(4).long(), torch.ones(0, 5), torch.zeros(0).long()),
    "one-identity": lambda: replace(self_case(50, 20, 5), labels=torch.zeros(50).long()),
    "no-positives": lambda: replace(self_case(50, 20, 5), labels=torch.arange(50)),
    "no-positives-in-bank": lambda: replace(bank_case(20, 30, 9, 3), labels=torch.full((20,), 77)),
    "singletons-among-pairs": lambda: replace(
        self_case(51, 20, 9), labels=torch.arange(51) // 2 + (torch.arange(51) % 3 == 0) * 100
    ),
    "near-outside-support": lambda: _near_outside(60, 5),
    "near-outside-support-k1": lambda: _near_outside(35, 1),
    "duplicates": lambda: _duplicates(4, 10),
    "duplicate-groups-over-k": lambda: _duplicates(7, 4),
    "all-identical": lambda: Case(torch.full((37, 19), 0.25), torch.arange(37) % 4, k=5),
    "grid-1d": lambda: _grid(40, 1, 6),
    "grid-5d": lambda: _grid(70, 5, 10),
    "labels-extreme": lambda: _relabelled(_extreme),
    "labels-int32": lambda: _relabelled(lambda y: (y - 3).int()),
    "labels-int16": lambda: _relabelled(lambda y: (y - 3).short()),
    "labels-uint8": lambda: _relabelled(lambda y: (y + 248).to(torch.uint8)),
    "columns-strided": lambda: replace(self_case(33, 20, 6), feats=self_case(33, 40, 6).feats[:, ::2]),
    "columns-misaligned": lambda: replace(self_case(33, 20, 6), feats=self_case(33, 40, 6).feats[:, 1:21]),
    "rows-strided": lambda: replace(self_case(33, 20, 6), feats=self_case(66, 20, 6).feats[::2]),
    "transposed": lambda: replace(self_case(33, 20, 6), feats=self_case(20, 33, 6).feats.t()),
    "expanded": lambda: replace(self_case(33, 20, 6), feats=self_case(1, 20, 1).feats.expand(33, 20)),
    # Every anchor's row is in the bank, but the user says that it is not it: a neighbour at distance 0.
    "bank-of-unmarked-copies": lambda: replace(bank_case(30, 40, 12, 5, self_kind="offset"), self_index=None),
    "bank-strided": lambda: replace(
        bank_case(19, 30, 11, 4),
        candidates=bank_case(19, 60, 22, 4).candidates[::2, ::2],  # type: ignore[index]
        labels=torch.arange(38)[::2] % 4,
    ),
    "bank-labels-int32": lambda: replace(
        bank_case(19, 30, 11, 4, self_kind="tensor"),
        labels=bank_case(19, 30, 11, 4, self_kind="tensor").labels.int(),
        self_index=bank_case(19, 30, 11, 4, self_kind="tensor").self_index.int(),  # type: ignore[union-attr]
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that an uncertified screening gets wrong. Each: (rows, dims, seed) -> fp64 features


def _normal(rows: int, dims: int, seed: int) -> Tensor:
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _clusters(centres: int, noise: float) -> Callable[[int, int, int], Tensor]:
    def make(rows: int, dims: int, seed: int) -> Tensor:
        middle = torch.nn.functional.normalize(_normal(centres, dims, seed), dim=1)
        return middle[torch.arange(rows) % centres] + noise * _normal(rows, dims, seed + 1)

    return make


def _collapsed(offset: float, noise: float) -> Callable[[int, int, int], Tensor]:
    return lambda rows, dims, seed: offset * _normal(1, dims, seed) + noise * _normal(rows, dims, seed + 1)


def _with_rows(base: Callable[[int, int, int], Tensor], change: Callable[[Tensor], None]) -> Callable[..., Tensor]:
    def make(rows: int, dims: int, seed: int) -> Tensor:
        feats = base(rows, dims, seed)
        change(feats)
        return feats

    return make


def _spread_norms(low: float, high: float) -> Callable[[int, int, int], Tensor]:
    return lambda rows, dims, seed: _normal(rows, dims, seed) * torch.logspace(low, high, rows).double()[:, None]


def _outlier(feats: Tensor) -> None:
    feats[len(feats) // 2] *= 1000


def _zero_rows(feats: Tensor) -> None:
    feats[::4] = 0


ADVERSARIAL: dict[str, Callable[[int, int, int], Tensor]] = {
    "random": _normal,
    "unit-rows": lambda rows, dims, seed: torch.nn.functional.normalize(_normal(rows, dims, seed), dim=1),
    "clusters-1e-3": _clusters(8, 1e-3),
    "clusters-1e-4": _clusters(8, 1e-4),
    "clusters-1e-6": _clusters(8, 1e-6),
    "two-clusters": _clusters(2, 1e-5),
    "collapsed": _collapsed(1.0, 1e-4),
    "collapsed-to-rounding": _collapsed(1.0, 1e-7),
    "large-mean": _collapsed(1000.0, 1.0),
    "outlier-x1000": _with_rows(_normal, _outlier),
    "outlier-in-clusters": _with_rows(_clusters(4, 1e-4), _outlier),
    "all-identical": lambda rows, dims, seed: _normal(1, dims, seed).expand(rows, dims).clone(),
    "duplicate-groups": lambda rows, dims, seed: _normal(rows, dims, seed)[torch.arange(rows) % (rows // 23)],
    "norms-1e-20-to-1e18": _spread_norms(-20, 18),
    "norms-overflowing": _spread_norms(10, 30),
    "subnormal": lambda rows, dims, seed: 1e-40 * _normal(rows, dims, seed),
    "underflowing-squares": lambda rows, dims, seed: 1e-22 * _normal(rows, dims, seed),
    "bf16-exact": lambda rows, dims, seed: _normal(rows, dims, seed).bfloat16().double(),
    "bf16-exact-clusters": lambda rows, dims, seed: _clusters(8, 1e-2)(rows, dims, seed).bfloat16().double(),
    "zero-rows": _with_rows(_normal, _zero_rows),
    "small-integers": lambda rows, dims, seed: _normal(rows, dims, seed).round(),
    "one-hot": lambda rows, dims, seed: torch.eye(dims).double()[torch.arange(rows) % dims],
    "signs": lambda rows, dims, seed: _normal(rows, dims, seed).sign(),
}


def line_rows(rows: int, seed: int, *, dims: int = 64) -> Tensor:
    """Rows on one line, clustered about 33 points of it: a row is u times a pattern of signs.

    All elements of a row are as large as each other, so a copy in half precision moves a whole row along the line. No
    other rows come as close to what a bound allows: an error is all in the direction of the distances.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (dims,), generator=generator) * 2.0 - 1.0
    points = torch.randint(-16, 17, (rows,), generator=generator) / 16.0
    u = points + 2.0**-11 * (2 * torch.rand(rows, generator=generator) - 1)
    return u[:, None] * signs


def line_case(anchors: int, candidates: int | None = None, *, k: int, seed: int, large: int = 0) -> Case:
    """Rows on a line, in the self case or against a bank; the first `large` of the candidates are of one identity, and
    so is every other anchor."""
    everyone = anchors + (candidates or 0)
    feats = line_rows(everyone, seed)
    labels = random_labels(everyone, 12, seed=seed)
    first = 0 if candidates is None else anchors
    if large:
        labels[first : first + large] = 50
        labels[:anchors:2] = 50
    if candidates is None:
        return Case(feats, labels, k=k)
    return Case(feats[:anchors], labels[:anchors], feats[anchors:], labels[anchors:], k=k)


def adversarial_case(name: str, rows: int, dims: int, *, k: int = 10, dtype: torch.dtype = torch.float32) -> Case:
    """An adversarial batch in the self case; identities of 4 images cut across its clusters."""
    feats = ADVERSARIAL[name](rows, dims, 3)
    labels = torch.where(torch.arange(rows) % 5 == 0, 0, torch.arange(rows) // 4)
    return Case(feats.to(dtype), labels, k=k)
