"""The one schema of the JSON records that the GPU kit writes, and how records are checked and kept.

The TypedDicts below are the schema: `problems` checks a record against them, then what types cannot express. The first
word of a step's name gives the type of its data (`DATA`); any other step may have any JSON object. Only the standard
library is needed, and Python 3.10.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import types
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypedDict, Union, cast, get_args, get_origin, get_type_hints

SCHEMA = 1
# A figure fits into one line of the table at the end of a call.
FIGURE_WIDTH = 100

Result = Literal["passed", "failed", "timed out", "crashed", "not run", "running"]
DType = Literal["float64", "float32", "float16", "bfloat16"]
Scope = Literal["forward", "both"]  # both: forward and backward
How = Literal["graph", "called"]  # replayed as a CUDA graph, or called from Python
Backend = Literal["cuda", "triton", "eager", "strongest", "compile"]

# --------------------------------------------------------------------------------------------------
# A record
# --------------------------------------------------------------------------------------------------


class Clocks(TypedDict):
    """MHz."""

    sm: int
    memory: int
    sm_max: int
    memory_max: int


class _Device(TypedDict):
    name: str
    capability: str
    multiprocessors: int
    memory_bytes: int
    driver: str
    clocks_mhz: Clocks | None


class Device(_Device, total=False):
    """The GPU, as its driver describes it. `shared_bytes`: what a block may have at most; `wide_clusters`: how many
    clusters of 16 blocks it holds at once, of the one kernel that has such."""

    l2_bytes: int
    shared_bytes: int
    wide_clusters: int


class Libraries(TypedDict):
    """What was built beforehand, by its manifest. `changed_since`: files that are no longer what was built."""

    commit: str
    dirty: bool
    architecture: str
    torch: str
    nvcc: str
    changed_since: list[str]


class _Provenance(TypedDict, total=False):
    libraries: Libraries | None
    clocks_under_load_mhz: Clocks


class Provenance(_Provenance):
    """What a reader needs to judge or repeat a record. `sn_ops` is its version, `build` its build_info()."""

    date: str
    commit: str
    dirty: bool
    device: Device
    python: str
    torch: str
    cuda: str
    triton: str
    sn_ops: str
    build: dict[str, object]
    host: dict[str, object]
    command: list[str]


class Step(TypedDict):
    """One step of a call. `seconds` is what it took of its `cap`; `figure` is for the last screen, `reason` for a
    step that did not pass."""

    name: str
    result: Result
    seconds: float
    cap: float
    figure: str
    reason: str
    data: dict[str, Any] | None


class _Record(TypedDict, total=False):
    troubles: list[str]


class Record(_Record):
    """One call. `rehearsal`: the device was pretended. `complete`: the runner reached its end, whatever failed.
    `troubles`: what could not be written."""

    schema: int
    call: Literal["prove", "measure"]
    rehearsal: bool
    provenance: Provenance
    steps: list[Step]
    complete: bool


# --------------------------------------------------------------------------------------------------
# Data of the steps that measure
# --------------------------------------------------------------------------------------------------


class Ceiling(TypedDict):
    """What the device can do at all. The names are those of `expected.CEILINGS`."""

    unit: Literal["s", "B/s", "FLOP/s"]
    samples: list[float]
    median: float


class Case(TypedDict):
    """One time of one contestant. Without samples the three figures are null and `note` says why.

    `bank`: candidates with labels of their own; otherwise the anchors are among the M candidates. `path` is what ran.
    """

    label: str
    N: int
    M: int
    D: int
    k: int
    dtype: DType
    bank: bool
    backend: Backend
    path_wanted: str
    path: str | None
    scope: Scope
    how: How
    samples_us: list[float]
    median_us: float | None
    q1_us: float | None
    q3_us: float | None
    expected_us: float | None
    note: str


class Kernel(TypedDict):
    """A kernel's share of one case: `total_us` of the GPU in `calls` launches of one call."""

    label: str
    scope: Scope
    name: str
    calls: int
    total_us: float


class Compiled(TypedDict):
    """Kernels of Triton that a step's processes loaded: `hits` from the cache, `misses` compiled or built in `seconds`,
    of which `missed` names the first. `prepared`: the cache was filled beforehand."""

    prepared: bool
    hits: int
    misses: int
    seconds: float
    missed: list[str]


class _Cases(TypedDict, total=False):
    compiled: Compiled


class Cases(_Cases):
    """Data of the steps loss, paths, rivals, triton and train; of triton with `compiled`."""

    cases: list[Case]
    kernels: list[Kernel]


