"""The GPU kit's own logic: its table of steps, its runner and its shapes. `rehearse.py` runs all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import counters
import device
import manifest
import predict
import probe
import protocol
import records
import replay
import runner
import smoke
import sn_ops
import steps
import suite
import times

CALLS = tuple(steps.CALL_LIMIT_S)
LONGEST_COMMAND_S = 600
"""The time limit of one command on a rented machine."""


@pytest.mark.parametrize("call", CALLS)
def test_the_caps_of_a_call_fit_its_limit(call: str) -> None:
    mine = steps.steps_of(call)
    assert 0 < steps.longest(mine) + steps.OVERHEAD_S <= steps.CALL_LIMIT_S[call] <= LONGEST_COMMAND_S
    assert sum(steps.CALL_LIMIT_S.values()) <= 15 * 60


@pytest.mark.parametrize("call", CALLS)
def test_the_table_is_whole(call: str) -> None:
    mine = steps.steps_of(call)
    names = [step.name for step in mine]
    assert len(set(names)) == len(names)
    assert mine[0].name == "facts" and mine[0].gate and mine[0].always
    for position, step in enumerate(mine):
        assert (manifest.PROGRAMS / step.program[0]).is_file(), step
        assert step.what and step.cap > 0
        assert step.beside is None or step.beside in names[:position]
        if step.program[0] == "times.py":
            assert step.program[1] in times.STEPS
    assert sorted(step.name for group in steps.groups_of(mine) for step in group) == sorted(names)
    assert {step.call for step in steps.STEPS} == set(CALLS)


def test_steps_beside_each_other_count_once() -> None:
    a = steps.Step("a", "prove", 10, ("facts.py",), "")
    b = steps.Step("b", "prove", 25, ("facts.py",), "", beside="a")
    c = steps.Step("c", "prove", 5, ("facts.py",), "")
    assert steps.longest([a, b, c]) == 30
    assert [[step.name for step in group] for group in steps.groups_of([a, b, c])] == [["a", "b"], ["c"]]
    # A step that is picked without the one it runs beside runs alone.
    assert [[step.name for step in group] for group in steps.groups_of([b, c])] == [["b"], ["c"]]


@pytest.mark.parametrize(
    ("only", "first", "expected"),
    [
        ("", "", ["facts", "smoke", "probe", "tests", "sanitizers", "replay", "tests-triton"]),
        ("replay,probe", "", ["facts", "probe", "replay"]),
        ("", "replay", ["facts", "replay", "tests-triton"]),
        ("smoke,replay", "probe", ["facts", "replay"]),
    ],
)
def test_steps_are_picked(only: str, first: str, expected: list[str]) -> None:
    assert [step.name for step in runner.chosen(steps.steps_of("prove"), only, first)] == expected


@pytest.mark.parametrize(("only", "first"), [("smoke,fast", ""), ("", "fast")])
def test_an_unknown_step_is_named(only: str, first: str) -> None:
    with pytest.raises(SystemExit, match=r"expected steps among facts, smoke.* got 'fast'"):
        runner.chosen(steps.steps_of("prove"), only, first)


def test_what_a_step_says_is_merged() -> None:
    data: dict[str, Any] = {}
    for news in ({"runs": [1]}, {"runs": [2], "a": {"b": 1}}, {"a": {"c": 2}, "n": 1}, {"n": 2}):
        protocol.merge(data, news)
    assert data == {"runs": [1, 2], "a": {"b": 1, "c": 2}, "n": 2}


def test_a_full_disk_keeps_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record fits once the ballast is released, which happens only once; the next record fits too."""
    disk = runner.Disk(tmp_path, "prove")
    ballast = tmp_path / ".prove.ballast"
    kept, write = ballast.stat().st_size, Path.write_text
    assert kept == runner.BALLAST_BYTES
    pieces = [1]

    def full(path: Path, text: str, **more: Any) -> int:
        if ballast.stat().st_size > kept - pieces[0] * runner.BALLAST_PIECE:
            raise OSError(28, "No space left on device")
        return write(path, text, **more)

    monkeypatch.setattr(Path, "write_text", full)
    for pieces[0] in (1, 2):
        assert disk.save({"complete": False})
    pieces[0] = runner.BALLAST_BYTES // runner.BALLAST_PIECE + 1
    assert not disk.save({"complete": True})
    assert '"complete": false' in (tmp_path / "prove.json").read_text()
    assert any("no room for the record" in trouble for trouble in disk.troubles)
    disk.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prove.json", "prove.log"]


