"""Runs the steps of a call and keeps the record of it, whatever a step does.

Each step is a process with a session of its own and a time limit: a hang, a crash or a CUDA error that sticks ends that
step, not the run. What a step prints goes to `<call>.log` line by line. The record, `<call>.json`, is replaced after
every step, and every two seconds while a step reports. No other file is left. If the disk fills up, the log ends first:
some of the disk is kept back for the record. A table of all steps is printed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import kernel_cache
import manifest
import protocol
import steps as table
from records import FIGURE_WIDTH, SCHEMA
from steps import Step

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

BALLAST_BYTES = 4 << 20
BALLAST_PIECE = 256 << 10
SAVE_EVERY_S = 2.0
GRACE_S = 3.0  # seconds between SIGTERM and SIGKILL
LOG_BYTES = 12 << 20
REHEARSAL_SLACK = 4.0
LINE_BYTES = 4 << 20  # a longer line is read in pieces: a step may print without line ends
LAST_LINES = 12  # of a step that did not pass, shown at the end


class Disk:
    """The output folder. A full disk ends the log, not the record: a file of ballast holds space, of which a piece is
    freed whenever the record does not fit."""

    def __init__(self, folder: Path, call: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._turn = (folder / f".{call}.lock").open("w")
            fcntl.flock(self._turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{folder}: another {call} is running there") from None
        except OSError as error:
            raise SystemExit(f"{folder}: expected a folder to write to, got: {error}") from None
        self.folder = folder
        self.record = folder / f"{call}.json"
        self.log = folder / f"{call}.log"
        self.troubles: list[str] = []
        self._lock = threading.Lock()
        self._ballast = folder / f".{call}.ballast"
        self._log_bytes = 0
        self._log_ended = False
        try:
            room = min(BALLAST_BYTES, shutil.disk_usage(folder).free // 2)
            self._ballast.write_bytes(os.urandom(room))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._ballast.unlink(missing_ok=True)
            self.trouble(f"no room is kept back for the record: {error}")
        with contextlib.suppress(OSError):
            self.record.unlink(missing_ok=True)  # an earlier run's must not be taken for this one's
        try:
            self._log = self.log.open("wb", buffering=0)
        except OSError as error:
            self._log_ended = True
            self.trouble(f"no log: {error}")

    def trouble(self, text: str) -> None:
        """Note what could not be written."""
        self.troubles.append(text)
        print(f"runner: {text}", file=sys.stderr, flush=True)

    def write_line(self, line: bytes) -> None:
        """Append to the log, until it is too long or the disk is full."""
        with self._lock:
            if self._log_ended:
                return
            try:
                if self._log_bytes + len(line) > LOG_BYTES:
                    raise OSError(f"the log ends at {LOG_BYTES >> 20} MiB")
                self._log.write(line)
                self._log_bytes += len(line)
            except OSError as error:
                self._log_ended = True
                self.trouble(f"the log is cut off: {error}")

    def save(self, record: dict[str, Any]) -> bool:
        """Replace the record. False where there is no room for it even without the ballast."""
        fresh = self.record.with_suffix(".json.new")
        with self._lock:
            while True:
                text = json.dumps({**record, "troubles": self.troubles}, indent=1, allow_nan=False) + "\n"
                try:
                    fresh.write_text(text, encoding="utf-8")
                    os.replace(fresh, self.record)
                    return True
                except OSError as error:
                    with contextlib.suppress(OSError):
                        fresh.unlink(missing_ok=True)
                    said = f"there was no room for the record: {error}"
                    if said not in self.troubles:
                        self.trouble(said)
                    if not self.give_up_ballast():
                        return False

    def give_up_ballast(self, *, everything: bool = False) -> bool:
        """Free a piece of the ballast, and end the log, which would use it up. False where no ballast is left."""
        self._log_ended = True
        with contextlib.suppress(OSError):
            left = self._ballast.stat().st_size
            os.truncate(self._ballast, 0 if everything else max(0, left - BALLAST_PIECE))
            return left > 0
        return False

    def close(self) -> None:
        """Remove the ballast, and let other runs use the folder."""
        with contextlib.suppress(OSError):
            self._ballast.unlink(missing_ok=True)
            (self.folder / f".{self.record.stem}.lock").unlink(missing_ok=True)
        self._turn.close()


class Runner:
    """One call."""

    def __init__(
        self, call: str, steps: Sequence[Step], limit: float, folder: Path, *, pretend: bool, command: list[str]
    ) -> None:
        self.call = call
        self.command = command
        self.pretend = pretend
        self.end = time.monotonic() + limit
        self.disk = Disk(folder, call)
        self.scratch = (
            folder / f"scratch-{call}" / "of" / "steps"
        )  # deep: what a killed run leaves does not travel with the record
        self.lock = threading.RLock()
        self.stopped = ""
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.tails: dict[str, list[str]] = {}
        self.unread: dict[str, str] = {}
        self.saved = 0.0
        self.steps = list(steps)
        self.results: dict[str, dict[str, Any]] = {
            step.name: {
                "name": step.name,
                "result": "not run",
                "seconds": 0.0,
                "cap": step.cap,
                "figure": "",
                "reason": "",
                "data": None,
            }
            for step in steps
        }
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "call": call,
            "rehearsal": pretend,
            "provenance": {},
            "steps": list(self.results.values()),
            "complete": False,
        }

    # ---- one step ------------------------------------------------------------------------------------------------

    def environment(self, step: Step) -> dict[str, str]:
        """The environment of a step: it writes only to its scratch folder, and downloads nothing."""
        scratch = self.scratch / step.name
        scratch.mkdir(parents=True, exist_ok=True)
        changes = {
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            **{name: str(scratch) for name in ("TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "CUDA_CACHE_PATH")},
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            **({protocol.PRETEND: "1"} if self.pretend else {}),
            **dict(step.environment),
        }
        # The programs import the modules of this folder; without an installed package, the checkout's own.
        paths = [str(HERE)] if importlib.util.find_spec("sn_ops") else [str(HERE), str(ROOT)]
        changes["PYTHONPATH"] = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH", "")]))
        # A cache that was filled beforehand saves minutes. What travelled is not written to: each step has a copy.
        cache = scratch / "triton"
        if "TRITON_CACHE_DIR" not in os.environ and kernel_cache.ARCHIVE.is_file() and not cache.exists():
            kernel_cache.unpack(kernel_cache.ARCHIVE, cache)
        changes.setdefault("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(cache)))
        changes[kernel_cache.EVENTS] = str(scratch / "compiled")
        return os.environ | changes

    def listen(self, step: Step, process: subprocess.Popen[bytes]) -> None:
        """Log what a step prints, and read its messages."""
        assert process.stdout is not None
        while line := process.stdout.readline(LINE_BYTES):
            printed, mark, said = line.decode("utf-8", "replace").partition(protocol.MARK)
            if printed.strip() or not mark:
                text = printed.rstrip("\n")
                self.disk.write_line(f"{step.name}: {text}\n".encode())
                self.tails.setdefault(step.name, []).append(text[:300])
                del self.tails[step.name][:-LAST_LINES]
            if mark:
                try:
                    self.take(step, protocol.parse(said))
                except protocol.MessageError as error:
                    self.disk.write_line(f"{step.name}: cannot be read: {said}".encode())
                    self.unread.setdefault(step.name, f"it said what cannot be read: {error}")

    def take(self, step: Step, message: dict[str, Any]) -> None:
        """Merge a message of a step into the record."""
        result = self.results[step.name]
        with self.lock:
            if result["result"] not in ("not run", "running"):
                return  # the step has ended: a process that it left behind writes this
            result["figure"] = message.get("figure", result["figure"])[:FIGURE_WIDTH].replace("\n", " ")
            result["reason"] = message.get("reason", result["reason"])
            news = message.get("data", {})
            protocol.merge(self.record["provenance"], news.pop("provenance", {}))
            if news:
                result["data"] = result["data"] or {}
                protocol.merge(result["data"], news)
            self.save(now=False)

    def save(self, *, now: bool = True) -> None:
        """Write the record; without `now`, at most once in SAVE_EVERY_S seconds."""
        with self.lock:
            if now or time.monotonic() - self.saved > SAVE_EVERY_S:
                self.disk.save(self.record)
                self.saved = time.monotonic()

    def end_process(self, process: subprocess.Popen[bytes]) -> None:
        """End a step's process and all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
                if number == signal.SIGTERM:
                    time.sleep(0.1)

    def run_step(self, step: Step) -> None:
        """Run one step to its end; an exception of the runner itself fails that step."""
        try:
            self.run_process(step)
        except Exception as error:
            with self.lock:
                self.results[step.name].update(result="failed", reason=f"the runner: {error!r}")
            self.disk.trouble(f"{step.name}: {error!r}")
        result = self.results[step.name]
        self.disk.write_line(f"runner: {step.name} {result['result']} after {result['seconds']} s\n".encode())
        shutil.rmtree(self.scratch / step.name, ignore_errors=True)
        self.save()
        print(line_of(result), flush=True)

    def run_process(self, step: Step) -> None:
        """Run the process of a step; its result follows from how it ended."""
        result = self.results[step.name]
        cap = min(step.cap, self.end - time.monotonic())
        started = time.monotonic()
        try:
            environment = self.environment(step)
            command = [sys.executable, str(manifest.PROGRAMS / step.program[0]), *step.program[1:]]
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            with self.lock:
                result.update(result="failed", reason=f"it could not be started: {error}")
            return
        with self.lock:
            result["result"] = "running"
            self.running[step.name] = process
            if self.stopped:  # by a signal that came just now
                self.end_process(process)
        self.save()
        listener = threading.Thread(target=self.listen, args=(step, process), daemon=True)
        listener.start()
        late = False
        try:
            status = process.wait(max(0.0, cap))
        except subprocess.TimeoutExpired:
            late = True
            self.end_process(process)
            status = process.wait()
        # Processes that it left behind hold the device, and the pipe.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        listener.join(GRACE_S)
        with self.lock:
            self.running.pop(step.name, None)
            result["seconds"] = round(time.monotonic() - started, 2)
            if self.stopped:
                result.update(result="timed out", reason=self.stopped)
            elif late:
                result.update(result="timed out", reason=f"it took more than {cap:.0f} s. " + result["reason"])
            elif status < 0:
                result.update(result="crashed", reason=f"ended by {signal_name(-status)}. " + result["reason"])
            elif status == protocol.NOT_RUN:
                result.update(result="not run", reason=result["reason"] or "it lacks something, and does not say what")
            elif status != 0:
                last = next((text for text in reversed(self.tails.get(step.name, [])) if text.strip()), "")
                result.update(result="failed", reason=result["reason"] or f"exit status {status}. {last}".strip())
            elif step.name in self.unread:
                result.update(result="failed", reason=self.unread[step.name])
            else:
                result["result"] = "passed"

    # ---- all of them ---------------------------------------------------------------------------------------------

    def stop(self, number: int, _: FrameType | None) -> None:
        """On a signal: end the steps that run, and say so in the record."""
        self.stopped = f"the whole call was stopped by {signal.Signals(number).name}"
        for process in list(self.running.values()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def run(self) -> int:
        """Run all; 0 if every step passed."""
        with handling((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), self.stop):
            self.save()
            self.record["provenance"] = provenance(self.command, self.disk.folder)
            if self.record["provenance"]["dirty"]:
                print("changes are not committed: this record cannot be published", flush=True)
            self.save()
            closed = ""
            for group in table.groups_of(self.steps):
                wanted = [step for step in group if not closed or step.anyway]
                for step in group:
                    if self.stopped:
                        self.results[step.name]["reason"] = self.stopped
                    elif step not in wanted:
                        self.results[step.name]["reason"] = closed
                if self.stopped or not wanted:
                    continue
                if time.monotonic() > self.end - 1:
                    for step in wanted:
                        self.results[step.name]["reason"] = "the call's time was used up"
                    continue
                threads = [threading.Thread(target=self.run_step, args=(step,)) for step in wanted]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                for step in wanted:
                    if step.gate and self.results[step.name]["result"] != "passed":
                        closed = f"{step.name} did not pass"
            shutil.rmtree(self.scratch.parent.parent, ignore_errors=True)
            with self.lock:
                self.record["complete"] = not self.stopped
                self.disk.give_up_ballast(everything=True)
                saved = self.disk.save(self.record)
            self.disk.close()
        print(self.last_screen(), flush=True)
        if not saved:
            print(f"the record, which could not be written:\n{json.dumps(self.record)}", flush=True)
        good = all(result["result"] == "passed" for result in self.results.values())
        return 0 if good and saved and not self.stopped else 1

    def last_screen(self) -> str:
        """Print the last lines of what did not pass, then the table."""
        text = []
        for result in self.results.values():
            if result["result"] in ("failed", "crashed", "timed out"):
                text += [f"---- the end of {result['name']}", *self.tails.get(result["name"], [])]
        width = max(len(name) for name in self.results)
        text += ["", *(line_of(result, width) for result in self.results.values())]
        text += [f"trouble: {trouble}" for trouble in self.disk.troubles]
        device = self.record["provenance"].get("device") or {}
        commit = self.record["provenance"].get("commit") or "unknown commit"
        dirty = ", modified" if self.record["provenance"].get("dirty") else ""
        text.append(f"{device.get('name', 'no device')}, {commit[:10]}{dirty}; record {self.disk.record}")
        return "\n".join(text)


def signal_name(number: int) -> str:
    """The name of a signal; real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def line_of(result: dict[str, Any], width: int = 0) -> str:
    """One line of the table: step, result, seconds of cap, figure."""
    said = "; ".join(text for text in (result["figure"], result["reason"].strip()) if text)
    return (
        f"{result['name']:<{width}}  {result['result']:<9}  {result['seconds']:5.1f} of {result['cap']:3.0f} s  {said}"
    )


@contextlib.contextmanager
def handling(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    """Signals go to the handler for a while."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# ---- provenance ------------------------------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    """What a program prints; empty where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def installed(name: str) -> str | None:
    """Version of a package, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name in /proc/cpuinfo."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def device_of_smi() -> dict[str, Any] | None:
    """What nvidia-smi says of the first device."""
    fields = {
        "name": "name",
        "driver": "driver_version",
        "memory_mib": "memory.total",
        "sm": "clocks.sm",
        "memory": "clocks.mem",
        "sm_max": "clocks.max.sm",
        "memory_max": "clocks.max.mem",
    }
    text = output_of("nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits")
    if not text:
        return None
    values = dict(zip(fields, (value.strip() for value in text.splitlines()[0].split(",")), strict=False))

    def number(name: str) -> int | None:
        with contextlib.suppress(ValueError):
            return int(values[name])
        return None

    return {
        "name": values["name"],
        "driver": values["driver"],
        "clocks_mhz": {name: number(name) for name in ("sm", "memory", "sm_max", "memory_max")},
    }


def changed_files(besides: Path | None) -> bool:
    """Whether the checkout has changes that are not committed, besides what this run writes itself."""
    pathspec = ["--", "."]
    if besides is not None and besides.is_relative_to(ROOT) and besides != ROOT:
        pathspec.append(f":(exclude){besides.relative_to(ROOT)}")
    return output_of("git", "-C", str(ROOT), "status", "--porcelain", *pathspec) != ""


def provenance(command: list[str], folder: Path | None = None) -> dict[str, Any]:
    """Where, when, with what and from which commit; the step `facts` adds what only the libraries know.

    The commit is git's, or, where the tree came without its history (or in one that does not know the commit that was
    prepared), that of the manifest `prepare.sh` left.
    """
    known = manifest.read()
    head = output_of("git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD").splitlines()
    prepared = str(known.get("commit", "HEAD"))
    if len(head) == 2 and Path(head[0]) == ROOT and output_of("git", "-C", str(ROOT), "cat-file", "-t", prepared):
        commit: str | None = head[1]
        dirty: bool | None = changed_files(folder)
    else:
        commit, dirty = known.get("commit"), known.get("dirty")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "libraries": manifest.state(known),
        "device": device_of_smi(),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "triton": installed("triton"),
        "cuda": None,
        "sn_ops": None,
        "build": None,
        "host": {"cpu": processor(), "cores": len(os.sched_getaffinity(0)), "os": platform.platform()},
        "command": command,
    }


# ---- command line ----------------------------------------------------------------------------------------------------


def chosen(steps: list[Step], only: str, first: str) -> list[Step]:
    """The steps picked by --only and --from, and those that always run.

    Raises:
        SystemExit: for a name that no step has.
    """
    names = [step.name for step in steps]
    wanted = [name for name in only.split(",") if name] or names
    for name in [*wanted, *([first] if first else [])]:
        if name not in names:
            raise SystemExit(f"expected steps among {', '.join(names)}, got {name!r}")
    begin = names.index(first) if first else 0
    return [s for i, s in enumerate(steps) if s.always or (s.name in wanted and i >= begin)]


def main(call: str, description: str, arguments: list[str] | None = None) -> int:
    """The command of a call."""
    # Emulated threads are slow.
    slack = REHEARSAL_SLACK if protocol.pretending() else 1.0
    steps = [replace(step, cap=slack * step.cap) for step in table.steps_of(call)]
    listing = "\n".join(f"  {step.name:<11} {step.cap:4.0f} s  {step.what}" for step in steps)
    parser = argparse.ArgumentParser(
        description=f"{description}\n\nsteps, with the most each may take:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help=f"folder for {call}.json and {call}.log")
    parser.add_argument("--only", default="", metavar="STEP,...", help="run these steps alone")
    parser.add_argument("--from", dest="first", default="", metavar="STEP", help="begin with this step")
    parser.add_argument("--limit", type=float, default=table.CALL_LIMIT_S[call], help="seconds in all (%(default)s)")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    command = [f"{call}.py", *("OUT" if Path(text) == options.out else text for text in given)]
    picked = chosen(steps, options.only, options.first)
    return Runner(
        call, picked, slack * options.limit, options.out.resolve(), pretend=protocol.pretending(), command=command
    ).run()
