"""Compiles every variant of every Triton kernel ahead of time, for GPUs that need not be there, and makes a table of
what each takes, read from the compiled code:

* registers a thread, bytes of shared memory, spills (instructions that go to local memory)
* barriers of a block, instructions, and instructions and barriers of the main loop: of the loop that has the most
  products (HGMMA, HMMA and their like), fused multiply-adds, or loads outside loops inside it
* warnings of ptxas: C75xx says that it waits for every wgmma by itself

The table is compared with the committed one, sn_ops/triton/resources.txt, which `--write` replaces. A difference fails
the run, unless the committed one is of another version of Triton: then it is not looked for. A spill in a hot kernel, a
warning, more shared memory than the GPU has and a kernel that no batch launches fail with any version. These are looked
for on sm_90 also in variants of the hot kernels beyond the table's, from all kinds of batches.

    python .ci/triton_resources.py [sm_80 sm_90 sm_100] [--kernels search_kernel,loss_kernel] [--table] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sass import Flow, Instruction, read_functions
from sn_ops.triton import tuning
from triton_launches import REGIMES, Launch, covering, kernels, launches_of, whole_range

TABLE = Path(__file__).resolve().parent.parent / "sn_ops" / "triton" / "resources.txt"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
RANGE_ARCHITECTURE = "sm_90"
"""That of the variants beyond the table's."""

# Most shared memory of a block, bytes.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# Run for each pair, for each tile of pairs, or along D for each neighbour or edge. The others are short.
HOT = {"search_kernel", "sample_kernel", "screen_kernel", "refine_kernel", "positives_kernel", "fallback_kernel",
       "gradient_kernel", "hub_kernel"}  # fmt: skip

WARNING = re.compile(r"\bC75\d\d\b")
PRODUCTS = re.compile(r"\w*MMA$")
SUMS = ("FFMA", "FFMA2", "DFMA", "FADD", "FADD2", "DADD")
LOADS = ("LDG", "LDGSTS", "LD")


def device_of(architecture: str) -> tuning.Device:
    """What plans depend on, of a GPU of this architecture and of the Triton that is installed."""
    number = int(architecture.removeprefix("sm_"))
    major, minor = map(int, re.findall(r"\d+", triton.__version__)[:2])
    return tuning.Device(divmod(number, 10), SHARED[number], (major, minor))


class Row(NamedTuple):
    """A variant's code for an architecture."""

    kernel: str
    variant: str
    architecture: str
    warps: int
    registers: int
    shared: int
    spills: int
    barriers: int
    code: int  # instructions
    loop: int  # instructions of the main loop, 0 without one
    loop_barriers: int
    warnings: tuple[str, ...]


def told(launch: Launch) -> str:
    """What tells a variant from others of its kernel: types, constants, what 16 divides (16|D), pointers that it need
    not divide (gLabels%16), numbers of 64 bits.
    """
    types = sorted({kind for _, kind in launch.signature if kind in ("*fp16", "*bf16", "*fp32", "*fp64")})
    constants = [
        f"{name}={getattr(value, 'name', value)}"
        for name, value in launch.constants
        if not name.startswith("LOG_") or name == "LOG_SEGMENTS"
    ]
    pointers = {name for name, kind in launch.signature if kind.startswith("*")}
    wide = [f"{name}:i64" for name, kind in launch.signature if kind == "i64"]
    divided = [f"16|{name}" for name in launch.aligned if name not in pointers]
    odd = [f"{name}%16" for name in sorted(pointers - set(launch.aligned))]
    return " ".join([*types, *constants, *wide, *divided, *odd])


def main_loop(code: list[Instruction]) -> tuple[int, int]:
    """Instructions and barriers of the main loop, outside loops inside it; zeros without one."""

    def work(blocks: Iterable[int]) -> tuple[int, int, int, int]:
        names = [instruction.name for instruction in flow.code(sorted(blocks)) if not instruction.never]
        products = sum(PRODUCTS.match(name) is not None for name in names)
        return products, sum(name in SUMS for name in names), sum(name in LOADS for name in names), -len(names)

    flow = Flow(code)
    loops = [flow.own(loop) for loop in flow.loops]
    best = max(loops, key=work, default=None)
    if best is None:
        return 0, 0
    inside = flow.code(sorted(best))
    return len(inside), sum(instruction.name == "BAR" for instruction in inside)


