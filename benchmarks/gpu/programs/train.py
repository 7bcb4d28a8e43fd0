"""The step "train": the share of the loss in a training step: ResNet50 of sn_ops.reid, AMP bf16, 256 x 128 pixels."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import torch

import manifest
import protocol
from device import Gpu, Pretended, open_device
from predict import Shape
from times import Loss, case_of, graph_samples, inputs_of, ours, pass_of, theirs, told

sys.path.append(str(manifest.HERE.parent))

import baselines
from bench_train_step import Size, Step

BATCHES = (64, 256)
ROUNDS = 20
WARM_UPS = 3


def seconds_of(device: Gpu | Pretended, call: Callable[[], object]) -> float:
    """Seconds of wall clock until the device has done it."""
    device.synchronize()
    start = time.perf_counter()
    call()
    device.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """A step without a loss, with ours and with eager PyTorch, in turns; the share is of the loss in a CUDA graph."""
    device = open_device("cpu")
    gpu = device.name == "cuda"
    figures = []
    for images in BATCHES if gpu else (4,):
        size = Size(images, 256, 128) if gpu else Size(images, 32, 32)
        step = Step(size, device.device, "bf16" if gpu else "none")
        shape = Shape(images, 2048)
        inputs = inputs_of(shape, device.device, 0) | {"labels": step.labels}
        weights = torch.linspace(-1, 1, 2048, device=device.device)
        own = ours(device.backend, shape.k)
        contestants: dict[str, Loss] = {
            "no loss": lambda _, feats: (feats * weights).sum(),  # noqa: B023
            "sn_ops": own,
            "eager": theirs(baselines.eager, shape.k),
        }
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(WARM_UPS + ROUNDS if gpu else 1):
            for name, loss in contestants.items():
                call = partial(step.run, partial(loss, inputs))
                seconds = seconds_of(device, call)
                if turn >= WARM_UPS or not gpu:
                    samples[name].append(seconds * 1e6)
        medians = {}
        for name, taken in samples.items():
            backend = "cuda" if name == "sn_ops" else "eager"
            case = case_of(shape, backend, "", None, "both", "called", taken, f"whole step, {name}")
            case |= {"label": f"step of {images} images, {name}", "expected_us": None}
            medians[name] = case["median_us"]
            told(device, case)
        alone = graph_samples(device, pass_of(own, [inputs], "both"), 1)
        case = case_of(shape, "cuda", "", None, "both", "graph", alone, "the loss alone")
        case |= {"label": f"loss of {images} images", "expected_us": None}
        told(device, case)
        share = 100 * case["median_us"] / medians["sn_ops"]
        figures.append(f"{images} images: {share:.2f} % of {medians['sn_ops'] / 1e3:.1f} ms")
        protocol.say(figure="the loss is " + "; ".join(figures))


if __name__ == "__main__":
    main()
