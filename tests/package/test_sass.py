"""The counter of CUDA instructions, on machine code written by hand whose counts are known."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import cuda_instructions
from cuda_instructions import Counts, Kind, MiscountError, count_kernel
from sass import Flow, Instruction, read_functions

# A warp's tile of 16 x 16: two chains of HMMA, two steps a trip. Copies stop before the last stages; what could not be
# copied is loaded in a way of its own. Behind the loop one product moves to another register, a loop clears the
# counters, a hit leaves the straight way, and hits of a full list are flushed in a loop that no quiet path enters.
SCORES = """
    MOV R1, c[0x0][0x28]
    @P0 EXIT
copy_first:
    LDGSTS.E.BYPASS.128 [R37], desc[UR8][R34.64], P5
    LDGDEPBAR
main:
    DEPBAR.LE SB0, 0x1
    BAR.SYNC.DEFER_BLOCKING 0x0
    BSSY B0, copied
    @P1 BRA no_copy
    @P2 BRA slowly
    @!PT LDS RZ, [RZ]
    LDGSTS.E.BYPASS.128 [R37], desc[UR8][R34.64], P5
    LDGSTS.E.BYPASS.128 [R37+0x1000], desc[UR8][R34.64], P5
    BRA no_copy
slowly:
    LDG.E.128 R60, desc[UR8][R34.64]
    STS.128 [R37], R60
no_copy:
    BSYNC B0
copied:
    LDSM.16.M88.4 R88, [R119]
    LDSM.16.M88.4 R52, [R124+0x4000]
    HMMA.16816.F32 R4, R88, R52, R4
    HMMA.16816.F32 R8, R88, R54, R8
    LDSM.16.M88.4 R88, [R119+0x20]
    LDSM.16.M88.2 R52, [R124+0x4020]
    LDS.64 R56, [R3]
    HMMA.16816.F32 R4, R88, R52, R4
    HMMA.16816.F32 R8, R88, R56, R8
    @!P3 BRA main
    IMAD.MOV.U32 R20, RZ, RZ, R11
    SHFL.BFLY PT, R11, R2, 0x1, 0x1f
    FADD R2, R11, R2
clear:
    STS [R3], RZ
    @!P4 BRA clear
    FFMA R30, R4, -2, R40
    FFMA R31, R5, -2, R40
    FFMA R32, R6, -2, R41
    FFMA R33, R7, -2, R41
    FSETP.GT.AND P0, PT, R30, R42, PT
    BSSY B0, quiet
    @!P0 BRA no_hit
    STS.64 [R3], R4
    LOP3.LUT R9, R2, 0x1f, RZ, 0xc0, !PT
no_hit:
    BSYNC B0
quiet:
    FMNMX3 R34, R8, R9, R10, !PT
    FADD R35, R20, R34
    @!P6 BRA done
flush:
    FFMA R30, R4, -2, R40
    @P6 BRA flush
done:
    @P5 EXIT
    STG.E [R60], R35
    EXIT
    BRA 0xforever
"""
TABLE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "instructions.txt"
SIZES = {"float": 4, "half": 2, "bfloat16": 2}
MATRIX = Kind("HMMA", epilogue=True)

# The inner loop reads staged rows, the outer one copies them.
DIRECT = """
stage:
    LDGSTS.E.BYPASS.128 [R37], desc[UR8][R34.64]
    BAR.SYNC.DEFER_BLOCKING 0x0
few:
    LDS.128 R4, [R2]
    FADD R8, R4, -R5
    FFMA R9, R8, R8, R9
    FFMA.RM R9, R8, R8, R9
    @!P0 BRA few
    @!P1 BRA stage
    EXIT
