"""The parts of a run, and one step of it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint import random_state, set_random_state
from ..config import Config
from ..config.config import check_neck
from ..config.fields import wrong
from ..data import Split
from ..data.loading import ReIDImages, make_loader, outlive_stop_signals, train_transform
from ..data.sampler import IdentitySampler
from ..ddp import Parallel
from ..losses import Memory, build_losses
from ..models import build_model
from .gradcache import backward_in_chunks
from .nonfinite import report_nonfinite
from .schedule import learning_rate

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Step(NamedTuple):
    """The result of a step."""

    lr: float
    """The learning rate of the step."""
    values: dict[str, float]
    """"loss" first, its terms, the metric term's statistics, "gradient_norm"; the same on every rank."""
    stop: bool
    """Whether any rank was asked to stop."""


class Trainer:
    """Network, losses, optimiser, scaler, sampler and memory of a run, at a position in it.

    The position is (`epoch`, `batch`): the number of finished epochs, and of finished batches in the present epoch.

    Args:
        config: of the run.
        split: the data set.
        parallel: this process's place among those of the run.

    Raises:
        ValueError: options that a part refuses, or a batch that cannot be divided among ranks or chunks.
        OSError: missing weights.
        ImportError: a missing package.
    """

    def __init__(self, config: Config, split: Split, parallel: Parallel) -> None:
        self.config, self.parallel = config, parallel
        data, optim = config.data, config.optim
        identities = split.identities()
        self.images = ReIDImages(split.train, train_transform(data), identities, seed=config.run.seed)
        self.sampler = IdentitySampler(
            self.images.labels, self.images.cameras, data.identities, data.images, seed=config.run.seed,
            camera_balanced=data.camera_balanced, rank=parallel.rank, world=parallel.world,
        )  # fmt: skip
        self.steps = self.sampler.batches  # of an epoch
        smallest = len(identities) // self.steps // parallel.world * data.images
        if optim.accumulate > smallest:
            raise wrong("optim.accumulate", f"at most the {smallest} images of a rank's batch", optim.accumulate)
        if config.model.neck:
            # A batch norm over all ranks takes statistics of all their images.
            check_neck(smallest, optim.accumulate, parallel.world if config.run.sync_batchnorm else 1)
        self.loader = make_loader(
            self.images, sampler=self.sampler, workers=data.workers, pin_memory=parallel.device.type == "cuda"
        )
        self.loader.worker_init_fn = outlive_stop_signals
        self.num_identities = len(identities) if config.loss.identity > 0 else 0
        self.model = build_model(config.model, self.num_identities, image_size=(data.height, data.width))
        self.network = parallel.wrap(self.model, sync=config.run.sync_batchnorm)
        self.losses = build_losses(config.loss)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(self.parameters, config)
        self.scaler = torch.amp.GradScaler(parallel.device.type, enabled=optim.amp == "fp16")
        self.memory = Memory(config.loss.memory) if config.loss.memory else None
        self.epoch = self.batch = 0

    def begin_epoch(self) -> None:
        """Sets the loader and augmentation to the present position."""
        self.images.set_epoch(self.epoch)
        self.sampler.set_epoch(self.epoch, self.batch)
        self.network.train()

    @property
    def step_number(self) -> int:
        """The number of finished steps of the whole run."""
        return self.epoch * self.steps + self.batch

    def step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], folder: Path, *, stop: bool) -> Step:
        """One step on a batch of the loader: forward, backward, optimiser; advances the position.

        Args:
            batch: images float32 `[n, 3, H, W]`, labels, cameras and indices int64 `[n]`.
            folder: of the run, for nonfinite.json.
            stop: whether this process was asked to stop.

        Raises:
            NonFiniteLossError: the loss, or without a scaler a gradient, is NaN or infinite on any rank. Only gradients
                have changed.
        """
        optim, parallel = self.config.optim, self.parallel
        images, labels, _, indices = (tensor.to(parallel.device, non_blocking=True) for tensor in batch)
        if parallel.device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        lr = learning_rate(optim, self.epoch, self.batch, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()

        all_indices = indices if self.memory is None else parallel.gather_rows(indices)
        bank = None if self.memory is None else self.memory.candidates(all_indices)

        def loss_of(embedding: Tensor, logits: Tensor | None) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            loss, values = self._loss(embedding, logits, labels, bank)
            return self.scaler.scale(loss), (embedding.detach(), values)

        embedding, tensors = backward_in_chunks(self.network, images, optim.accumulate, loss_of, self._autocast)
        self.scaler.unscale_(self.optimizer)
        tensors["gradient_norm"] = self._gradient_norm()

        # The only synchronisation with the device in a step.
        values = dict(zip(tensors, torch.stack([v.double() for v in tensors.values()]).tolist(), strict=True))
        # A scaler skips steps with infinite gradients itself, and lowers the scale.
        checked = {name: v for name, v in values.items() if name != "gradient_norm" or not self.scaler.is_enabled()}
        bad = not all(abs(value) < float("inf") for value in checked.values())
        flags = parallel.sum(torch.tensor([float(stop), float(bad)], device=parallel.device)).tolist()
        if flags[1]:
            raise report_nonfinite(
                folder, rank=parallel.rank, position={"epoch": self.epoch + 1, "step": self.step_number + 1},
                values=checked, samples=[self.images.samples[i] for i in indices.tolist()], embedding=embedding,
                model=self.model,
            )  # fmt: skip
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.memory is not None:
            self.memory.push(parallel.gather_rows(embedding), parallel.gather_rows(labels), all_indices)
        self.batch += 1
        if self.batch == self.steps:
            self.epoch, self.batch = self.epoch + 1, 0
        return Step(lr, values, flags[0] > 0)

    def _loss(
        self, embedding: Tensor, logits: Tensor | None, labels: Tensor, bank: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and the values to log."""
        loss, group = self.config.loss, self.parallel.group
        candidates, candidate_labels = bank if bank is not None else (None, None)
        if bank is not None and group is None:
            # The batch first, with its gradients; with a group the losses add it themselves.
            candidates, candidate_labels = torch.cat([embedding, bank[0]]), torch.cat([labels, bank[1]])
        metric, stats = self.losses.metric(
            embedding, labels, candidates=candidates, candidate_labels=candidate_labels,
            self_index=0 if bank is not None and group is None else None, group=group,
        )  # fmt: skip
        total = loss.metric_weight * metric
        values = {"metric": metric.detach(), **stats}
        if self.losses.identity is not None and logits is not None:
            identity, stats = self.losses.identity(logits, labels, group=group)
            total = total + loss.identity * identity
            values |= {"identity": identity.detach(), **stats}
        return total, {"loss": total.detach(), **values}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        half = _HALF.get(self.config.optim.amp)
        return contextlib.nullcontext() if half is None else torch.autocast(self.parallel.device.type, half)

    def _gradient_norm(self) -> Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.config.optim.clip > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.optim.clip, norm)
        return norm

    # ---- checkpoints ----------------------------------------------------------------------------

    def network_state(self) -> dict[str, Any]:
        """The part of a checkpoint that using the network needs."""
        return {
            "num_identities": self.num_identities,
            "epoch": self.epoch,
            "batch": self.batch,
            "model": self.model.state_dict(),
        }

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that resuming needs; all ranks must call it.

        Learning rate, sampler and augmentation need no state: they are functions of the seed and the position.
        """
        return {
            **self.network_state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "memory": None if self.memory is None else self.memory.state_dict(),
            "random": self.parallel.all_gather_object(random_state()),
        }

    def load(self, state: Mapping[str, Any]) -> bool:
        """Loads the state of a checkpoint.

        Returns:
            False if the number of ranks differs, so that random generators (dropout) start anew.

        Raises:
            LookupError, TypeError, ValueError, AttributeError, RuntimeError: contents that are missing or do not fit;
                see `checkpoint.restoring`.
        """
        self.model.load_state_dict(state["model"])
        _restore(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"], self.parallel.device)
        epoch, batch, epochs = int(state["epoch"]), int(state["batch"]), self.config.optim.epochs
        if not 0 <= epoch * self.steps + batch <= epochs * self.steps or not 0 <= batch < self.steps:
            raise ValueError(
                f"sn_ops.reid: checkpoint: expected a position in {epochs} epochs of {self.steps} batches, got epoch "
                f"{epoch}, batch {batch}"
            )
        self.epoch, self.batch = epoch, batch
        if len(state["random"]) != self.parallel.world:
            return False
        set_random_state(state["random"][self.parallel.rank])
        return True


def _optimizer(parameters: list[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    optim = config.optim
    if optim.name == "sgd":
        return torch.optim.SGD(parameters, optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
    kind = torch.optim.Adam if optim.name == "adam" else torch.optim.AdamW
    return kind(parameters, optim.lr, weight_decay=optim.weight_decay)


def _restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimiser's state, and checks what PyTorch does not: names and shapes.

    Raises:
        ValueError: other options, or tensors of other names or shapes.
        LookupError, TypeError, AttributeError: parts that are missing or of another type.
    """
    options = [set(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if [set(group) for group in optimizer.param_groups] != options:
        raise ValueError("sn_ops.reid: checkpoint: expected the options of the optimiser, got others")
    names = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = optimizer.state.get(parameter, {})
            fits = all(not isinstance(v, Tensor) or v.dim() == 0 or v.shape == parameter.shape for v in kept.values())
            if not fits or set(kept) not in (set(), names):
                raise ValueError(
                    f"sn_ops.reid: checkpoint: expected {', '.join(sorted(names))} of shape {list(parameter.shape)} "
                    f"from the optimiser, got {', '.join(map(str, kept))}"
                )
