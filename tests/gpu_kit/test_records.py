"""The GPU kit's records, the expected times they are held against, and the page that is written from them."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import expected
import page
import records
import render
from records import Case

Change = Callable[[dict[str, Any]], object]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def step(name: str, data: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    made = {"name": name, "result": "passed", "seconds": 1.5, "cap": 40, "figure": "", "reason": "", "data": data}
    return made | changes


def record(call: str, steps: list[dict[str, Any]], commit: str = "a" * 40) -> dict[str, Any]:
    clocks = {"sm": 1755, "memory": 3201, "sm_max": 1980, "memory_max": 3201}
    device = {
        "name": "NVIDIA H200",
        "capability": "9.0",
        "multiprocessors": 132,
        "memory_bytes": 141 << 30,
        "driver": "580.1",
        "clocks_mhz": clocks,
        "l2_bytes": 60 << 20,
        "wide_clusters": 8,
    }
    libraries = {
        "commit": commit,
        "dirty": False,
        "architecture": "9.0a",
        "torch": "2.11.0+cu130",
        "nvcc": "13.0.88",
        "changed_since": [],
    }
    provenance = {
        "libraries": libraries,
        "date": "2026-11-24T10:00:00+00:00",
        "commit": commit,
        "dirty": False,
        "device": device,
        "python": "3.12.1",
        "torch": "2.11.0+cu130",
        "cuda": "13.0",
        "triton": "3.6.0",
        "sn_ops": "0.1.0",
        "build": {"version": "0.1.0"},
        "host": {},
        "command": [call],
    }
    whole = {"schema": 1, "call": call, "rehearsal": False, "provenance": provenance, "steps": steps, "complete": True}
    return copy.deepcopy(whole)


def prove(commit: str = "a" * 40) -> dict[str, Any]:
    facts = {"group": 16, "bits": 25, "rounding": "truncated", "subnormals": "kept", "worst": 0.3125, "seen": 7}
    probe = {
        "device": "NVIDIA H200",
        "capability": "9.0",
        "types": {"float16": facts, "bfloat16": facts},
        "model": "Hopper",
        "bound": 1.25,
        "holds": True,
    }
    smoke = [
        {"path": "cluster", "dtype": "float32", "shape": "64 x 128", "result": "passed", "note": ""},
        {"path": "bank", "dtype": "float32", "shape": "16 x 4096 x 64", "result": "timed out", "note": "20 s"},
    ]
    tests = {"passed": 900, "failed": 1, "skipped": 3, "failures": ["test_cuda.py::test_ties"]}
    steps = [
        step("facts", None, figure="H200, driver 580.1"),
        step("smoke", {"runs": smoke}, result="failed", reason="1 of 2 runs"),
        step("probe", probe, figure="0.31 of 1.25"),
        step("tests", tests, result="failed", reason="1 failed"),
        step("sanitizers", {"runs": [{"tool": "memcheck", "share": "bank", "clean": True, "said": "0 errors"}]}),
        step("replay", {"runs": [{"rows": 48, "replays": 2000}]}),
    ]
    return record("prove", steps, commit)


def case(backend: records.Backend, scope: records.Scope, how: records.How, median: float, **more: Any) -> Case:
    shape = more.pop("shape", (256, 256, 2048))
    samples = [0.99 * median, median, 1.01 * median]
    return records.case(
        "random", shape, k=10, dtype="float32", backend=backend, scope=scope, how=how, samples_us=samples, **more
    )


COMPILED = {"prepared": True, "hits": 11, "misses": 1, "seconds": 1.5, "missed": ["search_kernel KP=16 D:i32"]}


def measure(commit: str = "a" * 40) -> dict[str, Any]:
    loss = [
        case("cuda", "forward", "graph", 20.0, path="direct"),
        case("cuda", "both", "graph", 50.0, path="direct", expected_us=25.0),
        case("cuda", "both", "called", 100.0, path="direct"),
    ]
    bank = (64, 65536, 2048)
    paths = [
        case("cuda", "forward", "graph", 321.0, shape=bank, bank=True, path_wanted="dense", path="dense"),
        case("cuda", "forward", "graph", 123.0, shape=bank, bank=True, path_wanted="bank", path="bank"),
    ]
    failed = case("compile", "both", "called", 1.0) | {"samples_us": [], "note": "out of memory"}
    failed |= {"median_us": None, "q1_us": None, "q3_us": None}
    rivals = [case("eager", "both", "called", 700.0), failed]
    triton = [case("triton", "both", "called", 60.0, shape=(32, 32, 64))]
    kernels = [
        {"label": "random", "scope": "both", "name": "tile", "calls": 1, "total_us": 30.0},
        {"label": "random", "scope": "both", "name": "gather", "calls": 2, "total_us": 10.0},
    ]
    copies = {"unit": "B/s", "samples": [4.0e12, 4.3e12, 4.4e12], "median": 4.3e12}
    null = {"unit": "s", "samples": [3e-6], "median": 3e-6}
    steps = [
        step("ceilings", {"copy": copies, "null_kernel": null, "new one": copies}),
        step("loss fp32", {"cases": loss, "kernels": kernels}),
        step("paths", {"cases": paths, "kernels": []}),
        step("rivals", {"cases": rivals, "kernels": []}),
        step("train", {"cases": [case("cuda", "both", "called", 90.0, note="share 0.4 %")], "kernels": []}),
        step(
            "triton",
            {
                "cases": triton,
                "kernels": [],
                "compiled": COMPILED,
            },
        ),
        step("ncu", None, result="not run", reason="no time left"),
    ]
    return record("measure", steps, commit)


# --------------------------------------------------------------------------------------------------
# The schema
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [prove, measure])
def test_a_good_record_has_no_problems(made: Callable[[], dict[str, Any]]) -> None:
    assert records.problems(made()) == []
    assert records.problems(json.loads(json.dumps(made()))) == []


def test_a_record_of_a_crash_has_no_problems() -> None:
    """The record is rewritten after every step; a step may be running, or have left part of its data, or none."""
    made = prove()
    made["complete"] = False
    made["steps"][2] |= {"result": "crashed", "reason": "signal 11", "data": None}
    made["steps"][4] |= {"result": "running", "data": None}
    made["provenance"]["device"]["clocks_mhz"] = None
    del made["provenance"]["device"]["l2_bytes"], made["provenance"]["device"]["wide_clusters"]
    assert records.problems(made) == []


def at(*keys: str | int) -> Callable[[dict[str, Any]], Any]:
    def inner(made: Any) -> Any:
        for key in keys:
            made = made[key]
        return made

    return inner


def put(value: Any, *keys: str | int) -> Change:
    """Sets the entry at these keys."""
    return lambda made: at(*keys[:-1])(made).__setitem__(keys[-1], value)


def drop(*keys: str | int) -> Change:
    return lambda made: at(*keys[:-1])(made).__delitem__(keys[-1])


CASE = ("steps", 1, "data", "cases", 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(2, "schema"), "schema: expected 1, found 2"),
        (put("1", "schema"), "schema: expected int, found '1'"),
        (put(True, "schema"), "schema: expected int, found True"),
        (put("bench", "call"), "call: expected one of prove, measure"),
        (put(0, "rehearsal"), "rehearsal: expected bool"),
        (drop("complete"), "complete: missing"),
        (put(1, "more"), "more: not in the schema"),
        (put([], "provenance"), "provenance: expected an object"),
        (put("2026-11-24", "provenance", "date"), "provenance.date: expected an ISO date"),
        (put("2026-11-24T10:00:00+01:00", "provenance", "date"), "provenance.date: expected an ISO date"),
        (put("today", "provenance", "date"), "provenance.date: expected an ISO date"),
        (put("a" * 39, "provenance", "commit"), "provenance.commit: expected 40"),
        (put(None, "provenance", "dirty"), "provenance.dirty: expected bool"),
        (put(" ", "provenance", "device", "name"), "provenance.device.name: expected a name"),
        (put(1.5, "provenance", "device", "clocks_mhz", "sm"), "clocks_mhz.sm: expected int"),
        (put("x", "provenance", "device", "l2_bytes"), "l2_bytes: expected int"),
        (put(None, "provenance", "device", "wide_clusters"), "wide_clusters: expected int"),
        (put([1], "provenance", "command"), "command[0]: expected str"),
        (put({}, "steps"), "steps: expected a list"),
        (put([], "steps"), "steps: expected some"),
        (put("fine", "steps", 0, "result"), "steps[0].result: expected one of passed"),
        (put("running", "steps", 0, "result"), "steps[0].result: running, in a record that is complete"),
        (put("failed", "steps", 0, "result"), "steps[0].reason: expected one"),
        (put(-1, "steps", 0, "seconds"), "steps[0]: expected seconds"),
        (put(float("nan"), "steps", 0, "seconds"), "steps[0].seconds: expected a finite number"),
        (put("loss fp32", "steps", 0, "name"), "are called 'loss fp32'"),
        (put("", "steps", 0, "name"), "steps[0].name: expected a name"),
        (put("a\nb", "steps", 0, "figure"), "steps[0].figure: expected one line"),
        (put(None, "steps", 1, "data"), "steps[1].data: expected some"),
        (put(3, "steps", 5, "data"), "steps[5].data: expected an object"),
        (drop("steps", 1, "data", "kernels"), "steps[1].data.kernels: missing"),
        (put(0, "steps", 1, "data", "kernels", 0, "calls"), "kernels[0]: expected at least one call"),
        (put(0, *CASE, "N"), "cases[0].N: expected at least 1"),
        (put("fp32", *CASE, "dtype"), "cases[0].dtype: expected one of float64"),
        (put(99.0, *CASE, "median_us"), "are not those of the samples"),
        (put(None, *CASE, "q1_us"), "are not those of the samples"),
        (put([], *CASE, "samples_us"), "expected no figures without samples"),
        (put([], *CASE, "samples_us"), "note: expected the reason"),
        (put([0.0], *CASE, "samples_us"), "expected times above zero"),
        (put(0.0, *CASE, "expected_us"), "expected_us: expected a time above zero"),
        (put("screen", *CASE, "path_wanted"), "direct ran where screen was wanted"),
        (put(5.0, "steps", 0, "data", "copy", "median"), "copy.median: 5.0 is not that of the samples"),
        (put([], "steps", 0, "data", "copy", "samples"), "copy.samples: expected figures above zero"),
        (put("GB/s", "steps", 0, "data", "copy", "unit"), "copy.unit: expected one of s, B/s, FLOP/s"),
        (put(-1, "steps", 5, "data", "compiled", "hits"), "compiled: expected counts and seconds of at least zero"),
        (put([], "steps", 5, "data", "compiled", "missed"), "compiled.missed: 0 names for 1 misses"),
        (put(0, "steps", 5, "data", "compiled", "misses"), "compiled.missed: 1 names for 0 misses"),
        (put("yes", "steps", 5, "data", "compiled", "prepared"), "compiled.prepared: expected bool"),
    ],
)
def test_each_defect_of_a_measure_record_is_named(change: Change, said: str) -> None:
    made = measure()
    change(made)
    assert said in "\n".join(records.problems(made))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(False, "steps", 2, "data", "holds"), "holds: False contradicts"),
        (put(1.3, "steps", 2, "data", "types", "float16", "worst"), "holds: True contradicts"),
        (put({}, "steps", 2, "data", "types"), "types: expected at least one"),
        (drop("steps", 2, "data", "types", "float16", "bits"), "types.float16.bits: missing"),
        (put(-1, "steps", 3, "data", "skipped"), "expected counts of at least zero"),
        (put(0, "steps", 3, "data", "failed"), "failures: 1 names, but 0 failed"),
        (put(1, "steps", 4, "data", "runs", 0, "tool"), "tool: expected str"),
        (put("ok", "steps", 1, "data", "runs", 0, "result"), "runs[0].result: expected one of passed"),
        (put([3], "steps", 5, "data", "runs"), "runs[0]: expected an object"),
    ],
)
def test_each_defect_of_a_prove_record_is_named(change: Change, said: str) -> None:
    made = prove()
    change(made)
    assert said in "\n".join(records.problems(made))


@pytest.mark.parametrize("made", [None, 3, "record", []])
def test_what_is_no_record(made: object) -> None:
    assert len(records.problems(made)) == 1


def test_written_and_read(tmp_path: Path) -> None:
    made: Any = measure()
    path = tmp_path / records.place(made)
    assert path == tmp_path / "nvidia-h200" / "2026-11-24-aaaaaaaaaa-measure.json"
    records.write(made, path)
    assert records.read(path) == made
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        records.read(path)
    records.write(made | {"schema": 7}, path)
    with pytest.raises(ValueError, match="schema: expected 1, found 7"):
        records.read(path)


def test_quartiles() -> None:
    assert records.quartiles([3.0, 1.0]) == (1.0, 2.0, 3.0)
    assert records.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    with pytest.raises(ValueError, match="at least one sample"):
        records.quartiles([])


@pytest.mark.parametrize(
    ("name", "folder"), [("NVIDIA H200", "nvidia-h200"), ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3")]
)
def test_slug(name: str, folder: str) -> None:
    assert records.slug(name) == folder


# --------------------------------------------------------------------------------------------------
# Expected times
# --------------------------------------------------------------------------------------------------


def test_floors_are_those_of_the_design_notes() -> None:
    """N = M, D, and the times stated there in us, to the digits stated."""
    for N, D, fp32, tf32, half, split, backward in (
        (256, 2048, 4.0, 0.68, 0.34, 1.0, 1.0),
        (8192, 512, 1030, 174, 87, 261, 8),
        (8192, 2048, 4100, 700, 350, 1040, 31),
        (65536, 2048, 263_000, 45_000, 22_000, 67_000, 250),
    ):
        for arithmetic, stated in (("fp32", fp32), ("tf32", tf32), ("half", half), ("split", split)):
            assert expected.product_us(N, N, D, arithmetic) == pytest.approx(stated, rel=0.05)
        assert expected.product_us(N, N, D, "half", symmetric=True) == pytest.approx(half / 2, rel=0.05)
        assert expected.backward_us(N, D) == pytest.approx(backward, rel=0.05)
    assert expected.read_us(65536, 2048) == pytest.approx(125, rel=0.01)
    assert expected.gather_us(8192, 2048) == pytest.approx(300, rel=0.03)


@pytest.mark.parametrize(
    ("problem", "scope", "path", "how", "us"),
    [
        ((256, 256, 2048, "float32", False), "both", "auto", "graph", 25),
        ((256, 256, 2048, "float32", False), "both", "direct", "graph", None),  # stated for no forced path
        ((64, 64, 2048, "float32", False), "both", "auto", "graph", 12),
        ((64, 64, 2048, "float32", False), "both", "cluster", "graph", 24),
        ((64, 64, 2048, "float32", False), "both", "direct", "graph", 13),
        ((128, 128, 2048, "float32", False), "both", "", "called", 30),
        ((8192, 8192, 512, "float32", False), "forward", "auto", "graph", 139),
        ((8192, 8192, 512, "float32", False), "both", "auto", "graph", 355),  # no goal: 260 and 95 predicted
        ((8192, 8192, 2048, "bfloat16", False), "forward", "auto", "graph", 470),
        ((8192, 8192, 2048, "float16", False), "both", "auto", "graph", 830),
        ((256, 65536, 2048, "float32", True), "both", "auto", "graph", 195),
        ((256, 65536, 2048, "float32", False), "both", "auto", "graph", None),
        ((7, 7, 7, "float32", False), "both", "auto", "graph", None),
    ],
)
def test_expected_times(
    problem: tuple[int, int, int, str, bool], scope: str, path: str, how: str, us: float | None
) -> None:
    assert expected.expected_us(*problem, scope, path, how) == us


def test_no_figure_contradicts_another() -> None:
    """Each figure is there once and above zero; later stages are no slower, and no goal is below its floor."""
    keys = [(f.N, f.M, f.D, f.dtype, f.bank, f.scope, f.source, f.path, f.kernel, f.how) for f in expected.FIGURES]
    assert len(set(keys)) == len(keys)
    for f in expected.FIGURES:
        assert f.us > 0
        rest = (f.N, f.M, f.D, f.dtype, f.bank, f.scope, "")
        goal, later, floor = (expected.stated_us(*rest, source) for source in ("goal", "later", "floor"))
        assert goal is None or later is None or goal >= later
        assert floor is None or later is None or later >= floor


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit, a pair of records of it, and the page."""
    if shutil.which("git") is None:
        pytest.skip("no git here")
    # In a hook these name the repository that runs it.
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    for made in (prove(commit), measure(commit)):
        save(tmp_path, made)
    (tmp_path / "old.json").write_text(
        json.dumps({"provenance": {"date": "2026-01-02", "commit": commit, "dirty": True}, "contestants": {}})
    )
    assert page.main(["--results", str(tmp_path)]) == 0
    return tmp_path


