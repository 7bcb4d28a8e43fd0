"""What the loss costs in a whole training step of the paper's network: forward, loss, backward, optimiser.

    python benchmarks/bench_train_step.py            CPU: 32 images of 128 x 64, two minutes; GPU: 128 of 256 x 128
    python benchmarks/bench_train_step.py --quick    16 images of 64 x 32, some ten seconds
    python benchmarks/bench_train_step.py --json FILE    also machine, versions, commit and every sample

ResNet50 of sn_ops.reid with last stride 1 and 2048-d embeddings, Adam, identities x 4 random images. Contestants take
turns, a whole step each. The first line is the same step with a loss of next to no cost (a weighted sum), the least a
step can take. "loss" is forward and backward of the loss alone on features of this network, and "share" its part of
the step. On a CPU the processor seconds of all threads are given too, and the share of those: on a machine that others
use, read these. The pixels are random: nothing that is timed depends on what they show.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

import bench_loss
import harness
from baselines import Recipe
from contestants import Contestant, Setting, backend_contestants, rival_contestants
from inputs import IMAGES, Batch
from report import ms, percent, table
from sn_ops.reid.config import ModelConfig
from sn_ops.reid.models import build_model

FLOOR = "no loss"


@dataclasses.dataclass(frozen=True)
class Size:
    """One batch."""

    images: int
    height: int
    width: int

    @property
    def title(self) -> str:
        """How tables call it."""
        return f"{self.images} images of {self.height} x {self.width}"


SIZES = {"cpu": Size(32, 128, 64), "cuda": Size(128, 256, 128), "quick": Size(16, 64, 32)}


@dataclasses.dataclass
class Line:
    """One contestant."""

    name: str
    note: str
    step: harness.Timing | None = None
    loss: harness.Timing | None = None
    step_samples: list[float] = dataclasses.field(default_factory=list)
    loss_samples: list[float] = dataclasses.field(default_factory=list)
    step_processor: list[float] = dataclasses.field(default_factory=list)
    loss_processor: list[float] = dataclasses.field(default_factory=list)
    skipped: str | None = None

    @property
    def share(self) -> float | None:
        """The loss's part of the step."""
        return None if self.loss is None or self.step is None else self.loss.median / self.step.median

    @property
    def processor_share(self) -> float | None:
        """The loss's part of the step's processor seconds."""
        if not self.step_processor or not self.loss_processor:
            return None
        return statistics.median(self.loss_processor) / statistics.median(self.step_processor)


def counted(call: Callable[[], object], seconds: list[float], device: torch.device) -> Callable[[], object]:
    """The call, noting its processor seconds on a CPU; a GPU's work is not the processor's."""
    if device.type != "cpu":
        return call

    def run() -> None:
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)

    return run


class Step:
    """A network with its optimiser, and one training step of it."""

    def __init__(self, size: Size, device: torch.device, amp: str) -> None:
        torch.manual_seed(0)
        config = ModelConfig(name="resnet50", weights=None, last_stride=1, neck=False, dim=None)
        self.amp = torch.bfloat16 if amp == "bf16" else None
        self.model: nn.Module = build_model(config, 0).to(device).train()
        self.images = torch.randn(size.images, 3, size.height, size.width, device=device)
        if device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.images = self.images.to(memory_format=torch.channels_last)
        self.labels = torch.arange(size.images, device=device) // IMAGES
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-5, weight_decay=5e-4)
        self.device = device

    def features(self) -> Tensor:
        """Unit rows, fp32 `[images, 2048]`, recorded for the gradient."""
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            embedding: Tensor = self.model(self.images).embedding
        return normalize(embedding.float(), dim=1)

    def run(self, loss: Callable[[Tensor], Tensor]) -> None:
        """Forward, loss, backward, optimiser."""
        self.optimizer.zero_grad(set_to_none=True)
        loss(self.features()).backward()
        self.optimizer.step()


def losses_of(options: argparse.Namespace, device: torch.device) -> list[Contestant]:
    """sn_ops and plain PyTorch; a second way to write eager, and its compilation, with --slow alone."""
    names = [name for name in options.backends.split(",") if name]
    found = backend_contestants(names, [], device) + rival_contestants()
    return [contestant for contestant in found if options.slow or contestant.name not in ("cdist", "compile")]


