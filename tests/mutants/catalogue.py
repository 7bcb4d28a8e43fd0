"""The mutants: faults of the kind that a tired engineer makes, and the tests that notice each.

`tests/package/test_mutants.py` checks that each still applies and that its tests exist; `run.py` that they fail.
"""

from __future__ import annotations

from dataclasses import dataclass

LIBRARY = ("sn_simt",)
BOUNDS = ("sn_simt_bounds",)


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    name: str
    file: str
    """Below the root of the tree."""
    old: str
    """Text that the file has exactly once."""
    new: str
    why: str
    """What is wrong with it."""
    killers: tuple[str, ...]
    """What pytest is given: at least one of these tests must fail."""
    builds: tuple[str, ...] = LIBRARY
    """Targets of CMake that these tests load; none: they read the sources."""


BACKENDS, PACKAGE = "tests/backends/", "tests/package/"
FORMULAS = BACKENDS + "test_cuda_bounds.py::"
LINES = BACKENDS + "test_simt_bounds.py::"
EDGES = BACKENDS + "test_simt_edges.py::"
PATHS = BACKENDS + "test_simt.py::"
LINE_SUPPORT = (LINES + "test_support_of_rows_on_a_line", LINES + "test_support_among_a_bank_on_a_line")
LINE_FAR = (LINES + "test_farthest_of_a_large_identity_on_a_line",)
LINE_GROUPS = (
    LINES + "test_a_group_has_its_own_residual_and_may_be_the_anchors",
    LINES + "test_thresholds_of_groups_on_a_line",
)
FENCES = (PACKAGE + "test_tickets.py::test_every_ticket_has_its_fences",)
SCREEN, DIRECT, BACKWARD = "csrc/cuda/screen/", "csrc/cuda/direct/", "csrc/cuda/backward/"


