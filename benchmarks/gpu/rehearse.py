"""Rehearses the kit without a GPU, so that mistakes of the kit cost no time on one.

    python benchmarks/gpu/rehearse.py [--keep FOLDER]

First both calls run whole, on emulated kernels and the CPU backend: the record must be complete, fit the schema and
be marked as a rehearsal. Then come made-up calls, whose steps fail, hang, die, leave processes behind, print
nonsense, fill the disk or are interrupted with the runner: the record must exist and say so. The exit status is 0 if
everything held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_cache
import manifest
import protocol
import records
import runner
import steps as table
from steps import Step

ROOT = manifest.ROOT
TREE = ROOT / "build" / "simt"
MOST_FILES = 8
MOST_FILE_BYTES = 16 << 20
SMALL_DISK = "3m"

LEFT_BEHIND = ["sleep", f"600.{os.getpid() if 'REHEARSAL' not in os.environ else os.environ['REHEARSAL']}"]
"""A command that only processes of this rehearsal have, to look for afterwards."""

# What steps of the made-up calls do, each a program for `python -c`; `say` is protocol.say.
PROGRAMS = {
    "good": "say(figure='fine', cases=[1])",
    "after": "say(figure='still runs')",
    "fails": "say(cases=[1]); print('the last words'); protocol.fail('it is wrong')",
    "raises": "raise ValueError('unexpected')",
    "lacks": "protocol.not_run('no such tool')",
    "hangs": "say(cases=[1, 2]); print('it hangs'); import time; time.sleep(600)",
    "hangs with a child": "import subprocess, time; subprocess.Popen(LEFT_BEHIND); time.sleep(600)",
    "ignores": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); say(cases=[3]); time.sleep(600)",
    "dies": "say(cases=[4]); import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "aborts": "say(figure='CUDA error'); import os; os.abort()",
    "leaves a child": "import subprocess; subprocess.Popen(LEFT_BEHIND); say(cases=[5])",
    "babbles": "import sys; sys.stdout.buffer.write(b'\\xff\\xfe@kit\\n@kit {cut off\\n'); say(cases=[6])",
    "interrupted": "import sys; say(cases=['a']); sys.stderr.write('50 %'); sys.stderr.flush(); say(cases=['b'])",
    "infinite": 'print(\'@kit {"data": {"time": Infinity}}\')',
    "gate": "protocol.fail('it does not load')",
    "fills": "import os\nwith open(os.path.join(os.environ['TMPDIR'], '../../../big'), 'wb', 0) as f:\n"
    "    try:\n        while True: f.write(b'x' * 65536)\n    except OSError as e: print(e)\nsay(cases=[7])",
    "loads": "import os, pathlib; cache = pathlib.Path(os.environ['TRITON_CACHE_DIR'])\n"
    "say(cases=sorted(path.name for path in cache.glob('*/*'))); (cache / 'ENTRY' / 'new').write_text('')\n"
    "kernel_cache.note('a_kernel', 'D=64', True, 0.0); kernel_cache.note('b_kernel', 'D=65', False, 2.0)\n"
    "say(figure=kernel_cache.tell())",
    "talks": "for i in range(40000): print('x' * 100)\nsay(cases=[8])",
}


def step(name: str, cap: float = 30, **more: Any) -> Step:
    """A step of a made-up call."""
    return Step(name, "prove", cap, (__file__, "--act", name), "", **more)


Results = dict[str, dict[str, Any]]


class Stage:
    """Runs made-up calls in a folder, and checks what they leave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checked = 0
        self.wrong: list[str] = []

    def check(self, holds: bool, what: str) -> None:
        """Note what does not hold."""
        self.checked += 1
        if not holds:
            self.wrong.append(what)
            print(f"rehearse: WRONG: {what}", flush=True)

    def read(self, out: Path, call: str) -> dict[str, Any]:
        """The record that a call left; empty, and a failed check, where it cannot be read."""
        try:
            record: dict[str, Any] = json.loads((out / f"{call}.json").read_text())
        except (OSError, ValueError) as error:
            self.check(False, f"{out.name}: no record: {error}")
            return {}
        left = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
        few = len(left) <= MOST_FILES and all((out / path).stat().st_size <= MOST_FILE_BYTES for path in left)
        self.check(few, f"{out.name}: too much is left: {left}")
        self.check(record["rehearsal"] is True, f"{out.name}: the record could be taken for a measurement")
        return record

    def play(self, name: str, steps: list[Step], limit: float = 60) -> tuple[int, Results]:
        """Run a made-up call; its status and the results by step."""
        out = self.folder / name.replace(" ", "-")
        status = runner.Runner("prove", steps, limit, out, pretend=True, command=["rehearse"]).run()
        record = self.read(out, "prove")
        self.check(record.get("complete") is True, f"{name}: the record is not complete")
        self.check((out / "prove.log").is_file(), f"{name}: there is no log")
        return status, {result["name"]: result for result in record.get("steps", [])}

    def expect(self, results: Results, name: str, result: str, reason: str = "", cases: Any = None) -> None:
        """Check the result, the reason and the cases of a step."""
        found = results.get(name, {})
        told = (found.get("data") or {}).get("cases")
        self.check(
            found.get("result") == result and reason in found.get("reason", "") and (cases is None or told == cases),
            f"{name}: expected {result!r} for {reason!r} with {cases}, found {found}",
        )


