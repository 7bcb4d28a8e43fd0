"""Runs that take a second: noise in Market-1501's layout, one colour an identity, and a configuration for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sn_ops.reid.config import Config
from sn_ops.reid.models import Output

HEIGHT, WIDTH = 48, 24  # the least that the small network takes


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: in work this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _image(file: Path, pid: int, random: np.random.Generator) -> None:
    colour = np.random.default_rng(pid).integers(40, 216, 3)
    pixels = colour + random.integers(-40, 40, (HEIGHT, WIDTH, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(file)


def write_market(root: Path, train: int = 6, test: int = 2) -> Path:
    """`train` + `test` people, two images of each by each of two cameras; the first of each is a query in the test."""
    random = np.random.default_rng(0)
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (root / folder).mkdir(parents=True)
    for pid in range(1, train + test + 1):
        for camera in (1, 2):
            for image in (1, 2):
                name = f"{pid:04d}_c{camera}s1_{image:06d}_01.jpg"
                folder = "bounding_box_train" if pid <= train else "query" if image == 1 else "bounding_box_test"
                _image(root / folder / name, pid, random)
    return root


def tiny_config(root: Path, out: Path, *assignments: str) -> Config:
    """Three epochs of three batches of 2 x 4 images, on one thread, evaluated after the second and the last."""
    return Config().override(
        "data.name=market1501", f"data.root={root}", "data.options.check_counts=false", f"data.height={HEIGHT}",
        f"data.width={WIDTH}", "data.identities=2", "data.images=4", "data.workers=0", "data.erase=0.5",
        "optim.epochs=3", "optim.warmup_epochs=1", "eval.every=2", "run.threads=1", "run.device=cpu",
        "run.log_every=2", f"run.out={out}", *assignments,
    )  # fmt: skip


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, without times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


class Restless(nn.Module):
    """A quick network with state beside its weights: dropout and batch norm."""

    def __init__(self, identities: int, *, norm: bool = True, dropout: float = 0.3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout),
            nn.AvgPool2d((4, 6)), nn.Flatten(), nn.Linear(24, 16),
        )  # fmt: skip
        self.classifier = nn.Linear(16, identities) if identities else None

    def forward(self, images: Tensor) -> Output | Tensor:
        embedding = self.body(images)
        if not self.training:
            return embedding
        return Output(embedding, None if self.classifier is None else self.classifier(embedding))
