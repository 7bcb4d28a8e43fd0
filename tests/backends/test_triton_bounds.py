"""The bounds of the screening, kernel by kernel, against the formulas of `screening.py` in float64.

A whole selection seldom shows a bound that is too tight: eta leaves more room than the rows of a test need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from sn_ops.triton import tuning
from support import problems
from support.backends import require
from support.triton_screens import launched, small_screens

K, ROWS = 20, 150


class Bounds(NamedTuple):
    """L_ij and U_ij of all pairs [ROWS, ROWS], float64, without the roundings outwards."""

    lower: torch.Tensor
    upper: torch.Tensor


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """The arguments of each kernel for rows whose residuals matter; every candidate is a sample."""
    require("triton")
    if not tuning.INTERPRETED:
        pytest.skip("looks at memory of the CPU")
    small_screens(monkeypatch, every=1, strip=160, capacity=256, short=256)
    return launched(monkeypatch, problems.line_case(ROWS, k=K, seed=1))


def bounds_of(half: torch.Tensor, scale: torch.Tensor, norm: torch.Tensor, rho: torch.Tensor) -> Bounds:
    rows = half.double() * scale[:ROWS, None].double()
    n, rho = norm[:ROWS].double(), rho[:ROWS].double()
    assert (rho > 0).sum() > 140
    eta = (1.28125 * half.shape[1] + 64) * 2.0**-23
    norms, product, rhos = n[:, None] + n[None, :], 2 * rows @ rows.T, rho[:, None] + rho[None, :]
    lower = (norms * (1 - eta) - product).clamp(min=0).sqrt() - rhos
    return Bounds(lower, (norms * (1 + eta) - product).clamp(min=0).sqrt() + rhos)


def test_least_bounds_of_samples(screened: dict[str, tuple[Any, ...]]) -> None:
    """A group's is not below the least U_ij of its samples, and hardly above it."""
    half, _, scale, norm, rho, *_ = screened["sample_kernel"][1:]
    least, groups = screened["sample_kernel"][-2:]
    upper = bounds_of(half, scale, norm, rho).upper
    # A tile of 32 columns has a group's 4 samples in its 4 slices of 8 columns, one in each.
    behind = torch.full((ROWS, 160 - ROWS), torch.inf, dtype=torch.float64)
    wanted = torch.cat([upper, behind], dim=1).view(ROWS, 5, 4, 8).amin(dim=2).view(ROWS, 40)
    assert groups == 40
    found, far = least[:ROWS].double(), wanted > 0.1  # nearer, the rounding of the product shows
    assert far.sum() > 5000
    found, wanted = found[far], wanted[far]
    assert (found >= wanted * (1 - 1e-4)).all() and (found <= wanted * 1.001).all()


def test_samples_have_no_period() -> None:
    """Identities that come again and again after as many candidates are all met, whatever that number is."""
    require("triton")
    if not tuning.INTERPRETED:
        pytest.skip("calls a kernel on the CPU")
    from sn_ops.triton import screening

    number, none, facts = torch.arange(8 * 4096.0), torch.zeros(8 * 4096), torch.zeros(3, 4096)
    screening.sampled_facts_kernel[(4,)](number, none, none, 4096, 4096, 8, 64, facts, R=1024)
    sample = facts[0].long()
    assert (sample // 8 == torch.arange(4096)).all()
    for period in (7, 16, 32, 64, 96, 100, 128, 256):
        assert len((sample % period).unique()) == period


def test_shortlists_leave_out_what_cannot_matter(screened: dict[str, tuple[Any, ...]]) -> None:
    """Those not above the K-th least U_ij of the buffer by their L_ij, and no others but on its very edge."""
    half = screened["screen_kernel"][1]
    scale, norm, rho = screened["shortlist_kernel"][1:4]
    count, buffer, short, short_count = screened["shortlist_kernel"][14:18]
    bounds = bounds_of(half, scale, norm, rho)
    assert buffer.shape[1] == 256 and int(count[:ROWS].max()) <= 256
    on_the_edge = 0
    for i in range(ROWS):
        kept = torch.tensor([int(entry) & 0x7FFFFFFF for entry in buffer[i, : int(count[i])]])
        kept = kept[kept != i]
        bound = float(bounds.upper[i, kept].sort().values[K - 1])
        found = set(short[i, : int(short_count[i])].tolist())
        lower = bounds.lower[i, kept]
        assert set(kept[lower <= bound].tolist()) <= found
        assert found <= set(kept[lower <= bound * (1 + 1e-4) + 1e-6].tolist())
        on_the_edge += int(((lower <= bound) & (lower + rho[i].double() + rho[kept].double() > bound * 1.001)).sum())
    assert on_the_edge > 10, "residuals decide about some"


def test_full_buffers_are_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors whose counter has passed the end of the buffer go to the fallback, all of them."""
    require("triton")
    if not tuning.INTERPRETED:
        pytest.skip("looks at memory of the CPU")
    small_screens(monkeypatch, strip=96, capacity=8, short=64, fallback_segments=1)
    case = problems.self_case(90, 40, 12, k=6)
    count, *_, queue, queued = launched(monkeypatch, case, "shortlist_kernel")["shortlist_kernel"][14:]
    full = (count[:90] > 8).nonzero().flatten()
    assert 4 < len(full) < 80
    assert sorted(queue[: int(queued)].tolist()) == full.tolist()