def save(folder: Path, made: Any) -> Path:
    path = folder / records.place(made)
    records.write(made, path)
    return path


def check(folder: Path) -> int:
    return page.main(["--check", "--results", str(folder)])


def rows(text: str, *cells: str) -> list[str]:
    """Rows of tables that begin with these cells."""
    return [line for line in text.splitlines() if line.startswith("| " + " | ".join(cells) + " |")]


def test_the_page_says_what_the_records_say(results: Path) -> None:
    text = (results / "README.md").read_text()
    assert "nothing has been measured" not in text.lower()
    assert "0.31 of 1.25" in rows(text, "probe", "passed")[0]
    assert "Tensor core: Hopper; the bound of 1.25 D 2^-23 holds" in text
    assert "| 0.312 | 4.00x |" in rows(text, "bfloat16", "16", "25", "truncated", "kept")[0]
    assert rows(text, "tests", "test_cuda.py::test_ties", "failed")
    assert rows(text, "smoke", "bank float32 16 x 4096 x 64", "timed out", "20 s")
    assert rows(text, "copy", "4.30 TB/s", "4.30 TB/s", "1.00")
    assert rows(text, "null_kernel", "3.00 us", "2.00 us", "1.50")
    assert rows(text, "new one", "4.30 TB/s", "-", "-")
    # forward: graph, expected, ratio, called; the same of both
    assert rows(text, "random", "256 x 2048", "float32", "direct", "20.0", "-", "-", "-", "50.0", "25.0", "2.00", "100")
    assert rows(text, "64 x 65536 x 2048 bank", "float32", "forward", "graph", "321", "123", "bank", "-")
    assert rows(text, "256 x 2048", "float32", "both", "called", "100", "7.00x", "failed", "-", "out of memory")
    assert rows(text, "random", "both", "tile", "1", "30.0", "75 %")
    assert rows(text, "[old.json](old.json)", "not recorded", "2026-01-02")[0].endswith("| with uncommitted changes |")
    assert rows(text, "ncu", "not run", "1.5", "40", "-", "no time left")
    assert rows(text, "triton", "yes", "11", "1", "1.5", "search_kernel KP=16 D:i32")


