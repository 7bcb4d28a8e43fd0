"""Two ranks under torchrun against one process with the same configuration."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from sn_ops.reid.checkpoint import load_checkpoint
from sn_ops.reid.config import Config, ModelConfig
from sn_ops.reid.ddp import Parallel, processes
from sn_ops.reid.models import ReIDModel, build_model
from sn_ops.reid.training import train
from support.tiny_runs import metrics, one_thread, tiny_config, write_market

# Batches of 3 identities: one rank has 1 of them, the other 2. SGD, since Adam's first steps turn rounding into signs.
OPTIONS = (
    "data.identities=3", "optim.name=sgd", "optim.lr=0.05", "eval.every=0", "run.log_every=1", "data.erase=0",
    "optim.epochs=2",
)  # fmt: skip
VARIANTS = {
    "plain": (),
    "memory": ("loss.memory=20", "loss.k=4"),
    "everything": (
        "loss.memory=20",
        "loss.identity=1",
        "model.neck=true",
        "optim.accumulate=2",
        "optim.clip=1",
        "run.sync_batchnorm=false",
    ),
    "triplet": ("loss.metric=triplet", "loss.identity=1"),
}
# With chunks, batch norm has the statistics of a chunk, and ranks divide a batch into other chunks than one process.
FROZEN = "everything"

SCRIPT = """
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [{here!r}, {tests!r}]
from test_parallel import FROZEN, VARIANTS, configuration, frozen_norms
from sn_ops.reid.training import StoppedError, train

import os, shutil, signal

from sn_ops.reid.report import build

build.write_run_report = lambda *args, **options: None  # it takes longer than the runs
folder, market = Path({folder!r}), Path({market!r})
for variant in VARIANTS:
    with frozen_norms(variant == FROZEN):
        train(configuration(market, folder / variant, variant), progress=False)

# The signal comes to one rank; both stop at the same step.
def stop(step):
    if step == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)

try:
    train(configuration(market, folder / "stopped", "memory"), progress=False, after_step=stop)
except StoppedError as error:
    (folder / f"stopped-{{os.environ['RANK']}}").write_text(str(error))
    if os.environ["RANK"] == "0":
        shutil.copytree(folder / "stopped", folder / "stopped-early")
train(resume=folder / "stopped", progress=False)
"""


def configuration(market: Path, out: Path, variant: str) -> Config:
    """The configuration of a run in this file."""
    return tiny_config(market, out, *OPTIONS, *VARIANTS[variant])


@contextmanager
def frozen_norms(on: bool) -> Iterator[None]:
    """A context in which batch norm of new networks stays in evaluation mode, if `on`."""

    def build(config: ModelConfig, identities: int, **options: Any) -> ReIDModel:
        model = build_model(config, identities, **options)
        for module in model.modules():
            if on and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
                module.train = partial(_unmoved, module)  # type: ignore[method-assign, assignment]
        return model

    with mock.patch("sn_ops.reid.training.trainer.build_model", build):
        yield


def _unmoved(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return module


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The data set, and the folder of the runs of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    market = write_market(folder / "market")
    script = folder / "script.py"
    here = Path(__file__)
    text = SCRIPT.format(here=str(here.parent), tests=str(here.parents[1]), folder=str(folder), market=str(market))
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    with one_thread():
        yield market, folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_one_process(
    runs: tuple[Path, Path], tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses and statistics step by step, and the same network at the end, up to rounding."""
    market, folder = runs
    monkeypatch.setattr("sn_ops.reid.report.build.write_run_report", lambda *args, **options: None)
    with frozen_norms(variant == FROZEN):
        one = train(configuration(market, tmp_path / "run", variant), progress=False)
    wanted, found = metrics(one), metrics(folder / variant)
    assert len(wanted) == len(found) == 5
    for record, other in zip(wanted, found, strict=True):
        assert record.keys() == other.keys()
        for key, value in record.items():
            assert math.isclose(value, other[key], rel_tol=1e-4, abs_tol=1e-5), (key, record, other)
    start = load_checkpoint(one / "checkpoints" / "last.pt")["model"]
    for name, value in load_checkpoint(folder / variant / "checkpoints" / "last.pt")["model"].items():
        torch.testing.assert_close(value, start[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_signal_to_one_rank_stops_all(runs: tuple[Path, Path]) -> None:
    """The resumed run equals the one without a stop, bit for bit: gloo adds two ranks in one order."""
    _, folder = runs
    texts = [(folder / f"stopped-{rank}").read_text() for rank in range(2)]
    assert "a signal to another rank: the run has stopped" in texts[0] and "SIGTERM: the run has stopped" in texts[1]
    states = [load_checkpoint(folder / name / "checkpoints" / "last.pt") for name in ("stopped", "memory")]
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())
    assert len(states[0]["random"]) == 2
    assert metrics(folder / "stopped") == metrics(folder / "memory")


def test_one_process_goes_on_from_two(runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is not bound to a number of ranks."""
    _, folder = runs
    monkeypatch.setattr("sn_ops.reid.report.build.write_run_report", lambda *args, **options: None)
    shutil.copytree(folder / "stopped-early", tmp_path / "run")
    run = train(resume=tmp_path / "run", progress=False)
    for record, other in zip(metrics(run), metrics(folder / "memory"), strict=True):
        key = "loss" if "loss" in other else "mAP_standard"
        assert record["step"] == other["step"] and record[key] == pytest.approx(other[key], rel=1e-4)


class _NormAndActivation(torch.nn.BatchNorm2d):
    """As timm's BatchNormAct2d, a batch norm that does more."""


def test_a_norm_that_ranks_cannot_share_has_a_way_out() -> None:
    """The message names the option with which such a network trains on several ranks."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), _NormAndActivation(4))
    with pytest.raises(ValueError, match=r"got _NormAndActivation '1'; with run\.sync_batchnorm=false every rank"):
        Parallel(0, 2, torch.device("cpu"), object()).wrap(network, sync=True)


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun, or with one rank of it, there is no group and nothing to wait for."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes("cpu") as parallel:
        assert parallel == Parallel(0, 1, torch.device("cpu")) and parallel.is_main
        rows = torch.ones(2, 3, requires_grad=True)
        assert parallel.all_gather_object(5) == [5] and not parallel.gather_rows(rows).requires_grad
        assert torch.equal(parallel.sum(torch.ones(2)), torch.ones(2))
        model = torch.nn.Linear(2, 2)
        assert parallel.wrap(model, sync=True) is model
        parallel.barrier()
    with pytest.raises(ValueError, match="device: expected"), processes("tpu"):
        pass
