"""What the screening knows of short rows, of which a warp takes two or four: the CUDA kernels on emulated threads.

A fact of a row that another row of its warp had a part in shows in the selection, or in who has to be screened again.
"""

from __future__ import annotations

import pytest
import torch

from support import simt_build
from support.problems import Case

simt_build.enable()
from support.rungs import check  # noqa: E402

SHORT = (1, 7, 8, 9, 63, 64, 65, 120, 127, 128, 129, 192, 256, 257)
"""About 64 and 128 elements: the rows of a warp are four, two, then one."""


def spread(rows: int, dims: int, seed: int = 0) -> torch.Tensor:
    """Rows of lengths from 2^-4 to 2^3, in no order: neighbours in a warp differ."""
    generator = torch.Generator().manual_seed(1000 * seed + dims)
    directions = torch.nn.functional.normalize(torch.randn(rows, dims, generator=generator), dim=1)
    return directions * 2.0 ** torch.randint(-4, 4, (rows, 1), generator=generator)


@pytest.mark.parametrize("dims", SHORT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_every_length(dims: int, dtype: torch.dtype) -> None:
    """97 rows: the last block has one, for some of the lanes of its only warp."""
    labels = torch.arange(152) % 11
    feats = spread(152, dims).to(dtype)
    alone = check(Case(feats[:97], labels[:97], k=5), buffer_capacity=0)
    against = check(
        Case(feats[:51], labels[:51], k=5, candidates=feats[51:], candidate_labels=labels[51:]), buffer_capacity=0
    )
    if dims >= 7:  # on a line many are too near
        assert (alone.rescreened, alone.fallen_back, against.rescreened, against.fallen_back) == (0, 0, 0, 0)


@pytest.mark.parametrize("dims", [40, 64, 100, 128, 200])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 2.0**60), (torch.float32, 2.0**20)], ids=str)
@pytest.mark.parametrize("row", [1, 71, 98])
def test_a_row_out_of_range_is_alone_with_it(dims: int, dtype: torch.dtype, scale: float, row: int) -> None:
    """Its products would overflow, or it its copy: it has no bounds. The others of its warp have."""
    feats = spread(99, dims, seed=1)
    feats[row] *= scale
    report = check(Case(feats.to(dtype), torch.arange(99) % 11, k=5), buffer_capacity=0)
    assert (report.rescreened, report.fallen_back) == (0, 1)


@pytest.mark.parametrize("dims", [40, 64, 100, 128, 200])
def test_rows_that_are_the_mean(dims: int) -> None:
    """Three of four candidates are: the first k + 1 stand for all of them."""
    feats = torch.nn.functional.normalize(spread(2000, dims, seed=2)) * (torch.arange(2000) % 4 == 3)[:, None]
    labels = torch.arange(2000) % 631
    report = check(Case(feats[:80], labels[:80], k=5, candidates=feats, candidate_labels=labels), buffer_capacity=512)
    assert report.fallen_back == 0
