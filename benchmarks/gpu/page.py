"""Write benchmarks/results/README.md from the records beside it, or check that it is up to date.

    python benchmarks/gpu/page.py           write it
    python benchmarks/gpu/page.py --check   fail, with the difference, if it is not what would be written

Both first check every record. One of the GPU kit must fit its schema, be in the place that its content says, be
complete and no rehearsal, and come from a clean checkout. A commit that any record names must be an ancestor of HEAD.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import expected
import records
import render
from records import Record, Step

RESULTS = Path(__file__).resolve().parents[1] / "results"
COMMAND = "python benchmarks/gpu/page.py"
PAGE = "README.md"
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Entry:
    """One record in the list. `commit` is None where none is recorded; `remark` says what a reader must know.

    `record` is set for those of the GPU kit.
    """

    place: PurePosixPath
    device: str
    date: str
    commit: str | None
    torch: str
    what: str
    remark: str = ""
    record: Record | None = None


@dataclass
class Survey:
    """What is in a folder of results: its records, what is wrong with them, and what could not be checked."""

    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------
# Reading and checking
# --------------------------------------------------------------------------------------------------


def _git(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output; status 127 where git cannot be run."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return 127, ""
    return done.returncode, done.stdout.strip()


def missing_history(folder: Path) -> str:
    """Why the repository of a folder cannot tell ancestors of HEAD; empty if it can."""
    status, shallow = _git(folder, "rev-parse", "--is-shallow-repository")
    if status == 127:
        return "git cannot be run"
    if status != 0:
        return "this is no git checkout"
    if shallow == "true":
        return "the clone is shallow"
    return "" if _git(folder, "rev-parse", "--verify", "HEAD")[0] == 0 else "there is no commit yet"


def is_ancestor(folder: Path, commit: str) -> bool:
    """Whether a commit is HEAD or came before it."""
    return _git(folder, "merge-base", "--is-ancestor", commit, "HEAD")[0] == 0


def _script(record: dict[str, Any]) -> str:
    """The program that wrote a record of a CPU, by the record's content."""
    if "contestants" in record:
        return "bench_loss.py"
    if "parameters" in record:
        return "bench_train_step.py"
    if "rerank" in record or "matrix" in record:
        return "bench_evaluation.py"
    if "variants" in record:
        return "python -m sn_ops.reid compare"
    return "bench_host.py" if "runs" in record else "unknown script"


def _options(command: list[str]) -> str:
    """Command-line options, but for where the record went."""
    rest = list(command)
    while "--json" in rest:
        at = rest.index("--json")
        del rest[at : at + 2]
    return " ".join(rest)


def _cpu_entry(path: Path) -> Entry:
    """A record directly in the folder. Raises ValueError if it is not one of a CPU."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("provenance", {}), dict):
        raise ValueError("expected an object, with an object as provenance if there is one")
    if "schema" in record:
        raise ValueError("a record of the GPU kit belongs in the folder of its device")
    provenance = {**record.get("facts", {}), **record.get("provenance", {})}
    commit, dirty = provenance.get("commit"), provenance.get("dirty")
    remark = ""
    if commit is None:
        remark = "commit not recorded"
    elif dirty is not False:
        remark = "with uncommitted changes" if dirty else "not recorded whether changes were committed"
    return Entry(
        PurePosixPath(path.name),
        provenance.get("cpu", {}).get("model") or provenance.get("machine") or NOT_RECORDED,
        provenance["date"][:10] if "date" in provenance else NOT_RECORDED,
        commit,
        provenance.get("torch") or NOT_RECORDED,
        f"{_script(record)} {_options(provenance.get('command', []))}".strip(),
        remark,
    )


def _gpu_entry(path: Path, place: PurePosixPath) -> tuple[Entry, list[str]]:
    """A record in a device's folder, and why it may not be there. Raises ValueError if it does not fit the schema."""
    record = records.read(path)
    provenance = record["provenance"]
    found = []
    if record["rehearsal"]:
        found.append("a rehearsal, on a pretended device")
    if not record["complete"]:
        found.append("incomplete: the runner did not reach its end")
    if provenance["dirty"]:
        found.append("from a checkout with uncommitted changes")
    libraries = provenance.get("libraries")
    if libraries is None:
        found.append("it does not say what its libraries were built from: build them with prepare.sh")
    elif libraries["commit"] != provenance["commit"] or libraries["dirty"] or libraries["changed_since"]:
        found.append("its libraries were built from something else than its commit")
    if (wanted := records.place(record)) != Path(place):
        found.append(f"its content belongs in {wanted.as_posix()}")
    results = [step["result"] for step in record["steps"]]
    what = f"{record['call']}: {results.count('passed')} of {len(results)} steps passed"
    entry = Entry(
        place,
        provenance["device"]["name"],
        provenance["date"][:10],
        provenance["commit"],
        provenance["torch"],
        what,
        record=record,
    )
    return entry, found


def survey(folder: Path) -> Survey:
    """Read and check every record below a folder of results."""
    found = Survey()
    reason = missing_history(folder)
    if reason:
        found.remarks.append(f"{reason}: whether commits are ancestors of HEAD was not checked")
    for path in sorted(folder.rglob("*.json")):
        place = PurePosixPath(path.relative_to(folder).as_posix())
        why: list[str] = []
        try:
            if len(place.parts) == 1:
                entry = _cpu_entry(path)
            elif len(place.parts) == 2:
                entry, why = _gpu_entry(path, place)
            else:
                raise ValueError("no record belongs so deep")
        except (ValueError, TypeError, AttributeError, KeyError, OSError, RecursionError) as error:
            found.problems.append(f"{place}: {error or type(error).__name__}")
            continue
        if entry.commit is not None and not reason and not is_ancestor(folder, entry.commit):
            why.append(f"its commit {entry.commit} is not an ancestor of HEAD")
        found.problems += [f"{place}: {each}" for each in why]
        found.entries.append(entry)
    return found


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------