def _formulas() -> list[Mutant]:
    """One operation of a formula rounds to the wrong side, or a term of it is missing."""
    bound, certificate, args = SCREEN + "bound.cuh", SCREEN + "certificate.cuh", SCREEN + "args.cuh"
    constants = "test_constants_and_certificates"
    changes = [
        # name, file, old, new, why, test
        (
            "lower-square-up", bound,
            "const float square = add_down(add_down(n_i, score),",
            "const float square = add_down(add_up(n_i, score),",
            "a lower bound whose first sum is rounded up", "test_distances",
        ),
        (
            "lower-root-up", bound,
            "add_down(sqrt_down(square > 0.0f ? square : 0.0f), -add_up(rho_i, rho_j));",
            "add_down(sqrt_up(square > 0.0f ? square : 0.0f), -add_up(rho_i, rho_j));",
            "a lower bound whose root is rounded up", "test_distances",
        ),
        (
            "upper-error-missing", bound,
            "const float square = fma_up(eta, add_up(n_i, n_j), add_up(n_i, score));",
            "const float square = fma_up(eta, n_j, add_up(n_i, score));",
            "the error of a score without the anchor's norm", "test_distances",
        ),
        (
            "support-T-down", bound,
            "const float T = add_up(multiply_up(t, t), -least);",
            "const float T = add_down(multiply_up(t, t), -least);",
            "the support threshold rounded down", "test_thresholds_of_the_support",
        ),
        (
            "support-least-up", bound,
            "const float least = multiply_down(n_i, add_down(1.0f, -eta));",
            "const float least = multiply_up(n_i, add_down(1.0f, -eta));",
            "what is subtracted from the support threshold rounded up", "test_thresholds_of_the_support",
        ),
        (
            "support-bias-up", bound,
            "return add_down(multiply_down(n_j, add_down(1.0f, -eta)), -multiply_up(rho, rho));",
            "return add_up(multiply_down(n_j, add_down(1.0f, -eta)), -multiply_up(rho, rho));",
            "the candidate's side of the support test rounded up", "test_thresholds_of_the_support",
        ),
        (
            "support-t-without-rho",
            bound,
            "const float t = add_up(reach, rho_i);",
            "const float t = reach; static_cast<void>(rho_i);",
            "the anchor's residual is forgotten",
            "test_thresholds_of_the_support",
        ),
        (
            "far-g-without-rho",
            bound,
            "const float g = add_down(reach, -rho_i);",
            "const float g = reach; static_cast<void>(rho_i);",
            "the anchor's residual is forgotten",
            "test_thresholds_of_the_farthest",
        ),
        (
            "group-square-down", bound,
            "const float square = add_up(most, q);", "const float square = add_down(most, q);",
            "the bound of a group rounded down", "test_groups",
        ),
        (
            "rho-margin-missing", bound,
            "inline constexpr float kRhoMargin = 1.0f + 0x1p-20f;", "inline constexpr float kRhoMargin = 1.0f;",
            "no margin for the roundings of evaluating the test", "test_thresholds_of_the_support",
        ),
        (
            "far-G-up", bound,
            "const float G = add_down(multiply_down(g, g), -most);",
            "const float G = add_down(multiply_up(g, g), -most);",
            "the far threshold rounded up", "test_thresholds_of_the_farthest",
        ),
        (
            "far-bias-sign", bound,
            "return rho_j < kInfinity ? multiply_up(n_j, add_up(1.0f, eta)) : kInfinity;",
            "return rho_j < kInfinity ? multiply_up(n_j, add_up(1.0f, -eta)) : kInfinity;",
            "the error of a score with the wrong sign in the far test", "test_thresholds_of_the_farthest",
        ),
        (
            "residual-of-centring-missing", bound,
            "return add_up(fma_up(0x1p-23f, sqrt_up(squares), multiply_up(row_slack, sqrt_up(rests))), 0x1p-60f);",
            "return add_up(multiply_up(row_slack, sqrt_up(rests)), 0x1p-60f); static_cast<void>(squares);",
            "what centring rounds is not in rho", "test_residuals",
        ),
        (
            "residual-slack-missing", bound,
            "multiply_up(row_slack, sqrt_up(rests))", "sqrt_up(rests)",
            "the roundings of the residual's own sum are not in rho", "test_residuals",
        ),
        (
            "stretch-missing", args, ".stretch = up(1.0 + 2.0 * gamma),", ".stretch = 1.0f,",
            "a key is taken for the exact square of a distance", constants,
        ),
        (
            "shrink-up", args, ".shrink = down(1.0 - 2.0 * gamma),", ".shrink = up(1.0 + 2.0 * gamma),",
            "gamma with the wrong sign", constants,
        ),
        (
            "gamma-without-the-chunk", args,
            "(64.0 + 5.0 + sections + 4.0) * 0x1p-24", "(5.0 + sections + 4.0) * 0x1p-24",
            "the 64 roundings inside a chunk are forgotten", constants,
        ),
        (
            "underflow-in-wrong-units", certificate,
            "return fma_up(U, args.stretch, multiply_up(args.underflow_distance, facts.scale));",
            "return fma_up(U, args.stretch, multiply_up(args.underflow_distance, facts.unscale));",
            "what underflows is converted from the units that it should be converted to", constants,
        ),
        (
            "largest-key-down", certificate,
            "return fma_up(multiply_up(distance, args.stretch), distance, args.underflow_key);",
            "return fma_up(distance, distance, args.underflow_key);",
            "the largest key of a distance is taken for its square", constants,
        ),
        (
            "eta-without-norms", "csrc/cuda/plan/sizes.h",
            "(1.25 * dims + dims / 32.0 + 32.0) * 0x1p-23", "(1.25 * dims) * 0x1p-23",
            "the errors of the norms and of evaluating a bound are forgotten", constants,
        ),
    ]  # fmt: skip
    return [Mutant(n, f, old, new, why, (FORMULAS + test,), BOUNDS) for n, f, old, new, why, test in changes]


def _tiles() -> list[Mutant]:
    """Tiles of scores: which pairs a warp serves, how it finds and writes its hits, when an operand may be read."""
    scores, epilogue, bank = SCREEN + "scores.cu", SCREEN + "epilogue.cuh", SCREEN + "bank.cu"
    once = "test_each_pair_is_appended_once"
    changes = [
        # name, file, old, new, why, test
        (
            "diagonal-served-by-nobody", scores,
            "!kSymmetric || place.row <= place.column *", "!kSymmetric || place.row < place.column *",
            "rows of the diagonal's square blocks are not served", once,
        ),
        (
            "diagonal-served-twice", scores,
            "return kSymmetric && place.row < place.column *", "return kSymmetric && place.row <= place.column *",
            "columns of the diagonal's square blocks are served, too", once,
        ),
        (
            "staircase-of-equal-steps", scores,
            "while (id >= kAcross * (step + 1) && step + 1 < steps) id -= kAcross * ++step;",
            "while (id > kAcross * (step + 1) && step + 1 < steps) id -= kAcross * ++step;",
            "the last tile of a step is taken for the one below it", once,
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
            "bank-forgets-infinity", bank,
            "if (!is_finite(rValues[i / 4].elements[i % 4])) sums.flags |= 1u << q;",
            "if (!is_finite(rMeans[i / 4].elements[i % 4])) sums.flags |= 1u << q;",
            "a value of the bank that is not finite is not reported", "test_tiles_of_a_bank",
        ),
    ]  # fmt: skip
    return [Mutant(name, file, old, new, why, (PATHS + test,)) for name, file, old, new, why, test in changes]


