"""ONNX export of an embedding network, and its check against PyTorch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import replacing
from ..requirements import need
from .embed import device_of

INPUT, OUTPUT = "images", "embeddings"


class _Embedding(nn.Module):
    """The network as retrieval uses it: one named input, and rows of unit length if asked."""

    def __init__(self, model: nn.Module, normalize: bool) -> None:
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(self, images: Tensor) -> Tensor:
        """`[n, 3, H, W]` to `[n, D]`."""
        out = self.model(images)
        return nn.functional.normalize(out) if self.normalize else out


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    height: int = 256,
    width: int = 128,
    normalize: bool = True,
    tolerance: float = 1e-4,
) -> Path:
    """Writes the network in eval mode as ONNX, for any batch size, and checks the file against PyTorch.

    The input is `images`, float32 `[n, 3, height, width]`, standardised as in training; the output is `embeddings`,
    float32 `[n, D]`. The file has the weights inside. It replaces an older one only after it has passed the check.

    Args:
        model: maps `[n, 3, H, W]` to `[n, D]` in eval mode; its mode is restored.
        path: the file to write.
        height: of the images, pixels.
        width: of the images, pixels.
        normalize: give rows unit length.
        tolerance: the largest difference from PyTorch, relative to the largest entry.

    Returns:
        The file.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: onnxruntime's embeddings differ from PyTorch's.
        RuntimeError: PyTorch cannot export the network.
        OSError: the file cannot be written.
        RuntimeError: PyTorch's exporter returned no program.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        need(module)
    path = Path(path)
    with _as_exported(model, normalize) as wrapped, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's, about its own use of torch.utils
        program = torch.onnx.export(
            wrapped,
            (_random_images(2, height, width, device_of(model)),),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("sn_ops.reid: onnx: expected a program from torch.onnx.export, got None")
    with replacing(path) as unfinished:
        program.save(unfinished, external_data=False)
        check_onnx(model, unfinished, height=height, width=width, normalize=normalize, tolerance=tolerance)
    return path


@torch.inference_mode()
def check_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    height: int = 256,
    width: int = 128,
    batches: Sequence[int] = (1, 2, 5),
    normalize: bool = True,
    tolerance: float = 1e-4,
) -> float:
    """The largest difference of an entry between embeddings of onnxruntime on a CPU and PyTorch, on random images.

    Args:
        model: as `export_onnx`.
        path: the ONNX file.
        height: of the images, pixels.
        width: of the images, pixels.
        batches: batch sizes to try.
        normalize: as `export_onnx`.
        tolerance: the largest difference, relative to the largest entry.

    Raises:
        ImportError: onnxruntime is missing.
        ValueError: the difference is larger, NaN, or of another shape.
    """
    runtime = need("onnxruntime")
    session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    with _as_exported(model, normalize) as wrapped:
        for n in batches:
            images = _random_images(n, height, width, device_of(model))
            ours = wrapped(images).float().cpu()
            theirs = torch.from_numpy(session.run([OUTPUT], {INPUT: images.cpu().numpy()})[0])
            if theirs.shape != ours.shape:
                raise ValueError(f"sn_ops.reid: onnx: expected shape {list(ours.shape)}, got {list(theirs.shape)}")
            difference = float((theirs - ours).abs().max())
            if not difference <= tolerance * float(ours.abs().max()):
                raise ValueError(
                    f"sn_ops.reid: onnx: expected embeddings within {tolerance:g} of PyTorch's, got {difference:g} "
                    f"in a batch of {n}"
                )
            worst = max(worst, difference)
    return worst


@contextmanager
def _as_exported(model: nn.Module, normalize: bool) -> Iterator[nn.Module]:
    """The network as it is exported, in eval mode; the model's own mode is restored."""
    training = model.training
    try:
        yield _Embedding(model, normalize).eval()
    finally:
        model.train(training)


def _random_images(n: int, height: int, width: int, device: torch.device) -> Tensor:
    """The same at every call."""
    return torch.randn(n, 3, height, width, device=device, generator=torch.Generator(device).manual_seed(0))