# ---- whole calls -----------------------------------------------------------------------------------------------------


def whole(stage: Stage) -> None:
    """Both calls with all their steps, on emulated kernels and the CPU backend."""
    for call in ("prove", "measure"):
        out = stage.folder / "whole"
        command = [sys.executable, str(manifest.HERE / f"{call}.py"), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {protocol.PRETEND: "1"})
        print(done.stdout[-2500:], done.stderr[-2500:], flush=True)
        record = stage.read(out, call)
        names = [step.name for step in table.steps_of(call)]
        lines = {line.split()[0] for line in done.stdout.splitlines()[-len(names) - 1 :] if line.split()}
        stage.check(done.returncode == 0, f"{call}: exit status {done.returncode}")
        stage.check(set(names) <= lines, f"{call}: the last screen lacks {sorted(set(names) - lines)}")
        if not record:
            continue
        stage.check([s["name"] for s in record["steps"]] == names, f"{call}: not all steps are in the record")
        bad = [s["name"] for s in record["steps"] if s["result"] != "passed"]
        stage.check(not bad, f"{call}: did not pass: {bad}")
        told = [s["name"] for s in record["steps"] if "compiled" in (s["data"] or {})]
        stage.check(
            told == (["tests-triton"] if call == "prove" else ["triton"]), f"{call}: compiled is said by {told}"
        )
        # The commit may be missing where there is no git.
        problems = [text for text in records.problems(record) if not text.startswith("provenance.")]
        stage.check(not problems, f"{call}: not in the schema: {problems}")


# ---- made-up calls ---------------------------------------------------------------------------------------------------


def failing(stage: Stage) -> None:
    """A step that fails, raises, lacks something: the others run, the record says which and why."""
    names = ("fails", "raises", "lacks", "babbles", "interrupted", "infinite", "good")
    status, results = stage.play("failing", [step(name) for name in names])
    stage.check(status == 1, "a failed step must show in the exit status")
    stage.expect(results, "fails", "failed", "it is wrong", [1])
    stage.expect(results, "raises", "failed", "exit status 1")
    stage.expect(results, "lacks", "not run", "no such tool")
    stage.expect(results, "babbles", "failed", "cannot be read", [6])
    stage.expect(results, "interrupted", "passed", cases=["a", "b"])
    stage.expect(results, "infinite", "failed", "cannot be read")
    stage.expect(results, "good", "passed", cases=[1])
    log = (stage.folder / "failing" / "prove.log").read_text(errors="replace")
    stage.check("the last words" in log and "unexpected" in log, "the log lacks what steps printed")