MUTANTS: tuple[Mutant, ...] = (
    *_formulas(),
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
        (EDGES + "test_ties_in_the_fallback",),
    ),
    # ---- order of memory
    Mutant(
        "merge-fence-before-ticket",
        SCREEN + "merge.cu",
        "  fence_device();\n  sync_block();\n",
        "  sync_block();\n",
        "the ticket may be seen before the records",
        FENCES,
        (),
    ),
    Mutant(
        "merge-fence-of-the-last",
        SCREEN + "merge.cu",
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
        SCREEN + "merge.cu",
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
    # ---- backward
    Mutant(
        "gather-stride-of-32-bits",
        BACKWARD + "rows.cuh",
        "other + list.sources.get(edge) * stride",
        "other + list.sources.get(edge) * static_cast<std::int32_t>(stride)",
        "rows 2^31 elements apart are looked for elsewhere",
        (EDGES + "test_rows_that_32_bits_do_not_reach",),
    ),
    Mutant(
        "gather-own-row-of-32-bits",
        BACKWARD + "gather.cu",
        "\n    gather_list(strip, args.row_shift, list, count, gOwn + std::int64_t{target} * side.own_stride, gOther,",
        "\n    const auto stride = static_cast<std::uint32_t>(side.own_stride);"
        "\n    gather_list(strip, args.row_shift, list, count, gOwn + target * stride, gOther,",
        "rows 2^32 elements apart are looked for elsewhere",
        (EDGES + "test_rows_that_32_bits_do_not_reach",),
    ),
    Mutant(
        "facts-stride-of-32-bits",
        SCREEN + "facts.cu",
        "const T* gRow = side.rows + row * side.stride;",
        "const T* gRow = side.rows + static_cast<std::int32_t>(row * side.stride);",
        "rows 2^31 elements apart are looked for elsewhere",
        (EDGES + "test_rows_that_32_bits_do_not_reach",),
    ),
    Mutant(
        "bank-stride-of-32-bits",
        SCREEN + "bank.cu",
        "number * args.score.candidates.step * args.candidate_stride + begin;",
        "static_cast<std::int32_t>(number * args.score.candidates.step * args.candidate_stride) + begin;",
        "rows 2^31 elements apart are looked for elsewhere",
        (EDGES + "test_rows_that_32_bits_do_not_reach",),
    ),
    Mutant(
        "gather-pack-behind-the-row",
        BACKWARD + "rows.cuh",
        "rRow[p] = load_pack(row + (p * step < left ? p * step : 0));",
        "rRow[p] = load_pack(row + (p * step <= left ? p * step : 0));",
        "a pack is read behind the end of a row",
        (EDGES + "test_nothing_is_read_behind_an_input",),
    ),
    Mutant(
        "zero-times-infinity",
        BACKWARD + "graph.cuh",
        "  if (coefficient == Acc(0)) return Acc(0);\n",
        "",
        "a coefficient of 0 times an upstream of Inf or NaN is NaN",
        ("tests/loss/test_nonfinite.py::test_edges_without_a_coefficient_stay_without_a_gradient",),
    ),
    Mutant(
        "tail-one-too-long",
        BACKWARD + "gather.cu",
        "if (waiting + rank < kEdgeChunk) {",
        "if (waiting + rank <= kEdgeChunk) {",
        "an edge too many is written behind a target's tail, into the next one's",
        (EDGES + "test_hubs_over_several_windows",),
    ),
    Mutant(
        "chunks-of-the-next-target",
        BACKWARD + "gather.cu",
        "if (round + by < chunk || round + by >= end) continue;",
        "if (round + by < chunk || round + by > end) continue;",
        "a target adds the first chunk of the next one",
        (EDGES + "test_hubs_over_several_windows",),
    ),
    Mutant(
        "buckets-without-an-end",
        BACKWARD + "place.cu",
        "if (block_id() == 0 && bucket == count - 1) buckets.begins[count] = rBegin;",
        "if (block_id() == 0 && bucket == count - 2) buckets.begins[count] = rBegin;",
        "the last bucket ends where it begins",
        (PATHS + "test_backward_with_and_without_buckets",),
    ),
    Mutant(
        "buckets-out-of-order",
        BACKWARD + "place.cu",
        "popcount(peers & lanes_below()));",
        "popcount(peers & ~lanes_below()) - 1);",
        "edges of one bucket change their order",
        (PATHS + "test_backward_with_and_without_buckets",),
    ),
    Mutant(
        "bucket-of-the-group-before",
        BACKWARD + "gather.cu",
        "buckets.begins + (first >> args.buckets.shift);",
        "buckets.begins + (first >> (args.buckets.shift + 1));",
        "groups look for their edges in another bucket",
        (PATHS + "test_backward_with_and_without_buckets",),
    ),
    *_tiles(),
)
