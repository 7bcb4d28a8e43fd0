"""The cache of compiled Triton kernels that travels to a GPU's machine, and what is compiled there all the same.

Triton names an entry of its cache by the kernel's source, the variant, its own files, the target and the options, and
finds it on any machine that has the same Triton and Python. But an entry lists its files with the whole path of the
cache that it was made in: `unpack` writes the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import manifest
import protocol

ARCHIVE = manifest.BUILT / "triton.tar.gz"
"""The cache that `prepare.sh` fills."""

CALLS = "calls.json"
"""The file of an archive with the calls of operators that it was filled by."""

EVENTS = "SN_OPS_KIT_COMPILED"
"""Environment variable with the file that processes of a step add a line to for each kernel: found or compiled."""

GROUP = "__grp__"
NEEDED = (".json", ".cubin", ".so")
"""A launch reads no other file of an entry."""

MOST_NAMED = 20
NAME_WIDTH = 200


# ---- the cache ---------------------------------------------------------------------------------------------------


def pack(cache: Path, calls: Path, archive: Path) -> int:
    """Archive what a launch needs of a cache of Triton, with the calls; the number of its entries."""
    wanted = [path for path in sorted(cache.glob("*/*")) if path.suffix in NEEDED and not path.name.startswith(GROUP)]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(calls, CALLS)
        for path in wanted:
            tar.add(path, str(path.relative_to(cache)))
    return len({path.parent for path in wanted})


def unpack(archive: Path, into: Path) -> None:
    """A cache for Triton to read and to write, of what was packed."""
    into.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")
    for metadata in into.glob("*/*.json"):
        files = {path.name: str(path) for path in metadata.parent.iterdir()}
        (metadata.parent / f"{GROUP}{metadata.name}").write_text(json.dumps({"child_paths": files}))


# ---- what is compiled ----------------------------------------------------------------------------------------------


def note(kernel: str, facts: str, hit: bool, seconds: float) -> None:
    """Add an event to the file."""
    line = json.dumps({"kernel": kernel, "facts": facts[:NAME_WIDTH], "hit": hit, "seconds": seconds})
    with Path(os.environ[EVENTS]).open("a") as file:
        file.write(f"{line}\n")  # one short write: events of several processes do not mix


def facts_of(source: Any) -> str:
    """What tells a variant from the others of its kernel, of Triton's ASTSource."""
    names = source.fn.arg_names
    constants = [f"{names[place[0]]}={getattr(value, 'name', value)}" for place, value in source.constants.items()]
    types = [f"{name}:{kind}" for name, kind in source.signature.items() if kind != "constexpr"]
    divided = [f"16|{names[place[0]]}" for place in source.attrs]
    return " ".join([*constants, *types, *divided])


def listen() -> None:
    """Note from now on every kernel that this process finds in the cache or compiles, and every launcher it builds."""
    if EVENTS not in os.environ:  # the program was started by hand
        os.environ[EVENTS] = tempfile.mkstemp()[1]
    from triton import knobs
    from triton.runtime import build

    def compiled(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        with contextlib.suppress(Exception):  # no kernel may fail for what is said about it
            note(src.fn.__name__, facts_of(src), cache_hit, times.total * 1e-6)

    def built(name: str, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        path = build_module(name, *arguments, **options)
        note(name, "built by a C compiler", False, time.perf_counter() - started)
        return path

    knobs.compilation.listener = compiled
    build_module, build._build = build._build, built


def events(path: Path) -> Iterator[dict[str, Any]]:
    """What was noted; a line that a killed process left unfinished is passed over."""
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def report(path: Path) -> dict[str, Any]:
    """`records.Compiled` of a step; what several processes load counts in each."""
    found = list(events(path))
    missed = [event for event in found if not event["hit"]]
    named = sorted({f"{event['kernel']} {event['facts']}" for event in missed})
    return {
        "prepared": ARCHIVE.is_file(),
        "hits": len(found) - len(missed),
        "misses": len(missed),
        "seconds": round(sum(event["seconds"] for event in missed), 3),
        "missed": named[:MOST_NAMED],
    }


def told(report: dict[str, Any]) -> str:
    """A report in a few words."""
    if report["misses"] == 0:
        return f"{report['hits']} kernels from the cache, none compiled"
    return f"{report['misses']} kernels compiled in {report['seconds']:.0f} s, {report['hits']} from the cache"


def tell() -> str:
    """Report what this process and those that it started noted; the same in a few words."""
    found = report(Path(os.environ[EVENTS]))
    for missed in found["missed"]:
        print(f"compiled: {missed}", flush=True)
    protocol.say(compiled=found)
    return told(found)


def pytest_configure() -> None:
    """As a plugin of pytest, in its workers too."""
    listen()