def hanging(stage: Stage) -> None:
    """A step that hangs, alone, with a child, deaf to SIGTERM; one that leaves a child behind."""
    started = time.monotonic()
    steps = [step("hangs", 2), step("hangs with a child", 2), step("ignores", 2), step("leaves a child"), step("good")]
    status, results = stage.play("hanging", steps)
    stage.check(status == 1, "a hang must show in the exit status")
    stage.check(time.monotonic() - started < 30, "hangs took longer than their caps")
    stage.expect(results, "hangs", "timed out", "more than 2 s", [1, 2])
    stage.expect(results, "hangs with a child", "timed out", "more than 2 s")
    stage.expect(results, "ignores", "timed out", "more than 2 s", [3])
    stage.expect(results, "leaves a child", "passed", cases=[5])
    stage.expect(results, "good", "passed", cases=[1])
    stage.check(not left_behind(), f"processes are left: {left_behind()}")


def left_behind() -> list[str]:
    """Processes that steps started and that should be gone."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if path.read_bytes().split(b"\0")[:-1] == [word.encode() for word in LEFT_BEHIND]:
                found.append(path.parent.name)
    return found


def dying(stage: Stage) -> None:
    """A step that dies by a signal."""
    _, results = stage.play("dying", [step("dies"), step("aborts"), step("good")])
    stage.expect(results, "dies", "crashed", "SIGSEGV", [4])
    stage.expect(results, "aborts", "crashed", "SIGABRT")
    stage.expect(results, "good", "passed", cases=[1])


def gates(stage: Stage) -> None:
    """Steps behind a gate that failed, steps beside each other, and the call's own limit."""
    _, results = stage.play("gates", [step("gate", gate=True), step("good", anyway=True), step("after")])
    stage.expect(results, "good", "passed", cases=[1])
    stage.expect(results, "after", "not run", "gate did not pass")
    started = time.monotonic()
    _, results = stage.play("beside", [step("hangs", 3), step("ignores", 3, beside="hangs"), step("good")])
    stage.check(time.monotonic() - started < 20, "steps beside each other ran one after the other")
    stage.expect(results, "ignores", "timed out", cases=[3])
    stage.expect(results, "good", "passed", cases=[1])
    _, results = stage.play("late", [step("hangs", 100), step("good")], limit=3)
    stage.expect(results, "hangs", "timed out", cases=[1, 2])
    stage.expect(results, "good", "not run", "time was used up")


def cached(stage: Stage) -> None:
    """Steps with the kernels that travelled: each has a copy of its own; what was compiled all the same is named."""
    made = stage.folder / "made"
    (made / "ENTRY").mkdir(parents=True)
    (made / "ENTRY" / "a_kernel.json").write_text("{}")
    (made / "calls").write_text("[]")
    kept, kernel_cache.ARCHIVE = kernel_cache.ARCHIVE, made / "triton.tar.gz"
    chosen = os.environ.pop("TRITON_CACHE_DIR", None)
    try:
        kernel_cache.pack(made, made / "calls", kernel_cache.ARCHIVE)
        _, results = stage.play("cached", [step("loads"), step("loads again")])
    finally:
        kernel_cache.ARCHIVE = kept
        if chosen is not None:
            os.environ["TRITON_CACHE_DIR"] = chosen
    for name in ("loads", "loads again"):
        stage.expect(results, name, "passed", cases=["__grp__a_kernel.json", "a_kernel.json"])
        found = (results.get(name, {}).get("data") or {}).get("compiled", {})
        stage.check(
            (found.get("hits"), found.get("misses"), found.get("missed")) == (1, 1, ["b_kernel D=65"]),
            f"{name}: what was compiled is not told: {found}",
        )


