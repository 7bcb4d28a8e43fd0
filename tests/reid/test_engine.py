"""Whole runs on a few images: what they leave behind, stopping and going on, broken batches."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sn_ops.reid.checkpoint import CheckpointError, load_checkpoint, random_state, save_checkpoint
from sn_ops.reid.config import Config, from_dict, from_yaml
from sn_ops.reid.training import EXIT_NONFINITE, EXIT_STOPPED, NonFiniteLossError, StoppedError, train
from sn_ops.reid.training.signals import StopSignals
from support.tiny_runs import Restless, metrics, one_thread, tiny_config, write_market


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set."""
    return write_market(tmp_path_factory.mktemp("market"))


@pytest.fixture(scope="module")
def whole(market: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    return train(tiny_config(market, tmp_path_factory.mktemp("whole") / "run"), progress=False)


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def training(run: Path) -> dict[str, Any]:
    """The state of training at the end of a run."""
    state = load_checkpoint(run / "checkpoints" / "last.pt")
    return {key: state[key] for key in ("model", "optimizer", "scaler", "memory", "random", "epoch", "batch", "best")}


def stopping(step: int, number: int = signal.SIGTERM) -> Callable[[int], None]:
    """A hook that sends this process a signal after a step."""
    return lambda done: os.kill(os.getpid(), number) if done == step else None


# ---- a run --------------------------------------------------------------------------------------


def test_what_a_run_leaves(whole: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "scores.json", "report.html", "checkpoints/last.pt",
                 "checkpoints/best.pt"):  # fmt: skip
        assert (whole / name).is_file(), name
    assert not list(whole.rglob("*.part"))
    records = metrics(whole)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [2, 4, 6, 8, 9]
    assert [next(iter(record)) for record in records[-2:]] == ["epoch", "epoch"] and "rank1" in records[-1]
    assert all({"lr", "metric", "valid_anchors", "nearest_is_positive", "gradient_norm"} <= set(r) for r in steps)
    assert [record["epoch"] for record in records if "rank1" in record] == [2, 3]
    assert from_yaml(whole / "config.yaml").run.out == str(whole)
    assert json.loads((whole / "scores.json").read_text())["scores"]["single query"]["queries"] == 4
    best = load_checkpoint(whole / "checkpoints" / "best.pt")
    assert best["num_identities"] == 0 and "optimizer" not in best


def deterministic() -> tuple[bool, bool, bool]:
    """Deterministic algorithms, only a warning where there are none, uninitialised memory filled."""
    uninitialized: Any = torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        uninitialized.fill_uninitialized_memory,
    )


def test_process_is_as_it_was(market: Path, tmp_path: Path) -> None:
    before, threads = random_state(), torch.get_num_threads()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert deterministic() == (False, False, True)
    inside: list[tuple[bool, bool, bool]] = []

    def stop(done: int) -> None:
        if done == 1:
            inside.append(deterministic())
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        train(tiny_config(market, tmp_path / "run"), progress=False, after_step=stop)
    assert inside == [(True, True, False)]
    assert same(random_state(), before) and torch.get_num_threads() == threads
    assert deterministic() == (False, False, True)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


