"""The mutants: faults of the kind that a tired engineer makes, and the tests that notice each.

`tests/package/test_mutants.py` checks that each still applies and that its tests exist; `run.py` that they fail.
"""

from __future__ import annotations

from mutants.backward import backward
from mutants.cpu import cpu
from mutants.formulas import formulas
from mutants.mutant import (
    BACKENDS,
    BACKWARD,
    DIRECT,
    EDGES,
    FALLBACK,
    FENCES,
    LINE_FAR,
    LINE_GROUPS,
    LINE_SUPPORT,
    LINES,
    PATHS,
    RESCREEN,
    SCREEN,
    Mutant,
)
from mutants.partial_tiles import partial_tiles
from mutants.preparation import preparation
from mutants.selection import selection
from mutants.small import small
from mutants.square import square
from mutants.triton import triton
from mutants.triton_screening import triton_screening


def _fallback() -> list[Mutant]:
    """Queued rows in tiles: which rows share one, which candidates it sees, its sums, and what each row keeps."""
    search, order, tree = FALLBACK + "tile_search.cuh", FALLBACK + "order.cuh", FALLBACK + "slice_tree.cuh"
    numbers, neighbors = "test_numbers_of_queued_rows", "test_numbers_of_neighbors"
    within = "test_tiles_end_within_a_label"
    changes = [
        # name, file, old, new, why, test
        (
            "queue-rank-without-earlier-warps", order,
            "if (cut[c] && warp < warp_id()) rank += votes;", "if (cut[c] && warp < 0) rank += votes;",
            "rows of a bucket in different warps have one rank: some are served twice, some never", within,
        ),
        (
            "queue-cut-bucket-taken-whole", order,
            "if (cut[c]) inside = rank >= begin && rank < end;", "if (cut[c]) inside = rank >= begin;",
            "a bucket that a tile's end cuts gives it more rows than it has", within,
        ),
        (
            "tile-tree-of-equal-levels", tree,
            "if ((slice >> level & 1) != 0) {", "if ((slice >> level & 1) != 0 && level < 2) {",
            "slices of the second half of a section leave the first out", "test_dimensions",
        ),
        (
            "tile-total-without-its-last-section", tree,
            "if (slice >= kSectionSlices) add_plane(kLevels, rSums);",
            "if (slice > kSectionSlices) add_plane(kLevels, rSums);",
            "of the second section the first slice alone forgets the total", "test_dimensions",
        ),
        (
            "tile-list-of-other-lanes", search,
            "const std::uint64_t other = shuffle(rest, kWarpSize - 1 - lane_id());",
            "const std::uint64_t other = shuffle(rest, lane_id());",
            "two rising sequences are merged as if one fell", neighbors,
        ),
        (
            "tile-list-ends-with-its-first-part", search,
            "rest = merge_lanes(known < other ? other : known);", "rest = merge_lanes(known);",
            "what the first 32 places push out is lost", neighbors,
        ),
        (
            "tile-self-is-a-neighbor", search,
            "const bool present = candidate >= 0 && candidate != self;", "const bool present = candidate >= 0;",
            "a row is its own nearest neighbour", "test_schedules_and_strips",
        ),
        (
            "tile-null-rows-of-any-tile", search,
            "if (!is_null_row) sWords_.atomic_or(kNotNull, 1u);", "if (is_null_row) sWords_.atomic_or(kNeeds, 0u);",
            "null candidates count as at distance 0 of every row", "test_null_candidates_of_other_rows",
        ),
        (
            "tile-drops-positives", search,
            "const std::uint32_t votes = ballot(better || positive);", "const std::uint32_t votes = ballot(better);",
            "a far positive is dropped after its first slice", "test_a_positive_that_no_row_has_for_a_neighbor_stays",
        ),
        (
            "tile-closed-before-the-index", search,
            "return limit >= place; }", "return limit >= kInfiniteKey; }",
            "a tile ends as soon as its rows have bounds", numbers,
        ),
        (
            "tile-of-joined-segments-ends-early", search,
            "set_word(kEnd, place(next));", "set_word(kEnd, place(segment + 1));",
            "of several segments that a block joins it sees the first", "test_large_identities_in_clusters",
        ),
        (
            "merge-of-fixed-segments", FALLBACK + "merge.cu",
            "const std::int64_t segments = fallback_segments(args, queued);",
            "const std::int64_t segments = kFallbackSegments;",
            "lists of further segments are not joined", "test_larger_buffers_have_more_segments",
        ),
    ]  # fmt: skip
    return [
        Mutant(name, file, old, new, why, (BACKENDS + f"test_fallback.py::{test}",))
        for name, file, old, new, why, test in changes
    ]


