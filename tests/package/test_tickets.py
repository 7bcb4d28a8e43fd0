"""The order of memory between blocks, which emulated threads cannot show: it is read in the sources.

A block that has written what another one will read fences before it takes its ticket; the block that holds the last
ticket fences before it reads. Both are looked for around each atomic whose result says who is last. Where the atomic
itself releases and acquires, barriers stand on both sides of it: one behind the block's writes, one before its reads.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("direct/reduce.cu", "direct/select.cu", "fallback/merge.cu")
WITH_TICKETS = [f"csrc/cuda/{name}" for name in KERNELS]
RELEASING = ["csrc/cuda/direct/one_launch.cuh", "csrc/cuda/direct/square.cu"]
TOGETHER = re.compile(r"sync_(?:block|cluster)\(\);")
TICKET = re.compile(r"atomic_add\([^;]*?[tT]icket")
RELEASING_TICKET = re.compile(r"atomic_add_acq_rel\([^;]*?[tT]icket")
FENCE = "fence_device();"
BARRIER = re.compile(r"sync_(?:block|warp)\(\);")
LEAVES = re.compile(r"if \([^\n]*\) (?:return|return false|continue);")


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def faults(text: str) -> list[str]:
    """What is missing around the tickets of a source."""
    text, found = without_comments(text), []
    for ticket in TICKET.finditer(text):
        before, after = text[: ticket.start()], text[ticket.end() :]
        # Nothing may be written between the fence and the ticket but what the block keeps to itself. The fence is each
        # writer's before the barrier, or, as fences accumulate, of the thread that takes the ticket behind it.
        end = max(before.rfind(FENCE), 0)
        between = before[end:]
        if (
            end == 0
            or between.count("\n") > 6
            or re.search(r"\bg[A-Z]\w*\[[^\]]*\] =|atomic_store|args\.\w+\[", between)
        ):
            found.append("no fence before the ticket")
        if not BARRIER.search(before[max(end - 200, 0) :]):
            found.append("no barrier between the block's writes and the ticket")
        leaves = LEAVES.search(after)
        if leaves is None:
            found.append("nobody leaves: who is last?")
        elif not after[leaves.end() :].lstrip().startswith(FENCE):
            found.append("no fence before the last block reads")
    return found


def releasing_faults(text: str) -> list[str]:
    """What is missing around the tickets that release and acquire: before and behind, up to the end of the function, a
    barrier of the block or the cluster with nothing of other blocks between."""
    text, found = without_comments(text), []
    for ticket in RELEASING_TICKET.finditer(text):
        before = text[text.rfind("\n}\n", 0, ticket.start()) + 1 : ticket.start()]
        after = text[ticket.end() : text.index("\n}\n", ticket.end())]
        barriers = TOGETHER.split(before)
        if len(barriers) < 2 or re.search(r"atomic_store|\bg[A-Z]\w*\[", barriers[-1]):
            found.append("no barrier between the block's writes and the ticket")
        behind = TOGETHER.split(after)
        if len(behind) < 2 or re.search(r"atomic_load|\bg[A-Z]\w*\[", behind[0]):
            found.append("no barrier between the ticket and what the last block reads")
    return found


def sources() -> dict[str, str]:
    return {
        str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
        for file in (ROOT / "csrc" / "cuda").rglob("*")
        if file.suffix in (".cu", ".cuh")
    }


def test_every_ticket_has_its_fences() -> None:
    with_tickets = {name: text for name, text in sources().items() if TICKET.search(without_comments(text))}
    assert set(WITH_TICKETS) <= set(with_tickets)
    assert {name: faults(text) for name, text in with_tickets.items()} == {name: [] for name in with_tickets}
    releasing = {name: text for name, text in sources().items() if RELEASING_TICKET.search(without_comments(text))}
    assert sorted(releasing) == RELEASING
    assert {name: releasing_faults(text) for name, text in releasing.items()} == {name: [] for name in releasing}


@pytest.mark.parametrize("name", WITH_TICKETS)
def test_a_missing_fence_or_barrier_is_found(name: str) -> None:
    text = without_comments(sources()[name])
    ticket = TICKET.search(text)
    assert ticket is not None
    fences = [fence.span() for fence in re.finditer(re.escape(FENCE), text)]
    assert len(fences) == 2 and fences[0][1] < ticket.start() < fences[1][0]
    for begin, end in fences:
        assert len(faults(text[:begin] + text[end:])) == 1
    late = text[: fences[0][0]] + text[fences[0][1] : ticket.start()] + "0); " + FENCE + text[ticket.start() :]
    assert faults(late.replace(FENCE, "", 1)) != []


@pytest.mark.parametrize("name", RELEASING)
def test_a_missing_barrier_around_a_releasing_ticket_is_found(name: str) -> None:
    text = without_comments(sources()[name])
    ticket = RELEASING_TICKET.search(text)
    assert ticket is not None
    before = [*TOGETHER.finditer(text, 0, ticket.start())][-1]
    after = TOGETHER.search(text, ticket.end())
    assert after is not None
    for barrier in (before, after):
        assert len(releasing_faults(text[: barrier.start()] + text[barrier.end() :])) == 1
