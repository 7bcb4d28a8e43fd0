"""k-reciprocal re-ranking: against sets and dictionaries, from the definition."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sn_ops.reid.evaluation import ReRank, RerankedDistances, evaluate, rerank
from support import retrieval_oracle as oracle


def clusters(seed: int, q: int, g: int, d: int, people: int) -> tuple[Tensor, Tensor]:
    """Unit rows in overlapping clusters, float64 so that selections are those of the oracle."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(people, d, generator=generator, dtype=torch.float64)
    rows = centres[torch.randint(0, people, (q + g,), generator=generator)]
    rows = torch.nn.functional.normalize(rows + 0.7 * torch.randn(q + g, d, generator=generator, dtype=torch.float64))
    return rows[:q], rows[q:]


def matrix(distances: RerankedDistances) -> Tensor:
    """The whole matrix, computed in blocks of three queries."""
    q = distances.shape[0]
    return torch.cat([distances.block(start, min(q, start + 3)).rows for start in range(0, q, 3)])


@pytest.mark.parametrize(
    ("k1", "k2", "lam"),
    [
        (20, 6, 0.3), (7, 3, 0.3), (5, 1, 0.5), (6, 2, 0.0), (6, 40, 1.0), (1, 1, 0.3), (200, 6, 0.3),
        (6, 7, 0.3), (6, 8, 0.3), (4, 6, 0.3), (6, 40, 0.3), (6, 200, 0.3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("people", [4, 15])
def test_agrees_with_the_definition(k1: int, k2: int, lam: float, people: int) -> None:
    """Every distance but for its rounding to float32; even and odd k1 / 2, no expansion, k beyond the data,
    expansion over fewer, as many and more images than R is chosen from."""
    query, gallery = clusters(k1 + people, 13, 60, 6, people)
    ours = matrix(RerankedDistances(query, gallery, ReRank(k1, k2, lam)))
    theirs = oracle.reranked(query.numpy(), gallery.numpy(), k1, k2, lam)
    assert ours.shape == (13, 60) and ours.dtype == torch.float32
    assert np.abs(ours.numpy() - theirs).max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_select_the_same_neighbours(dtype: torch.dtype) -> None:
    """Where no two distances are close the type of the sums does not matter."""
    query, gallery = (x.to(dtype) for x in clusters(1, 10, 50, 6, 6))
    theirs = oracle.reranked(query.double().numpy(), gallery.double().numpy(), 10, 4, 0.3)
    ours = matrix(RerankedDistances(query, gallery, ReRank(10, 4)))
    assert np.abs(ours.numpy() - theirs).max() < 1e-6


def test_scores_are_those_of_the_definitions_matrix() -> None:
    """`evaluate(rerank=)` against the oracle from features to scores, and better than without on noisy clusters."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = clusters(3, 20, 100, 8, 8)
    centres = torch.cat([query, gallery])
    ids = torch.cdist(centres, centres[::15]).argmin(1) + 1
    cameras = torch.randint(0, 3, (120,), generator=generator)
    labels = (ids[:20], cameras[:20], ids[20:], cameras[20:])
    ours = evaluate(query, labels[0], labels[1], gallery, *labels[2:], rerank=ReRank(10, 3), max_rank=10)
    distances = oracle.reranked(query.numpy(), gallery.numpy(), 10, 3, 0.3).astype(np.float32)
    theirs = oracle.score(oracle.hits(distances, *(x.numpy() for x in labels)), 10)
    assert ours.cmc.tolist() == pytest.approx(theirs.cmc, abs=1e-6)
    assert (ours.mAP_standard, ours.mAP_market, ours.mINP) == pytest.approx(
        (theirs.mean_ap, theirs.mean_ap_market, theirs.mean_inp), abs=1e-6
    )
    plain = evaluate(query, labels[0], labels[1], gallery, *labels[2:])
    assert ours.mAP != plain.mAP


def test_the_cosine_takes_directions() -> None:
    """Lengths do not matter; a row without a direction is an error."""
    query, gallery = clusters(5, 8, 40, 6, 5)
    scaled = RerankedDistances(query * 3, gallery * torch.rand(40, 1) + 1e-3 * gallery, ReRank(8, 3), "cosine")
    assert torch.allclose(matrix(scaled), matrix(RerankedDistances(query, gallery, ReRank(8, 3))), atol=1e-7)
    with pytest.raises(ValueError, match="expected no row of zeros with metric 'cosine'"):
        RerankedDistances(query, 0 * gallery, ReRank(), "cosine")


def test_equal_images() -> None:
    """Every distance 0: an image is its own first neighbour, nothing is divided by 0, all else is ties."""
    query, gallery = torch.ones(3, 4).double(), torch.ones(30, 4).double()
    ours = matrix(RerankedDistances(query, gallery, ReRank(5, 2)))
    assert np.abs(ours.numpy() - oracle.reranked(query.numpy(), gallery.numpy(), 5, 2, 0.3)).max() < 1e-7


def test_steps_are_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short steps over anchors, lists and entries give the bits of long ones."""
    query, gallery = clusters(7, 9, 80, 6, 6)
    whole = matrix(RerankedDistances(query, gallery, ReRank(9, 4)))
    monkeypatch.setattr(rerank, "_ANCHORS", 7)
    monkeypatch.setattr(rerank, "_halves", lambda features, backend: False)
    monkeypatch.setattr(rerank, "_ENTRIES", 50)
    assert torch.equal(matrix(RerankedDistances(query, gallery, ReRank(9, 4))), whole)


@pytest.mark.parametrize("bad", [{"k1": 0}, {"k2": 0}, {"lam": 1.5}, {"lam": -0.1}])
def test_constants_out_of_range(bad: dict[str, Any]) -> None:
    """The message has the constants."""
    with pytest.raises(ValueError, match="expected k1 >= 1, k2 >= 1 and 0 <= lam <= 1, got ReRank"):
        ReRank(**bad)


def test_a_missing_scipy_is_named_with_its_extra() -> None:
    """Importing the package needs none of the extra's packages."""
    code = (
        "import sys\n"
        "for name in ('scipy', 'matplotlib', 'PIL', 'onnx', 'onnxruntime', 'torchvision', 'h5py', 'yaml'):\n"
        "    sys.modules[name] = None\n"
        "import torch, sn_ops, sn_ops.reid.evaluation as e, sn_ops.reid.report\n"
        "try: e.RerankedDistances(torch.rand(2, 3), torch.rand(4, 3), e.ReRank())\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "expected the package 'scipy'" in run.stdout and "pip install 'sn_ops[reid]'" in run.stdout