def backward(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> None:
    """Forward and backward of a loss alone."""
    torch.autograd.grad(loss(leaf), leaf)


def measure(
    step: Step, contestants: list[Contestant], setting: Setting, budget: float, tick: Callable[[str], None]
) -> list[Line]:
    """Whole steps, then the losses alone; one list of contestants takes turns in each."""
    recipe = Recipe()
    with torch.no_grad():
        feats = step.features().detach()
    batch = Batch(feats, step.labels)
    weights = torch.randn(feats.shape, device=feats.device, generator=torch.Generator(feats.device).manual_seed(0))
    lines = [Line(FLOOR, "a weighted sum of the features")]

    def floor() -> None:
        step.run(lambda rows: (rows * weights).sum())

    steps = [harness.Task(FLOOR, counted(floor, lines[0].step_processor, step.device))]
    alone: list[harness.Task] = []
    timed = [lines[0]]
    for contestant in contestants:
        line = Line(contestant.name, contestant.note, skipped=contestant.limit(batch, recipe, setting))
        lines.append(line)
        if line.skipped is not None:
            continue
        timed.append(line)

        def loss(rows: Tensor, contestant: Contestant = contestant) -> Tensor:
            return contestant.run(batch, rows, recipe, "mean")

        leaf = feats.clone().requires_grad_()
        whole = counted(partial(step.run, loss), line.step_processor, step.device)
        single = counted(partial(backward, loss, leaf), line.loss_processor, step.device)
        steps.append(harness.Task(f"step, {line.name}", whole))
        alone.append(harness.Task(f"loss, {line.name}", single))
    harness.measure(alone, step.device, 0.2 * budget, tick)
    floor()  # the optimiser makes its state in the first step
    harness.measure(steps, step.device, budget, tick)
    for line, task in zip(timed, steps, strict=True):
        line.step, line.step_samples = harness.summarize(task.samples), task.samples
    for line, task in zip(timed[1:], alone, strict=True):
        line.loss, line.loss_samples = harness.summarize(task.samples), task.samples
    return lines


def show(title: str, lines: list[Line]) -> str:
    """A table; ratios are to the first line, footnotes say what was left out and why."""
    floor = lines[0].step
    assert floor is not None
    rows, notes = [], []
    for line in lines:
        if line.step is None:
            notes.append(f"  {line.name}: {line.skipped}")
            continue
        cells = [ms(line.step.median), percent(line.step), f"{line.step.median / floor.median:.3f}"]
        if line.loss is not None and line.share is not None:
            cells += [ms(line.loss.median), percent(line.loss), f"{100 * line.share:.2g} %"]
        else:
            cells += [""] * 3
        processor = [statistics.median(s) if s else None for s in (line.step_processor, line.loss_processor)]
        cells += ["" if seconds is None else ms(seconds) for seconds in processor]
        cells.append("" if line.processor_share is None else f"{100 * line.processor_share:.2g} %")
        rows.append([line.name, *cells, str(line.step.samples)])
    header = [
        title,
        "step ms",
        "IQR",
        "x no loss",
        "loss ms",
        "IQR",
        "share",
        "step CPU ms",
        "loss CPU ms",
        "CPU share",
    ]
    header.append("steps")
    left_out = ["left out:", *notes] if notes else []
    return "\n".join([table(header, rows), *left_out])


def size_of(options: argparse.Namespace) -> Size:
    """What one step sees.

    Raises:
        SystemExit: an image size that is none, or images that are no multiple of those an identity has.
    """
    default = SIZES["quick" if options.quick else options.device.partition(":")[0]]
    images = options.images or default.images
    if images < IMAGES or images % IMAGES:
        raise SystemExit(f"--images: expected a multiple of {IMAGES}, got {images}")
    if options.size is None:
        return Size(images, default.height, default.width)
    try:
        height, width = (int(part) for part in options.size.lower().split("x"))
    except ValueError:
        raise SystemExit(f"--size: expected HEIGHTxWIDTH, got {options.size!r}") from None
    if min(height, width) < 32:
        raise SystemExit(f"--size: expected at least 32 x 32, got {options.size!r}")
    return Size(images, height, width)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, help="images a batch, a multiple of 4")
    add("--size", metavar="HxW", help="of the images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--amp", choices=["off", "bf16"], default="off", help="network under autocast (%(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    add("--backends", default="", help="sn_ops backends (default: all usable)")
    add("--budget", type=float, help="seconds of sampling (default 60, 8 with --quick)")
    add("--slow", action="store_true", help="torch.cdist and torch.compile too")
    add("--quick", action="store_true", help="a small batch, some ten seconds")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is 1 if a contestant does not compute the loss."""
    options = parse(arguments)
    size, device = size_of(options), torch.device(options.device)
    torch.set_num_threads(options.threads)
    try:
        contestants = losses_of(options, device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    facts: dict[str, Any] = harness.provenance(device) | bench_loss.package_facts()
    try:
        bench_loss.check(contestants, bench_loss.TINY_CHECKS[:1], device, lambda _: None)
    except bench_loss.MismatchError as mismatch:
        print(f"self check failed: {mismatch}", file=sys.stderr)
        return 1
    print(bench_loss.heading(facts, contestants, argparse.Namespace(k=Recipe().k, dtype="float32")), flush=True)
    pace = "quick" if options.quick else "slow" if options.slow else "default"
    setting = Setting(options.threads, options.threads, pace, device)
    step = Step(size, device, options.amp)
    parameters = sum(parameter.numel() for parameter in step.model.parameters())
    print(f"ResNet50, {parameters / 1e6:.1f} M parameters, {options.threads} threads, autocast {options.amp}\n")
    with tqdm(file=sys.stderr, disable=None, bar_format="{desc}", leave=False) as bar:
        lines = measure(step, contestants, setting, options.budget or (8 if options.quick else 60), bar.set_description)
    print(show(size.title, lines))
    if options.json is not None:
        facts["load_average_at_end"] = [round(value, 2) for value in os.getloadavg()]
        record = {
            "provenance": facts,
            "size": dataclasses.asdict(size),
            "threads": options.threads,
            "amp": options.amp,
            "parameters": parameters,
            "lines": [
                dataclasses.asdict(line) | {"share": line.share, "processor_share": line.processor_share}
                for line in lines
            ],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