def test_each_step_is_shown_from_the_newest_record_that_ran_it(results: Path) -> None:
    made = measure(git(results, "rev-parse", "HEAD"))
    made["provenance"]["date"] = "2026-11-25T10:00:00+00:00"
    made["steps"] = [
        step("loss fp32", {"cases": [case("cuda", "both", "graph", 30.0, expected_us=25.0)], "kernels": []})
    ]
    save(results, made)
    assert page.main(["--results", str(results)]) == 0
    text = (results / "README.md").read_text()
    assert "| 30.0 | 25.0 | 1.20 |" in text
    assert "| 50.0 | 25.0 | 2.00 |" not in text
    assert rows(text, "64 x 65536 x 2048 bank", "float32", "forward", "graph", "321", "123")  # the older record's
    unwrapped = " ".join(text.split())
    assert (
        unwrapped.count(" has loss fp32: ") == 1 and " has ceilings, paths, rivals, train, triton, ncu: " in unwrapped
    )
    assert "Tensor core: Hopper" in text  # the other call's


def test_without_a_gpu_record_the_page_says_so(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"variants": {}, "facts": {"torch": "2.13"}}))
    assert page.main(["--results", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "Nothing has been measured on a GPU yet" in text
    assert "commit not recorded" in text


def test_the_text_of_a_table_is_aligned() -> None:
    made: Any = measure()
    for table in render.measure_tables(made):
        title, *lines = table.text().splitlines()
        assert title == table.title
        assert len({len(line) for line in lines}) == 1


def test_nothing_to_report(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (results / "README.md").read_bytes()
    assert check(results) == 0
    assert page.main(["--results", str(results)]) == 0
    assert (results / "README.md").read_bytes() == before
    assert "not checked" not in capsys.readouterr().out


def test_an_edited_page_is_noticed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = results / "README.md"
    path.write_text(path.read_text().replace("| 2.00 |", "| 1.00 |"))
    assert check(results) == 1
    said = capsys.readouterr().out
    assert "\n-| random | 256 x 2048" in said
    assert "\n+| random | 256 x 2048" in said
    path.unlink()
    assert check(results) == 1


def change_record(results: Path, change: Change, call: str = "measure") -> None:
    [path] = results.glob(f"nvidia-h200/*-{call}.json")
    made = json.loads(path.read_text())
    change(made)
    path.write_text(json.dumps(made))


def test_a_changed_record_is_noticed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_record(results, put(15.0, "steps", 1, "data", "cases", 1, "expected_us"))
    assert check(results) == 1
    assert "| 50.0 | 15.0 | 3.33 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(True, "rehearsal"), "a rehearsal"),
        (put(True, "provenance", "dirty"), "uncommitted changes"),
        (put(False, "complete"), "incomplete"),
        (put("b" * 40, "provenance", "commit"), f"its commit {'b' * 40} is not an ancestor"),
        (
            put("b" * 40, "provenance", "commit"),
            "its content belongs in nvidia-h200/2026-11-24-bbbbbbbbbb-measure.json",
        ),
        (put("NVIDIA H100", "provenance", "device", "name"), "its content belongs in nvidia-h100/"),
        (put("2026-11-23T10:00:00+00:00", "provenance", "date"), "its content belongs in nvidia-h200/2026-11-23"),
        (put(2, "schema"), "schema: expected 1"),
        (put(None, "provenance", "libraries"), "what its libraries were built from"),
        (put("c" * 40, "provenance", "libraries", "commit"), "built from something else"),
        (put(True, "provenance", "libraries", "dirty"), "built from something else"),
        (put(["sn_ops/_C_cuda.so"], "provenance", "libraries", "changed_since"), "built from something else"),
        (put(float("nan"), "steps", 1, "seconds"), "NaN is no number of JSON"),
    ],
)
@pytest.mark.parametrize("arguments", [["--check"], []])
def test_a_record_out_of_order_is_noticed(
    results: Path, capsys: pytest.CaptureFixture[str], change: Change, said: str, arguments: list[str]
) -> None:
    """The check names it, and no page is written."""
    before = (results / "README.md").read_bytes()
    change_record(results, change)
    assert page.main([*arguments, "--results", str(results)]) == 1
    assert said in capsys.readouterr().out
    assert (results / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [
        (1, put("passed", "result"), "steps[1]: passed, but a run did not"),
        (2, put(False, "data", "holds"), "holds: False contradicts"),
        (2, put(1.5, "data", "types", "float16", "general"), "holds: True contradicts"),
        (3, put("passed", "result"), "steps[3]: passed, but 900 tests passed and 1 failed"),
        (4, put(False, "data", "runs", 0, "clean"), "steps[4]: passed, but a tool found something"),
        (5, put(3, "data", "runs", 0, "wrong"), "steps[5]: passed, but a replay was wrong"),
    ],
)
def test_a_step_that_contradicts_itself_is_noticed(number: int, change: Change, said: str) -> None:
    made = prove()
    change(made["steps"][number])
    assert said in "\n".join(records.problems(made))


def test_a_commit_beside_the_history_is_noticed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A commit of the repository that is no ancestor, as a rebase leaves behind; in records of a CPU too."""
    git(results, "commit", "-q", "--amend", "--allow-empty", "-m", "another first")
    assert check(results) == 1
    said = capsys.readouterr().out
    assert said.count("is not an ancestor of HEAD") == 3
    assert "FAILED old.json" in said


@pytest.mark.parametrize(
    ("place", "text", "said"),
    [
        ("new.json", "[]", "expected an object"),
        ("new.json", "{", "Expecting"),
        ("new.json", json.dumps(measure()), "belongs in the folder of its device"),
        ("nvidia-h200/new.json", "{}", "schema: missing"),
        ("nvidia-h200/deep/new.json", "{}", "no record belongs so deep"),
    ],
)
def test_what_does_not_belong_is_noticed(
    results: Path, capsys: pytest.CaptureFixture[str], place: str, text: str, said: str
) -> None:
    path = results / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert check(results) == 1
    assert said in capsys.readouterr().out


def test_without_history_only_ancestors_are_not_checked(
    results: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    git(results, "add", "-A")
    git(results, "commit", "-q", "-m", "records")
    shallow = tmp_path_factory.mktemp("clones") / "shallow"
    git(results, "clone", "-q", "--depth", "1", results.as_uri(), str(shallow))
    assert check(shallow) == 0
    assert "the clone is shallow: whether commits are ancestors of HEAD was not checked" in capsys.readouterr().out
    (shallow / "README.md").write_text("")
    assert check(shallow) == 1
    (results / ".git").rename(results / "elsewhere")
    assert check(results) == 0
    assert "this is no git checkout: whether" in capsys.readouterr().out
