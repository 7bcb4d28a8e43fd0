"""Reading, transforms, and augmentation that neither workers nor order change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sn_ops.reid import cli
from sn_ops.reid.config import DataConfig
from sn_ops.reid.data.images import UnreadableImageError, read_image
from sn_ops.reid.data.loading import MEAN, STD, ReIDImages, eval_transform, make_loader, train_transform
from sn_ops.reid.data.records import Sample
from sn_ops.reid.data.sampler import IdentitySampler

PLAIN = DataConfig(height=32, width=16, flip=0.0, erase=0.0, pad=0)
FULL = replace(PLAIN, flip=0.5, erase=0.5, pad=3)


def picture(height: int = 32, width: int = 16, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels(image: Tensor) -> np.ndarray:
    """0 to 255, from a standardised image; float64 `[H, W, 3]`."""
    values = image.double().numpy().transpose(1, 2, 0)
    return (values * np.array(STD) + np.array(MEAN)) * 255


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("images")
    found = []
    for i in range(14):
        path = folder / f"{i}.png"
        picture(seed=i).save(path)
        found.append(Sample(path, pid=10 + i // 4, camera=i % 3))
    return found


@pytest.fixture
def images(samples: list[Sample]) -> ReIDImages:
    return ReIDImages(samples, train_transform(FULL), {10: 0, 11: 1, 12: 2, 13: 3}, seed=5)


# ---- transforms -----------------------------------------------------------------------------------


def test_eval_transform_standardises() -> None:
    found = eval_transform(FULL)(picture())
    assert found.dtype == torch.float32 and found.shape == (3, 32, 16)
    expected = (np.asarray(picture()) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(found.numpy().transpose(1, 2, 0) - expected).max() < 1e-5


@pytest.mark.parametrize("size", [(100, 37), (20, 9), (64, 16)])
def test_resize_is_bilinear_and_antialiased(size: tuple[int, int]) -> None:
    """As Pillow's, which has a triangle over the shrunken pixel too; within a rounding of 8 bits."""
    image = picture(*size)
    for transform in (eval_transform(PLAIN), train_transform(PLAIN)):
        found = pixels(transform(image))
        expected = np.asarray(image.resize((16, 32), Image.Resampling.BILINEAR), dtype=float)
        assert np.abs(found - expected).max() < 1.6
        aliased = np.asarray(image.resize((16, 32), Image.Resampling.NEAREST), dtype=float)
        assert np.abs(found - aliased).max() > 20


def test_flip() -> None:
    plain = eval_transform(PLAIN)(picture())
    assert torch.equal(train_transform(replace(PLAIN, flip=1.0))(picture()), plain.flip(2))
    torch.manual_seed(0)
    half = train_transform(replace(PLAIN, flip=0.5))
    flipped = 0
    for _ in range(300):
        found = half(picture())
        flipped += torch.equal(found, plain.flip(2))
        assert torch.equal(found, plain) or torch.equal(found, plain.flip(2))
    assert abs(flipped - 150) < 4.5 * 300**0.5 / 2


def test_pad_and_crop() -> None:
    """A window of the image inside a black border; every offset comes up."""
    torch.manual_seed(0)
    transform = train_transform(replace(PLAIN, pad=2))
    bordered = np.pad(np.asarray(picture(), dtype=float), ((2, 2), (2, 2), (0, 0)))
    offsets = set()
    for _ in range(300):
        found = pixels(transform(picture()))
        at = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.abs(bordered[top : top + 32, left : left + 16] - found).max() < 0.01
        ]
        assert len(at) == 1
        offsets.add(at[0])
    assert len(offsets) == 25


def test_erasing() -> None:
    """One rectangle of the mean colour, of the size and as often as asked for; the rest is as it was."""
    torch.manual_seed(0)
    config = replace(PLAIN, height=64, width=32, erase=0.5)
    plain = eval_transform(config)(picture(64, 32))
    transform = train_transform(config)
    erased = 0
    for _ in range(200):
        found = transform(picture(64, 32))
        changed = (found != plain).any(0)
        if not bool(changed.any()):
            continue
        erased += 1
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        height, width = len(rows), len(columns)
        assert int(rows[-1] - rows[0]) + 1 == height and int(columns[-1] - columns[0]) + 1 == width
        assert bool(changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())
        assert bool((found[:, changed] == 0).all())
        assert 0.02 * 0.8 <= height * width / 2048 <= 0.4 * 1.1
        assert 0.3 * 0.8 <= height / width <= 3.34 * 1.3
    assert abs(erased - 100) < 4.5 * 200**0.5 / 2


# ---- items ----------------------------------------------------------------------------------------


def test_item(images: ReIDImages, samples: list[Sample]) -> None:
    for index in range(len(images)):
        image, label, camera, own = images[index]
        assert image.shape == (3, 32, 16) and image.dtype == torch.float32
        assert (label, camera, own) == (samples[index].pid - 10, samples[index].camera, index)
    assert images.labels == [sample.pid - 10 for sample in samples]
    assert images.cameras == [sample.camera for sample in samples]
    raw = ReIDImages(samples, eval_transform(PLAIN))
    assert raw[13][1] == 13 and raw.labels[0] == 10


