"""Mutants of small batches in one launch: quads, chunks, slices, groups, tickets, the life of shared memory."""

from __future__ import annotations

from mutants.mutant import BACKENDS, DIRECT, FENCES, Mutant

TESTS = BACKENDS + "test_simt_small.py::"


def small() -> list[Mutant]:
    """Each changes one edge of `small.cu`."""
    file = DIRECT + "small.cu"
    rows, dims = TESTS + "test_rows_around_quads_and_groups", TESTS + "test_dimensions_around_chunks_and_sections"
    neighbours = TESTS + "test_neighbours_extracted_and_sorted"
    poison = TESTS + "test_a_value_that_is_not_finite_poisons_all"
    changes = [
        # name, old, new, why, test
        (
            "small-last-of-a-quad-forgotten",
            "if (quad * kQuad + i < args.anchors) {", "if (quad * kQuad + i + 1 < args.anchors) {",
            "the last anchor of a group has no sums", rows,
        ),
        (
            "small-slices-of-one-block",
            "const int place = (slice++ >> shift) * plane + at;", "const int place = at; ++slice;",
            "the second slice of a block is read as its first", dims,
        ),
        (
            "small-chunks-in-another-tree",
            "A sum = add(chunk(0, at), chunk(1, at));\n      if (args.chunks == 4) "
            "sum = add(sum, add(chunk(2, at), chunk(3, at)));",
            "A sum = add(chunk(0, at), chunk(1, at));\n      if (args.chunks == 4) "
            "sum = add(add(sum, chunk(2, at)), chunk(3, at));",
            "chunks are added one after the other: other bits", dims,
        ),
        (
            "small-chunk-behind-the-end",
            "while (present < args.chunks && begin_of(own_slice, present) < args.forward.dims) ++present;",
            "present = args.chunks;",
            "a slice that is not full adds what an earlier one left", dims,
        ),
        (
            "small-buffer-filled-while-it-is-read",
            "copy_round(round + kAhead);", "copy_round(round + kAhead - 1);",
            "rows of the next round come where they are waited for, or not at all", dims,
        ),
        (
            "small-last-candidate-not-sorted",
            "sort_keys(WarpTeam(), sKeys, M);", "sort_keys(WarpTeam(), sKeys, M - 1);",
            "the last candidate of a row is no neighbour where rows are sorted", neighbours,
        ),
        (
            "small-barrier-orders-nothing",
            "    sync_cluster();\n  } else {", "    arrive_cluster_relaxed();\n    wait_cluster();\n  } else {",
            "sums of other blocks are read behind a barrier that orders no memory", rows,
        ),
        (
            "small-block-leaves-early",
            "  if constexpr (kCluster) wait_cluster();", "  if (kCluster && sFlags.get(2) != 0) wait_cluster();",
            "shared memory is gone while another block may read it", rows,
        ),
        (
            "small-ticket-not-left-at-zero",
            "if (thread_id() == 0) atomic_store(gTicket, 0u);", "if (thread_id() == 32) atomic_store(gTicket, 1u);",
            "the next launch on the stream finds a block that has finished", rows,
        ),
        (
            "small-poison-stays",
            "if (thread_id() == 0) atomic_store(&gSlot->nonfinite, 0u);", "",
            "the next launch on the stream is poisoned, too", poison,
        ),
        (
            "small-poison-of-a-group-forgotten",
            "if (thread_id() == 0 && sFlags.get(0) != 0) atomic_or(&gSlot->nonfinite, 1u);\n"
            "    if (!take_last_ticket(",
            "if (!take_last_ticket(",
            "what a block without the last ticket of its group saw is not told", poison,
        ),
    ]  # fmt: skip
    found = [Mutant(name, file, old, new, why, (test,)) for name, old, new, why, test in changes]
    fence = "    fence_device();\n    sLast.set(0, atomic_add(gTicket"
    return [
        *found,
        Mutant(
            "small-fence-before-the-ticket", file, fence, fence.replace("    fence_device();\n", ""),
            "the last block may not see what this one wrote", FENCES, (),
        ),
    ]  # fmt: skip