# ---- stopping and going on ----------------------------------------------------------------------


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are of `Restless`, and write no report, which takes longer than they do."""
    monkeypatch.setattr(
        "sn_ops.reid.training.trainer.build_model", lambda config, identities, **options: Restless(identities)
    )
    monkeypatch.setattr("sn_ops.reid.report.build.write_run_report", lambda *args, **options: None)


VARIANTS = {
    "plain": (),
    "everything": ("loss.memory=12", "loss.identity=1", "data.pad=2", "optim.accumulate=2", "optim.clip=1",
                   "data.camera_balanced=true", "optim.amp=bf16"),
    "fp16": ("optim.amp=fp16", "optim.name=sgd", "optim.lr=0.01", "data.workers=1"),
}  # fmt: skip


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("variant", VARIANTS)
def test_stop_and_go_on(market: Path, tmp_path: Path, variant: str) -> None:
    """Stopped in an epoch, at its end, before an evaluation and once more: the same bits as the run without a stop."""
    wanted = train(tiny_config(market, tmp_path / "wanted", *VARIANTS[variant]), progress=False)
    config: Config | None = tiny_config(market, tmp_path / "run", *VARIANTS[variant])
    run: Path | None = None
    for step in (1, 3, 5, 7):
        torch.rand(step)  # whatever the process did before
        with pytest.raises(StoppedError, match="SIGTERM") as caught:
            train(config, resume=run, progress=False, after_step=stopping(step))
        config, run = None, caught.value.checkpoint.parent.parent
        state = load_checkpoint(run / "checkpoints" / "last.pt")
        assert 3 * state["epoch"] + state["batch"] == step + 1 or state["due"]
    assert run is not None and train(resume=run, progress=False) == tmp_path / "run"
    assert same(training(run), training(wanted))
    assert metrics(run) == metrics(wanted)
    assert (run / "scores.json").read_text() == (wanted / "scores.json").read_text()


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("stop", [4, 8, 9])
def test_a_line_for_the_last_steps(market: Path, tmp_path: Path, stop: int) -> None:
    """A run shorter than `log_every` has a line too, before its last evaluation, however often it was stopped."""
    options = ("run.log_every=10", "optim.schedule=cosine")
    wanted = train(tiny_config(market, tmp_path / "wanted", *options), progress=False)
    with pytest.raises(StoppedError):
        train(tiny_config(market, tmp_path / "run", *options), progress=False, after_step=stopping(stop))
    # A signal ends the step after it; after the last one, the evaluation, which the line comes before.
    assert any("loss" in record for record in metrics(tmp_path / "run")) == (stop == 9)
    train(resume=tmp_path / "run", progress=False)
    assert metrics(tmp_path / "run") == metrics(wanted)
    records = metrics(wanted)
    assert ["loss" in record for record in records] == [False, True, False]
    every = train(tiny_config(market, tmp_path / "every", "run.log_every=1"), progress=False)
    steps = [record for record in metrics(every) if "loss" in record]
    assert len(steps) == 9 and records[1]["loss"] == pytest.approx(sum(record["loss"] for record in steps) / 9)
    assert {key: records[1][key] for key in ("epoch", "step", "lr")} == {
        key: steps[-1][key] for key in ("epoch", "step", "lr")
    }
    train(resume=wanted, progress=False)  # complete: evaluated again, and nothing more
    assert metrics(wanted) == records


@pytest.mark.usefixtures("restless")
def test_an_int_for_a_float(market: Path, tmp_path: Path) -> None:
    """A run whose configuration was made in Python resumes like any other."""
    config = tiny_config(market, tmp_path / "run")
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, alpha=50))
    with pytest.raises(StoppedError):
        train(config, progress=False, after_step=stopping(1))
    train(resume=tmp_path / "run", progress=False)


@pytest.mark.usefixtures("restless")
def test_the_largest_seed(market: Path, tmp_path: Path) -> None:
    for step, resume in ((1, None), (4, tmp_path / "run")):
        with pytest.raises(StoppedError):
            train(
                tiny_config(market, tmp_path / "run", f"run.seed={2**63 - 1}", f"run.threads={step}"),
                resume=resume, progress=False, after_step=stopping(step),
            )  # fmt: skip


@pytest.mark.usefixtures("restless")
def test_the_folder_stays_what_it_was(market: Path, tmp_path: Path) -> None:
    """Resuming with a configuration for another folder leaves the run's own folder in its configuration."""
    with pytest.raises(StoppedError):
        train(tiny_config(market, tmp_path / "run"), progress=False, after_step=stopping(1))
    with pytest.raises(StoppedError):
        train(
            tiny_config(market, tmp_path / "other", "run.log_every=3"), resume=tmp_path / "run", progress=False,
            after_step=stopping(4),
        )  # fmt: skip
    written = from_yaml(tmp_path / "run" / "config.yaml").run
    assert written.out == str(tmp_path / "run") and written.log_every == 3
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("restless")
def test_killed_without_a_chance(market: Path, tmp_path: Path) -> None:
    """Lines logged after the last checkpoint are removed, and the resumed run is the same as an unbroken one."""

    class Killed(BaseException):
        pass

    def kill(step: int) -> None:
        if step == 8:
            raise Killed

    wanted = train(tiny_config(market, tmp_path / "wanted"), progress=False)
    with pytest.raises(Killed):
        train(tiny_config(market, tmp_path / "run"), progress=False, after_step=kill)
    assert len(metrics(tmp_path / "run")) == 5  # four of steps, one evaluation
    train(resume=tmp_path / "run", progress=False)
    assert same(training(tmp_path / "run"), training(wanted)) and metrics(tmp_path / "run") == metrics(wanted)


