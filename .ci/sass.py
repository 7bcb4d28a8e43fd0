"""Machine code of a kernel, as `cuobjdump -sass` prints it: instructions, control flow, loops, and paths through it;
and the kernel's name as the tables spell it.

Nothing else here knows the kernels; cuda_instructions.py counts what matters of them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

FUNCTION = re.compile(r"\s*Function : (\S+)")
LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\S*)\s*([^;]*?)\s*;")
TARGET = re.compile(r"0x([0-9a-f]+)$")
REGISTER = re.compile(r"\bR(\d+)\b")

# Copies of a register: what they write is what they read.
MOVES = re.compile(r"MOV\b|IMAD\.MOV|IMAD\.U32")
# Of what these write, the first register is named; of everything else one register is written, or none.
WIDE = {"64": 2, "128": 4, "WIDE": 2, "16816": 4, "1688": 4}
PAIRS = ("DFMA", "DADD", "DMUL", "FFMA2", "FADD2", "FMUL2")
NO_RESULT = re.compile(
    r"ST|RED\b|REDG|BAR|BRA|BRX|BS|CALL|RET|EXIT|LDGSTS|LDGDEPBAR|DEPBAR|WARPSYNC|CCTL|MEMBAR|\w*SETP|PLOP3|FCHK|R2P"
)
PREDICATES = re.compile(r"(?:(?:U?P\w+), )*")  # results that come before the register


class Instruction(NamedTuple):
    """One instruction; the guard is the predicate that switches it on, such as !P0."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int:
        """Where a branch goes."""
        found = TARGET.search(self.operands)
        if found is None:
            raise ValueError(f"{self.opcode} {self.operands}: no target")
        return int(found[1], 16)

    @property
    def never(self) -> bool:
        """Issued, but switched off for good: the dummies by which ptxas waits."""
        return self.guard in ("!PT", "!UPT")

    @property
    def bytes_a_lane(self) -> int:
        """Of a load, a store or an asynchronous copy."""
        if self.never:
            return 0
        if self.name == "LDSM":
            return 4 * {"4": 4, "2": 2}.get(self.opcode.rsplit(".", 1)[1], 1)
        parts = self.opcode.split(".")
        for part, size in {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}.items():
            if part in parts:
                return size
        return 4

    def _result(self) -> re.Match[str] | None:
        """Where the operands name the register that is written."""
        if NO_RESULT.match(self.name):
            return None
        predicates = PREDICATES.match(self.operands)
        return REGISTER.match(self.operands, predicates.end() if predicates else 0)

    def written(self) -> list[int]:
        """Numbers of the registers that it gives a value."""
        first = self._result()
        if first is None:
            return []
        parts = self.opcode.split(".")
        count = next((size for part, size in WIDE.items() if part in parts), 1)
        if self.name == "LDSM":
            count = self.bytes_a_lane // 4
        elif self.name in PAIRS or (self.name == "CS2R" and "32" not in parts):
            count = 2
        return [int(first[1]) + i for i in range(count)]

    def read(self) -> list[int]:
        """Numbers of the registers that it names as sources, once each time."""
        result = self._result()
        return [int(number) for number in REGISTER.findall(self.operands, result.end() if result else 0)]


def read_functions(text: str) -> dict[str, list[Instruction]]:
    """Mangled name -> instructions."""
    functions: dict[str, list[Instruction]] = {}
    here: list[Instruction] | None = None
    for line in text.splitlines():
        if found := FUNCTION.match(line):
            here = functions.setdefault(found[1], [])
        elif here is not None and (found := LINE.match(line)):
            here.append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4]))
    return functions


def short_name(demangled: str) -> str:
    """`tile_kernel<float, true>` of `void sn::cuda::(anonymous namespace)::tile_kernel<float, true>(...)`."""
    name = re.sub(r"\(anonymous namespace\)::|sn::cuda::|sn::", "", demangled)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for position, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and position > 0:
            name = name[:position]
            break
    # One name for a type, whichever compiler printed it.
    for ours, theirs in {"half": "__half", "bfloat16": "__nv_bfloat16"}.items():
        name = name.replace(theirs, ours)
    name = re.sub(r"\bHalf\b", "half", name)
    name = re.sub(r"\bBFloat16\b", "bfloat16", name)
    name = re.sub(r"\((\w+)\)(\d+)", r"\2", name)  # (bool)1, (ScoreMode)0
    return name.replace("true", "1").replace("false", "0").replace(" ", "")


def short_names(mangled: list[str]) -> list[str]:
    """The same of mangled names."""
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [short_name(name) for name in done.stdout.split("\n")[: len(mangled)]]


class Loop(NamedTuple):
    """A natural loop: all blocks from which its end is reached without passing its head."""

    head: int
    blocks: frozenset[int]


class Cost(NamedTuple):
    """Of a path. The greater one is the one that is taken: more marks, then fewer instructions."""

    marks: int
    less: int  # minus the instructions


