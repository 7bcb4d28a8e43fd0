"""The parts of .ci/run: what a step records, steps that run beside others, and the counts at the end."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

import requirements
import summary

CI = Path(summary.__file__).resolve().parent

REPORT = """<testsuites><testsuite tests="5" failures="1" errors="1">
<testcase classname="tests.a" name="fast" time="0.5"/>
<testcase classname="tests.a" name="slow" time="12.25"/>
<testcase classname="tests.a" name="bad" time="1"><failure message="no"/></testcase>
<testcase classname="tests.a" name="worse" time="1"><error message="no"/></testcase>
<testcase classname="tests.b" name="left" time="0"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def run_steps(folder: Path, body: str) -> tuple[str, list[summary.Step]]:
    """What a run of these steps prints, and what it records."""
    script = f"set -uo pipefail; work={folder}; . {CI}/steps.sh; trap stop_tracks EXIT\n{body}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, summary.read_steps(folder / "results.txt")


def test_steps_are_recorded(tmp_path: Path) -> None:
    printed, steps = run_steps(tmp_path, "step good true; step bad false; skip 'not here' 'no nvcc here'")
    assert [(step.result, step.name, step.reason) for step in steps] == [
        ("passed", "good", ""),
        ("failed", "bad", ""),
        ("skipped", "not here", "no nvcc here"),
    ]
    assert "==== bad: failed" in printed and "not here: skipped, no nvcc here" in printed


def test_steps_run_beside_others(tmp_path: Path) -> None:
    # Each waits for the other: one after the other, neither would pass.
    body = """
    meet() { touch "$work/$1"; for i in $(seq 200); do [ -e "$work/$2" ] && return; sleep 0.1; done; false; }
    others() { step there meet a b; echo printed there; step bad false; }
    beside others; step here meet b a; echo last before the join; join_tracks"""
    printed, steps = run_steps(tmp_path, body)
    assert {(step.result, step.name) for step in steps} == {("passed", "here"), ("passed", "there"), ("failed", "bad")}
    assert printed.index("last before the join") < printed.index("printed there")


def test_steps_that_never_came_to_run_are_a_failure(tmp_path: Path) -> None:
    _, steps = run_steps(
        tmp_path, "others() { step one true; kill -9 $BASHPID; step two true; }; beside others; join_tracks"
    )
    assert [(step.result, step.name) for step in steps] == [("passed", "one"), ("failed", "others")]


def test_what_runs_beside_ends_with_the_run(tmp_path: Path) -> None:
    started = 'until [ -s "$work/child" ]; do sleep 0.1; done'
    run_steps(tmp_path, f'others() {{ sleep 600 & echo $! >"$work/child"; wait; }}; beside others; {started}')
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it still runs ten seconds later")


@pytest.mark.parametrize(("bad", "status"), [("passed", 0), ("failed", 1)])
def test_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str, status: int) -> None:
    results, report = tmp_path / "results.txt", tmp_path / "pytest.xml"
    results.write_text(f"passed\t100\tlong\t\n{bad}\t2\tshort\t\nskipped\t0\tabsent\tno nvcc here\n")
    report.write_text(REPORT)
    assert summary.main(str(results), str(report), "135") == status
    lines = capsys.readouterr().out.splitlines()
    steps = "2 passed, 0 failed" if bad == "passed" else "1 passed, 1 failed"
    assert lines[-2] == f"steps: {steps}, 1 skipped; the next line adds pytest's 5 tests"
    assert lines[-1] == ("4 passed, 2 failed, 2 skipped" if bad == "passed" else "3 passed, 3 failed, 2 skipped")
    assert lines.index("   100 s  long") < lines.index("     2 s  short")
    assert lines.index("  12.2 s  tests.a::slow") < lines.index("   0.5 s  tests.a::fast")
    assert "SKIPPED  absent: no nvcc here" in lines and "SKIPPED  1 of pytest's tests: no GPU" in lines
    assert "2 min 15 s in all" in lines


def test_the_end_without_a_report_of_the_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.txt").write_text("failed\t3\tthe suite\t\n")
    assert summary.main(str(tmp_path / "results.txt"), str(tmp_path / "none.xml"), "3") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"


SYMBOLS = """
namespace sn::cpu::generic {
int own() { return 1; }
}
"""


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        (SYMBOLS, 0, "1 instruction sets"),
        (SYMBOLS + "inline int shared() { return 2; } int (*use)() = shared;", 1, "generic shares symbols"),
        ("int elsewhere() { return 1; }", 1, "no symbol of its own"),
        (None, 1, "no kernels.cpp.o"),
    ],
)
def test_symbols_of_kernels(tmp_path: Path, source: str | None, status: int, said: str) -> None:
    folder = tmp_path / "build" / "sn_cpu_generic.dir" / "csrc"
    folder.mkdir(parents=True)
    if source is not None:
        object_file = str(folder / "kernels.cpp.o")
        subprocess.run(["c++", "-x", "c++", "-c", "-", "-o", object_file], input=source, text=True, check=True)
    script = f"work={tmp_path}; . {CI}/native.sh; private_symbols {tmp_path}/build"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout + done.stderr


def test_linters_have_exact_versions() -> None:
    linters = requirements.requirements("lint")
    assert {name for name, mark, version in (each.partition("==") for each in linters) if mark and version} == {
        "ruff",
        "mypy",
        "clang-format",
    }