@pytest.mark.usefixtures("restless")
def test_a_signal_while_evaluating(market: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops at once, since its checkpoint is already written."""
    from sn_ops.reid.inference import scoring

    evaluate = scoring.evaluate_model

    def interrupted(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal should have ended it")

    wanted = train(tiny_config(market, tmp_path / "wanted"), progress=False)
    monkeypatch.setattr(scoring, "evaluate_model", interrupted)
    with pytest.raises(StoppedError, match="SIGINT"):
        train(tiny_config(market, tmp_path / "run"), progress=False)
    monkeypatch.setattr(scoring, "evaluate_model", evaluate)
    train(resume=tmp_path / "run", progress=False)
    assert same(training(tmp_path / "run"), training(wanted)) and metrics(tmp_path / "run") == metrics(wanted)


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("what", ["worker", "destructor"])
def test_a_signal_that_work_takes_in_its_own_way(
    market: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A worker process may die of the same signal, and a destructor may swallow the handler's exception."""
    from sn_ops.reid.inference import scoring

    evaluate = scoring.evaluate_model

    class Holder:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass  # where the handler runs, and its error is ignored

    def interrupted(*args: Any, **options: Any) -> Any:
        if what == "destructor":
            holder = Holder()
            del holder
            return evaluate(*args, **options)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.") from None

    monkeypatch.setattr(scoring, "evaluate_model", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    with pytest.raises(StoppedError, match="SIGTERM: the run has stopped"):
        train(tiny_config(market, tmp_path / "run"), progress=False)
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["epoch"] == 2 and state["due"]


def test_errors_of_work_without_a_signal(tmp_path: Path) -> None:
    """Errors of the work pass unchanged."""
    with StopSignals() as stop, pytest.raises(RuntimeError, match="of its own"), stop.at_once(tmp_path):
        raise RuntimeError("of its own")
    with StopSignals() as stop, stop.at_once(tmp_path):
        pass


def test_second_signal_acts_at_once() -> None:
    # Python's own handler, since shells start background jobs with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.name == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_exit_status(market: Path, tmp_path: Path) -> None:
    """A process of its own, and a signal from outside."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from support.tiny_runs import tiny_config
        from sn_ops.reid.training import StoppedError, train

        config = tiny_config({str(market)!r}, {str(tmp_path / "run")!r}, "optim.epochs=1000", "eval.every=0",
                             "data.workers=1", "run.checkpoint_every=1000")
        try:
            train(config, progress=False, after_step=lambda step: print(step, flush=True))
        except StoppedError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_status)
        """)
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while process.stdout.readline() not in ("2\n", ""):
        pass
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: to the processes that read images too
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, error
    assert "SIGTERM: the run has stopped and its checkpoint is written" in error and "--resume" in error
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert 3 * state["epoch"] + state["batch"] >= 2
    assert EXIT_STOPPED != EXIT_NONFINITE


# ---- what is refused ----------------------------------------------------------------------------


def test_refused(market: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a configuration or a run to resume"):
        train()
    with pytest.raises(ValueError, match="expected a folder without a run, or --resume"):
        train(tiny_config(market, whole), progress=False)
    with pytest.raises(FileNotFoundError, match="expected a run's folder or a checkpoint"):
        train(resume=tmp_path / "nothing", progress=False)
    with pytest.raises(ValueError, match=r"differs in loss\.k \(checkpoint: 10, this run: 9\)"):
        train(tiny_config(market, whole, "loss.k=9"), resume=whole, progress=False)
    with pytest.raises(ValueError, match=r"run\.seed: expected at most"):
        train(tiny_config(market, whole, f"run.seed={2**63}"), progress=False)
    with pytest.raises(ValueError, match="has the network alone"):
        train(resume=whole / "checkpoints" / "best.pt", progress=False)
    other = write_market(tmp_path / "other", train=7)
    with pytest.raises(ValueError, match="expected the training images that"):
        train(tiny_config(other, whole), resume=whole, progress=False)
    with pytest.raises(ValueError, match=r"optim\.accumulate: expected at most the 12 images of a rank's batch"):
        train(
            tiny_config(market, tmp_path / "run", "data.identities=5", "optim.accumulate=18", "data.images=4"),
            progress=False,
        )


@pytest.mark.usefixtures("restless")
def test_a_folder_whose_run_has_no_checkpoint(market: Path, tmp_path: Path) -> None:
    """Without a checkpoint --resume has nothing to go on from."""

    class Killed(BaseException):
        pass

    def kill(step: int) -> None:
        raise Killed

    config = tiny_config(market, tmp_path / "run")
    with pytest.raises(Killed):
        train(config, progress=False, after_step=kill)
    with pytest.raises(ValueError, match=r"expected a folder without a run, got .*: remove the folder, or") as caught:
        train(config, progress=False)
    assert "--resume" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        train(resume=tmp_path / "run", progress=False)


def _without(tree: dict[str, Any], *path: Any) -> None:
    """Removes an entry of nested dicts and lists."""
    for key in path[:-1]:
        tree = tree[key]
    del tree[path[-1]]


SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no tensor": lambda state: _without(state, "model", "body.6.weight"),
    "a tensor too many": lambda state: state["model"].update(other=torch.zeros(2)),
    "another shape": lambda state: state["model"].update({"body.6.weight": torch.zeros(16, 23)}),
    "no tensor but a number": lambda state: state["model"].update({"body.6.weight": 3.0}),
    "names that are numbers": lambda state: state["model"].update({1: torch.zeros(2)}),
    "no optimizer groups": lambda state: _without(state, "optimizer", "param_groups"),
    "no betas": lambda state: _without(state, "optimizer", "param_groups", 0, "betas"),
    "no moments": lambda state: _without(state, "optimizer", "state", 0, "exp_avg"),
    "moments of another shape": lambda state: state["optimizer"]["state"][0].update(exp_avg_sq=torch.zeros(3)),
    "no random numbers": lambda state: _without(state, "random"),
    "no generator": lambda state: _without(state, "random", 0, "torch"),
    "another generator": lambda state: state["random"][0].update(numpy=["MT19937", torch.zeros(3), 0, 0, 0.0]),
    "no memory": lambda state: state.update(memory=None),
    "no memory's head": lambda state: _without(state, "memory", "head"),
    "a short memory": lambda state: state["memory"].update(labels=torch.zeros(3)),
    "no log": lambda state: _without(state, "log"),
    "no gathered": lambda state: _without(state, "log", "gathered"),
    "no due": lambda state: _without(state, "due"),
    "another epoch": lambda state: state.update(epoch=4),
    "another batch": lambda state: state.update(batch=3),
    "no batch": lambda state: _without(state, "batch"),
}


@pytest.fixture(scope="module")
def stopped(market: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `Restless` with a memory that a signal has stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sn_ops.reid.training.trainer.build_model", lambda config, identities, **options: Restless(identities)
        )
        with pytest.raises(StoppedError):
            train(
                tiny_config(market, tmp_path_factory.mktemp("stopped") / "run", "loss.memory=12"), progress=False,
                after_step=stopping(3),
            )  # fmt: skip
    return next(tmp_path_factory.getbasetemp().glob("stopped*/run"))


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("what", SPOILED)
def test_contents_that_do_not_fit(stopped: Path, tmp_path: Path, what: str) -> None:
    """One message with the file's name, whatever PyTorch or Python raise."""
    state = load_checkpoint(stopped / "checkpoints" / "last.pt")
    config = from_dict(state["config"])
    SPOILED[what](state)
    file = tmp_path / "run" / "checkpoints" / "last.pt"
    save_checkpoint(file, state, config)
    with pytest.raises(CheckpointError, match=r"^sn_ops\.reid: checkpoint: expected .*last\.pt, got "):
        train(resume=tmp_path / "run", progress=False)


@pytest.mark.usefixtures("restless")
def test_nonfinite_loss(market: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops before the optimiser's step and says which images were in the batch, and what was not finite."""

    def broken(config: Any, identities: int, **options: Any) -> nn.Module:
        network = Restless(identities)

        def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.index_fill(0, torch.tensor([2]), float("inf")) if network.training else output

        network.body.register_forward_hook(spoil)
        return network

    monkeypatch.setattr("sn_ops.reid.training.trainer.build_model", broken)
    config = tiny_config(market, tmp_path / "run")
    with pytest.raises(NonFiniteLossError, match=r"loss nan.* in step 1 \(epoch 1\); 1 of 8 embeddings") as caught:
        train(config, progress=False)
    report = json.loads(caught.value.report.read_text())
    assert (report["epoch"], report["step"], report["rank"]) == (1, 1, 0)
    assert report["values"]["loss"] == "nan" and {"loss", "metric"} <= set(report["nonfinite_values"])
    assert report["nonfinite_parameters"] == [] and "body.6.weight" in report["nonfinite_gradients"]
    bad = [image for image in report["images"] if image["nonfinite_entries"]]
    assert len(report["images"]) == 8 and bad == [report["images"][2]] and bad[0]["embedding_norm"] == "inf"
    assert Path(bad[0]["path"]).is_file() and f"{bad[0]['pid']:04d}_c{bad[0]['camera'] + 1}" in bad[0]["path"]
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("restless")
def test_memory_reaches_the_loss(market: Path, tmp_path: Path) -> None:
    """The memory is empty in the first step and used from the second."""
    runs = {
        rows: train(
            tiny_config(market, tmp_path / rows, f"loss.memory={rows}", "optim.epochs=1", "run.log_every=1"),
            progress=False,
        )
        for rows in ("0", "16")
    }
    without, with_memory = (metrics(run) for run in runs.values())
    assert without[0] == with_memory[0]
    assert without[1]["loss"] != with_memory[1]["loss"]