class Flow:
    """Basic blocks, numbered by address, and how control goes from one to the next."""

    def __init__(self, code: list[Instruction]) -> None:
        starts = {code[0].address}
        for instruction, behind in zip(code, [*code[1:], None], strict=True):
            if instruction.name in ("BRA", "BSSY", "CALL"):
                starts.add(instruction.target)
            if instruction.name in ("BRA", "BRX", "BSYNC", "CALL", "EXIT", "RET") and behind is not None:
                starts.add(behind.address)
        self.blocks: list[list[Instruction]] = []
        for instruction in code:
            if instruction.address in starts:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
        at = {block[0].address: number for number, block in enumerate(self.blocks)}
        # Where a BSYNC goes: to the end that a BSSY named. That is what follows, or else the last one named above it.
        joins: dict[str, int] = {}
        ends = {
            (instruction.operands.split(",")[0], at[instruction.target])
            for instruction in code
            if instruction.name == "BSSY"
        }
        self.next: list[list[int]] = []
        for number, block in enumerate(self.blocks):
            for instruction in block:
                if instruction.name == "BSSY":
                    joins[instruction.operands.split(",")[0]] = at[instruction.target]
            last = block[-1]
            follows = [number + 1] if number + 1 < len(self.blocks) else []
            sometimes = last.guard != "" or "," in last.operands  # the operand before the target is a condition
            if last.name == "BRA":
                self.next.append([at[last.target], *(follows if sometimes else [])])
            elif last.name == "BSYNC":
                goes = number + 1 if (last.operands, number + 1) in ends else joins[last.operands]
                self.next.append([goes, *(follows if last.guard else [])])
            elif last.name == "CALL":
                # ptxas also uses it as a jump. A call comes back behind it, and what it called ends in a RET: no path
                # to an EXIT or round a loop leads there, so a call counts as one instruction.
                self.next.append([at[last.target], *follows])
            elif last.name in ("EXIT", "RET", "BRX"):
                self.next.append(follows if last.guard else [])
            else:
                self.next.append(follows)

    @cached_property
    def order(self) -> list[int]:
        """Blocks that can be reached, each before those behind it, but for the ends of loops."""
        seen: set[int] = set()
        done: list[int] = []
        stack: list[tuple[int, Iterator[int]]] = [(0, iter(self.next[0]))]
        seen.add(0)
        while stack:
            block, rest = stack[-1]
            step = next((b for b in rest if b not in seen), None)
            if step is None:
                done.append(block)
                stack.pop()
            else:
                seen.add(step)
                stack.append((step, iter(self.next[step])))
        return done[::-1]

    @cached_property
    def dominators(self) -> dict[int, int]:
        """Block -> the block that every way to it passes last."""
        place = {block: i for i, block in enumerate(self.order)}
        before: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for follower in self.next[block]:
                before[follower].append(block)
        immediate = {self.order[0]: self.order[0]}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                known = [b for b in before[block] if b in immediate]
                best = known[0]
                for other in known[1:]:
                    while best != other:
                        while place[best] > place[other]:
                            best = immediate[best]
                        while place[other] > place[best]:
                            other = immediate[other]
                if immediate.get(block) != best:
                    immediate[block] = best
                    changed = True
        return immediate

    def dominates(self, head: int, block: int) -> bool:
        """Whether every way to the block passes the head."""
        while block != head:
            if self.dominators[block] == block:
                return False
            block = self.dominators[block]
        return True

    @cached_property
    def loops(self) -> list[Loop]:
        """All loops; those with one head are one."""
        before: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for follower in self.next[block]:
                before[follower].append(block)
        inside: dict[int, set[int]] = {}
        for block in self.order:
            for head in self.next[block]:
                if head == block or self.dominates(head, block):
                    body = inside.setdefault(head, {head})
                    waiting = [block]
                    while waiting:
                        here = waiting.pop()
                        if here not in body:
                            body.add(here)
                            waiting += before[here]
        return [Loop(head, frozenset(blocks)) for head, blocks in inside.items()]

    def own(self, loop: Loop) -> frozenset[int]:
        """The loop's blocks that are in no loop inside it."""
        inner = [other.blocks for other in self.loops if other.blocks < loop.blocks]
        return loop.blocks - frozenset().union(*inner)

    def around(self, loop: Loop) -> Loop | None:
        """The next larger loop."""
        larger = [other for other in self.loops if loop.blocks < other.blocks]
        return min(larger, key=lambda other: len(other.blocks), default=None)

    def best_path(
        self, start: int, ends: Callable[[int], bool], within: frozenset[int], marks: Callable[[Instruction], int],
        free: frozenset[int] = frozenset(),
    ) -> list[int]:  # fmt: skip
        """The blocks of the path with the most marks, and of those the fewest instructions.

        It goes from `start` to a block that `ends` accepts, through blocks of `within`, at most once through each: ends
        of loops are not followed back. Blocks of `free` cost nothing and have no marks.
        """
        place = {block: i for i, block in enumerate(self.order)}
        best: dict[int, tuple[Cost, int]] = {start: (Cost(0, 0), -1)}
        found: tuple[Cost, int] | None = None
        for block in self.order[place[start] :]:
            if block not in best or block not in within:
                continue
            cost, _ = best[block]
            if block not in free:
                code = self.blocks[block]
                cost = Cost(cost.marks + sum(map(marks, code)), cost.less - len(code))
            if ends(block) and (found is None or cost > found[0]):
                found = cost, block
            for follower in self.next[block]:
                if place[follower] > place[block] and (follower not in best or cost > best[follower][0]):
                    best[follower] = cost, block
        if found is None:
            raise ValueError(f"no path from {self.blocks[start][0].address:#x}")
        path = [found[1]]
        while path[-1] != start:
            path.append(best[path[-1]][1])
        return path[::-1]

    def code(self, blocks: list[int]) -> list[Instruction]:
        """The instructions of these blocks."""
        return [instruction for block in blocks for instruction in self.blocks[block]]
