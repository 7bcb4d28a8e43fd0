"""Forwards of one launch against those of direct sums, on emulated threads. Import after `simt_build.enable()`."""

from __future__ import annotations

import torch

import sn_ops
from support import judge, simt
from support.problems import Case


def check(case: Case, path: str, **settings: object) -> None:
    """Selection, loss, statistics and gradients are those of the direct path, and the forward is one launch."""
    results = []
    for taken in ("direct", path):
        leaves = case.leaves()
        with simt.using(path=taken, **settings):
            neighbours = judge.neighbors_of(case, "simt")
            assert simt.last_report is not None and simt.last_report.path == taken
            assert simt.last_report.launches == (2 if taken == "direct" else 1)
            loss, stats = sn_ops.sn_loss(**leaves.arguments(), backend="simt", return_stats=True)
            results.append([loss.detach(), *stats, *torch.autograd.grad(loss, leaves.inputs()), *neighbours])
    judge.assert_same_bits(results[1], results[0])