PLAN_DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}


class H200:
    """The device facts that the plan needs."""

    facts: dict[str, Any] = {  # noqa: RUF012
        "capability": (9, 0), "multiprocessors": 132, "shared_bytes": 232448
    }  # fmt: skip


def plans(core: ModuleType, path: str, dtype: str) -> list[dict[str, Any]]:
    shapes = smoke.RUNS[path][1]
    return [
        core.cuda_plan(s.N, s.M or s.N, s.D, s.k, PLAN_DTYPES[dtype], s.M is None, True, path, **H200.facts)
        for s in shapes
    ]


def test_the_smoke_test_reaches_every_path_and_dtype(core: ModuleType) -> None:
    """No shape is refused, and the sizes at which GPU code can fail are covered."""
    assert set(smoke.RUNS) == set(device.PATHS)
    for path, (dtypes, shapes) in smoke.RUNS.items():
        assert set(dtypes) == {"float32"} if path == "bank" else set(dtypes) >= {"float32", "float16", "bfloat16"}
        assert any(shape.emulated for shape in shapes)
        for dtype in dtypes:
            for plan in plans(core, path, dtype):
                assert path in ("auto", plan["path"])
    clusters = plans(core, "cluster", "float32")
    assert {plan["cluster"] for plan in clusters} == {1, 2, 4, 8}
    assert max(plan["d_slices"] / plan["cluster"] for plan in clusters) == 8
    assert {plan["strips"] > 1 for plan in plans(core, "direct", "float32")} == {True, False}
    assert {plan["strips"] > 1 for plan in plans(core, "dense", "float32")} == {True, False}
    for path in ("screen", "bank"):
        assert {plan["sample_group"] for plan in plans(core, path, "float32")} == {1, 8, 32}
    partitioned = {
        core.cuda_backward_plan(s.N, s.M or s.N, s.D, s.k, 0, s.M is None, **H200.facts)["partitioned"]
        for s in smoke.BACKWARD
    }
    assert partitioned == {True, False}


class Stub:
    """A device that runs exactly the path that was forced."""

    name, backend, device = "cuda", "cpu", torch.device("cpu")
    forced, ran = "auto", ""

    def force(self, path: str) -> None:
        self.forced = path

    def last_path(self) -> str:
        return self.ran or self.forced

    def synchronize(self) -> None:
        pass

    def capture(self, call: Callable[[], object], *, warm_ups: int = 1) -> Callable[[], object]:
        return call

    @contextmanager
    def busy(self) -> Iterator[Callable[[], None]]:
        yield lambda: None


@pytest.mark.parametrize(
    ("call", "said"),
    [(0, "differs from direct: loss"), (2, "differs from itself: loss"), (3, "differs from cpu: loss")],
)
def test_a_path_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch, call: int, said: str) -> None:
    """One of the four calls (direct, on the path, again, on the CPU) returns another loss."""
    inputs = smoke.inputs_of(smoke.small(20, 8), torch.float32)
    assert smoke.faults_of(Stub(), "screen", inputs, torch.float32) == ("screen", [])  # type: ignore[arg-type]
    made, count = smoke.outcome, iter(range(10))

    def wrong(*arguments: Any) -> dict[str, torch.Tensor]:
        found = made(*arguments)
        return found | {"loss": found["loss"] + 1e-2} if next(count) == call else found

    monkeypatch.setattr(smoke, "outcome", wrong)
    assert said in " ".join(smoke.faults_of(Stub(), "screen", inputs, torch.float32)[1])  # type: ignore[arg-type]


