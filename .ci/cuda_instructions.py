"""What the hot CUDA kernels issue and move, counted in their machine code: a measure without a GPU.

    cuda_instructions.py OBJECTS    the table of what was built so far, to see what a change does

cuda_resources.py makes the table of all kernels and compares it with the committed one. For each kernel:

* the main loop is the loop that has the most instructions of its kind of work outside loops inside it; a trip is the
  path through it with the most work, of those the most asynchronous copies, then stores to shared memory, and of those
  the fewest instructions: nothing rare happens
* multiply-adds are those of a warp: 16 x 8 x 16 an HMMA.16816, 32 an FFMA
* shared: bytes that a trip's LDSM, LDS, STS, LDGSTS and ATOMS name, their width times 32 lanes (512 an LDSM.x4); lanes
  that read one address together count each
* L2: bytes that a trip's LDGSTS and LDG name in global memory, likewise. All warps of a block copy the same share, so
  bytes and multiply-adds of a warp have the ratio of the block's. What the first-level cache serves counts too
* before: the path from the kernel's entry to the main loop with the most asynchronous copies, and of those the fewest
  instructions. A loop on the way counts once
* after, of kernels that end in an epilogue over their products: the path from the main loop to the kernel's end that
  looks at the most products, and of those the fewest instructions. So nothing is a hit and no list is flushed, and of a
  dense tile all is written. The counter follows the products' registers. Instructions for each pair of a lane: 32 pairs
  take a warp so many. tests: how often that path looks at each product (2: as a row's and as a column's)
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sass import MOVES, Flow, Instruction, Loop, read_functions, short_names

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

HMMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}
FMA = {"FFMA": 32, "FFMA2": 64}
SHARED = ("LDSM", "LDS", "STS", "LDGSTS", "ATOMS")
GLOBAL = ("LDGSTS", "LDG", "LD")
COPY = "LDGSTS"
# Never the use of a product: it goes elsewhere as it is.
UNSEEING = ("ST", "HMMA", "SHFL", "BRA", "BAR", "WARPSYNC")


class Kind(NamedTuple):
    """What is counted of a kernel."""

    work: str  # "HMMA", "FMA", or "LDG": rows are read
    epilogue: bool = False
    trips: int = 1  # more than 1: so many trips of the main loop make one of the loop around it, which does the copies


HOT = {
    "score_kernel": Kind("HMMA", epilogue=True),
    "bank_kernel": Kind("HMMA", epilogue=True),
    "rescore_kernel": Kind("HMMA"),  # its epilogues lie in a loop over tiles
    "tile_kernel": Kind("FMA", trips=16),  # direct/tile.cuh asserts them
    "fallback_kernel": Kind("FMA", trips=4),  # fallback/tile_search.cuh asserts them; kind_of: of halves twice as many
    "refine_kernel": Kind("FMA"),
    "facts_kernel": Kind("FMA"),
    "gather_kernel": Kind("FMA"),
    "search_kernel": Kind("FMA"),
    "resident_kernel": Kind("FMA"),
    "thresholds_kernel": Kind("LDG"),
    "groups_kernel": Kind("LDG"),
    "list_kernel": Kind("LDG"),
    "positives_kernel": Kind("LDG"),
    "select_kernel": Kind("LDG"),
}


class Counts(NamedTuple):
    """What is known of one kernel on one architecture. Bytes and multiply-adds are a warp's, of a trip."""

    code: int  # instructions of all of it
    before: int
    trip: int  # instructions
    work: int  # instructions of the work
    products: int  # multiply-adds of a trip; with `around`, of a trip of the loop around
    issued: int  # instructions for them
    shared: int  # bytes
    l2: int
    after: int
    pairs: int  # of a lane
    tests: int


class MiscountError(Exception):
    """The machine code is not what the counter takes it for."""