def stopped(stage: Stage) -> None:
    """The runner itself is told to end: the record says what ran then."""
    out = stage.folder / "stopped"
    process = subprocess.Popen([sys.executable, __file__, "--stopped", str(out)], stdout=subprocess.DEVNULL)
    log = out / "prove.log"
    for _ in range(300):  # until the second step has reported its cases
        time.sleep(0.1)
        if log.is_file() and "it hangs" in log.read_text():
            break
    process.send_signal(signal.SIGTERM)
    status = process.wait(20)
    record = stage.read(out, "prove")
    results = {result["name"]: result for result in record.get("steps", [])}
    stage.check(status == 1 and record.get("complete") is False, "stopped: the record must not be called complete")
    stage.expect(results, "good", "passed", cases=[1])
    stage.expect(results, "hangs", "timed out", "stopped by SIGTERM", [1, 2])
    stage.expect(results, "after", "not run", "stopped by SIGTERM")


def on_small_disk(stage: Stage) -> None:
    """On a disk of 3 MiB, which a step fills: the log is cut off, the record is whole and says so.

    A file system of that size where this user may mount one, else one that is pretended to be full.
    """
    steps = [step("good"), step("talks"), step("fills"), step("after")]
    out = stage.folder / "full-disk"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(out)]
    real = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        if not real:
            print("rehearse: no file system can be mounted here: the full disk is pretended", flush=True)
            pretend_full(steps, out)
        else:
            runner.Runner("prove", steps, 60, out, pretend=True, command=["rehearse"]).run()
        record = stage.read(out, "prove")
    finally:
        if real:
            subprocess.run(["umount", str(out)], check=True)
    results = {result["name"]: result for result in record.get("steps", [])}
    stage.check(record.get("complete") is True, "full disk: the record is not complete")
    stage.check(any("cut off" in text for text in record.get("troubles", [])), "full disk: unsaid")
    for name, cases in (("good", [1]), ("talks", [8]), ("fills", [7])):
        stage.expect(results, name, "passed", cases=cases)
    stage.expect(results, "after", "passed")


def pretend_full(steps: list[Step], out: Path) -> None:
    """Pretend that only the ballast is left on the disk once the first line is logged."""

    class Full(runner.Disk):
        def write_line(self, line: bytes) -> None:
            self._log.close()
            super().write_line(line)

    runner.Disk, kept = Full, runner.Disk  # type: ignore[misc]
    try:
        runner.Runner("prove", steps, 60, out, pretend=True, command=["rehearse"]).run()
    finally:
        runner.Disk = kept  # type: ignore[misc]


ACTS: tuple[Callable[[Stage], None], ...] = (failing, hanging, dying, gates, cached, stopped, on_small_disk, whole)


# ---- command line ----------------------------------------------------------------------------------------------------


def emulated_programs() -> dict[str, str]:
    """Environment variables with the emulated kernels and the emulated probe, which are built if needed."""
    sys.path.append(str(ROOT / "tests"))
    from support import simt_build

    library = simt_build.library()
    return {"SN_SIMT_LIBRARY": str(library), protocol.EMULATED_PROBE: str(simt_build.build("sn_simt_probe"))}


def act(name: str) -> None:
    """Be a step of a made-up call."""
    known = {"protocol": protocol, "say": protocol.say, "kernel_cache": kernel_cache, "LEFT_BEHIND": LEFT_BEHIND}
    exec(PROGRAMS[name.removesuffix(" again")], known)


def main() -> int:
    """All acts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave records and logs here")
    parser.add_argument("--act", help=argparse.SUPPRESS)
    parser.add_argument("--stopped", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.act:
        act(options.act)
        return 0
    if options.stopped:
        steps = [step("good"), step("hangs", 100), step("after")]
        return runner.Runner("prove", steps, 120, options.stopped, pretend=True, command=["rehearse"]).run()
    folder = options.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(emulated_programs(), REHEARSAL=LEFT_BEHIND[1].partition(".")[2])
    stage = Stage(folder)
    for each in ACTS:
        started = time.monotonic()
        each(stage)
        print(f"rehearse: {each.__name__}, {time.monotonic() - started:.0f} s", flush=True)
    if not options.keep:
        shutil.rmtree(folder)
    print(f"rehearse: {stage.checked} checks, {len(stage.wrong)} wrong", flush=True)
    return 1 if stage.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