def test_a_path_that_did_not_run_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(smoke.RUNS, "cluster", (("float32",), (smoke.small(20, 8),)))
    monkeypatch.setitem(smoke.RUNS, "screen", (("float32",), (smoke.small(20, 8),)))
    elsewhere = Stub()
    assert smoke.one_process(Stub(), "screen", "float32") == 0  # type: ignore[arg-type]

    def faults(*_: Any) -> tuple[str, list[str]]:
        return "dense", []

    monkeypatch.setattr(smoke, "faults_of", faults)
    assert smoke.one_process(elsewhere, "screen", "float32") == smoke.WRONG  # type: ignore[arg-type]
    assert smoke.one_process(elsewhere, "cluster", "float32") == smoke.ELSEWHERE  # type: ignore[arg-type]
    assert "dense ran" in capsys.readouterr().out


def test_a_replay_that_is_wrong_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replay.Case("small", 20, 8)
    monkeypatch.setattr(replay, "REPLAYS", 3)
    assert replay.replays_of(Stub(), case)["wrong"] == 0  # type: ignore[arg-type]
    made, count = sn_ops.sn_loss, iter(range(1000))

    def stale(*arguments: Any, **options: Any) -> Any:
        loss, stats = made(*arguments, **options)
        return loss + (1e-3 if next(count) == 4 else 0.0), stats

    monkeypatch.setattr(sn_ops, "sn_loss", stale)
    assert replay.replays_of(Stub(), case)["wrong"] == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(("holds", "status"), [(True, 0), (False, 1), (True, 1)])
def test_a_bound_that_fails_fails_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holds: bool, status: int
) -> None:
    program = tmp_path / "program"
    facts = {"group": 16, "bits": 25, "worst": 0.3}
    told = {"model": "hopper", "bound": 1.25, "holds": holds, "types": {"float16": facts}}
    program.write_text(f"#!/bin/sh\necho '{json.dumps(told)}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv(protocol.PRETEND, "1")
    monkeypatch.setenv(protocol.EMULATED_PROBE, str(program))
    if holds and status == 0:
        probe.main()
        return
    with pytest.raises(SystemExit, match="1"):
        probe.main()


@pytest.mark.parametrize("body", ["assert False", "pass", None])
def test_a_test_that_fails_fails_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str | None) -> None:
    tests = tmp_path / "test_it.py"
    tests.write_text("" if body is None else f"def test_one():\n    pass\n\n\ndef test_two():\n    {body}\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", os.devnull, str(tests)]
    monkeypatch.setattr(suite, "command", lambda backend: command)
    if body == "pass":
        suite.main("cuda")
        return
    with pytest.raises(SystemExit, match="1"):
        suite.main("cuda")


def test_changes_are_seen_but_for_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    assert not runner.changed_files(None)
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT" / "prove.json").touch()
    assert runner.changed_files(None) and not runner.changed_files(tmp_path / "OUT")
    (tmp_path / "other").touch()
    assert runner.changed_files(tmp_path / "OUT")


def test_values_that_differ_are_seen() -> None:
    inputs = smoke.inputs_of(smoke.small(20, 8), device.DTYPES["float32"])
    found = smoke.outcome(inputs, "cpu")
    assert smoke.different_bits(found, found) == []
    assert smoke.different_values(found, found, inputs.feats.dtype) == []
    for name in ("loss", "gradient 0", "distances"):
        wrong = {**found, name: found[name].clone()}
        wrong[name].view(-1)[3] += 1e-2 * found[name].norm()
        assert [text.split(" (")[0] for text in smoke.different_bits(found, wrong)] == [name]
        assert name in [text.split(" (")[0] for text in smoke.different_values(found, wrong, inputs.feats.dtype)]
        wrong[name].view(-1)[3] = float("nan")
        assert name in [text.split(" (")[0] for text in smoke.different_values(found, wrong, inputs.feats.dtype)]
    wrong = {**found, "indices": found["indices"].roll(1, 1)}
    assert any("indices" in text for text in smoke.different_values(found, wrong, inputs.feats.dtype))


