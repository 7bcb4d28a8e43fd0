"""The loss trains: a small network on real images, judged by retrieval on images of the half it has not seen."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import sn_ops
from support.backends import device_of
from support.problems import on


def mean_average_precision(feats: Tensor, labels: Tensor) -> float:
    """Every image as a query against all others by Euclidean distance: the mean over queries of average precision."""
    feats = functional.normalize(feats.double(), dim=1)
    distance = torch.cdist(feats, feats).fill_diagonal_(float("inf"))
    order = distance.argsort(dim=1, stable=True)[:, :-1]
    hits = (labels[order] == labels[:, None]).double()
    precision = hits.cumsum(dim=1) / torch.arange(1, hits.shape[1] + 1)
    return float(((precision * hits).sum(dim=1) / hits.sum(dim=1)).mean())


def test_mean_average_precision_by_hand() -> None:
    """Points on a circle, at 0, 1, 3, 7 and 20 degrees."""
    angles = torch.deg2rad(torch.tensor([0.0, 1.0, 3.0, 7.0, 20.0]))
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 0, 1, 0, 1])
    # Orders: 0: 1+ 3 7+ 20; 1: 0+ 3 7+ 20; 3: 1 0 7 20+; 7: 3 1+ 0+ 20; 20: 7 3+ 1 0.
    expected = [(1 + 2 / 3) / 2, (1 + 2 / 3) / 2, 1 / 4, (1 / 2 + 2 / 3) / 2, 1 / 2]
    assert mean_average_precision(points, labels) == pytest.approx(sum(expected) / 5)


def test_digits(full_speed_backend: str) -> None:
    """Raw pixels of the unseen half reach a mAP of about 0.69, the trained embedding about 0.95."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target).long()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[: len(order) // 2], order[len(order) // 2 :]

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48 * 4, 64),
    ).to(device_of(full_speed_backend))  # fmt: skip
    criterion = sn_ops.SNLoss(k=10, alpha=10.0, backend=full_speed_backend)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    members = [train[labels[train] == digit] for digit in range(10)]
    losses = []
    for _ in range(120):
        picked = [rows[torch.randperm(len(rows), generator=generator)[:12]] for rows in members]
        batch = torch.cat(picked)
        images, identities = on(full_speed_backend, (pixels[batch], labels[batch]))
        loss = criterion(functional.normalize(network(images), dim=1), identities)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    network.eval()
    with torch.no_grad():
        trained = mean_average_precision(network(on(full_speed_backend, pixels[test])).cpu(), labels[test])
    raw = mean_average_precision(pixels[test].flatten(1), labels[test])
    assert 0.6 < raw < 0.75
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert trained > raw + 0.2 and trained > 0.9, f"mAP {raw:.3f} -> {trained:.3f}"