# --------------------------------------------------------------------------------------------------
# Data of the steps that prove
# --------------------------------------------------------------------------------------------------


class _ProbeType(TypedDict, total=False):
    general: float | None


class ProbeType(_ProbeType):
    """How the tensor core accumulates one type. `worst` is the largest error seen, in D 2^-23; `general` is what no row
    exceeds by what group and bits say, null where these are of no known kind."""

    group: int
    bits: int
    rounding: str
    subnormals: str
    worst: float


class Probe(TypedDict):
    """Data of the step probe. `model` names the published model that fits, `holds` is worst <= bound."""

    device: str
    capability: str
    types: dict[str, ProbeType]
    model: str
    bound: float
    holds: bool


class SmokeRun(TypedDict):
    """One process of the step smoke."""

    path: str
    dtype: DType
    shape: str
    result: Result
    note: str


class Smoke(TypedDict):
    """Data of the step smoke."""

    runs: list[SmokeRun]


class _Tests(TypedDict, total=False):
    compiled: Compiled


class Tests(_Tests):
    """Data of the steps tests and tests-triton: counts, and the names of what failed."""

    passed: int
    failed: int
    skipped: int
    failures: list[str]


class SanitizerRun(TypedDict):
    """One tool on the calls of one path. `said`: its summary."""

    tool: str
    share: str
    clean: bool
    said: str


class Sanitizers(TypedDict):
    """Data of the step sanitizers."""

    runs: list[SanitizerRun]


class Replay(TypedDict):
    """Data of the step replay."""

    runs: list[dict[str, Any]]


# By the first word of a step's name. A passed step of these has data.
DATA: dict[str, Any] = {
    "ceilings": dict[str, Ceiling],
    "loss": Cases,
    "paths": Cases,
    "rivals": Cases,
    "triton": Cases,
    "train": Cases,
    "compile": Cases,
    "kernels": Cases,
    "probe": Probe,
    "smoke": Smoke,
    "tests": Tests,
    "tests-triton": Tests,
    "sanitizers": Sanitizers,
    "replay": Replay,
}
# A probe or a tool may say more than the page needs.
_OPEN = (ProbeType, Probe, SmokeRun, Smoke, Tests, SanitizerRun, Sanitizers, Replay)

# --------------------------------------------------------------------------------------------------
# Checking
# --------------------------------------------------------------------------------------------------


def kind_of(step_name: str) -> str:
    """The first word of a step's name: "loss fp32" is a "loss"."""
    return step_name.split(" ")[0]


def _plain(value: object, hint: Any, where: str) -> Iterator[str]:
    """A value of a plain type; a bool is not a number, an int is accepted for a float, NaN and infinity are not."""
    if hint is Any or hint is object:
        return
    wanted = (int, float) if hint is float else hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        yield f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r:.60}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where}: expected a finite number, found {value!r}"