def multiply_adds(instruction: Instruction) -> int:
    """Of a warp."""
    if instruction.name == "HMMA":
        return next(count for shape, count in HMMA.items() if shape in instruction.opcode.split("."))
    return FMA.get(instruction.name, 0)


def is_work(kind: Kind, instruction: Instruction) -> bool:
    """Whether the kernel exists for such instructions."""
    if kind.work == "FMA":
        return instruction.name in FMA and not {"RM", "RP"} & set(instruction.opcode.split("."))  # those divide
    return instruction.name == kind.work


def bytes_of(code: Iterable[Instruction], names: tuple[str, ...]) -> int:
    """That a warp's instructions of these names move."""
    return sum(32 * i.bytes_a_lane for i in code if i.name in names)


def main_loop(flow: Flow, kind: Kind) -> Loop:
    """The loop with the most work of its own; of those with as much the smallest, then the first."""

    def work(loop: Loop) -> tuple[int, int, int]:
        count = sum(is_work(kind, i) for i in flow.code(sorted(flow.own(loop))))
        return -count, len(loop.blocks), loop.head

    best = min(flow.loops, key=work, default=None)
    if best is None or work(best)[0] == 0:
        raise MiscountError(f"no loop with {kind.work}")
    return best


def trip_of(flow: Flow, loop: Loop, kind: Kind, free: frozenset[int] = frozenset()) -> list[Instruction]:
    """The instructions of a trip through the loop."""

    def marks(instruction: Instruction) -> int:
        weights = is_work(kind, instruction), instruction.name == COPY, instruction.name == "STS"
        return sum(weight * 1000**place for place, weight in enumerate(reversed(weights)))

    path = flow.best_path(loop.head, lambda block: loop.head in flow.next[block], loop.blocks, marks, free)
    return flow.code([block for block in path if block not in free])


def looks(flow: Flow, loop: Loop) -> dict[int, int]:
    """Address -> registers with products of the loop that the instruction uses, behind the loop and outside others.

    A register has a product from the loop on, or once it is copied from one, until it is written again.
    """
    behind = frozenset(flow.order) - loop.blocks
    products = {r for i in flow.code(sorted(loop.blocks)) if i.name == "HMMA" for r in i.written()}
    entering = {b: set(products) for at in loop.blocks for b in flow.next[at] if b in behind}
    found: dict[int, int] = {}
    waiting = sorted(entering)
    while waiting:
        block = waiting.pop()
        held = set(entering[block])
        for instruction in flow.blocks[block]:
            used = sum(register in held for register in instruction.read())
            moves = MOVES.match(instruction.opcode) is not None
            if used > 0 and not moves and not instruction.name.startswith(UNSEEING):
                found[instruction.address] = max(used, found.get(instruction.address, 0))
            written = set(instruction.written())
            held = held | written if used > 0 and moves else held - written
        for follower in flow.next[block]:
            known = entering.setdefault(follower, set())
            if follower in behind and not held <= known:
                known |= held
                waiting.append(follower)
    in_loops = {i.address for other in flow.loops if other != loop for b in other.blocks for i in flow.blocks[b]}
    return {address: used for address, used in found.items() if address not in in_loops}


def chains(trip: list[Instruction]) -> int:
    """Accumulators of a warp's trip: HMMA that add to what no HMMA of the trip before them gave."""
    given: set[int] = set()
    count = 0
    for instruction in trip:
        if instruction.name == "HMMA":
            count += not given & set(instruction.read()[-1:])
            given |= set(instruction.written()[:1])
    return count