def _tiles() -> list[Mutant]:
    """Tiles of scores: which pairs a warp serves, how it finds and writes its hits, when an operand may be read."""
    scores, epilogue, bank = SCREEN + "scores.cu", SCREEN + "epilogue.cuh", SCREEN + "bank.cu"
    once, strips = "test_each_pair_is_appended_once", "test_each_pair_of_strips_is_appended_once"
    beyond = "test_nothing_is_kept_for_rows_that_a_tile_has_beyond_the_matrix"
    changes = [
        # name, file, old, new, why, test
        (
            "diagonal-served-by-nobody", scores,
            "!kSymmetric || place.row <= place.column *", "!kSymmetric || place.row < place.column *",
            "rows of the diagonal's square blocks are not served", once,
        ),
        (
            "diagonal-served-twice", scores,
            "return kSymmetric && place.row < across", "return kSymmetric && place.row <= across",
            "columns of the diagonal's square blocks are served, too", once,
        ),
        (
            "staircase-of-equal-steps", scores,
            "while (id >= kAcross * (step + 1) && step + 1 < steps) id -= kAcross * ++step;",
            "while (id > kAcross * (step + 1) && step + 1 < steps) id -= kAcross * ++step;",
            "the last tile of a step is taken for the one below it", once,
        ),
        (
            "columns-of-other-strips-served", scores,
            "place.row < across && across < args.tile_rows;", "place.row < across;",
            "columns behind and before the strip's square are tested with thresholds of other calls", strips,
        ),
        (
            "circle-of-columns-one-too-long", scores,
            "return place < args.tile_columns ? place", "return place <= args.tile_columns ? place",
            "the first column of tiles is taken for one behind the last", strips,
        ),
        (
            "squares-begin-at-the-first-column", scores,
            "const std::uint32_t place = column + static_cast<std::uint32_t>(args.anchors.first / Tile::kColumns);",
            "const std::uint32_t place = column;",
            "the staircase of every strip lies where that of the first does", strips,
        ),
        (
            "tiles-below-a-staircase-of-odd-height", scores,
            "+ rows % Tile::kBlocksAcross * steps;", "+ rows % Tile::kBlocksAcross * (steps + 1);",
            "the last tile of a strip with an odd number of square blocks is not launched", strips,
        ),
        (
            "entries-of-columns-by-number-in-the-matrix", epilogue,
            "first_anchor = kRows ? row : column - args.anchors.first;", "first_anchor = kRows ? row : column;",
            "the buffer of a column is looked for as if the strip began with the first anchor", strips,
        ),
        (
            "counts-of-columns-by-number-in-the-matrix", epilogue,
            "row + i : column - args.anchors.first + (i - Tile::kWarpRows);",
            "row + i : column + (i - Tile::kWarpRows);",
            "the count of a column is looked for as if the strip began with the first anchor", strips,
        ),
        (
            "hits-of-columns-beyond-the-matrix", epilogue,
            "if (r >= rows_left || c >= columns_left) return false;", "if (r >= rows_left) return false;",
            "a product with NaN is kept for a column that has no buffer", EDGES + beyond,
        ),
        (
            "hits-of-rows-beyond-the-matrix", epilogue,
            "if (r >= rows_left || c >= columns_left) return false;", "if (c >= columns_left) return false;",
            "a product with NaN is kept for a row that has no buffer", EDGES + beyond,
        ),
        (
            "hits-of-the-first-words", epilogue,
            "const int bit = find_first(word) + (second ? 32 : 0) + w * 32;",
            "const int bit = find_first(word) + (second ? 32 : 0);",
            "hits of a lane's second half are taken for those of its first", once,
        ),
        (
            "entry-behind-the-buffer", epilogue,
            "if (place >= capacity) return true;", "if (place > capacity) return true;",
            "an entry too many is written behind a row's buffer", "test_however_the_work_is_cut",
        ),
        (
            "operands-before-they-arrive", scores,
            "        arrive();\n        load_depth(slot, 0);\n        multiply",
            "        load_depth(slot, 0);\n        multiply",
            "the next stage is read while its copies are under way", "test_however_the_work_is_cut",
        ),
        (
            "bank-last-stage-not-made", bank,
            "const bool converts = stage + 1 < score.stages;", "const bool converts = stage + 2 < score.stages;",
            "the last stage multiplies an old copy of the candidates", "test_tiles_of_a_bank",
        ),
        (
            "bank-half-tile-of-too-many", bank,
            "return request.rows <= BankHalfTile::kRows\n", "return request.rows <= BankHalfTile::kRows + 1\n",
            "the last of 129 anchors is left to the fallback", "test_a_bank_is_certified_as_it_is_read",
        ),
        (
            "bank-forgets-infinity", bank,
            "if (!is_finite(rValues[i / 4].elements[i % 4])) sums.flags |= 1u << q;",
            "if (!is_finite(rMeans[i / 4].elements[i % 4])) sums.flags |= 1u << q;",
            "a value of the bank that is not finite is not reported", "test_tiles_of_a_bank",
        ),
    ]  # fmt: skip
    return [
        Mutant(name, file, old, new, why, (test if "::" in test else PATHS + test,))
        for name, file, old, new, why, test in changes
    ]


