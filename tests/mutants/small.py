"""Mutants of small batches in one launch: quads, chunks, slices, groups, tickets, the life of shared memory."""

from __future__ import annotations

from mutants.mutant import BACKENDS, DIRECT, FENCES, Mutant

TESTS = BACKENDS + "test_simt_small.py::"


def small() -> list[Mutant]:
    """Each changes one edge of `small.cu`."""
    file, shared = DIRECT + "small.cu", DIRECT + "one_launch.cuh"
    rows, dims = TESTS + "test_rows_around_quads_and_groups", TESTS + "test_dimensions_around_chunks_and_sections"
    neighbours = TESTS + "test_neighbours_extracted_and_sorted"
    poison = TESTS + "test_a_value_that_is_not_finite_poisons_all"
    changes = [
        # name, old, new, why, test
        (
            "small-last-of-a-quad-forgotten",
            "if (quad * kQuad + i < anchors) {",
            "if (quad * kQuad + i + 1 < anchors) {",
            "the last anchor of a group has no sums",
            rows,
        ),
        (
            "small-barrier-orders-nothing",
            "    sync_cluster();\n  } else {",
            "    arrive_cluster_relaxed();\n    wait_cluster();\n  } else {",
            "sums of other blocks are read behind a barrier that orders no memory",
            rows,
        ),
        (
            "small-block-leaves-early",
            "  if constexpr (kCluster) wait_cluster();",
            "  if (kCluster && sFlags.get(2) != 0) wait_cluster();",
            "shared memory is gone while another block may read it",
            rows,
        ),
    ]
    shared_changes = [
        (
            "small-slices-of-one-block",
            "const int place = (slice++ >> shift) * plane + at;", "const int place = at; ++slice;",
            "the second slice of a block is read as its first", dims,
        ),
        (
            "small-chunks-in-another-tree",
            "A sum = add(chunk(0, at), chunk(1, at));\n      if (args_.chunks == 4) "
            "sum = add(sum, add(chunk(2, at), chunk(3, at)));",
            "A sum = add(chunk(0, at), chunk(1, at));\n      if (args_.chunks == 4) "
            "sum = add(add(sum, chunk(2, at)), chunk(3, at));",
            "chunks are added one after the other: other bits", dims,
        ),
        (
            "small-chunk-behind-the-end",
            "while (present < args_.chunks && begin_of(own_slice, present) < args_.forward.dims) ++present;",
            "present = args_.chunks;",
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
            "small-ticket-not-left-at-zero",
            "    if (last) atomic_store(gTicket, 0u);\n", "",
            "the next launch on the stream finds a block that has finished", rows,
        ),
        (
            "small-poison-stays",
            "atomic_store(gTicket, 0u);", "atomic_store(gTicket, taken / kPoisoned * kPoisoned);",
            "the next launch on the stream is poisoned, too", poison,
        ),
        (
            "small-poison-of-a-group-forgotten",
            "    if (last && poisoned(taken)) sNonfinite.set(0, 1u);\n", "",
            "what a block without the last ticket saw is not told", poison,
        ),
        (
            "small-poison-of-a-block-forgotten",
            "nonfinite ? kPoisoned + 1u : 1u;", "1u;",
            "a block's ticket does not say what it saw", poison,
        ),
    ]  # fmt: skip
    found = [
        Mutant(name, where, old, new, why, (test,))
        for where, listed in ((file, changes), (shared, shared_changes))
        for name, old, new, why, test in listed
    ]
    ticket = "const std::uint32_t taken = atomic_add_acq_rel(gTicket"
    return [
        *found,
        Mutant(
            "small-ticket-releases-nothing", shared, ticket, ticket.replace("_acq_rel", ""),
            "the last block may not see what this one wrote", FENCES, (),
        ),
        Mutant(
            "small-barrier-before-the-ticket", shared,
            "  sync_block();\n  if (thread_id() == 0) {\n    const std::uint32_t mine",
            "  if (thread_id() == 0) {\n    const std::uint32_t mine",
            "what other threads of a block wrote is not released", FENCES, (),
        ),
        Mutant(
            "extracted-key-stays", DIRECT + "select.cuh", "if (rCodes[i] == first) rBits[i] = kNone;",
            "if (rCodes[i] < first) rBits[i] = kNone;",
            "a neighbour is taken again, on both paths alike", (TESTS + "test_more_ties_than_a_list_holds",),
        ),
        Mutant(
            "bound-of-one-neighbour-less", DIRECT + "select.cuh",
            "< K && least != kNone;", "< K - 1 && least != kNone;",
            "the list lacks the last neighbour, on both paths alike", (TESTS + "test_options",),
        ),
        Mutant(
            "ranks-among-the-first-entries", DIRECT + "select.cuh",
            "first < listed; first += kTogether", "first + kTogether < listed; first += kTogether",
            "an entry's place does not count the last ones of the list", (TESTS + "test_options",),
        ),
        Mutant(
            "negatives-as-near-as-positives", "csrc/sn_math.h", "negative_mass : negative_mass * q;",
            "negative_mass : negative_mass;", "a side that is farther weighs as if it were as near",
            (TESTS + "test_options",),
        ),
        Mutant(
            "sums-of-other-warps", "csrc/cuda/loss.cuh", "i < half; ++i) rParts[i] = add(rParts[i], rParts[i + half]);",
            "i < half; ++i) rParts[i] = add(rParts[2 * i], rParts[2 * i + 1]);",
            "partial sums meet in another tree: other bits",
            (BACKENDS + "test_simt_reduction.py::test_sums_by_their_definition",),
        ),
    ]  # fmt: skip