def count_kernel(code: list[Instruction], kind: Kind) -> Counts:
    """All of it.

    Raises:
        MiscountError: if the kernel has no such loop, its copies are not where they should be, or the epilogue does not
            look at every product as often.
    """
    flow = Flow(code)
    everywhere = frozenset(flow.order)
    reached = sum(is_work(kind, i) for i in flow.code(flow.order))
    if reached != sum(is_work(kind, i) for i in code) and kind.work == "HMMA":
        raise MiscountError("some HMMA cannot be reached: the control flow is not understood")
    loop = main_loop(flow, kind)
    trip = trip_of(flow, loop, kind)
    around: list[Instruction] = []
    if kind.trips > 1:
        outer = flow.around(loop)
        around = trip_of(flow, outer, kind, free=loop.blocks) if outer is not None else []
        if not any(i.name == COPY for i in around):
            raise MiscountError("no loop around the main loop copies")
    to_loop = flow.best_path(
        0, lambda block: loop.head in flow.next[block] and block not in loop.blocks, everywhere - loop.blocks,
        lambda i: int(i.name == COPY),
    )  # fmt: skip
    after = pairs = tests = 0
    if kind.epilogue:
        seen = looks(flow, loop)
        ends = [b for at in sorted(loop.blocks) for b in flow.next[at] if b not in loop.blocks]
        paths = [
            flow.best_path(
                start, lambda block: flow.blocks[block][-1].name == "EXIT", everywhere - loop.blocks,
                lambda i: seen.get(i.address, 0),
            )
            for start in ends
        ]  # fmt: skip
        path = max(paths, key=lambda p: (sum(seen.get(i.address, 0) for i in flow.code(p)), -len(flow.code(p))))
        after = len(flow.code(path))
        pairs = 4 * chains(trip)
        used = sum(seen.get(i.address, 0) for i in flow.code(path))
        if used == 0 or used % pairs != 0:
            raise MiscountError(f"the epilogue looks {used} times at a lane's {pairs} products")
        tests = used // pairs
    return Counts(
        code=len(code),
        before=len(flow.code(to_loop)),
        trip=len(trip),
        work=sum(is_work(kind, i) for i in trip),
        products=kind.trips * sum(multiply_adds(i) for i in trip if is_work(kind, i)),
        issued=kind.trips * len(trip) + len(around),
        shared=kind.trips * bytes_of(trip, SHARED) + bytes_of(around, SHARED),
        l2=kind.trips * bytes_of(trip, GLOBAL) + bytes_of(around, GLOBAL),
        after=after,
        pairs=pairs,
        tests=tests,
    )


# ---- disassembly ----------------------------------------------------------------------------------------------------


def find_disassembler() -> str:
    """cuobjdump of the toolkit, or else of Triton's wheel.

    Raises:
        FileNotFoundError: if there is none.
    """
    toolkit = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    triton = importlib.util.find_spec("triton")
    places = triton.submodule_search_locations if triton else None
    wheel = [Path(place, "backends", "nvidia", "bin") for place in places or ()]
    path = os.pathsep.join(map(str, [*toolkit, *os.get_exec_path(), *wheel]))
    found = shutil.which("cuobjdump", path=path)
    if found is None:
        raise FileNotFoundError(
            "no cuobjdump, so the kernels' instructions cannot be counted: neither in $CUDA_HOME/bin nor on PATH, and "
            "no Triton whose wheel brings one (pip install triton)"
        )
    return found


