"""The inline assembly of the Triton backend, which only a GPU runs: emulated, it does what the plain form does."""

from __future__ import annotations

import re
from typing import Any

import numpy as np


class Emulated:
    """Runs the PTX of `offer.offer_code` for one thread on counters and buffers of Python."""

    def __init__(self, code: str, pack: int) -> None:
        self.lines = [line.strip() for line in code.strip("{}\n").splitlines() if not line.startswith(".reg")]
        self.pack = pack

    def run(self, arguments: list[list[Any]], counters: list[int], stored: dict[tuple[int, int], Any]) -> None:
        values: dict[str, Any] = {
            f"${(1 + place) * self.pack + pair}": value
            for place, values in enumerate(arguments) for pair, value in enumerate(values)
        }  # fmt: skip

        def get(name: str) -> Any:
            return values[name] if name in values else int(name)

        skip = False
        for line in self.lines:
            if line == "done:":
                skip = False
            if skip or line == "done:":
                continue
            guard, _, rest = line.rstrip(";").rpartition("@") if "@" in line else ("", "", line.rstrip(";"))
            assert guard == ""
            holds = True
            if "@" in line:
                predicate, rest = rest.split(" ", 1)
                holds = values.get(predicate.lstrip("!"), False) != predicate.startswith("!")
            operation, operands = rest.split(" ", 1)
            names = re.findall(r"[$\w-]+", operands)
            if not holds:
                continue
            match operation:
                case "setp.leu.f32":
                    values[names[0]] = not get(names[1]) > get(names[2])
                case "mov.pred" | "mov.b32":
                    values[names[0]] = get(names[1])
                case "or.pred":
                    values[names[0]] = get(names[1]) or get(names[2])
                case "bra":
                    skip = True
                case "atom.global.relaxed.gpu.add.u32":
                    values[names[0]] = counters[get(names[1])]
                    counters[get(names[1])] += int(names[2])
                case "setp.lt.and.u32":
                    values[names[0]] = get(names[3]) and get(names[1]) < get(names[2])
                case "mad.wide.u32":
                    assert names[2] == "8", "bytes of an entry"
                    values[names[0]] = (get(names[3]), values.get(names[1]))
                case "st.global.v2.b32":
                    stored[get(names[0])] = (get(names[1]), get(names[2]))
                case _:
                    raise AssertionError(f"not emulated: {line}")
        assert all(values[f"${pair}"] == 0 for pair in range(self.pack))


def test_the_inline_assembly_stores_what_the_plain_form_stores() -> None:
    """For values beside the limit and on it, infinite ones and NaN, and counters before and behind the end."""
    from sn_ops.triton import offer

    pack, capacity = int(offer.PACK.value), 64
    emulated = Emulated(str(offer.offer_code(pack, capacity)), pack)
    random = np.random.default_rng(3)
    limits = np.array([1.5, -np.inf, 3.4e38])
    for _ in range(300):
        rows = random.integers(0, 3, pack)
        # Some packs keep nothing, some one pair.
        values = np.where(
            random.random(pack) < random.random(), random.choice([1.0, 1.5, -np.inf, np.nan], pack), np.inf
        )
        dots, candidates = random.normal(size=pack), random.integers(0, 10**6, pack)
        counters = [int(x) for x in random.choice([0, 5, 62, 63, 64, 100], 3)]
        wanted, places = {}, list(counters)
        for row, value, dot, candidate in zip(rows, values, dots, candidates, strict=True):
            if not value > limits[row]:
                if places[row] < capacity:
                    wanted[row, places[row]] = (candidate, dot)
                places[row] += 1
        stored: dict[tuple[int, int], Any] = {}
        each = [list(column) for column in (values, limits[rows], dots, candidates, rows, rows)]
        emulated.run(each, counters, stored)
        assert counters == places and stored == wanted


def test_the_assembly_has_the_registers_it_names() -> None:
    from sn_ops.triton import offer

    for pack in (1, 4):
        constraints = str(offer.offer_registers(pack)).split(",")
        named = {int(x) for x in re.findall(r"\$(\d+)", str(offer.offer_code(pack, 256)))}
        assert named == set(range(len(constraints))) and constraints[:pack] == ["=r"] * pack
