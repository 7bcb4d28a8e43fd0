"""Mutants of what the screening prepares of each row."""

from __future__ import annotations

from mutants.mutant import BACKENDS, EDGES, SCREEN, Mutant


def preparation() -> list[Mutant]:
    """Each gives some rows the facts of others, or none."""
    lengths, alone = (
        f"{BACKENDS}test_simt_facts.py::{test}"
        for test in (
            "test_rows_of_every_length",
            "test_a_row_out_of_range_is_alone_with_it",
        )
    )
    changes = [
        # name, old, new, why, test
        (
            "facts-stride-of-32-bits",
            "const T* gRow = side.rows + row * side.stride;",
            "const T* gRow = side.rows + static_cast<std::int32_t>(row * side.stride);",
            "rows 2^31 elements apart are looked for elsewhere", EDGES + "test_rows_that_32_bits_do_not_reach",
        ),
        (
            "facts-of-the-whole-warp",
            "for (int mask = lanes / 2; mask > 0; mask /= 2) {",
            "for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {",
            "short rows have the squares of all rows of their warp", lengths,
        ),
        (
            "facts-fit-together",
            "fits = (ballot(fits) | others) == ~0u && finite && screenable;",
            "fits = all_lanes(fits) && finite && screenable;",
            "a row out of range takes the bounds of its warp's other rows with it", alone,
        ),
        (
            "facts-last-warp-left-out",
            "const std::int64_t warps = divide_up(rows, std::int64_t{kWarpSize} >> facts.row_shift);",
            "const std::int64_t warps = rows / (std::int64_t{kWarpSize} >> facts.row_shift);",
            "the last rows have no facts, if they do not fill a warp", lengths,
        ),
    ]  # fmt: skip
    return [Mutant(name, SCREEN + "facts.cu", old, new, why, (test,)) for name, old, new, why, test in changes]