@pytest.mark.parametrize(
    ("line", "outcome", "name"),
    [
        ("tests/test_a.py::test_b[cuda-x 1] PASSED   [  3%]", "PASSED", "tests/test_a.py::test_b[cuda-x 1]"),
        ("[gw3] [ 91%] FAILED tests/test_a.py::test_b[cuda] ", "FAILED", "tests/test_a.py::test_b[cuda]"),
        ("[gw3] [ 91%] SKIPPED tests/test_a.py::test_b ", "SKIPPED", "tests/test_a.py::test_b"),
    ],
)
def test_lines_of_pytest_are_read(line: str, outcome: str, name: str) -> None:
    found, named = suite.OUTCOME.search(line), suite.NAME.search(line)
    assert found is not None and named is not None
    assert (found[1], named[0].strip()) == (outcome, name)


def test_modules_of_the_suite_exist() -> None:
    for module in (*suite.MODULES, *suite.TRITON_MODULES):
        assert (manifest.ROOT / module).is_file(), module


def test_counters_are_read() -> None:
    text = (
        '==PROF== connected\n"ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","tile_kernel","(8, 1, 1)","Speed","Duration","ns","1,234"\n'
        '"0","tile_kernel","(8, 1, 1)","Speed","Something","ns","9"\n'
        '"1","gather_kernel","(2, 1, 1)","Occupancy","Achieved Occupancy","%","40"\n'
    )
    assert counters.rows_of(text) == [
        {"kernel": "tile_kernel", "grid": "(8, 1, 1)", "Duration": "1,234 ns"},
        {"kernel": "gather_kernel", "grid": "(2, 1, 1)", "Achieved Occupancy": "40 %"},
    ]


def test_every_time_becomes_a_case_of_the_schema() -> None:
    shape = predict.Shape(64, 2048, 65536, bank=True)
    case = times.case_of(shape, "cuda", "auto", "bank", "both", "graph", [3.0, 1.0, 2.0])
    assert set(case) == set(records.Case.__annotations__)
    assert (case["median_us"], case["expected_us"], case["M"]) == (2.0, 180, 65536)


def test_messages_that_are_none_are_refused() -> None:
    good = protocol.parse('{"figure": "x", "data": {"a": [1.5]}}')
    assert good == {"figure": "x", "data": {"a": [1.5]}}
    bad = ["5", "[]", "{", '{"figure": 5}', '{"figure": null}', '{"data": [1]}', '{"data": {"a": NaN}}', '{"x": 1}']
    for text in [*bad, '{"data": {"provenance": 5}}', "[" * 100_000]:
        with pytest.raises(protocol.MessageError):
            protocol.parse(text)
    with pytest.raises(ValueError, match="not JSON compliant"):
        protocol.say(time=float("nan"))


def test_a_folder_is_for_one_runner_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "prove.json").write_text("an earlier run's")
    first = runner.Disk(tmp_path, "prove")
    assert not (tmp_path / "prove.json").exists()
    with pytest.raises(SystemExit, match="another prove is running there"):
        runner.Disk(tmp_path, "prove")
    runner.Disk(tmp_path, "measure").close()
    first.close()
    runner.Disk(tmp_path, "prove").close()
    with pytest.raises(SystemExit, match="expected a folder to write to"):
        runner.Disk(tmp_path / "prove.log", "prove")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--python", "2.99"], "missing: python2.99 on PATH"),
        (["--env", "{environment}", "--python", "2.99", "--torch", "0.0"], "missing: Python 2.99 in"),
        (["--env", "{environment}", "--torch", "0.0"], "missing: torch 0.0 in"),
        (["--env", "{environment}", "--torch", "0.0"], "missing: what compiles Triton kernels in"),
        (["--env", "{environment}", "--torch", "0.0", "--no-triton", "--python", "2.99"], "missing: Python 2.99 in"),
    ],
)
def test_prepare_says_what_is_missing(tmp_path: Path, options: list[str], said: str) -> None:
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(
        subprocess.check_output(["sh", "-c", "command -v python3"], text=True).strip()
    )
    command = [str(manifest.HERE / "prepare.sh"), *(text.format(environment=environment) for text in options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stdout, (done.stdout, done.stderr)