def test_augmentation_is_a_function_of_seed_epoch_and_index(images: ReIDImages, samples: list[Sample]) -> None:
    forward = [images[i][0] for i in range(14)]
    backward = [images[i][0] for i in reversed(range(14))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        again = ReIDImages(samples, train_transform(FULL), seed=5)
        assert all(torch.equal(a, again[i][0]) for i, a in enumerate(forward))

    images.set_epoch(1)
    assert images.epoch == 1
    later = [images[i][0] for i in range(14)]
    other = ReIDImages(samples, train_transform(FULL), seed=6)
    assert sum(torch.equal(a, b) for a, b in zip(forward, later, strict=True)) <= 2
    assert sum(torch.equal(a, other[i][0]) for i, a in enumerate(forward)) <= 2
    images.set_epoch(0)
    assert all(torch.equal(a, images[i][0]) for i, a in enumerate(forward))


def test_an_image_twice_in_a_batch_is_augmented_twice(samples: list[Sample]) -> None:
    images = ReIDImages(samples, train_transform(replace(PLAIN, pad=8)), seed=0)
    batch = images.__getitems__([3, 3, 5, 3])
    assert torch.equal(batch[0][0], images[3][0]) and torch.equal(batch[2][0], images[5][0])
    assert not torch.equal(batch[0][0], batch[1][0]) and not torch.equal(batch[1][0], batch[3][0])
    again = images.__getitems__([5, 3, 3])
    assert torch.equal(again[1][0], batch[0][0]) and torch.equal(again[2][0], batch[1][0])


def test_generators_are_left_alone(images: ReIDImages) -> None:
    state, numpy_state = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    sampler = IdentitySampler(images.labels, images.cameras, 2, 3, seed=0)
    for loader in (make_loader(images, sampler=sampler), make_loader(images, batch_size=5)):
        assert sum(1 for _ in loader) == len(loader)
    assert torch.equal(state, torch.get_rng_state())
    assert numpy_state == str(np.random.get_state())  # noqa: NPY002


# ---- batches --------------------------------------------------------------------------------------


def epochs(images: ReIDImages, workers: int, numbers: tuple[int, ...], start: int = 0) -> list[list[Tensor]]:
    sampler = IdentitySampler(images.labels, images.cameras, 2, 5, seed=1)
    loader = make_loader(images, sampler=sampler, workers=workers)
    batches = []
    for epoch in numbers:
        images.set_epoch(epoch)
        sampler.set_epoch(epoch, start)
        batches += [list(batch) for batch in loader]
    return batches


def equal(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for batch, other in zip(a, b, strict=True) for x, y in zip(batch, other, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(images: ReIDImages, workers: int) -> None:
    """Workers that live through two epochs see the second one's number."""
    alone = epochs(images, 0, (0, 3))
    assert len(alone) == 4 and alone[0][0].shape == (10, 3, 32, 16)
    assert all(part.dtype == torch.int64 and part.shape == (10,) for part in alone[0][1:])
    assert equal(alone, epochs(images, workers, (0, 3)))
    assert not equal(alone[:2], alone[2:])
    assert equal(alone[3:], epochs(images, workers, (3,), start=1))


def test_in_order_without_a_sampler(images: ReIDImages) -> None:
    batches = list(make_loader(images, batch_size=6))
    assert [len(batch[0]) for batch in batches] == [6, 6, 2]
    assert torch.cat([batch[3] for batch in batches]).tolist() == list(range(14))
    assert torch.cat([batch[1] for batch in batches]).tolist() == images.labels


# ---- errors, and files that are unusual ------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    picture().convert(mode).save(path)
    found = ReIDImages([Sample(path, 1, 0)], eval_transform(PLAIN))[0][0]
    expected = np.asarray(picture().convert(mode).convert("RGB"), dtype=float)
    assert np.abs(pixels(found) - expected).max() < 0.01


@pytest.mark.parametrize("content", [None, b"", b"not an image", b"half"])
def test_unreadable(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "image.png"
    if content == b"half":
        picture().save(path)
        content = path.read_bytes()[:200]
    if content is not None:
        path.write_bytes(content)
    images = ReIDImages([Sample(path, 1, 0)], eval_transform(PLAIN))
    with pytest.raises(OSError, match=rf"^sn_ops.reid: images: expected an image, got {path}: .") as alone:
        images[0]
    # A DataLoader raises a worker's error again, with the worker's traceback as its text.
    with pytest.raises(OSError, match=rf"^sn_ops.reid: images: expected an image, got {path}: .") as from_worker:
        next(iter(make_loader(images, workers=1)))
    assert str(from_worker.value) == str(alone.value) and cli.exit_status(from_worker.value) == 2


def test_damage_of_any_kind_is_an_unreadable_image(tmp_path: Path) -> None:
    """Pillow raises other errors than OSError too; each becomes one message."""
    path = tmp_path / "image.bmp"
    picture().save(path)
    content = bytearray(path.read_bytes())
    content[18:26] = b"\xff\xff\x00\x00" * 2  # 65535 x 65535 pixels: Pillow's DecompressionBombError
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=rf"^sn_ops.reid: images: expected an image, got {path}: .*pixels"):
        read_image(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identities": {10: 0, 11: 1}}, "expected a pid among the 2 identities, got 12 of "),
        ({"seed": -1}, "seed: expected an int >= 0, got -1"),
    ],
)
def test_refuses(samples: list[Sample], change: dict[str, Any], message: str) -> None:
    transform: Callable[[Any], Tensor] = eval_transform(PLAIN)
    with pytest.raises(ValueError, match=message):
        ReIDImages(samples, transform, **change)