"""


def listing(source: str, name: str = "kernel") -> str:
    """What cuobjdump prints of it: labels become addresses, encodings stand beside and below."""
    lines = [line.strip() for line in source.strip().splitlines()]
    places: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if line.endswith(":"):
            places[line[:-1]] = 16 * len(code)
        else:
            code.append(line)
    places["0xforever"] = 16 * (len(code) - 1)
    text = f"\tcode for sm_90a\n\t\tFunction : {name}\n"
    for at, line in enumerate(code):
        head, _, last = line.rpartition(" ")
        if last in places:
            line = f"{head} {places[last]:#x}"
        text += f"        /*{16 * at:04x}*/                   {line} ;    /* 0x00000a00ff017b82 */\n"
        text += "                                                 /* 0x000ff00000000800 */\n"
    return text


def counts(source: str, kind: Kind = MATRIX) -> Counts:
    return count_kernel(read_functions(listing(source))["kernel"], kind)


def test_a_known_kernel() -> None:
    warp = 32
    assert counts(SCORES) == Counts(
        code=len([line for line in SCORES.split("\n") if line.startswith("    ")]),
        before=4,
        trip=20,  # all of the loop but the two instructions of the slow way
        work=4,
        products=4 * 16 * 8 * 16,
        issued=20,
        shared=3 * 512 + 256 + 8 * warp + 2 * 16 * warp,  # LDSM, LDS, and what two copies write; not the dummy
        l2=2 * 16 * warp,
        after=17,  # a hit, the flush and all behind the first EXIT left out; the clearing loop once
        pairs=8,
        tests=1,
    )


def test_what_is_added_is_noticed() -> None:
    before = counts(SCORES)
    hmma = "    HMMA.16816.F32 R4, R88, R52, R4\n"
    assert counts(SCORES.replace(hmma, f"    IMAD R2, R2, R3, R4\n{hmma}", 1)).trip == before.trip + 1
    assert counts(SCORES.replace(hmma, f"    LDS R2, [R3]\n{hmma}", 1)).shared == before.shared + 128
    assert counts(SCORES.replace("no_hit:", "no_hit:\n    NOP")).after == before.after + 1
    # Where something is a hit, nothing of that is counted.
    hit = "    STS.64 [R3], R4"
    assert counts(SCORES.replace(hit, f"    NOP\n{hit}"))[1:] == before[1:]


def test_products_that_are_looked_at_twice() -> None:
    again = "".join(f"    FADD R30, R{r}, R2\n" for r in (4, 5, 6, 7, 8, 9, 10, 20))
    twice = counts(SCORES.replace("    @!P6 BRA done", f"{again}    @!P6 BRA done"))
    assert (twice.tests, twice.after, twice.pairs) == (2, counts(SCORES).after + 8, 8)


def test_a_loop_in_the_loop() -> None:
    assert counts(DIRECT, Kind("FMA", trips=16)) == Counts(
        code=9, before=2, trip=5, work=1, products=16 * 32, issued=16 * 5 + 3, shared=16 * 512 + 512, l2=512,
        after=0, pairs=0, tests=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda text: text.replace("HMMA", "FMUL"), "no loop with HMMA"),
        (lambda text: text.replace("@!P3 BRA main", "NOP"), "no loop with HMMA"),
        (lambda text: text.replace("FADD R35, R20, R34", "NOP"), "looks 7 times at a lane's 8 products"),
        (lambda text: text.replace("R35, R20, R34", "R35, R11, R34"), "looks 7 times"),  # not a product any more
        (
            lambda text: text.replace("EXIT\n    BRA 0x", "EXIT\n    HMMA R4, R4, R4, R4\n    BRA 0x"),
            "cannot be reached",
        ),
    ],
)
def test_what_cannot_be_counted(broken: Callable[[str], str], message: str) -> None:
    with pytest.raises(MiscountError, match=message):
        counts(broken(SCORES))


def test_no_copy_around_the_loop() -> None:
    with pytest.raises(MiscountError, match="no loop around the main loop copies"):
        counts(DIRECT.replace("LDGSTS.E.BYPASS.128", "LDG.E"), Kind("FMA", trips=16))


def test_jumps() -> None:
    # A BSYNC goes where its BSSY said, wherever it stands; a call is a jump, or comes back; DIV has two ways.
    code = """
    BSSY B0, end
    @P0 CALL.REL.NOINC far
    BRA.DIV UR4, far
    BSYNC B0
