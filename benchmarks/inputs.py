"""What the benchmark runs on: synthetic features of several kinds, bundled real data, and the user's own embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

DIGITS = Path(__file__).resolve().parent / "data" / "digits.npz"
# Images per identity in synthetic batches, as in the paper's recipe.
IMAGES = 4
# Members of one cluster of near-duplicates.
CLUSTER = 256


@dataclass(frozen=True)
class Spec:
    """A batch by description, small enough to send to another process."""

    kind: str  # a name in KINDS, "digits" or "file"
    n: int = 0
    d: int = 0
    path: str = ""

    @property
    def title(self) -> str:
        """How tables call it."""
        if self.kind == "file":
            return Path(self.path).name
        return f"{self.n} x {self.d}" if self.kind == "random" else f"{self.n} x {self.d} {self.kind}"


DIGITS_SPEC = Spec("digits", 1797, 64)


@dataclass(frozen=True)
class Batch:
    """Anchors `feats` [N, D] with `labels` [N] int64, and candidates [M, D] with labels [M], or None: the anchors."""

    feats: Tensor
    labels: Tensor
    candidates: Tensor | None = None
    candidate_labels: Tensor | None = None

    @property
    def n(self) -> int:
        """Anchors."""
        return self.feats.shape[0]

    @property
    def d(self) -> int:
        """Dimensions."""
        return self.feats.shape[1]

    @property
    def pool(self) -> Tensor:
        """[M, D]: what neighbours are looked for in."""
        return self.feats if self.candidates is None else self.candidates

    @property
    def pool_labels(self) -> Tensor:
        """[M]."""
        return self.labels if self.candidate_labels is None else self.candidate_labels

    @property
    def m(self) -> int:
        """Candidates."""
        return self.pool.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On a device, features in `dtype`."""
        pool = None if self.candidates is None else self.candidates.to(device, dtype)
        pool_labels = None if self.candidate_labels is None else self.candidate_labels.to(device)
        return Batch(self.feats.to(device, dtype), self.labels.to(device), pool, pool_labels)


def _normal(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=generator)


def _random(n: int, d: int, g: torch.Generator) -> Tensor:
    return normalize(_normal(n, d, g), dim=1)


def _identities(n: int, d: int, g: torch.Generator) -> Tensor:
    centres = _normal(-(-n // IMAGES), d, g).repeat_interleave(IMAGES, dim=0)[:n]
    return normalize(centres + 0.7 * _normal(n, d, g), dim=1)


def _clusters(n: int, d: int, g: torch.Generator) -> Tensor:
    centres = normalize(_normal(-(-n // CLUSTER), d, g), dim=1)
    return normalize(centres.repeat_interleave(CLUSTER, dim=0)[:n] + _normal(n, d, g) * (1e-3 / d**0.5), dim=1)


def _collapsed(n: int, d: int, g: torch.Generator) -> Tensor:
    return normalize(_normal(1, d, g) + 1e-2 * _normal(n, d, g), dim=1)


def _identical(n: int, d: int, g: torch.Generator) -> Tensor:
    return normalize(_normal(1, d, g), dim=1).repeat(n, 1)


def _outlier(n: int, d: int, g: torch.Generator) -> Tensor:
    feats = _random(n, d, g)
    feats[n // 2] *= 1000.0
    return feats


KINDS: dict[str, tuple[Callable[[int, int, torch.Generator], Tensor], str]] = {
    "random": (_random, "independent directions, all distances near sqrt(2)"),
    "identities": (_identities, "4 images around each identity's centre, as in the middle of a training"),
    "clusters": (_clusters, "clusters of 256 near-duplicates (distances about 1e-3), identities mixed within them"),
    "collapsed": (_collapsed, "all rows within 1e-2 of one direction, as early in a training"),
    "identical": (_identical, "all rows equal: every distance is a tie"),
    "outlier": (_outlier, "random, one row 1000 times longer"),
}


def digits() -> Batch:
    """The bundled digits: 1797 images of 8 x 8 as L2-normalised rows [1797, 64] fp32, labels 0 to 9."""
    with np.load(DIGITS) as data:
        images, labels = data["images"], data["labels"]
    return Batch(
        normalize(torch.from_numpy(images.astype(np.float32)), dim=1), torch.from_numpy(labels.astype(np.int64))
    )


def from_file(path: str) -> Batch:
    """A user's .npz: `feats` [N, D] floating, `labels` [N] integer, optionally `candidates`, `candidate_labels`.

    Raises:
        ValueError: when an array is missing or has the wrong shape, naming it.
    """
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files}
    for required in ("feats", "labels", *(["candidate_labels"] if "candidates" in arrays else [])):
        if required not in arrays:
            raise ValueError(f"{path}: expected an array '{required}', got {sorted(arrays)}")
    for rows, ids in (("feats", "labels"), ("candidates", "candidate_labels")):
        if rows in arrays and (arrays[rows].ndim != 2 or arrays[ids].shape != arrays[rows].shape[:1]):
            shapes = f"{arrays[rows].shape} and {arrays[ids].shape}"
            raise ValueError(f"{path}: expected {rows} [N, D] and {ids} [N], got shapes {shapes}")
    pool = torch.from_numpy(arrays["candidates"]) if "candidates" in arrays else None
    pool_labels = torch.from_numpy(arrays["candidate_labels"].astype(np.int64)) if pool is not None else None
    labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    return Batch(torch.from_numpy(arrays["feats"]), labels, pool, pool_labels)


def make(spec: Spec) -> Batch:
    """The batch of a description on the CPU, fp32 (a file: its own dtype); the same for the same description."""
    if spec.kind == "digits":
        return digits()
    if spec.kind == "file":
        return from_file(spec.path)
    generator = torch.Generator().manual_seed(spec.n * 131071 + spec.d)
    feats = KINDS[spec.kind][0](spec.n, spec.d, generator)
    labels = torch.arange(spec.n) // IMAGES
    if spec.kind == "clusters":
        # An identity's images must not sit in one cluster by position.
        labels = labels[torch.randperm(spec.n, generator=generator)]
    return Batch(feats, labels)


def tiny(n: int, d: int, m: int | None, seed: int) -> Batch:
    """A small fp64 batch for checks: uneven identities, anchors without a positive, negative and large label values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-(2**62), -3, 0, 7, 2**40, 5, 6, 8])
    labels = values[torch.arange(n) // 3 % len(values)]
    # These have no positive.
    labels[:: max(3, n // 5)] = torch.arange(100, 100 + len(labels[:: max(3, n // 5)]))
    feats = normalize(_normal(n, d, generator).double(), dim=1)
    if m is None:
        return Batch(feats, labels)
    pool = normalize(_normal(m, d, generator).double(), dim=1)
    return Batch(feats, labels, pool, values[torch.randint(0, len(values), (m,), generator=generator)])
