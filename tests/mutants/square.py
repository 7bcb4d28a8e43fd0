"""Mutants of small batches of which each pair is summed once: items, rings, both places of a distance, tickets."""

from __future__ import annotations

from mutants.mutant import BACKENDS, DIRECT, Mutant

TESTS = BACKENDS + "test_simt_square.py::"


def square() -> list[Mutant]:
    """Each changes one edge of `square.cu`, or of the table of its items."""
    file, sizes = DIRECT + "square.cu", "csrc/cuda/plan/sizes_small.h"
    rows, dims = TESTS + "test_rows_around_sides_and_clusters", TESTS + "test_dimensions_around_chunks_and_sections"
    schedules, poison = TESTS + "test_schedules_do_not_show", TESTS + "test_a_value_that_is_not_finite_poisons_all"
    changes = [
        # name, file, old, new, why, test
        (
            "square-mirror-not-written", file,
            "    atomic_store(square.gDistances + j * square.pitch + i, d2);\n", "",
            "the other row of a pair does not get its distance", rows,
        ),
        (
            "square-ring-one-short", file,
            "return (lane + 1 + part * kRows + i) % kSide;", "return (lane + part * kRows + i) % kSide;",
            "each row meets itself, and its opposite not at all", rows,
        ),
        (
            "square-an-item-counted-twice", file,
            "const int first = cluster * square.items;",
            "const int first = cluster * square.items - (cluster > 0 ? 1 : 0);",
            "clusters overlap by an item, and the last one is left out", rows,
        ),
        (
            "square-rows-of-another-side", file,
            "for (int before = row / kSide; before > 0; --before) left &= left - 1;", "",
            "all rows of a buffer are those of its first side", rows,
        ),
        (
            "square-a-tile-without-its-last-part", sizes,
            "for (int part = first; part < last; ++part) {", "for (int part = first; part < last - 1; ++part) {",
            "eight anchors of each tile have no distances to it", rows,
        ),
        (
            "square-the-first-cluster-finishes", file,
            "(last ? kLast : 0u)", "(taken % kPoisoned == 1u ? kLast : 0u)",
            "a cluster finishes anchors before all distances are there", schedules,
        ),
        (
            "square-poison-of-another-block-forgotten", file,
            "lane_id() < args.blocks && sFlags.get_remote(0, lane_id()) != 0);", "sFlags.get(0) != 0);",
            "what a block but the first saw is not told", poison,
        ),
        (
            "square-poison-of-another-cluster-forgotten", file,
            "(poisoned(taken) ? kNonfinite : 0u)", "(nonfinite ? kNonfinite : 0u)",
            "what a cluster without the last ticket saw is not told", poison,
        ),
        (
            "square-first-block-leaves-early", file,
            "    wait_cluster();  // others", "    if (rank != 0) wait_cluster();  // others",
            "shared memory is gone while another block may read it", rows,
        ),
        (
            "square-slices-of-another-block", file,
            "const SliceSums<SquarePairs<T>, kSquareWarps> sums(args, pairs, rank);",
            "const SliceSums<SquarePairs<T>, kSquareWarps> sums(args, pairs, rank ^ 1);",
            "blocks are read in the place of their neighbours", dims,
        ),
    ]  # fmt: skip
    return [Mutant(name, where, old, new, why, (test,)) for name, where, old, new, why, test in changes]
