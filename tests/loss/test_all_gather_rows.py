"""`sn_ops.distributed.all_gather_rows`: the rows of all ranks, and gradients that return to their owners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support import loss_on_ranks
from support.judge import same_bits
from support.ranks import RankError, Ranks

SIZES = [(5,), (3, 3), (2, 5), (4, 0, 3), (0, 0), (1, 2, 3, 4)]


def rows_of(sizes: tuple[int, ...], *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [(100 * torch.randn(size, *shape, generator=generator)).to(dtype) for size in sizes]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("sizes", SIZES)
def test_rows_in_rank_order(ranks: Ranks, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every rank holds all rows, bit for bit, and knows which are its own."""
    for shape in ((7,), (), (2, 3), (0,)):
        rows = rows_of(sizes, *shape, dtype=dtype)
        for rank, found in enumerate(ranks.run(range(len(sizes)), loss_on_ranks.gather_rows, rows)):
            assert found.everyone.dtype == dtype and found.everyone.equal(torch.cat(rows))
            assert found.start == sum(sizes[:rank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_return_to_their_owner(ranks: Ranks, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """The sum of what all ranks give a rank's rows, added in rank order in the accumulation type, rounded once."""
    rows = rows_of(sizes, 3, 4, dtype=dtype)
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(sum(sizes), 3, 4, generator=generator).to(dtype) for _ in sizes]
    total = torch.zeros(sum(sizes), 3, 4, dtype=torch.promote_types(dtype, torch.float32))
    for gradient in upstream:
        total += gradient
    expected = total.to(dtype).split(list(sizes))
    for rank, found in enumerate(ranks.run(range(len(sizes)), loss_on_ranks.gather_rows, rows, upstream)):
        assert found.gradient is not None and found.gradient.dtype == dtype
        assert same_bits(found.gradient, expected[rank])


def test_collectives(ranks: Ranks) -> None:
    """The rows' numbers, the rows, and one way back; ranks of one size need no broadcasts."""
    rows = rows_of((3, 3), 4)
    for found in ranks.run((0, 1), loss_on_ranks.gather_rows, rows, [torch.ones(6, 4)] * 2):
        assert found.collectives == ["_all_gather_single"] * 2 + ["all_to_all_single"]


def test_second_derivatives_are_refused(ranks: Ranks) -> None:
    """Not silently wrong: backward is a collective that autograd cannot look into."""
    for outcome in ranks.outcomes((0, 1), loss_on_ranks.gather_and_differentiate_twice, rows_of((2, 2), 3)):
        assert isinstance(outcome, RankError) and "differentiate twice" in str(outcome.error)


@pytest.mark.parametrize(
    ("rows", "of_group", "error", "message"),
    [
        ([1.0], True, TypeError, "sn_ops: rows: expected a tensor, got list"),
        (
            torch.tensor(1.0),
            True,
            ValueError,
            "sn_ops: rows: expected a tensor of at least one dimension, got a scalar",
        ),
        (torch.ones(2, 2), False, TypeError, "sn_ops: group: expected"),
    ],
)
def test_bad_arguments(ranks: Ranks, rows: Any, of_group: bool, error: type[Exception], message: str) -> None:
    (outcome,) = ranks.outcomes((0,), loss_on_ranks.gather_what_cannot_be, rows, of_group)
    assert isinstance(outcome, RankError) and type(outcome.error) is error and message in str(outcome.error)
