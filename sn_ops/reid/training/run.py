"""Training a network: from a configuration to a run's folder."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import (
    check_resumable,
    data_fingerprint,
    find_checkpoint,
    load_checkpoint,
    random_state,
    restoring,
    save_checkpoint,
    set_random_state,
)
from ..config import Config, ConfigError, from_dict, to_yaml
from ..data import Split, load_split
from ..ddp import processes
from ..files import replace_json, replace_text
from ..inference import scoring
from ..report import build
from ..requirements import need
from .log import RunLog
from .schedule import learning_rate
from .signals import StoppedError, StopSignals
from .trainer import Trainer

RUNS = Path("runs")
"""The folder of runs without `run.out`."""


def train(
    config: Config | None = None,
    *,
    resume: Path | None = None,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
) -> Path:
    """Trains a network, evaluates it and writes a report.

    The run's folder gets config.yaml, checkpoints/last.pt (the whole state of training), checkpoints/best.pt (the
    network with the highest mAP, for a look only: evaluations use the test images, and scores.json is of the last
    network), metrics.jsonl, scores.json, report.html and, with `run.tensorboard`, tensorboard/.

    SIGTERM or SIGINT stops the run after the present step, with a checkpoint. On a CPU a stopped and resumed run gives
    the same bits as an uninterrupted one: in the network, and in metrics.jsonl apart from times. Under torchrun every
    rank calls this; see `ddp.ranks`. The process's random generators, number of threads and choice of deterministic
    algorithms are restored afterwards.

    Args:
        config: the configuration; None: that of the resumed run.
        resume: a run's folder or its checkpoint, to continue in that folder. Fields that decide what is trained must
            not differ; `run.out` is that of the resumed run.
        progress: show a progress bar on stderr.
        after_step: called with the number of each finished step of the run, from 1.

    Returns:
        The run's folder.

    Raises:
        ConfigError: an invalid configuration, or a folder that has a run; a ValueError.
        CheckpointError: a corrupt checkpoint, or one of another run; a ValueError.
        ValueError: a data set that is not as expected, or options that a part refuses.
        FileNotFoundError: data or a checkpoint is missing.
        StoppedError: a signal stopped the run; the checkpoint is written. Its `exit_status` is `EXIT_STOPPED`.
        NonFiniteLossError: the loss is NaN or infinite; nonfinite.json describes the batch. Its `exit_status` is
            `EXIT_NONFINITE`.
        ImportError: a package of the extra `reid` is missing.
    """
    checkpoint = None if resume is None else find_checkpoint(resume, "last")
    state = None if checkpoint is None else load_checkpoint(checkpoint)
    if config is None:
        if state is None:
            raise ConfigError("sn_ops.reid: train: expected a configuration or a run to resume, got neither")
        config = from_dict(state["config"])
    elif state is not None:  # config.yaml must name the folder that the run is in
        config = dataclasses.replace(
            config, run=dataclasses.replace(config.run, out=from_dict(state["config"]).run.out)
        )
    for package in ("yaml", "tqdm", "PIL.Image", "matplotlib", "scipy"):  # fail now, not after hours
        need(package)
    with _process_settings(config), processes(config.run.device) as parallel:
        if parallel.is_main:
            split = load_split(config.data)
        parallel.barrier()  # rank 0 renders or unpacks the data set, if needed
        if not parallel.is_main:
            split = load_split(config.data)
        scoring.check_evaluation(split)
        data = data_fingerprint(split.train)
        if checkpoint is not None and state is not None:
            check_resumable(state, checkpoint, config, data)
        trainer = Trainer(config, split, parallel)
        folder = parallel.all_gather_object(_folder(config, checkpoint) if parallel.is_main else Path())[0]
        if parallel.is_main:
            replace_text(folder / "config.yaml", to_yaml(config))
        log = RunLog(
            folder, every=config.run.log_every, steps=trainer.steps * config.optim.epochs, writes=parallel.is_main,
            progress=progress, tensorboard=config.run.tensorboard,
        )  # fmt: skip
        # Each rank draws its own dropout; a resumed run continues its generators.
        torch.manual_seed(config.run.seed + 1_000_003 * parallel.rank)
        with log, StopSignals() as stop:
            run = _Run(trainer, split, folder, log, stop, data)
            if state is None or checkpoint is None:
                run.start(None)
            else:
                with restoring(checkpoint):
                    run.start(state)
            run.go(after_step)
    return folder


@contextmanager
def _process_settings(config: Config) -> Iterator[None]:
    """Sets seeds, threads and determinism of the process, and restores them afterwards."""
    before, threads = random_state(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    uninitialized: Any = torch.utils.deterministic  # a module with a property, which mypy does not see
    filling: bool = uninitialized.fill_uninitialized_memory
    if config.run.deterministic:
        # cuBLAS reads it at its start, and is not deterministic without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        # An operation without a deterministic form is allowed: PyTorch warns and names it.
        torch.use_deterministic_algorithms(config.run.deterministic, warn_only=True)
        # Otherwise PyTorch fills every torch.empty, which only helps operations that read uninitialised memory.
        uninitialized.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = not config.run.deterministic
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        random.seed(config.run.seed)
        np.random.seed(config.run.seed % 2**32)  # noqa: NPY002 - for users of the global generator
        torch.manual_seed(config.run.seed)
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        uninitialized.fill_uninitialized_memory = filling
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(threads)
        set_random_state(before)


def _folder(config: Config, checkpoint: Path | None) -> Path:
    """The run's folder, made if necessary."""
    if checkpoint is not None:
        return checkpoint.resolve().parent.parent
    if config.run.out is None:
        names = (f"{config.data.name}-{config.loss.metric}-{number:03}" for number in itertools.count(1))
        folder = next(RUNS / name for name in names if not (RUNS / name).exists())
    else:
        folder = Path(config.run.out)
        if (folder / "checkpoints" / "last.pt").exists():
            raise ConfigError(
                f"sn_ops.reid: run.out: expected a folder without a run, or --resume {folder} to go on with the one "
                f"that is there, got {folder}"
            )
        if (folder / "checkpoints").exists() or (folder / "metrics.jsonl").exists():
            raise ConfigError(
                f"sn_ops.reid: run.out: expected a folder without a run, got {folder}, whose run has no checkpoint to "
                "go on from: remove the folder, or give another one"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Run:
    """The loop over epochs, and what happens between them."""

    def __init__(self, trainer: Trainer, split: Split, folder: Path, log: RunLog, stop: StopSignals, data: str) -> None:
        self.trainer, self.split, self.folder, self.log, self.stop = trainer, split, folder, log, stop
        self.data = data
        self.config, self.parallel = trainer.config, trainer.parallel
        self.last = folder / "checkpoints" / "last.pt"
        self.best = -1.0  # mAP of best.pt
        self.due = False  # whether the network is to be evaluated before the next step

    def start(self, state: dict[str, Any] | None) -> None:
        """Begins the run, or loads the state of a checkpoint.

        Raises:
            Exception: as `Trainer.load`.
        """
        if state is not None:
            self.best, self.due = float(state["best"]), bool(state["due"])
            if not self.trainer.load(state):
                self.log.say(
                    f"The checkpoint is of {len(state['random'])} ranks, this run has {self.parallel.world}: random "
                    "numbers of the network (dropout) begin anew."
                )
        self.log.start(self.trainer.step_number, None if state is None else state["log"])

    def go(self, after_step: Callable[[int], None] | None) -> None:
        """Runs to the end, from the present position."""
        trainer, total = self.trainer, self.config.optim.epochs
        last = learning_rate(self.config.optim, total - 1, trainer.steps - 1, trainer.steps)
        while True:
            if trainer.epoch == total:
                self.log.flush(total, trainer.step_number, last)
            if self.due:
                self._evaluate(final=trainer.epoch == total)
                self.due = False
            if trainer.epoch == total:
                return
            self._epoch(after_step)
            if self.due or trainer.epoch % self.config.run.checkpoint_every == 0:
                self._save()

    def _epoch(self, after_step: Callable[[int], None] | None) -> None:
        """Runs the rest of the epoch."""
        trainer, every = self.trainer, self.config.eval.every
        epoch = trainer.epoch
        trainer.begin_epoch()
        for batch in trainer.loader:
            step = trainer.step(batch, self.folder, stop=bool(self.stop.name))
            self.log.step(epoch + 1, trainer.step_number, step.lr, step.values)
            if trainer.batch == 0:  # the epoch is over
                self.due = trainer.epoch == self.config.optim.epochs or (every > 0 and trainer.epoch % every == 0)
            if after_step is not None:
                after_step(trainer.step_number)
            if step.stop:
                self._save()
                raise StoppedError(self.stop.name or "a signal to another rank", self.last)

    def _save(self) -> None:
        state = self.trainer.state()  # on every rank
        if self.parallel.is_main:
            state |= {"data": self.data, "log": self.log.state(), "best": self.best, "due": self.due}
            save_checkpoint(self.last, state, self.config)
        self.parallel.barrier()

    def _evaluate(self, *, final: bool) -> None:
        """Scores the network; at the end writes scores.json and the report."""
        if self.parallel.is_main:
            before = random_state()
            with self.stop.at_once(self.last):
                self._score(final)
            set_random_state(before)
        self.parallel.barrier()

    def _score(self, final: bool) -> None:
        trainer, device = self.trainer, self.parallel.device
        asked = None if final else False  # None: as configured
        scores = scoring.evaluate_model(
            trainer.model, self.split, self.config, device=device, rerank=asked, multi_query=asked
        )
        name, single = next(iter(scores.items()))
        numbers = single.as_dict()
        self.log.write({"epoch": trainer.epoch, "step": trainer.step_number, **numbers})
        self.log.say(
            f"epoch {trainer.epoch}, {name}: mAP ({single.average_precision}) {100 * single.mAP:.2f} %, "
            f"rank-1 {100 * numbers['rank1']:.2f} %"
        )
        if single.mAP > self.best:
            self.best = single.mAP
            save_checkpoint(self.last.with_name("best.pt"), trainer.network_state(), self.config)
        if final:
            replace_json(self.folder / "scores.json", scoring.scores_record(scores, self.split))
            build.write_run_report(
                self.folder, checkpoint="last", model=trainer.model, split=self.split, scores=scores, device=device
            )
