"""Batches that the first screening cannot decide, and what the CUDA kernels on emulated threads make of them.

Import it after `simt_build.enable()`.
"""

from __future__ import annotations

import torch

from support import judge, simt
from support.problems import Case


def clusters(
    rows: int,
    dims: int,
    centers: int = 2,
    radius: float = 1e-4,
    *,
    bank: int = 0,
    k: int = 10,
    ids: int = 150,
    seed: int = 7,
) -> Case:
    """Rows around a few unit vectors, in no order; with a bank, anchors against it. ids=0: a cluster is an identity."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(centers, dims, generator=generator), dim=1)
    of = torch.randint(centers, (rows + bank,), generator=generator)
    feats = points[of] + radius * torch.randn(rows + bank, dims, generator=generator) / dims**0.5
    labels = torch.randint(ids, (rows + bank,), generator=generator) if ids else 3 + 5 * of
    if bank == 0:
        return Case(feats, labels, k=k)
    return Case(feats[:rows], labels[:rows], k=k, candidates=feats[rows:], candidate_labels=labels[rows:])


def check(case: Case, *, path: str = "screen", **settings: object) -> simt.Report:
    """The path selects as direct sums do, bit for bit. What it counted is returned. Buffers are as small as the
    fallback allows (192 entries for 10 neighbours), unless the settings say otherwise."""
    with simt.using(path="direct"):
        expected = judge.neighbors_of(case, "simt")
    with simt.using(path=path, **({"buffer_capacity": 1} | settings)):
        found = judge.neighbors_of(case, "simt")
    judge.assert_same_bits(found, expected)
    report = simt.last_report
    assert report is not None and report.path == path
    return report