def _typed_dict(value: object, hint: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: expected an object, found {value!r:.60}"
        return
    hints = get_type_hints(hint)
    for key in sorted(hint.__required_keys__ - value.keys()):
        yield f"{where}.{key}: missing"
    for key, item in value.items():
        if key in hints:
            yield from _fits(item, hints[key], f"{where}.{key}")
        elif hint not in _OPEN:
            yield f"{where}.{key}: not in the schema"


def _fits(value: object, hint: Any, where: str) -> Iterator[str]:
    """What keeps a JSON value from being of a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            yield f"{where}: expected one of {', '.join(map(str, arguments))}, found {value!r:.60}"
    elif origin in (Union, types.UnionType):
        if value is not None:
            yield from _fits(value, next(each for each in arguments if each is not type(None)), where)
    elif origin is list:
        if not isinstance(value, list):
            yield f"{where}: expected a list, found {value!r:.60}"
            return
        for index, item in enumerate(value):
            yield from _fits(item, arguments[0], f"{where}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{where}: expected an object, found {value!r:.60}"
            return
        for key, item in value.items():
            yield from _fits(item, arguments[1], f"{where}.{key}")
    elif hasattr(hint, "__required_keys__"):
        yield from _typed_dict(value, hint, where)
    else:
        yield from _plain(value, hint, where)


def _is_utc(date: str) -> bool:
    try:
        return datetime.fromisoformat(date).utcoffset() == timedelta(0)
    except ValueError:
        return False


def _near(a: float, b: float) -> bool:
    """Equal but for rounding to a thousandth."""
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3)


def _case_problems(case: Case, where: str) -> Iterator[str]:
    for name in ("N", "M", "D", "k"):
        if case[name] < 1:
            yield f"{where}.{name}: expected at least 1, found {case[name]}"
    figures = (case["q1_us"], case["median_us"], case["q3_us"])
    if not case["samples_us"]:
        if figures != (None, None, None):
            yield f"{where}: expected no figures without samples, found {figures}"
        if not case["note"]:
            yield f"{where}.note: expected the reason why there are no samples"
    elif min(case["samples_us"]) <= 0:
        yield f"{where}.samples_us: expected times above zero"
    elif any(
        found is None or not _near(found, true)
        for found, true in zip(figures, quartiles(case["samples_us"]), strict=True)
    ):
        yield f"{where}: q1, median, q3 {figures} are not those of the samples, {quartiles(case['samples_us'])}"
    if case["expected_us"] is not None and case["expected_us"] <= 0:
        yield f"{where}.expected_us: expected a time above zero or null, found {case['expected_us']}"
    if case["path"] and case["path_wanted"] not in ("", "auto", case["path"]):
        yield f"{where}.path: {case['path']} ran where {case['path_wanted']} was wanted"


def _cases_problems(data: Cases, where: str) -> Iterator[str]:
    for index, case in enumerate(data["cases"]):
        yield from _case_problems(case, f"{where}.cases[{index}]")
    for index, kernel in enumerate(data["kernels"]):
        if kernel["calls"] < 1 or kernel["total_us"] < 0:
            yield f"{where}.kernels[{index}]: expected at least one call and a time of at least zero"
    yield from _compiled_problems(data, where)


def _ceilings_problems(data: dict[str, Ceiling], where: str) -> Iterator[str]:
    for name, ceiling in data.items():
        if not ceiling["samples"] or min(ceiling["samples"]) <= 0:
            yield f"{where}.{name}.samples: expected figures above zero"
        elif not math.isclose(statistics.median(ceiling["samples"]), ceiling["median"], rel_tol=1e-3):
            yield f"{where}.{name}.median: {ceiling['median']} is not that of the samples"


def _probe_problems(data: Probe, where: str) -> Iterator[str]:
    if not data["types"]:
        yield f"{where}.types: expected at least one"
        return
    # What was measured, and what follows from group and bits for any row, where these are known.
    errors = [error for each in data["types"].values() for error in (each["worst"], each.get("general"))]
    if data["holds"] != all(error is None or error <= data["bound"] for error in errors):
        yield f"{where}.holds: {data['holds']} contradicts the worst errors and the bound {data['bound']}"


def _compiled_problems(data: Cases | Tests, where: str) -> Iterator[str]:
    found = data.get("compiled")
    if found is None:
        return
    if min(found["hits"], found["misses"], found["seconds"]) < 0:
        yield f"{where}.compiled: expected counts and seconds of at least zero"
    if len(found["missed"]) > found["misses"] or (found["misses"] and not found["missed"]):
        yield f"{where}.compiled.missed: {len(found['missed'])} names for {found['misses']} misses"


def _tests_problems(data: Tests, where: str) -> Iterator[str]:
    yield from _compiled_problems(data, where)
    if min(data["passed"], data["failed"], data["skipped"]) < 0:
        yield f"{where}: expected counts of at least zero"
    if len(data["failures"]) > data["failed"]:
        yield f"{where}.failures: {len(data['failures'])} names, but {data['failed']} failed"


# Problems of a step's data that its types do not express.
_DATA_PROBLEMS: dict[Any, Callable[[Any, str], Iterator[str]]] = {
    "ceilings": _ceilings_problems,
    "probe": _probe_problems,
    "tests": _tests_problems,
    **dict.fromkeys((kind for kind, data in DATA.items() if data is Cases), _cases_problems),
}


def _step_problems(step: Step, complete: bool, where: str) -> Iterator[str]:
    kind, data = kind_of(step["name"]), step["data"]
    if not kind:
        yield f"{where}.name: expected a name"
    if step["seconds"] < 0 or step["cap"] <= 0:
        yield f"{where}: expected seconds of at least zero and a cap above it"
    if len(step["figure"]) > FIGURE_WIDTH or "\n" in step["figure"]:
        yield f"{where}.figure: expected one line of at most {FIGURE_WIDTH} characters"
    if step["result"] not in ("passed", "running") and not step["reason"]:
        yield f"{where}.reason: expected one, the step {step['result']}"
    if complete and step["result"] == "running":
        yield f"{where}.result: running, in a record that is complete"
    if kind not in DATA:
        return
    if data is None:
        if step["result"] == "passed":
            yield f"{where}.data: expected some, the step passed"
        return
    found = list(_fits(data, DATA[kind], f"{where}.data"))
    if not found and kind in _DATA_PROBLEMS:
        found += _DATA_PROBLEMS[kind](data, f"{where}.data")
    yield from found
    if not found and step["result"] == "passed" and (denial := _denial(kind, data)):
        yield f"{where}: passed, but {denial}"


def _denial(kind: str, data: Any) -> str:
    """Why the data of a step of `prove` contradict that it passed; empty if they do not."""
    if DATA[kind] is Tests and (data["failed"] or not data["passed"]):
        return f"{data['passed']} tests passed and {data['failed']} failed"
    if DATA[kind] is Probe and not data["holds"]:
        return "the bound does not hold"
    if DATA[kind] is Smoke and any(run["result"] not in ("passed", "not run") for run in data["runs"]):
        return "a run did not"
    if DATA[kind] is Sanitizers and not all(run["clean"] for run in data["runs"]):
        return "a tool found something"
    if DATA[kind] is Replay and any(run.get("wrong") for run in data["runs"]):
        return "a replay was wrong"
    return ""


def _record_problems(record: Record) -> Iterator[str]:
    """Problems of a record whose types are right."""
    if record["schema"] != SCHEMA:
        yield f"schema: expected {SCHEMA}, found {record['schema']}"
    provenance = record["provenance"]
    if not _is_utc(provenance["date"]):
        yield f"provenance.date: expected an ISO date and time in UTC, found {provenance['date']!r}"
    if not re.fullmatch(r"[0-9a-f]{40}", provenance["commit"]):
        yield f"provenance.commit: expected 40 hexadecimal digits, found {provenance['commit']!r}"
    if not slug(provenance["device"]["name"]):
        yield f"provenance.device.name: expected a name, found {provenance['device']['name']!r}"
    names = [step["name"] for step in record["steps"]]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"steps: {names.count(name)} are called {name!r}"
    if record["complete"] and not names:
        yield "steps: expected some in a record that is complete"
    for index, step in enumerate(record["steps"]):
        yield from _step_problems(step, record["complete"], f"steps[{index}]")


def problems(record: object) -> list[str]:
    """What is wrong with a record, one line each with the place; empty if it can be used.

    A rehearsal, a dirty checkout or an incomplete record is no problem here: `page.py` refuses those.
    """
    found = list(_fits(record, Record, "record"))
    if not found:
        found = list(_record_problems(cast(Record, record)))
    return [line.removeprefix("record.") for line in found]


# --------------------------------------------------------------------------------------------------
# Making and keeping
# --------------------------------------------------------------------------------------------------


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile. Of fewer than three samples: least, median, largest.

    Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("quartiles: expected at least one sample")
    if len(samples) < 3:
        return min(samples), statistics.median(samples), max(samples)
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return q1, median, q3


def case(
    label: str,
    shape: tuple[int, int, int],
    *,
    k: int,
    dtype: DType,
    backend: Backend,
    scope: Scope,
    how: How,
    samples_us: list[float],
    bank: bool = False,
    path_wanted: str = "auto",
    path: str | None = None,
    expected_us: float | None = None,
    note: str = "",
) -> Case:
    """A case with the figures of its samples. `shape` is N, M, D; without samples, `note` must say why."""
    q1, median, q3 = quartiles(samples_us) if samples_us else (None, None, None)
    return {
        "label": label,
        "N": shape[0],
        "M": shape[1],
        "D": shape[2],
        "k": k,
        "dtype": dtype,
        "bank": bank,
        "backend": backend,
        "path_wanted": path_wanted,
        "path": path,
        "scope": scope,
        "how": how,
        "samples_us": samples_us,
        "median_us": median,
        "q1_us": q1,
        "q3_us": q3,
        "expected_us": expected_us,
        "note": note,
    }


def slug(device_name: str) -> str:
    """The folder of a device's records: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def place(record: Record) -> Path:
    """Where a record is kept, below benchmarks/results: `<device>/<date>-<commit10>-<call>.json`."""
    provenance = record["provenance"]
    name = f"{provenance['date'][:10]}-{provenance['commit'][:10]}-{record['call']}.json"
    return Path(slug(provenance["device"]["name"])) / name


def write(record: Record, path: Path) -> None:
    """Write a record in one step: no reader sees half of it, and no crash leaves half of it. It is not checked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".part")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read(path: Path) -> Record:
    """The record in a file. Raises ValueError, with every problem, if it is none; OSError if it cannot be read."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if found := problems(record):
        raise ValueError("\n".join(f"{path}: {line}" for line in found))
    return cast(Record, record)
