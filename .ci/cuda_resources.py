"""Two tables of the CUDA kernels: what each needs of a multiprocessor, from ptxas' report and the host harness'
launches, and what the hot ones issue and move, from their machine code.

    cuda_resources.py PTXAS_LOG LAUNCH_LOG OBJECTS [--write]

PTXAS_LOG is the output of a build with SN_OPS_PTXAS_VERBOSE=ON. LAUNCH_LOG has a line "kernel<TAB>threads<TAB>shared
bytes<TAB>cluster" for each kernel that the harness launched (SN_SIMT_LAUNCH_LOG). OBJECTS is the folder of the object
files. The tables are compared with the committed ones, csrc/cuda/resources.txt and instructions.txt, which `--write`
replaces. It fails on a spill or other local memory, on a missing architecture, on a kernel that no test of the harness
launches, on one whose instructions cannot be counted, and on a difference. Registers and instructions of another
compiler than the committed tables' are not comparable: a difference is then only shown.
"""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cuda_instructions
from sass import short_name, short_names

FOLDER = Path(__file__).resolve().parent.parent / "csrc" / "cuda"


class Architecture(NamedTuple):
    """Limits of a multiprocessor, from the CUDA programming guide's table of compute capabilities."""

    warps: int
    blocks: int
    shared: int  # bytes, of which every resident block takes 1 KB beside its own


ARCHITECTURES = {
    "sm_80": Architecture(64, 32, 164 * 1024),
    "sm_86": Architecture(48, 16, 100 * 1024),
    "sm_89": Architecture(48, 24, 100 * 1024),
    "sm_90a": Architecture(64, 32, 228 * 1024),
    "sm_100": Architecture(64, 32, 228 * 1024),
    "sm_120": Architecture(48, 24, 100 * 1024),
}
REGISTERS = 65536
REGISTERS_ALLOCATED = 256  # a warp's registers come in pieces of so many
SYSTEM_SHARED = 1024

ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(\S+)'"
    r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


class Launch(NamedTuple):
    """The largest launch of a kernel that the harness saw."""

    threads: int
    shared: int
    cluster: int


def read_registers(log: str) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Kernel -> architecture -> registers, and what spills or has local memory for another reason."""
    found = ENTRY.findall(log)
    mangled_names = [entry[0] for entry in found]
    names = dict(zip(mangled_names, short_names(mangled_names), strict=True))
    registers: dict[str, dict[str, int]] = {}
    spills = []
    for mangled, arch, stack, stores, loads, count in found:
        name = names[mangled]
        registers.setdefault(name, {})[arch] = int(count)
        if int(stack) + int(stores) + int(loads) > 0:
            spills.append(f"{name} on {arch}: a frame of {stack} bytes, {stores} bytes stored, {loads} loaded")
    return registers, spills


def read_launches(text: str) -> dict[str, Launch]:
    """Kernel -> its largest launch."""
    launches: dict[str, Launch] = {}
    for line in text.splitlines():
        name, *numbers = line.split("\t")
        seen = Launch(*map(int, numbers))
        key = short_name(name)
        known = launches.get(key, seen)
        launches[key] = Launch(*map(max, known, seen))
    return launches


def resident_blocks(arch: Architecture, registers: int, launch: Launch) -> int:
    """Blocks that a multiprocessor holds at a time."""
    warps = -(-launch.threads // 32)
    warp_registers = -(-registers * 32 // REGISTERS_ALLOCATED) * REGISTERS_ALLOCATED
    return min(
        arch.blocks,
        arch.warps // warps,
        REGISTERS // (warp_registers * warps),
        arch.shared // (launch.shared + SYSTEM_SHARED),
    )


def table(registers: dict[str, dict[str, int]], launches: dict[str, Launch], compiler: str) -> str:
    """One line a kernel: registers a thread and resident warps of all that the multiprocessor can hold."""
    lines = [
        f"# {compiler}; cells: registers a thread / warps a multiprocessor holds, of at most "
        + ", ".join(f"{arch.warps} ({name})" for name, arch in ARCHITECTURES.items()),
        "# shared: the most bytes that a test of the host harness asked for; made by .ci/cuda_resources.py",
        " ".join(["kernel".ljust(72), "threads", " shared", *(name.rjust(9) for name in ARCHITECTURES)]),
    ]
    for name in sorted(registers):
        launch = launches.get(name)
        cells = []
        for arch, limits in ARCHITECTURES.items():
            count = registers[name].get(arch)
            warps = "?"
            if launch is not None and count is not None:
                warps = str(resident_blocks(limits, count, launch) * (-(-launch.threads // 32)))
            cells.append(f"{count}/{warps}".rjust(9) if count is not None else "-".rjust(9))
        shape = ["?".rjust(7)] * 2 if launch is None else [str(launch.threads).rjust(7), str(launch.shared).rjust(7)]
        lines.append(" ".join([name.ljust(72), *shape, *cells]))
    return "\n".join(lines) + "\n"


def compare(file: str, made: str, write: bool) -> list[str]:
    """Shows a table and how it differs from the committed one, which it replaces if wanted; faults."""
    print(made)
    path = FOLDER / file
    if write:
        path.write_text(made)
    committed = path.read_text() if path.exists() else ""
    difference = list(
        difflib.unified_diff(committed.splitlines(), made.splitlines(), "committed", "built", lineterm="", n=0)
    )
    print(*difference, sep="\n")
    if difference and (committed.split(";")[0] == made.split(";")[0] or not committed):
        return [f"the table differs from csrc/cuda/{file}: if that is meant, commit what --write makes of it"]
    return []


def main() -> None:
    """Builds the tables, shows and compares them."""
    log, launch_log, objects, *rest = sys.argv[1:]
    text = Path(log).read_text()
    registers, spills = read_registers(text)
    launches = read_launches(Path(launch_log).read_text())
    version = re.search(r"release (\d+\.\d+), V(\S+)", subprocess.run(
        ["nvcc", "--version"], capture_output=True, text=True, check=True).stdout)  # fmt: skip
    compiler = f"nvcc {version[2] if version else 'unknown'}"
    write = rest == ["--write"]
    faults = [f"a kernel uses local memory: {spill}" for spill in spills]
    seen = {arch for row in registers.values() for arch in row}
    faults += [f"not compiled for {arch}" for arch in ARCHITECTURES if arch not in seen]
    faults += [f"no test of the harness launches {name}" for name in registers if name not in launches]
    faults += compare("resources.txt", table(registers, launches, compiler), write)
    try:
        rows, miscounts = cuda_instructions.read_objects(Path(objects))
    except (FileNotFoundError, RuntimeError) as reason:
        faults.append(str(reason))
    else:
        faults += miscounts + compare("instructions.txt", cuda_instructions.table(rows, compiler), write)
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