def read_row(launch: Launch, architecture: str, shared: int, usage: str, sass: str, log: str) -> Row:
    """Of what cuobjdump prints of a variant's machine code, and of what ptxas printed while making it."""
    code = read_functions(sass)[launch.kernel]
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    return Row(
        launch.kernel, told(launch), architecture, dict(launch.options).get("num_warps", 4), registers, shared,
        # Instructions, not the size of the stack, which a call of a division's slow path needs too.
        sum(instruction.name in ("STL", "LDL") for instruction in code),
        sum(instruction.name == "BAR" for instruction in code),
        len(code),
        *main_loop(code),
        tuple(sorted(set(WARNING.findall(log)))),
    )  # fmt: skip


def compile_for(task: tuple[str, Launch, str]) -> Row:
    """Compiles a variant, of a kernel of the module, for an architecture."""
    module, launch, architecture = task
    kernel = getattr(importlib.import_module(module), launch.kernel)
    place = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={place[name]: value for name, value in launch.constants},
        attrs={place[name]: [["tt.divisibility", 16]] for name in launch.aligned},
    )
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder  # what comes out of a cache has no log
        knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=target, options=dict(launch.options))
        assert "Compiling entry function" in log.getvalue(), "ptxas printed nothing"
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, sass = (
            subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    return read_row(launch, architecture, int(compiled.metadata.shared), usage, sass, log.getvalue())


def faults_of(rows: Iterable[Row]) -> list[str]:
    """What no version of Triton may do."""
    faults = []
    for row in rows:
        of = f"on {row.architecture}: {row.variant}"
        most = SHARED[int(row.architecture.removeprefix("sm_"))]
        if row.kernel in HOT and row.spills:
            faults.append(f"{row.kernel} has {row.spills} spill instructions {of}")
        if row.shared > most:
            faults.append(f"{row.kernel} wants {row.shared} bytes of shared memory, of at most {most}, {of}")
        faults += [f"{row.kernel}: ptxas warns with {warning} {of}" for warning in row.warnings]
    return faults


HEAD = (
    f"{'kernel':22}{'for':7}{'warps':>5}{'regs':>5}{'shared':>7}{'spills':>7}{'bars':>5}{'code':>6}{'loop':>9}  variant"
)


def line(row: Row) -> str:
    """Of the table."""
    loop = f"{row.loop}/{row.loop_barriers}" if row.loop else "-"
    return (
        f"{row.kernel:22}{row.architecture:7}{row.warps:5}{row.registers:5}{row.shared:7}{row.spills:7}"
        f"{row.barriers:5}{row.code:6}{loop:>9}  {' '.join([row.variant, *row.warnings])}"
    )


def table(rows: Iterable[Row]) -> str:
    """One line a variant and architecture."""

    def place(row: Row) -> tuple[str, str, int]:
        return row.kernel, row.variant, int(row.architecture.removeprefix("sm_"))

    return "\n".join([
        f"# triton {triton.__version__}; made by .ci/triton_resources.py, which says what is counted",
        "# regs: registers a thread; shared: bytes; bars: barriers; code: instructions;",
        "# loop: instructions/barriers of the main loop; 16|D: for a D that 16 divides; gLabels%16: labels anywhere",
        HEAD, *map(line, sorted(rows, key=place)),
    ]) + "\n"  # fmt: skip


def merged(made: str, committed: str, kernels: set[str], architectures: Iterable[str]) -> str:
    """The committed table with the lines of these kernels and architectures anew."""

    def place(text: str) -> tuple[str, str, int]:
        cells = text.split()
        return cells[0], " ".join(cells[9:]), int(cells[1].removeprefix("sm_"))

    def lines(text: str) -> list[str]:
        return [each for each in text.splitlines() if not each.startswith("#") and each != HEAD]

    head = made[: made.index(HEAD) + len(HEAD)]
    kept = [each for each in lines(committed) if each.split()[0] not in kernels or each.split()[1] not in architectures]
    return "\n".join([head, *sorted([*kept, *lines(made)], key=place)]) + "\n"


def compare(made: str, committed: str, kernels: set[str], architectures: Iterable[str]) -> list[str]:
    """Faults: lines of the committed table that differ, of these kernels and architectures."""

    def chosen(text: str) -> list[str]:
        cells = [line.split() for line in text.splitlines() if not line.startswith("#")]
        return [" ".join(row) for row in cells if row[0] in kernels and row[1] in architectures]

    version, ours = committed.split(";")[0], made.split(";")[0]
    if committed and version != ours:
        print(f"{ours.strip('# ')}: not compared with sn_ops/triton/resources.txt, which is of{version.strip('#')}")
        return []
    difference = list(difflib.unified_diff(chosen(committed), chosen(made), "committed", "made", lineterm="", n=0))
    print(*difference, sep="\n")
    if difference:
        return ["the table differs from sn_ops/triton/resources.txt: if that is meant, commit what --write makes of it"]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].rstrip(":") + ".")
    parser.add_argument(
        "architectures", nargs="*", default=ARCHITECTURES, help="such as sm_90; all of the table's by default"
    )
    parser.add_argument("--kernels", help="only these, separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--table", action="store_true", help="compiles no variants beyond the table's")
    parser.add_argument(
        "--write",
        action="store_true",
        help="writes the committed table anew, or its lines of these kernels and architectures",
    )
    chosen = parser.parse_args()
    assert not tuning.INTERPRETED, "TRITON_INTERPRET is set: nothing would be compiled"

    wanted = set(chosen.kernels.split(",")) if chosen.kernels else kernels()
    # Each architecture has its own plans.
    launches = {each: launches_of(REGIMES, device_of(each)) for each in chosen.architectures}
    every = {launch: kernel for some in launches.values() for launch, kernel in some.items()}
    faults = [f"{name}: no batch launches it" for name in sorted(kernels() - {launch.kernel for launch in every})]
    beyond: list[Launch] = []
    known = launches.get(RANGE_ARCHITECTURE, {})
    if known and not chosen.table:
        ranged = launches_of(whole_range(), device_of(RANGE_ARCHITECTURE))
        hot = [launch for launch in ranged if launch.kernel in HOT & wanted]
        beyond = covering(hot, known)
        every.update(ranged)
        print(f"beyond the table {len(beyond)} of {len(set(hot) - set(known))} variants of hot kernels")
    tasks = [
        *(
            (launch, architecture)
            for architecture, some in launches.items()
            for launch in some
            if launch.kernel in wanted
        ),
        *((launch, RANGE_ARCHITECTURE) for launch in beyond),
    ]
    modules = {launch: kernel.fn.__module__ for launch, kernel in every.items()}
    print(f"triton {triton.__version__}: {len(tasks) - len(beyond)} variants of {len(kernels())} kernels in the table")
    print(HEAD)
    rows: list[Row] = []
    others: list[Row] = []
    with multiprocessing.get_context("spawn").Pool(chosen.jobs) as pool:
        results = pool.imap(compile_for, [(modules[launch], launch, architecture) for launch, architecture in tasks])
        for (launch, architecture), row in zip(tasks, results, strict=True):
            (rows if launch in launches[architecture] else others).append(row)
            print(line(row), flush=True)
    faults += faults_of([*rows, *others])
    made = table(rows)
    committed = TABLE.read_text() if TABLE.exists() else ""
    if chosen.write:
        whole = wanted == kernels() and set(chosen.architectures) == set(ARCHITECTURES)
        assert whole or committed.split(";")[0] == made.split(";")[0], "another version of Triton: --write wants all"
        TABLE.write_text(made if whole else merged(made, committed, wanted, chosen.architectures))
    else:
        faults += compare(made, committed, wanted, chosen.architectures)
    for fault in faults:
        print("FAILED", fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