MUTANTS: tuple[Mutant, ...] = (
    *formulas(),
    # ---- bounds, as the paths use them
    Mutant(
        "support-threshold-without-rho",
        SCREEN + "thresholds.cu",
        ", facts.n, facts.rho, args.eta);",
        ", facts.n, 0.0f, args.eta);",
        "the anchor's residual is forgotten",
        LINE_SUPPORT,
    ),
    Mutant(
        "far-threshold-without-rho",
        SCREEN + "far_thresholds.cu",
        ", facts.n, facts.rho, args.eta);",
        ", facts.n, 0.0f, args.eta);",
        "the anchor's residual is forgotten",
        LINE_FAR,
    ),
    Mutant(
        "refined-without-rho",
        SCREEN + "refine.cu",
        "lower_bound(args, facts, entry) <= reach;",
        "lower_bound(args, facts, entry) + facts.rho <= reach;",
        "candidates are ruled out as if the anchor's copy were exact",
        LINE_SUPPORT,
    ),
    Mutant(
        "support-test-without-rho",
        SCREEN + "epilogue.cuh",
        "if constexpr (kHasRho) {",
        "if constexpr (kHasRho && false) {",
        "the candidate's residual is forgotten",
        LINE_SUPPORT,
    ),
    Mutant(
        "bank-residuals-of-half-a-row",
        SCREEN + "bank.cu",
        "sums.rRests[q] = add(sums.rRests[q], shuffle_xor(sums.rRests[q], mask));",
        "if (mask < kRowChunks / 2) sums.rRests[q] = add(sums.rRests[q], shuffle_xor(sums.rRests[q], mask));",
        "residuals are summed over 4 of 8 lanes",
        LINE_SUPPORT,
    ),
    Mutant(
        "groups-forget-the-anchor",
        SCREEN + "thresholds.cu",
        "+ (with_self ? 1u : 0u);",
        "+ (with_self ? 0u : 0u);",
        "the group that holds the anchor itself is counted among the K",
        LINE_GROUPS,
    ),
    Mutant(
        "groups-with-the-rho-of-another",
        SCREEN + "epilogue.cuh",
        "rRho[e / 2] = less ? rPair.elements[e % 2 * 2 + 1] : rRho[e / 2];",
        "rRho[e / 2] = rPair.elements[e % 2 * 2 + 1];",
        "a group's least bound goes with the residual of its last member",
        LINE_GROUPS,
    ),
    Mutant(
        "kth-is-the-one-before",
        SCREEN + "kth_smallest.cuh",
        "if (within == k) {",
        "if (within + 1 == k) {",
        "the threshold is that of K - 1 neighbours",
        (*LINE_GROUPS, PATHS + "test_large_batch_takes_the_screening"),
    ),
    Mutant(
        "null-rows-one-too-few",
        SCREEN + "thresholds.cu",
        "popcount(nulls & lanes_below()) == args.K;",
        "popcount(nulls & lanes_below()) == args.K - 1;",
        "K null rows are kept, of which one may be the anchor",
        (LINES + "test_null_rows_beside_the_anchor",),
    ),
    Mutant(
        "sample-padded-with-candidates",
        SCREEN + "scores.cu",
        "memory.set(kBias, i, facts.matrix_row >= 0 ? far_bias(facts.norm, facts.rho, args.eta) : kInfinity);",
        "memory.set(kBias, i, far_bias(facts.norm, facts.rho, args.eta));",
        "what pads the last tile of a sample counts as a candidate",
        (LINES + "test_what_pads_a_sample_is_no_candidate",),
    ),
    Mutant(
        "bank-sample-padded-with-candidates",
        SCREEN + "bank.cu",
        "memory.set(kBias, Tile::kRows + row, exists ? far_bias(norm, rho, score.eta) : kInfinity);",
        "memory.set(kBias, Tile::kRows + row, far_bias(norm, rho, score.eta));",
        "what pads the last tile of a sample counts as a candidate",
        (LINES + "test_what_pads_a_sample_is_no_candidate",),
    ),
    Mutant(
        "far-test-without-rho",
        SCREEN + "epilogue.cuh",
        "fused_multiply_add(load(args.thresholds.g2 + anchor), rho, fused_multiply_add(-2.0f, product, bias));",
        "fused_multiply_add(0.0f, rho, fused_multiply_add(-2.0f, product, bias));",
        "the candidate's residual is forgotten",
        LINE_FAR,
    ),
    # ---- selection
    Mutant(
        "self-index-of-M",
        "csrc/cuda/loss.cuh",
        "return self >= 0 && self < args.candidates.rows ? self : -1;",
        "return self >= 0 && self <= args.candidates.rows ? self : -1;",
        "an index of exactly M is taken for a candidate, whose label is read out of bounds",
        (EDGES + "test_a_self_index_that_is_no_candidate_means_none",),
    ),
    Mutant(
        "strips-forget-nan",
        DIRECT + "select.cu",
        "if (poison) args.gControl->nonfinite = 1;",
        "if (poison) args.gControl->nonfinite = 0;",
        "NaN of an early strip is not handed to the last",
        (EDGES + "test_strips_hand_on_that_something_is_not_finite",),
    ),
    Mutant(
        "first-strip-forgets-nan",
        DIRECT + "select.cu",
        "std::uint32_t rFlag = args.gControl->nonfinite;",
        "std::uint32_t rFlag = 0;",
        "the last strip does not look at what the earlier ones found",
        (EDGES + "test_strips_hand_on_that_something_is_not_finite",),
    ),
    Mutant(
        "positives-list-too-short",
        SCREEN + "positives.cu",
        "if (place < kPositiveEntries) {",
        "if (place < kListedPositives) {",
        "an identity of 129 images, one of them the anchor, does not fit",
        (EDGES + "test_identities_as_large_as_the_list_of_positives",),
    ),
    Mutant(
        "positives-grid-rounded-down",
        SCREEN + "positives.cu",
        "const LaunchShape shape{divide_up(args.anchors.rows, anchors) * segments,",
        "const LaunchShape shape{args.anchors.rows / anchors * segments,",
        "the last anchors of many have no positives",
        (EDGES + "test_many_anchors_of_a_small_bank",),
    ),
    Mutant(
        "positives-segments-without-the-rest",
        SCREEN + "positives.cu",
        "const std::int64_t end = (segment + 1) * M / args.segments;",
        "const std::int64_t end = begin + M / args.segments;",
        "candidates between two segments are nobody's",
        (EDGES + "test_identities_as_large_as_the_list_of_positives",),
    ),
    Mutant(
        "positives-by-hash-alone",
        SCREEN + "positives.cu",
        "if (sLabels.get(leader) == label) return leader;",
        "return leader;",
        "a label that is no anchor's is taken for the one in its slot",
        (EDGES + "test_labels_that_meet_in_the_table",),
    ),
    Mutant(
        "positives-leaders-lose-slots",
        SCREEN + "positives.cu",
        "round << kRoundShift | (thread_id() + e * kThreads)",
        "(round & 0) << kRoundShift | (thread_id() + e * kThreads)",
        "a label of a later round takes the slot of one that leads already",
        (EDGES + "test_labels_that_meet_in_the_table",),
    ),
    Mutant(
        "strip-without-offset",
        DIRECT + "tiles.cu",
        ".anchors = rows_of<T>(args.anchors, strip.begin, strip.rows),",
        ".anchors = rows_of<T>(args.anchors, 0, strip.rows),",
        "every strip sums the anchors of the first",
        (PATHS + "test_however_the_work_is_cut",),
    ),
    Mutant(
        "key-that-ties-with-the-bound",
        SCREEN + "nearest.cuh",
        "const bool kept = !kBounded || d2 <= bound;",
        "const bool kept = !kBounded || d2 < bound;",
        "a key that ties with the last of the K is abandoned, whatever its index",
        (EDGES + "test_ties_in_the_fallback", BACKENDS + "test_fallback.py::test_ties_and_signs_of_zero"),
    ),
    Mutant(
        "dense-sums-whole-clusters",
        SCREEN + "refine.cu",
        "if ((args.rescreen || args.dense) && phase",
        "if (args.rescreen && phase",
        "rows of dense scores sum every member of their cluster",
        (RESCREEN + "test_rows_of_dense_scores_are_left_to_the_fallback",),
    ),
    # ---- order of memory
    Mutant(
        "merge-fence-before-ticket",
        FALLBACK + "merge.cu",
        "  fence_device();\n  sync_block();\n",
        "  sync_block();\n",
        "the ticket may be seen before the records",
        FENCES,
        (),
    ),
    Mutant(
        "merge-fence-of-the-last",
        FALLBACK + "merge.cu",
        "  if (sWord.get(0) == 0) return;\n  fence_device();\n",
        "  if (sWord.get(0) == 0) return;\n",
        "the last block may read records of before",
        FENCES,
        (),
    ),
    Mutant(
        "reduce-fence-before-ticket",
        DIRECT + "reduce.cu",
        "  fence_device();\n  sync_block();\n",
        "  sync_block();\n",
        "the ticket may be seen before the partial sums",
        FENCES,
        (),
    ),
    Mutant(
        "reduce-fence-of-the-last",
        DIRECT + "reduce.cu",
        "  if (sLast.get(0) == 0) return;\n  fence_device();\n",
        "  if (sLast.get(0) == 0) return;\n",
        "the last block may read partial sums of before",
        FENCES,
        (),
    ),
    Mutant(
        "ticket-not-given-back",
        DIRECT + "select.cu",
        "    args.gControl->ticket = 0;\n",
        "",
        "the blocks behind count from where the selection ended, and nobody is last",
        (BACKENDS + "test_simt_reduction.py::test_sums_by_their_definition",),
    ),
    Mutant(
        "partial-rounded-down",
        "csrc/cuda/loss.cuh",
        "partial < N ? (N - partial + kPartials - 1) / kPartials : 0;",
        "partial < N ? (N - partial) / kPartials : 0;",
        "a partial sum lacks its last record",
        (BACKENDS + "test_simt_reduction.py::test_sums_by_their_definition",),
    ),
    Mutant(
        "queued-row-of-another-partial",
        FALLBACK + "merge.cu",
        "if ((args.row_begin + (entry >> kNeedBits)) % kPartials != block_id()) continue;",
        "if ((entry >> kNeedBits) % kPartials != block_id()) continue;",
        "in later strips a block sums records that another one writes",
        (BACKENDS + "test_simt_reduction.py::test_queued_rows_are_summed_as_well",),
    ),
    Mutant(
        "select-fence-before-ticket",
        DIRECT + "select.cu",
        "    fence_device();\n    const std::uint32_t before",
        "    const std::uint32_t before",
        "the ticket may be seen before the records",
        FENCES,
        (),
    ),
    Mutant(
        "select-fence-of-the-last",
        DIRECT + "select.cu",
        "  if (sLast.get(0) == 0) return;\n  fence_device();\n",
        "  if (sLast.get(0) == 0) return;\n",
        "the last block may read records of before",
        FENCES,
        (),
    ),
    # ---- backward, and offsets of rows
    Mutant(
        "bank-stride-of-32-bits",
        SCREEN + "bank.cu",
        "number * args.score.candidates.step * args.candidate_stride + begin;",
        "static_cast<std::int32_t>(number * args.score.candidates.step * args.candidate_stride) + begin;",
        "rows 2^31 elements apart are looked for elsewhere",
        (EDGES + "test_rows_that_32_bits_do_not_reach",),
    ),
    Mutant(
        "zero-times-infinity",
        BACKWARD + "graph.cuh",
        "  if (coefficient == Acc(0)) return Acc(0);\n",
        "",
        "a coefficient of 0 times an upstream of Inf or NaN is NaN",
        ("tests/loss/test_nonfinite.py::test_edges_without_a_coefficient_stay_without_a_gradient",),
    ),
    *backward(),
    Mutant(
        "second-refinement-forgets-the-frame",
        SCREEN + "certificate.cuh",
        "return bits_of(upper_bound(args, facts, fetched.entry, fetched.n, fetched.rho));",
        "return bits_of(distance_upper(facts.n, facts.rho, fetched.n, fetched.rho, fetched.entry.score, args.eta));",
        "squares of the second screening are taken for scores of the first",
        (RESCREEN + "test_the_second_refinement_sums_few_of_many_entries",),
    ),
    Mutant(
        "minus-zero-is-another-point",
        "csrc/cuda/rescreen/rescore.cu",
        "differs = differs || value(i) != other.value(i);",
        "differs = differs || bits_of(value(i)) != bits_of(other.value(i));",
        "rows of +0 and -0 are not cut by their index",
        (PATHS + "test_rows_of_zeros_tie_by_thousands",),
    ),
    Mutant(
        "groups-of-any-leader",
        "csrc/cuda/rescreen/groups.cu",
        "if (leader == kNoLeader || sOwners.get(bucket_of(leader)) != leader) {",
        "if (leader == kNoLeader) {",
        "rows whose bucket belongs to another leader are screened from that one, in places of other rows",
        (RESCREEN + "test_small_groups_take_no_places_of_others",),
    ),
    *_tiles(),
    *partial_tiles(),
    *_fallback(),
    *preparation(),
    *selection(),
    *small(),
    *square(),
    *triton(),
    *triton_screening(),
    *cpu(),
)
