"""What a trainer makes of its configuration: a step written out by hand, the memory's rows, chunks, precision, batches,
and which network best.pt is."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sn_ops
from sn_ops.reid.checkpoint import load_checkpoint
from sn_ops.reid.config import Config
from sn_ops.reid.data import load_split
from sn_ops.reid.ddp import Parallel
from sn_ops.reid.inference import scoring
from sn_ops.reid.models import Output
from sn_ops.reid.training import StoppedError, train
from sn_ops.reid.training.trainer import Trainer
from support.tiny_runs import one_thread, tiny_config, write_market


class Plain(nn.Module):
    """A minimal network: nothing random, and the same in training and evaluation."""

    def __init__(self, identities: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(54, 12), nn.Tanh(), nn.Linear(12, 8))
        self.classifier = nn.Linear(8, identities) if identities else None

    def forward(self, images: Tensor) -> Output | Tensor:
        embedding = self.body(images)
        if not self.training:
            return embedding
        return Output(embedding, None if self.classifier is None else self.classifier(embedding))


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs train `Plain` on one thread and write no report, which takes longer than the run."""
    monkeypatch.setattr(
        "sn_ops.reid.training.trainer.build_model", lambda config, identities, **options: Plain(identities)
    )
    monkeypatch.setattr("sn_ops.reid.report.build.write_run_report", lambda *args, **options: None)
    with one_thread():
        yield


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set."""
    return write_market(tmp_path_factory.mktemp("market"))


def trainer_of(config: Config, *, rank: int = 0, world: int = 1) -> Trainer:
    """A trainer in this process; as one of several ranks it never talks to the others."""
    torch.manual_seed(0)
    return Trainer(config, load_split(config.data), Parallel(rank, world, torch.device("cpu")))


# ---- a step -------------------------------------------------------------------------------------

LR, DECAY, MOMENTUM, CLIP = 0.01, 0.2, 0.8, 0.05
STEP = (
    "loss.identity=0.3", "loss.metric_weight=0.5", "loss.k=3", "loss.alpha=5", "loss.weight=0.2", f"optim.lr={LR}",
    f"optim.weight_decay={DECAY}", f"optim.momentum={MOMENTUM}", "optim.schedule=constant", "optim.warmup_epochs=0",
    "loss.label_smoothing=0.2",
)  # fmt: skip


def by_hand(name: str, value: Tensor, gradient: Tensor, kept: dict[str, Tensor], number: int) -> Tensor:
    """A parameter `[...]` after step `number` (from 1) of an optimiser, as its paper writes it."""
    if name == "adamw":  # decay of the value, apart from the gradient
        value = value - LR * DECAY * value
    else:  # decay as a part of the gradient
        gradient = gradient + DECAY * value
    if name == "sgd":
        kept["m"] = gradient if number == 1 else MOMENTUM * kept["m"] + gradient
        return value - LR * kept["m"]
    zero = torch.zeros_like(value)
    kept["m"] = 0.9 * kept.get("m", zero) + 0.1 * gradient
    kept["v"] = 0.999 * kept.get("v", zero) + 0.001 * gradient**2
    return value - LR * (kept["m"] / (1 - 0.9**number)) / ((kept["v"] / (1 - 0.999**number)).sqrt() + 1e-8)


@pytest.mark.parametrize("clip", [0.0, CLIP])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_two_steps_by_hand(market: Path, tmp_path: Path, name: str, clip: float) -> None:
    """The loss with its factors, its gradient, the largest norm, the optimiser with its decay: each written out."""
    trainer = trainer_of(tiny_config(market, tmp_path / "run", *STEP, f"optim.name={name}", f"optim.clip={clip}"))
    model = copy.deepcopy(trainer.model).train()
    kept: dict[str, dict[str, Tensor]] = {key: {} for key, _ in model.named_parameters()}
    trainer.begin_epoch()
    for number, batch in zip((1, 2), trainer.loader, strict=False):
        step = trainer.step(batch, tmp_path, stop=False)
        embedding, logits = model(batch[0])
        # sn_ops' own operator on unit rows; everything around it is of this test.
        metric, _ = sn_ops.sn_loss(
            F.normalize(embedding), batch[1], alpha=5.0, k=3, weight=0.2, squeeze="span", reduction="mean",
            return_stats=True,
        )  # fmt: skip
        target = 0.8 * F.one_hot(batch[1], 6) + 0.2 / 6
        identity = -(target * logits.log_softmax(1)).sum(1).mean()
        loss = 0.5 * metric + 0.3 * identity
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > 2 * CLIP
        factor = clip / norm if clip else torch.ones(())
        with torch.no_grad():
            for (key, value), gradient in zip(model.named_parameters(), gradients, strict=True):
                value.copy_(by_hand(name, value, factor * gradient, kept[key], number))
        assert step.values["loss"] == pytest.approx(loss.item(), rel=1e-5) and step.lr == LR
        assert step.values["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
        for key, value in trainer.model.named_parameters():
            torch.testing.assert_close(value, model.get_parameter(key), rtol=1e-4, atol=1e-5, msg=f"{key} {number}")


@pytest.mark.parametrize(("amp", "wanted"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision(market: Path, tmp_path: Path, amp: str, wanted: torch.dtype) -> None:
    """The network computes in the precision that was asked for, the loss in single."""
    trainer = trainer_of(tiny_config(market, tmp_path / "run", f"optim.amp={amp}", "loss.identity=1"))
    seen: list[torch.dtype] = []
    for name in ("body.2", "classifier"):
        trainer.model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.losses.metric.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    trainer.begin_epoch()
    trainer.step(next(iter(trainer.loader)), tmp_path, stop=False)
    assert seen == [wanted, wanted, torch.float32]
    assert trainer.scaler.is_enabled() == (amp == "fp16")


@pytest.mark.parametrize(("chunks", "sizes"), [(1, [8]), (2, [4, 4]), (3, [3, 3, 2])])
def test_chunks(market: Path, tmp_path: Path, chunks: int, sizes: list[int]) -> None:
    """A batch goes through the network in as many parts as asked: without a graph, then with one."""
    trainer = trainer_of(tiny_config(market, tmp_path / "run", f"optim.accumulate={chunks}"))
    seen: list[tuple[int, bool]] = []
    trainer.model.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    trainer.begin_epoch()
    trainer.step(next(iter(trainer.loader)), tmp_path, stop=False)
    without = [(size, False) for size in sizes] if chunks > 1 else []
    assert seen == without + [(size, True) for size in sizes]


# ---- memory -------------------------------------------------------------------------------------


def test_the_bank_that_the_loss_gets(market: Path, tmp_path: Path) -> None:
    """Over three epochs: the batch, then the last rows of earlier batches, but for images that are in the batch."""
    rows = 30  # more than the 24 images of an epoch, so that images of a batch are in the memory
    trainer = trainer_of(tiny_config(market, tmp_path / "run", f"loss.memory={rows}", "loss.k=3", "optim.lr=0.05"))
    past: list[tuple[int, int, Tensor]] = []  # image, label, embedding; the oldest first
    left_out = 0
    metric = trainer.losses.metric
    now: list[int] = []

    class Spy(nn.Module):
        def forward(
            self, embedding: Tensor, labels: Tensor, *, candidates: Tensor | None, candidate_labels: Tensor | None,
            self_index: int | None, group: Any,
        ) -> Any:  # fmt: skip
            nonlocal left_out
            last = past[-rows:]
            wanted = [row for row in last if row[0] not in now]
            left_out += len(last) - len(wanted)
            if not past:
                assert candidates is None and candidate_labels is None and self_index is None
            else:
                assert candidates is not None and candidate_labels is not None and self_index == 0
                n = len(embedding)
                assert torch.equal(candidates[:n], embedding) and torch.equal(candidate_labels[:n], labels)
                assert candidates.requires_grad
                found = zip(candidate_labels[n:].tolist(), candidates[n:].tolist(), strict=True)
                assert sorted(found) == sorted((label, row.tolist()) for _, label, row in wanted)
            past.extend(zip(now, labels.tolist(), embedding.detach().clone(), strict=True))
            return metric(
                embedding, labels, candidates=candidates, candidate_labels=candidate_labels, self_index=self_index,
                group=group,
            )  # fmt: skip

    trainer.losses = trainer.losses._replace(metric=Spy())  # type: ignore[arg-type]
    for _ in range(3):
        trainer.begin_epoch()
        for batch in trainer.loader:
            now[:] = batch[3].tolist()
            trainer.step(batch, tmp_path, stop=False)
    assert len(past) == 72 and left_out >= 24


# ---- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [True, False])
def test_cameras_of_a_batch(market: Path, tmp_path: Path, balanced: bool) -> None:
    """Two images of each identity: from two cameras, or from any."""
    options = ("data.images=2", f"data.camera_balanced={balanced}")
    trainer = trainer_of(tiny_config(market, tmp_path / "run", *options))
    pairs = []
    for trainer.epoch in range(5):
        trainer.begin_epoch()
        for batch in trainer.sampler:
            cameras = [trainer.images.cameras[index] for index in batch]
            pairs += [set(cameras[first : first + 2]) for first in range(0, len(cameras), 2)]
    assert len(pairs) == 30
    assert all(len(pair) == 2 for pair in pairs) == balanced


@pytest.mark.parametrize(
    ("options", "world", "refused"),
    [
        (("data.images=1", "data.identities=5"), 1, False),
        (("data.images=1", "data.identities=5", "optim.accumulate=2"), 1, True),  # batches of 3 identities
        (("data.images=1", "data.identities=3"), 2, False),  # one image a rank, three together
        (("data.images=1", "data.identities=3", "run.sync_batchnorm=false"), 2, True),
        (("data.images=2", "data.identities=3", "run.sync_batchnorm=false"), 2, False),
        (("data.images=2", "data.identities=3", "run.sync_batchnorm=false", "optim.accumulate=2"), 2, True),
    ],
)
def test_a_neck_needs_two_images(
    market: Path, tmp_path: Path, options: tuple[str, ...], world: int, refused: bool
) -> None:
    """Batch norm in training mode has no statistics of one image."""
    settings = ("model.neck=true", "loss.identity=1", "loss.metric=none", *options)
    config = tiny_config(market, tmp_path / "run", *settings)
    if refused:
        with pytest.raises(ValueError, match=r"model\.neck: expected at least 2 images in every chunk.* got 1: "):
            trainer_of(config, world=world)
    else:
        trainer_of(config, world=world)


# ---- best.pt ------------------------------------------------------------------------------------


def stop_after(step: int, done: int) -> None:
    """Sends this process a signal after a step."""
    if done == step:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("scores", "best"), [((0.9, 0.5, 0.2), 1), ((0.2, 0.9, 0.5), 2), ((0.2, 0.5, 0.9), 3), ((0.5, 0.5, 0.2), 1)]
)
@pytest.mark.parametrize("stopped", [False, True])
def test_best_is_the_highest(
    market: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: tuple[float, ...], best: int, stopped: bool
) -> None:
    """The network of the epoch with the highest mAP, the first of equals; a run that goes on remembers it."""
    real, coming = scoring.evaluate_model, list(scores)

    def scored(*args: Any, **options: Any) -> Any:
        found, value = real(*args, **options), coming.pop(0)
        return {
            name: dataclasses.replace(score, mAP_standard=value, mAP_market=1 - value) for name, score in found.items()
        }

    monkeypatch.setattr(scoring, "evaluate_model", scored)
    config = tiny_config(market, tmp_path / "run", "eval.every=1", "optim.lr=0.05")
    if stopped:
        with pytest.raises(StoppedError):
            train(config, progress=False, after_step=partial(stop_after, 4))  # in the second epoch
        train(resume=tmp_path / "run", progress=False)
    else:
        train(config, progress=False)
    assert not coming
    found = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    assert (found["epoch"], found["batch"]) == (best, 0)
    last = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["model"]
    same = all(torch.equal(value, last[key]) for key, value in found["model"].items())
    assert same == (best == 3)