def disassemble(disassembler: str, source: Path, architecture: str) -> dict[str, list[Instruction]]:
    """The functions of an object file."""
    done = subprocess.run(
        [disassembler, "-sass", "-arch", architecture, str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{disassembler} -sass of {source.name} for {architecture}: {done.stderr.strip()}")
    return read_functions(done.stdout)


class Row(NamedTuple):
    """Counts of a kernel, under the name that the table gives it."""

    kernel: str
    architecture: str
    counts: Counts


def kind_of(kernel: str) -> Kind | None:
    """What is counted of it, by its name; nothing of kernels in fp64, which no one hurries."""
    kind = None if "double" in kernel else HOT.get(kernel.split("<")[0])
    if kind is not None and kernel.startswith("fallback_kernel") and "float" not in kernel:
        return kind._replace(trips=2 * kind.trips)
    return kind


def read_objects(folder: Path) -> tuple[list[Row], list[str]]:
    """The hot kernels among the object files below a folder, and what is wrong with them.

    One architecture of every object is looked through for tensor cores, so that no kernel that uses them is left out.
    """
    disassembler = find_disassembler()
    rows = []
    faults = []
    for source in sorted(folder.rglob("*.cu.o")):
        content = source.read_bytes()
        hot = any(name.encode() in content for name in HOT)
        for architecture in ARCHITECTURES if hot else ARCHITECTURES[1:2]:
            functions = {name: code for name, code in disassemble(disassembler, source, architecture).items() if code}
            for kernel, code in zip(short_names(list(functions)), functions.values(), strict=True):
                kind = kind_of(kernel)
                if kind is not None:
                    try:
                        rows.append(Row(kernel, architecture, count_kernel(code, kind)))
                    except MiscountError as miscount:
                        faults.append(f"{kernel} on {architecture}: {miscount}")
                elif any(i.name == "HMMA" for i in code):
                    faults.append(f"{kernel} multiplies on the tensor cores: list it in .ci/cuda_instructions.py")
    for name in HOT:
        missing = set(ARCHITECTURES) - {row.architecture for row in rows if row.kernel.split("<")[0] == name}
        if missing and not any(fault.startswith(name) for fault in faults):
            faults.append(f"{name} was not found for {', '.join(sorted(missing))}")
    return rows, faults


# ---- the table ------------------------------------------------------------------------------------------------------

WIDTH = 48


def products_line(row: Row) -> str:
    """Of a kernel that multiplies and adds."""
    c = row.counts
    after = [f"{c.after}", f"{c.after / c.pairs:.2f}", f"{c.tests}"] if c.pairs > 0 else ["-"] * 3
    cells = [
        f"{c.code}", f"{c.before}", f"{c.trip}", f"{c.work}", f"{1000 * c.issued / c.products:.2f}",
        f"{c.shared / c.products:.5f}", f"{c.l2 / c.products:.5f}", *after,
    ]  # fmt: skip
    return " ".join([row.kernel.ljust(WIDTH), row.architecture.ljust(7), *(cell.rjust(7) for cell in cells)])


def reads_line(row: Row) -> str:
    """Of a kernel that reads rows."""
    c = row.counts
    cells = [f"{c.code}", f"{c.before}", f"{c.trip}", f"{c.work}", f"{c.trip / c.work:.2f}", f"{c.shared}", f"{c.l2}"]
    return " ".join([row.kernel.ljust(WIDTH), row.architecture.ljust(7), *(cell.rjust(7) for cell in cells)])


def table(rows: list[Row], compiler: str) -> str:
    """One line a kernel and architecture."""

    def head(*columns: str) -> str:
        return " ".join(["kernel".ljust(WIDTH), "for    ", *(column.rjust(7) for column in columns)])

    def place(row: Row) -> tuple[str, int]:
        return row.kernel, ARCHITECTURES.index(row.architecture)

    reads = [row for row in sorted(rows, key=place) if (kind := kind_of(row.kernel)) and kind.work == "LDG"]
    products = [row for row in sorted(rows, key=place) if row not in reads]
    return "\n".join([
        f"# {compiler}; instructions and bytes of a warp, counted in machine code; made by .ci/cuda_resources.py",
        "# .ci/cuda_instructions.py says what is counted. trip: of the main loop; work: HMMA or FFMA in it; /kMA: for",
        "# a thousand multiply-adds; shared, L2: bytes a multiply-add; after: from the main loop to the end if nothing",
        "# is a hit; /pair: for each of a lane's pairs; tests: looks at each pair",
        head("code", "before", "trip", "work", "/kMA", "shared", "L2", "after", "/pair", "tests"),
        *map(products_line, products),
        "# Kernels that read rows: loads of a trip, instructions a load, bytes of a trip",
        head("code", "before", "trip", "loads", "/load", "shared", "L2"),
        *map(reads_line, reads),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    print(table(read_objects(Path(sys.argv[1]))[0], "not compared"))