HEADER = f"""# What was measured

Generated from the records in this folder by `{COMMAND}`; never edited by hand. With `--check`,
a step of `.ci/run`, it fails where this page differs from the records, or where a record is not in order.
"""

NO_GPU = """## GPUs

Nothing has been measured on a GPU yet: there is no record of one. Every expected time of the CUDA backend is a count
on paper.
"""

READING = f"""## GPUs

By device, each step from the newest record that ran it: ratios may compare times of two commits. Times are medians in
microseconds; "both" is forward + backward, "graph" a replayed CUDA graph, "called" the same call from Python. A ~ marks
an interquartile range above {render.NOISY:.0%} of the median. Expected times and ceilings are those of an
{expected.DEVICE} in `benchmarks/gpu/expected.py`: the goal, or the prediction where there is no goal. Those of forced
paths, where a record has them, are the plan's own (`csrc/cuda/plan/cost.cpp`). A ratio is measured over expected.
"""


def listing(entries: list[Entry]) -> str:
    """All records, those of GPUs first."""
    lines = ["| record | device | date | commit | torch | what | remark |", "|---|---|---|---|---|---|---|"]
    for entry in sorted(entries, key=lambda entry: (entry.record is None, entry.place)):
        cells = [
            f"[{entry.place}]({entry.place})",
            entry.device,
            entry.date,
            NOT_RECORDED if entry.commit is None else f"`{entry.commit[:10]}`",
            entry.torch,
            entry.what,
            entry.remark or render.NOTHING,
        ]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "## Records\n\n" + "\n".join(lines) + "\n"


def by_date(entries: list[Entry], call: str) -> list[tuple[Record, Entry]]:
    """The records of a call, the newest first, by date and time."""
    found = [(entry.record, entry) for entry in entries if entry.record is not None and entry.record["call"] == call]
    found.sort(key=lambda pair: (datetime.fromisoformat(pair[0]["provenance"]["date"]), pair[1].place), reverse=True)
    return found


def composed(found: list[tuple[Record, Entry]]) -> tuple[Record, dict[str, Entry]]:
    """The newest record, with the steps that only older ones ran added to it; and where each step is from.

    Raises:
        ValueError: for no record.
    """
    if not found:
        raise ValueError("expected a record")
    steps: list[Step] = []
    sources: dict[str, Entry] = {}
    for wanted in (lambda step: step["result"] != "not run", lambda step: True):
        for record, entry in found:
            for step in filter(wanted, record["steps"]):
                if step["name"] not in sources:
                    sources[step["name"]] = entry
                    steps.append(step)
    whole = found[0][0].copy()
    whole["steps"] = steps
    return whole, sources


def device_section(device: str, entries: list[Entry]) -> str:
    """What the newest records of one device say, step by step."""
    parts = [f"## {device}\n"]
    if device != expected.DEVICE:
        parts.append(f"Expected times are stated for an {expected.DEVICE}, which this is not.\n")
    for call, title, tables in (
        ("prove", "Is it right?", render.prove_tables),
        ("measure", "How fast is it?", render.measure_tables),
    ):
        found = by_date(entries, call)
        if not found:
            parts.append(f"### {title}\n\nNo record of `{call}`.\n")
            continue
        record, sources = composed(found)
        parts.append(f"### {title}\n")
        for each, entry in found:
            ran = [name for name, source in sources.items() if source is entry]
            if ran:
                facts = render.facts(each["provenance"])
                origin = f"[{entry.place}]({entry.place}) has {', '.join(ran)}: {facts}."
                parts.append(textwrap.fill(origin, 120, break_long_words=False, break_on_hyphens=False) + "\n")
        parts += [table.markdown() for table in tables(record)]
    return "\n".join(parts)


def page(entries: list[Entry]) -> str:
    """The whole page. The same entries give the same text."""
    of_gpus: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.record is not None:
            of_gpus.setdefault(entry.device, []).append(entry)
    sections = [device_section(device, of_gpus[device]) for device in sorted(of_gpus)]
    return "\n".join([HEADER, listing(entries), READING if sections else NO_GPU, *sections])


def main(arguments: list[str]) -> int:
    """Exit status: 0, or 1 if a record is not in order or, with --check, the page differs."""
    parser = argparse.ArgumentParser(description="Write the page of results from its records.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of records and page (default: this one's)"
    )
    options = parser.parse_args(arguments)
    found = survey(options.results)
    for line in found.remarks:
        print(line)
    for line in found.problems:
        print(f"FAILED {line}")
    if found.problems:
        return 1
    path = options.results / PAGE
    wanted = page(found.entries)
    if not options.check:
        path.write_text(wanted, encoding="utf-8")
        print(f"{path}: {len(found.entries)} records")
        return 0
    present = path.read_text(encoding="utf-8") if path.exists() else ""
    if present == wanted:
        print(f"{len(found.entries)} records, and the page says what they say")
        return 0
    sys.stdout.writelines(
        difflib.unified_diff(present.splitlines(True), wanted.splitlines(True), str(path), "what the records say")
    )
    print(f"FAILED {path}: not what the records say; write it with {COMMAND}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
