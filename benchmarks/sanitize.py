"""One small call on every path of the CUDA forward and of the backward: what compute-sanitizer runs.

Shapes lie just beyond tile boundaries; features repeat and cluster, so that thresholds, buffers and ladder are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sn_ops

PATHS = 6
"""How many numbers `cuda_force_path` knows, the automatic choice included."""


def features(rows: int, dims: int, dtype: torch.dtype) -> Tensor:
    """Clusters, duplicates and an outlier, on the GPU."""
    generator = torch.Generator().manual_seed(rows)
    centres = torch.randn(7, dims, generator=generator)
    feats = centres[torch.arange(rows) % 7] + 1e-3 * torch.randn(rows, dims, generator=generator)
    feats[1::9] = feats[0]
    feats[rows // 2] *= 100
    return feats.to("cuda", dtype)


def call(feats: Tensor, k: int, candidates: Tensor | None) -> None:
    """Forward and backward, everything asked for."""
    feats = feats.clone().requires_grad_()
    more: dict[str, Any] = {}
    if candidates is not None:
        candidates = candidates.clone().requires_grad_()
        more = {"candidates": candidates, "candidate_labels": torch.arange(len(candidates), device="cuda") // 3}
    labels = torch.arange(len(feats), device="cuda") // 3
    sn_ops.sn_loss(feats, labels, k=k, backend="cuda", **more).backward()
    sn_ops.support_neighbors(feats, labels, k=k, backend="cuda", **more)


def main() -> None:
    """Every path, type and option that changes a kernel."""
    for path in range(PATHS):
        torch.ops.sn_ops.cuda_force_path(path)
        for dtype in (torch.float32, torch.bfloat16):
            call(features(50, 70, dtype), 5, None)
            call(features(150, 130, dtype), 10, None)
            call(features(40, 33, dtype), 10, features(300, 33, dtype))
    torch.ops.sn_ops.cuda_force_path(0)
    call(features(70, 65, torch.float64), 10, None)
    call(features(140, 65, torch.float32), 135, None)
    call(features(1500, 64, torch.float32), 10, None)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
