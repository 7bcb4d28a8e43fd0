"""Embedding files, ranking a folder, ONNX against PyTorch."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sn_ops.reid import cli
from sn_ops.reid.inference import (
    Embeddings,
    check_onnx,
    embed_images,
    export_onnx,
    image_files,
    load_embeddings,
    rank_images,
    save_embeddings,
)
from sn_ops.reid.report import write_ranking

image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed: pip install 'sn_ops[reid]'")

HEIGHT, WIDTH = 32, 16


class Small(nn.Module):
    """A network with everything that behaves differently in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, H, W]` to `[n, 12]`."""
        return self.body(x).mean((2, 3))


@pytest.fixture
def model() -> Small:
    """With running statistics that are not the initial ones, in training mode."""
    torch.manual_seed(0)
    network = Small().train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, HEIGHT, WIDTH))
    return network


def transform(image: Any) -> Tensor:
    """To [3, H, W] in [0, 1]."""
    small = image.resize((WIDTH, HEIGHT))
    return torch.tensor(list(small.tobytes()), dtype=torch.float32).view(HEIGHT, WIDTH, 3).permute(2, 0, 1) / 255


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine images in two folders, two of them equal, and a file that is none."""
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.zeros(0)
    for i in range(8):
        noise = torch.randint(0, 256, (HEIGHT * WIDTH * 3,), generator=generator, dtype=torch.uint8)
        noise[i * 150 :] = 20 * i
        image = image_module.frombytes("RGB", (WIDTH, HEIGHT), bytes(noise.tolist()))
        image.save(root / ("deep" if i % 2 else ".") / f"{i}.png")
    image_module.frombytes("RGB", (WIDTH, HEIGHT), bytes(noise.tolist())).save(root / "8.png")
    (root / "notes.txt").write_text("no image")
    return root


def test_embeddings_are_those_of_the_network_in_eval_mode(model: Small, folder: Path) -> None:
    """For any batch size; the mode is restored, and running statistics do not change."""
    paths = image_files(folder)
    assert [path.name for path in paths] == [
        "0.png",
        "2.png",
        "4.png",
        "6.png",
        "8.png",
        "1.png",
        "3.png",
        "5.png",
        "7.png",
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[int] = []
    features = embed_images(model, paths, transform, batch_size=4, tick=seen.append)
    assert model.training and seen == [4, 4, 1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        expected = model(torch.stack([transform(image_module.open(path).convert("RGB")) for path in paths]))
    assert torch.allclose(features, nn.functional.normalize(expected), atol=1e-6)
    assert torch.allclose(embed_images(model, paths, transform, normalize=False), expected, atol=1e-6)
    assert not model.training


def test_a_signal_to_all_processes_leaves_the_images_to_be_read(model: Small, folder: Path) -> None:
    """Schedulers send SIGTERM to the readers too; the run decides when to stop, so they ignore it."""
    reader = os.getpid()

    def signalled(image: Any) -> Tensor:
        assert os.getpid() != reader
        if image.getpixel((0, 0)) == first:
            signal.raise_signal(signal.SIGTERM)
        return transform(image)

    paths = image_files(folder)
    first = image_module.open(paths[0]).convert("RGB").getpixel((0, 0))
    features = embed_images(model, paths[:2], signalled, workers=1, batch_size=1)
    assert torch.equal(features, embed_images(model, paths[:2], transform, batch_size=1))


def test_embedding_files(model: Small, folder: Path, tmp_path: Path) -> None:
    """A file gives back what it was given; another one is refused."""
    paths = [str(path) for path in image_files(folder)]
    written = Embeddings(paths, embed_images(model, paths, transform))
    read = load_embeddings(save_embeddings(tmp_path / "e.npz", written))
    assert read.paths == paths and torch.equal(read.features, written.features)
    with pytest.raises(ValueError, match=r"expected a file name that ends in \.npz"):
        save_embeddings(tmp_path / "e.bin", written)
    with pytest.raises(
        ValueError, match=r"embeddings: expected floating point features \[2, D\], one row a path, got "
    ):
        Embeddings(paths[:2], written.features)


TWO = np.array(["a.png", "b.png"])


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, "paths"),
        ({"paths": TWO}, "features"),
        ({"paths": TWO, "features": np.ones((1, 3), np.float32)}, r"features float32 \[1, 3\], not .* \[2, D\]"),
        ({"paths": TWO, "features": np.ones((3, 3), np.float32)}, r"features float32 \[3, 3\], not .* \[2, D\]"),
        ({"paths": TWO, "features": np.ones(2, np.float32)}, r"features float32 \[2\], not"),
        ({"paths": TWO, "features": np.float32(1)}, r"features float32 \[\], not"),
        ({"paths": TWO, "features": np.ones((2, 3), np.int64)}, r"features int64 \[2, 3\], not floating point"),
        ({"paths": TWO, "features": np.ones((2, 3), np.complex64)}, "features complex64"),
        ({"paths": TWO, "features": np.array([["x"], ["y"]])}, "features <U1"),
        ({"paths": np.arange(2), "features": np.ones((2, 3))}, r"got paths int64 \[2\], not text \[n\]"),
        ({"paths": TWO[:, None], "features": np.ones((2, 3))}, r"got paths <U5 \[2, 1\], not text \[n\]"),
    ],
)
def test_other_arrays_are_no_embeddings(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    """The message has the file and what is wrong in it."""
    file = tmp_path / "other.npz"
    np.savez(file, **arrays)
    with pytest.raises(ValueError, match=f"^sn_ops.reid: embeddings: .* features and paths in {file}: .*{reason}"):
        load_embeddings(file)


def test_damaged_embedding_files(tmp_path: Path) -> None:
    """Cut off anywhere, or with other bytes: what was written, or an error that names the file."""
    written = Embeddings([f"{i}.png" for i in range(3)], torch.eye(3))
    whole = save_embeddings(tmp_path / "whole.npz", written).read_bytes()
    file = tmp_path / "bad.npz"
    generator = np.random.default_rng(0)
    damaged = [b"", b"nonsense", *(whole[:length] for length in range(1, len(whole), 7))]
    for _ in range(300):
        changed = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            changed[place] = generator.integers(0, 256)
        damaged.append(bytes(changed))
    refused: list[str] = []
    for content in damaged:
        file.write_bytes(content)
        try:
            assert len(load_embeddings(file).features) == 3
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > len(damaged) / 2
    message = f"sn_ops.reid: embeddings: expected arrays features and paths in {file}: "
    assert all(text.startswith(message) for text in refused)
    np.save(tmp_path / "one.npy", np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"in .*one\.npy: got an \.npy file of a single array"):
        load_embeddings(tmp_path / "one.npy")
    with pytest.raises(FileNotFoundError):
        load_embeddings(tmp_path / "none.npz")
    # Written by others, in other precisions.
    np.savez(file, paths=TWO, features=np.ones((2, 3), ">f8"))
    assert load_embeddings(file).features.dtype is torch.float32


def test_ranking_a_folder(model: Small, folder: Path, tmp_path: Path) -> None:
    """The equal image is first, the query itself is left out, and stored embeddings give the same list."""
    query = folder / "8.png"
    ranking = rank_images(model, transform, query, folder, top=100)
    assert len(ranking) == 8 and ranking[0].path.name == "7.png" and ranking[0].distance < 1e-6
    distances = [found.distance for found in ranking]
    assert distances == sorted(distances) and query not in [found.path for found in ranking]
    paths = [str(path) for path in image_files(folder)]
    stored = Embeddings(paths, embed_images(model, paths, transform))
    again = rank_images(model, transform, query, stored, top=3)
    assert [found.path for found in again] == [found.path for found in ranking[:3]]
    text = write_ranking(tmp_path / "list.html", query, ranking[:3]).read_text()
    assert text.count("<img ") == 4 and "7.png" in text


def test_what_cannot_be_embedded(model: Small, folder: Path, tmp_path: Path) -> None:
    """Missing folders and files, files that are no image, networks that return something else: by name."""
    with pytest.raises(FileNotFoundError, match="expected a folder, got"):
        image_files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="got none"):
        image_files(tmp_path / "empty")
    for workers in (0, 1):
        with pytest.raises(OSError, match=r"^sn_ops\.reid: images: expected an image, got .*notes\.txt: .") as caught:
            embed_images(model, [folder / "0.png", folder / "notes.txt"], transform, workers=workers)
        assert cli.exit_status(caught.value) == 2
    with pytest.raises(ValueError, match=r"model: expected output \[1, D\], got \[1, 8, 16, 8\]"):
        embed_images(model.body[0], [folder / "0.png"], transform)
    with pytest.raises(ValueError, match="expected at least one path"):
        embed_images(model, [], transform)


# ---- ONNX -------------------------------------------------------------------------------------------------------

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'sn_ops[reid]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'sn_ops[reid]'")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'sn_ops[reid]'")


def test_onnx_computes_what_pytorch_does(model: Small, tmp_path: Path) -> None:
    """For batch sizes that it was not exported with; unit rows; the network's mode is put back."""
    path = export_onnx(model, tmp_path / "m.onnx", height=HEIGHT, width=WIDTH)
    assert model.training
    assert check_onnx(model, path, height=HEIGHT, width=WIDTH, batches=(1, 3, 17)) < 1e-5
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = torch.rand(4, 3, HEIGHT, WIDTH)
    (out,) = session.run(["embeddings"], {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(out).norm(dim=1), torch.ones(4), atol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx"]


def test_a_file_of_another_network_does_not_pass(model: Small, tmp_path: Path) -> None:
    """The check fails, and no file is left or replaced."""
    path = export_onnx(model, tmp_path / "m.onnx", height=HEIGHT, width=WIDTH, normalize=False)
    with pytest.raises(ValueError, match=r"expected embeddings within 0\.0001 of PyTorch's, got"):
        check_onnx(model, path, height=HEIGHT, width=WIDTH)  # without the normalisation
    before = path.read_bytes()
    with pytest.raises(ValueError, match="expected embeddings within"):
        export_onnx(model, path, height=HEIGHT, width=WIDTH, tolerance=0.0)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
