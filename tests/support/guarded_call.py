"""A program: calls of the CUDA kernels on emulated threads whose inputs end where nothing may be read.

Each forward and backward must give the bits that it gives from ordinary memory. A read behind an input ends the
program, so a test runs it in a process of its own.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import sn_ops
from support import memory, problems, simt_build
from support.cuda_paths import PATHS
from support.problems import Case


def guarded(case: Case) -> Case:
    """The same case in memory that ends with it."""
    moved: dict[str, Any] = {
        name: memory.at_the_end(x.contiguous()) for name, x in vars(case).items() if isinstance(x, Tensor)
    }
    return replace(case, **moved)


def results(case: Case) -> list[Tensor]:
    """Neighbours, loss and gradients."""
    leaves = case.leaves()
    found = sn_ops.support_neighbors(**case.arguments(), backend="simt")
    loss = sn_ops.sn_loss(**leaves.arguments(), reduction="none", backend="simt")
    gradients = torch.autograd.grad(loss, leaves.inputs(), torch.linspace(1, 2, len(loss)))
    return [*found, loss.detach(), *gradients]


def cases() -> list[Case]:
    """Rows of whole and of broken packs and stages. D of 384: the last slice of a row is half as long as the others; of
    332: of the backward's last slice of 24 bytes a lane some lanes have a pack and no half."""
    whole = problems.self_case(41, 384, 9, k=5, seed=1)
    halves = problems.self_case(41, 332, 9, k=5, seed=6)
    broken = problems.self_case(41, 70, 9, k=5, seed=2)
    bank = problems.bank_case(9, 67, 384, 9, k=5, self_kind="tensor", seed=3)
    broken_bank = problems.bank_case(9, 67, 70, 9, k=5, self_kind="offset", seed=4)
    large = replace(problems.bank_case(12, 140, 64, 3, k=5, seed=5), candidate_labels=torch.zeros(140).long())
    return [whole, halves, broken, bank, broken_bank, large, whole.to(torch.float64), bank.to(torch.float16)]


def main() -> int:
    simt_build.enable()
    from support import simt

    for case in cases():
        # Each path, then each width of the backward's slices that is more than a pack, half warps, and resident rows.
        planned = [(path, 0, 0) for path in PATHS]
        widths = [("direct", lanes, width) for lanes, width in ((32, 24), (32, 32), (16, 16), (16, 24), (16, 32))]
        resident = [("direct", 0, width) for width in (16, 32, 128)]
        for path, lanes, width in planned + widths + resident:
            partition = {0: "resident" if width > 0 else "auto", 16: "always", 32: "never"}[lanes]
            with simt.using(path=path, lane_bytes=width, target_lanes=lanes, partition=partition):
                expected = results(case)
                for one, other in zip(expected, results(guarded(case)), strict=True):
                    assert torch.equal(one, other), f"{path}, {case.feats.dtype}, {tuple(case.feats.shape)}"
    print("read nothing behind its inputs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
