"""What .ci/triton_resources.py reads from machine code, what it fails on, and which variants it chooses."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

import triton_launches
import triton_resources
from triton_launches import Launch
from triton_resources import Row, compare, faults_of, line, read_row, table

ROW = Row("screen_kernel", "*fp16 D=64", "sm_90", 8, 128, 4096, 0, 2, 100, 10, 1, ())

USAGE = "Function screen_kernel:\n  REG:77 STACK:0 SHARED:0 LOCAL:0"

# Two loops, one in the other; the inner one has the products. A store and a load of local memory: two spills.
SASS = """
    Function : screen_kernel
        /*0000*/  MOV R1, c[0x0][0x28] ;
        /*0010*/  STL [R1], R2 ;
        /*0020*/  BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/  LDG.E.128 R4, desc[UR8][R34.64] ;
        /*0040*/  BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/  HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0060*/  @P0 BRA 0x40 ;
        /*0070*/  LDL R2, [R1] ;
        /*0080*/  @P1 BRA 0x20 ;
        /*0090*/  EXIT ;
"""

PTXAS = "ptxas info    : Compiling entry function 'screen_kernel' for 'sm_90a'\n"
SERIALISED = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"


def launch(kernel: str = "screen_kernel", **facts: Any) -> Launch:
    """A variant; facts in capitals are constants, others numbers that 16 divides or not."""
    constants = tuple((name, value) for name, value in facts.items() if name.isupper())
    numbers = {name: value for name, value in facts.items() if not name.isupper()}
    signature = [("gX", "*fp32"), *((name, "constexpr") for name, _ in constants), *((name, "i32") for name in numbers)]
    return Launch(
        kernel, tuple(signature), constants, ("gX", *(n for n, v in numbers.items() if v)), (("num_warps", 8),)
    )


def test_machine_code_is_read() -> None:
    row = read_row(launch(BM=128, d=True), "sm_90", 4096, USAGE, SASS, PTXAS)
    assert row == Row("screen_kernel", "*fp32 BM=128 16|d", "sm_90", 8, 77, 4096, 2, 2, 10, 3, 1, ())
    assert read_row(launch(), "sm_90", 4096, USAGE, SASS, PTXAS + 2 * SERIALISED).warnings == ("C7515",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spills": 3}, "screen_kernel has 3 spill instructions on sm_90: *fp16 D=64"),
        ({"warnings": ("C7510",)}, "screen_kernel: ptxas warns with C7510 on sm_90: *fp16 D=64"),
        ({"shared": 232449}, "screen_kernel wants 232449 bytes of shared memory, of at most 232448, on sm_90"),
        ({"architecture": "sm_80", "shared": 166913}, "of at most 166912, on sm_80"),
    ],
)
def test_what_no_kernel_may_do(changes: dict[str, Any], said: str) -> None:
    (fault,) = faults_of([ROW, ROW._replace(**changes)])
    assert said in fault


def test_what_kernels_may_do() -> None:
    """All of a GPU's shared memory; spills where each row runs a kernel once."""
    assert faults_of([ROW, ROW._replace(shared=227 << 10), ROW._replace(kernel="shortlist_kernel", spills=3)]) == []


def test_a_row_that_differs_fails(capsys: pytest.CaptureFixture[str]) -> None:
    other = ROW._replace(kernel="loss_kernel", architecture="sm_80")
    committed = table([ROW, other])
    assert compare(committed, committed, {"screen_kernel", "loss_kernel"}, ("sm_80", "sm_90")) == []
    for made in (table([ROW._replace(registers=129), other]), table([other]), table([ROW, ROW, other])):
        (fault,) = compare(made, committed, {"screen_kernel", "loss_kernel"}, ("sm_80", "sm_90"))
        assert "the table differs" in fault
    assert line(ROW).split()[0] in capsys.readouterr().out
    # Of one kernel or architecture alone
    for kernels, architectures in (({"loss_kernel"}, ("sm_80",)), ({"screen_kernel"}, ("sm_80",))):
        made = table([row for row in [other] if row.kernel in kernels])
        assert compare(made, committed, kernels, architectures) == []
    assert compare(table([other]), "", {"loss_kernel"}, ("sm_80",)) != []


def test_lines_are_written_anew() -> None:
    """Those of some kernels and architectures; in their places, the others kept, those that are gone left out."""
    other = ROW._replace(kernel="loss_kernel")
    rows = [ROW, ROW._replace(architecture="sm_100"), ROW._replace(variant="*fp16 D=128"), other]
    changed = ROW._replace(registers=1)
    made = triton_resources.merged(table([changed]), table(rows), {"screen_kernel"}, ("sm_90",))
    assert made == table([changed, rows[1], other])
    assert triton_resources.merged(table(rows), table(rows), {"screen_kernel"}, ("sm_90", "sm_100")) != table(rows)
    assert triton_resources.merged(table(rows[:3]), table(rows), {"screen_kernel"}, ("sm_90", "sm_100")) == table(rows)


def test_another_version_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    committed = table([ROW]).replace("# triton ", "# triton 0.")
    assert compare(table([ROW._replace(registers=129)]), committed, {"screen_kernel"}, ("sm_90",)) == []
    assert "not compared" in capsys.readouterr().out


def test_facts_that_meet_are_covered() -> None:
    """All three at a time, of each kernel, with fewer variants than there are; CHUNK and what follows from it do not
    count, nor do facts that always go together."""
    every = [
        launch(kernel, KP=k, R=1024 // k, LOG_KP=k.bit_length(), CHUNK=chunk, a=a, b=b, c=c)
        for kernel in ("screen_kernel", "search_kernel")
        for k in (2, 16, 64, 128)
        for chunk in (16, 32)
        for a in (False, True)
        for b in (False, True)
        for c in (False, True)
    ]
    given = every[:3]
    chosen = triton_launches.covering(every, given)
    assert not set(chosen) & set(given) and len(chosen) < len(every) / 3

    def meetings(variants: list[Launch]) -> set[Any]:
        return {
            (each.kernel, group)
            for each in variants
            for group in combinations([("KP", dict(each.constants)["KP"]), *((n, n in each.aligned) for n in "abc")], 3)
        }

    assert meetings([*given, *chosen]) == meetings(every)
    assert meetings([*given, *chosen[:-1]]) != meetings(every)
    assert triton_launches.covering(every, every) == []