far:
    CALL.REL.NOINC routine
    BRA P1, routine
    BRA end
end:
    EXIT
routine:
    RET.REL.NODEC R4 0x0
"""
    flow = Flow(read_functions(listing(code))["kernel"])
    starts = [block[0].address // 16 for block in flow.blocks]
    assert starts == [0, 2, 3, 4, 5, 6, 7, 8]
    assert [[starts[b] for b in after] for after in flow.next] == [[4, 2], [4, 3], [7], [8, 5], [8, 6], [7], [], []]


def test_widths() -> None:
    def lane(opcode: str, guard: str = "") -> int:
        return Instruction(0, guard, opcode, "").bytes_a_lane

    assert [lane(name) for name in ("LDG.E", "LDG.E.64.CONSTANT", "LDG.E.U16.CONSTANT", "LDS.U8", "LDS.128")] == [
        4, 8, 2, 1, 16,
    ]  # fmt: skip
    assert [lane(name) for name in ("LDSM.16.M88.4", "LDSM.16.MT88.2", "LDGSTS.E.BYPASS.128", "LDGSTS.E")] == [
        16, 8, 16, 4,
    ]  # fmt: skip
    assert lane("LDS", "!PT") == 0


def test_without_a_disassembler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="no cuobjdump"):
        cuda_instructions.find_disassembler()
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "cuobjdump"
    tool.write_text("")
    tool.chmod(0o755)
    assert cuda_instructions.find_disassembler() == str(tool)


def test_the_committed_table_has_the_arithmetic_of_the_tiles() -> None:
    # A score tile's stage is copied once and read by every warp; of direct sums a tile is 64 x 64.
    lines = [line.split() for line in TABLE.read_text().splitlines()]
    scores = [line for line in lines if line[0].startswith("score_kernel")]
    assert {line[1] for line in scores} == set(cuda_instructions.ARCHITECTURES)
    for name, _, *cells in scores:
        shape = re.search(r"Tile<(\d+),(\d+),(\d+),(\d+)", name)
        assert shape is not None
        rows, columns, warp_rows, warp_columns = map(int, shape.groups())
        copied = 2 * (rows + columns) / (rows * columns)
        read = 2 * (warp_rows + warp_columns) / (warp_rows * warp_columns)
        assert (float(cells[5]), float(cells[6])) == pytest.approx((copied + read, copied), abs=1e-5), name
    direct = {name: float(cells[6]) for name, _, *cells in lines if name.startswith("tile_kernel")}
    assert direct == {f"tile_kernel<{name}>": 2 * size / 64 for name, size in SIZES.items()}


def test_kernels_that_are_not_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # One hot kernel under a new name: what it was called is missed, and its tensor cores are seen.
    monkeypatch.setattr(cuda_instructions, "find_disassembler", lambda: "cuobjdump")
    monkeypatch.setattr(cuda_instructions, "short_names", lambda names: names)
    monkeypatch.setattr(cuda_instructions, "HOT", {"score_kernel": MATRIX, "old_kernel": MATRIX})
    code = {name: read_functions(listing(SCORES))["kernel"] for name in ("score_kernel<1>", "new_kernel", "empty")}
    code["empty"] = []
    monkeypatch.setattr(cuda_instructions, "disassemble", lambda tool, source, architecture: code)
    (tmp_path / "scores.cu.o").write_bytes(b"score_kernel")
    rows, faults = cuda_instructions.read_objects(tmp_path)
    assert [(row.kernel, row.architecture) for row in rows] == [
        ("score_kernel<1>", name) for name in cuda_instructions.ARCHITECTURES
    ]
    assert faults[-1] == "old_kernel was not found for sm_100, sm_80, sm_90a"
    assert all(fault.startswith("new_kernel multiplies on the tensor cores") for fault in faults[:-1])
    assert "score_kernel<1>" in cuda_instructions.table(rows, "nvcc 1.0")
