"""Timing, memory and provenance: how numbers are taken, whatever is measured.

Timing. Contestants take turns: one sample each a round, so that a drift of the machine hits all of them. A sample is
one call, or, for calls under two milliseconds, the mean of as many calls as fill that time after one untimed call, so
that every contestant starts with its own data in cache. Reported is the median over samples with the quartiles.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch

# A sample lasts at least this long, by repeating short calls.
SAMPLE_SECONDS = 2e-3
# Calls longer than this count from the first one on: warming up matters little to them and costs much.
LONG_CALL_SECONDS = 0.3
# Samples at least, by what one call takes: (up to seconds, samples).
MIN_SAMPLES = ((0.1, 5), (LONG_CALL_SECONDS, 3), (float("inf"), 2))
MAX_SAMPLES = 200


def nothing() -> None:
    """The default of hooks."""


@dataclass
class Task:
    """One thing to time. `enter` runs, untimed, before each of its samples."""

    name: str
    call: Callable[[], object]
    enter: Callable[[], None] = nothing
    samples: list[float] = field(default_factory=list)
    repeats: int = 1

    @property
    def needed(self) -> int:
        """How many samples there must be."""
        longest = max(self.samples, default=0.0)
        return next(samples for seconds, samples in MIN_SAMPLES if longest <= seconds)


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    median: float
    q1: float
    q3: float
    samples: int

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.q3 - self.q1) / self.median


def summarize(samples: list[float]) -> Timing:
    """Median and quartiles (of two samples: the samples themselves)."""
    if len(samples) < 3:
        return Timing(statistics.median(samples), min(samples), max(samples), len(samples))
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q1, q3, len(samples))


def sample(task: Task, device: torch.device) -> float:
    """Seconds of one call of a task, the mean of `task.repeats` calls."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(task.repeats):
            task.call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / task.repeats
    start = time.perf_counter()
    for _ in range(task.repeats):
        task.call()
    return (time.perf_counter() - start) / task.repeats


def measure(tasks: Iterable[Task], device: torch.device, budget: float, tick: Callable[[str], None]) -> None:
    """Fill in the samples of the tasks, round robin.

    Rounds go on for `budget` seconds; past it, those that have too few samples still get them. A task that used up its
    share of the budget sits out, so that slow contestants do not cost fast ones their repeats. `tick` is told the name
    of each task in turn.
    """
    tasks = list(tasks)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for task in tasks:
            tick(task.name)
            task.enter()
            first = sample(task, device)
            if first > LONG_CALL_SECONDS:
                task.samples.append(first)
            else:
                # The first call of a short task may have paid for warming up: look again.
                seconds = sample(task, device) if first < 10 * SAMPLE_SECONDS else first
                task.repeats = max(1, min(10_000, round(SAMPLE_SECONDS / max(seconds, 1e-7))))
        end = time.perf_counter() + budget
        share = budget / len(tasks)
        while True:
            over = time.perf_counter() > end
            turn = []
            for task in tasks:
                count = len(task.samples)
                spent = sum(task.samples) * task.repeats
                if count < task.needed or (not over and count < MAX_SAMPLES and spent < share):
                    turn.append(task)
            if not turn:
                break
            for task in turn:
                tick(task.name)
                task.enter()
                if task.repeats > 1:
                    task.call()
                task.samples.append(sample(task, device))
    finally:
        if collecting:
            gc.enable()


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise OSError(f"no {key} in /proc/self/status")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call adds to the memory of this process at its peak, results included.

    CUDA: what the caching allocator handed out. Otherwise the peak resident size, whose record Linux lets a process
    reset (`ru_maxrss` alone would remember everything before). Raises OSError where that is not possible.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    # Hand freed memory back first, or a call that reuses it would look free.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    call()
    return max(0, _status_kib("VmHWM") - before) * 1024


def available_bytes() -> int:
    """Bytes of main memory that are available; 8 GiB where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 << 30


# --------------------------------------------------------------------------------------------------
# Provenance
# --------------------------------------------------------------------------------------------------


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        if not line.strip() and fields:
            break
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(index / name)) for name in ("level", "type", "size"))
        caches[f"L{level} {kind}"] = size
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "family": fields.get("cpu family", ""),
        "number": fields.get("model", ""),
        "stepping": fields.get("stepping", ""),
        "logical_cores": os.cpu_count(),
        "usable_cores": usable,
        "caches": caches,
        "flags": (fields.get("flags") or fields.get("Features") or "").split(),
    }


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def provenance(device: torch.device) -> dict[str, Any]:
    """Machine, system, versions, commit and date: what a reader needs to judge or repeat a result."""
    status = _git("status", "--porcelain")
    load = os.getloadavg()
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "cpu": _cpu(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "transparent_huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average_at_start": [round(value, 2) for value in load],
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "numpy": numpy.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else status != "",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return facts
