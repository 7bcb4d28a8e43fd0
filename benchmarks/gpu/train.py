"""The step "train": the share of the loss in a training step: ResNet50 of sn_ops.reid, AMP bf16, 256 x 128 pixels."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import manifest
import protocol
from device import Gpu, Pretended, open_device
from times import Shape, called_samples, case_of, inputs_of, ours, theirs, told

sys.path.append(str(manifest.HERE.parent))

import baselines
from bench_train_step import Size, Step

BATCHES = (64, 256)


def samples_of(device: Gpu | Pretended, step: Step, loss: Callable[[Tensor], Tensor]) -> list[float]:
    """Microseconds of a whole step."""
    return called_samples(device, lambda _: step.run(loss), 1)


def main() -> None:
    """A step without a loss, with ours and with eager PyTorch; then the loss alone."""
    device = open_device("cpu")
    figures = []
    for images in BATCHES if device.name == "cuda" else (4,):
        size = Size(images, 256, 128) if device.name == "cuda" else Size(images, 32, 32)
        step = Step(size, device.device, "bf16" if device.name == "cuda" else "none")
        shape = Shape(images, 2048)
        inputs = inputs_of(shape, device.device, 0) | {"labels": step.labels}
        began = time.perf_counter()
        weights = torch.linspace(-1, 1, 2048, device=device.device)
        medians = {}
        for name, backend, loss in (
            ("no loss", "eager", lambda _, feats: (feats * weights).sum()),  # noqa: B023
            ("sn_ops", "cuda", ours(device.backend, shape.k)),
            ("eager", "eager", theirs(baselines.eager, shape.k)),
        ):
            samples = samples_of(device, step, lambda feats, loss=loss: loss(inputs, feats))  # type: ignore[misc]  # noqa: B023
            case = case_of(shape, backend, "", None, "both", "called", samples, f"whole step, {name}")
            case["expected_us"] = None
            case["label"] = f"step of {images} images, {name}"
            medians[name] = case["median_us"]
            told(device, case)
        print(f"{images} images: {time.perf_counter() - began:.1f} s", flush=True)
        figures.append(f"{images} images: {100 * (medians['sn_ops'] / medians['no loss'] - 1):.2f} % beyond no loss")
        protocol.say(figure="; ".join(figures))


if __name__ == "__main__":
    main()
