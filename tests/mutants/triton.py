"""Mutants of the Triton backend; its tests run in Triton's interpreter, so nothing is built for them."""

from __future__ import annotations

from mutants.mutant import BACKENDS, Mutant

TRITON = "sn_ops/triton/"


def _positives() -> list[Mutant]:
    """Which candidates a group of anchors reads, and how segments are merged."""
    file = TRITON + "positives.py"
    near_and_far, sizes, slowest = "test_near_and_far", "test_labels_of_every_size", "test_slowest_program"
    changes = [
        # name, file, old, new, why, test
        (
            "no-jump", file, "tl.where(first[:, None] <= number[None, :], jumped[:, None], 0)",
            "tl.where(first[:, None] <= 0 * number[None, :], jumped[:, None], 0)",
            "only the first identity's places are found, what follows it is read instead of the others", near_and_far,
        ),
        (
            "jump-late", file,
            "tl.where(first[:, None] <= number[None, :]", "tl.where(first[:, None] < number[None, :]",
            "the first place of each identity is taken from before the jump", near_and_far,
        ),
        (
            "identity-counted-for-each-anchor", file,
            "start = tl.maximum(begin, tl.load(gEnd + rank - 1, used & (rank > group * R), 0))", "start = begin",
            "anchors of one identity read it once each", near_and_far,
        ),
        (
            "identity-cut-by-a-group", file, "used & (rank > group * R)", "used & (rank > 0)",
            "an identity that another group begins has no places in this one", near_and_far,
        ),
        (
            "last-tile-in-no-segment", file, "share = tl.cdiv(tl.cdiv(wanted, C), segments) * C",
            "share = tl.cdiv(wanted // C, segments) * C",
            "a tile that is not full is read by no program", near_and_far,
        ),
        (
            "tiles-not-shared", file, "share = tl.cdiv(tl.cdiv(wanted, C), segments) * C",
            "share = tl.cdiv(wanted, C) * C",
            "the first segment reads everything", near_and_far,
        ),
        (
            "neighbouring-identity", file, "(place[None, :] < end[:, None])", "(place[None, :] <= end[:, None])",
            "the first candidate of the next identity counts as a positive", near_and_far,
        ),
        (
            "itself-positive", file, "present[None, :] & (candidate[None, :] != own[:, None])", "present[None, :]",
            "an anchor is its own nearest positive", near_and_far,
        ),
        (
            "tiles-of-nobody", file, "tl.max(tl.max(same.to(tl.int32), axis=1), axis=0) > 0",
            "tl.max(tl.max(same.to(tl.int32), axis=1), axis=0) >= 0",
            "distances of anchors to themselves are summed", near_and_far,
        ),
        (
            "far-tie-to-the-last", file, "tl.max(tl.where(same, far_keys, NO_FAR_KEY), axis=1)",
            "tl.max(tl.where(same, far_keys ^ LAST_INDEX, NO_FAR_KEY), axis=1) ^ LAST_INDEX",
            "of equally far positives of a tile the last is far", near_and_far,
        ),
        (
            "far-index-of-its-key", file, "far.to(tl.int32) ^ LAST_INDEX", "far.to(tl.int32)",
            "the complement of the farthest positive's index is far", near_and_far,
        ),
        (
            "one-segment-for-the-loss", TRITON + "screened.py", "*extremes[:4]), extremes.segments, None",
            "*extremes[:4]), 1, None", "the loss sees a part of the positives", "test_segments_reach_the_loss",
        ),
        (
            "segments-in-one-place", file, "slot = anchor * segments + segment", "slot = anchor * segments",
            "segments write over each other", near_and_far,
        ),
        (
            "bisection-one-step-short", file, "m.bit_length(), begin", "m.bit_length() - 1, begin",
            "one place is left, and not looked at", sizes,
        ),
        (
            "bisection-behind-equals", file, "value <= label if AFTER else value < label", "value <= label",
            "identities begin where they end", near_and_far,
        ),
        (
            "one-segment", TRITON + "tuning.py",
            "segments = max(1, min(cdiv(_PROGRAMS, cdiv(anchors, rows)), cdiv(candidates, columns), 64))",
            "segments = 1", "few anchors of a large bank keep a few multiprocessors busy", slowest,
        ),
    ]  # fmt: skip
    return [
        Mutant("triton-positives-" + name, where, old, new, why, (f"{BACKENDS}test_triton_positives.py::{test}",), ())
        for name, where, old, new, why, test in changes
    ]


def _devices() -> list[Mutant]:
    """What is served."""
    test = BACKENDS + "test_triton_devices.py::"
    return [
        Mutant(
            "triton-interpreter-by-one-spelling", TRITON + "tuning.py", '.lower() in ("1", "true", "on", "yes", "y")',
            ' == "1"', "a kernel is interpreted on tensors that it was not planned for",
            (test + "test_the_interpreter_is_on_where_triton_says_so",), (),
        ),
        Mutant(
            "triton-on-rocm", TRITON + "__init__.py", "if torch.version.cuda is None:",
            "if torch.version.cuda is None and torch.version.hip is None:",
            "a GPU that its kernels were never tested on is served", (test + "test_rocm_is_not_cuda",), (),
        ),
    ]  # fmt: skip


def _rows() -> list[Mutant]:
    """Offsets of rows in 32 bits, and what is not finite."""
    search, gradients, positives = (TRITON + name for name in ("search.py", "gradients.py", "positives.py"))
    apart = "backends/test_triton_edges.py::test_rows_that_32_bits_do_not_reach"
    unseen = "backends/test_triton_edges.py::test_a_nan_that_32_bits_do_not_reach"
    nonfinite = "loss/test_nonfinite.py::"
    narrow = "rows that lie far apart are read from elsewhere"
    changes = [
        # name, file, old, new, why, test
        (
            "narrow-scanned", search, "candidate.to(tl.int64) * z_stride, present, D, ACC",
            "candidate * z_stride, present, D, ACC", narrow, apart,
        ),
        (
            "narrow-anchors", search, "x_offsets = anchor.to(tl.int64) * x_stride", "x_offsets = anchor * x_stride",
            narrow, apart,
        ),
        ("narrow-inspected", search, "base = row.to(tl.int64) * stride", "base = row * stride", narrow, unseen),
        (
            "narrow-positives", positives, "anchor * x_stride, used, gZ, candidate * z_stride, present",
            "anchor * x_stride, used, gZ, candidate.to(tl.int32) * z_stride, present", narrow, apart,
        ),
        (
            "narrow-anchors-of-positives", positives, "anchor * x_stride, used, gZ, candidate * z_stride, present",
            "anchor.to(tl.int32) * x_stride, used, gZ, candidate * z_stride, present", narrow, apart,
        ),
        (
            "narrow-gradients", gradients, "row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)",
            "row = tl.program_id(0) * R + tl.arange(0, R)", narrow, apart,
        ),
        (
            "narrow-outgoing", gradients, "index[:, :, None].to(tl.int64) * z_stride", "index[:, :, None] * z_stride",
            narrow, apart,
        ),
        (
            "narrow-incoming", gradients, "anchor = (edge // E).to(tl.int64)", "anchor = (edge // E).to(tl.int32)",
            narrow, apart,
        ),
        (
            "narrow-hub", gradients, "target = tl.load(gTargets + chunk * CHUNK, present, -1).to(tl.int64)",
            "target = tl.load(gTargets + chunk * CHUNK, present, -1)", narrow, apart,
        ),
        (
            "candidates-not-inspected", search, "bad |= has_bad_rows(gZ, z_stride, begin, end, D, 4, 256, ACC)",
            "bad |= 0", "a candidate that is NaN leaves a loss that is a number",
            nonfinite + "test_with_a_bank[triton-candidates-nan-none]",
        ),
        (
            "nobody-not-inspected", search, '(largest == float("inf")) | (M == 0)', 'largest == float("inf")',
            "anchors without candidates are not looked at", nonfinite + "test_with_nobody_on_the_other_side[triton]",
        ),
        (
            "nothing-times-inf", gradients, "active = w != 0  # an edge", "active = within  # an edge",
            "an edge that carries no gradient carries NaN",
            nonfinite + "test_edges_without_a_coefficient_stay_without_a_gradient[triton-False-inf]",
        ),
    ]  # fmt: skip
    return [
        Mutant("triton-" + name, where, old, new, why, (f"tests/{test}",), ())
        for name, where, old, new, why, test in changes
    ]


def _merges() -> list[Mutant]:
    """Segments of direct sums, chunks of edges, and lists of them."""
    search, gradients = TRITON + "search.py", TRITON + "gradients.py"
    direct, hubs = "test_triton_positives.py::test_direct_sums_find_the_same", "test_triton.py::test_hubs_in_chunks"
    changes = [
        # name, file, old, new, why, test
        (
            "no-segment-backwards", search, "tl.where(segment % 2 == 1, KP - 1", "tl.where(segment % 2 == 2, KP - 1",
            "runs are merged that are not in the order which the network expects", direct,
        ),
        (
            "lists-of-the-first-segments", search, "used[:, None] & (segment < segments), NO_KEY)",
            "used[:, None] & (segment < 2), NO_KEY)", "neighbours in the third segment are not found", direct,
        ),
        (
            "near-of-segments-to-the-last", search,
            "near = tl.min(tl.where((index >= 0) & (d2 == near_d2[:, None]), index, 0x7FFFFFFF), axis=1)",
            "near = tl.max(tl.where((index >= 0) & (d2 == near_d2[:, None]), index, -1), axis=1)",
            "of equally near positives the last segment's is near", direct,
        ),
        (
            "far-of-segments-to-the-last", search,
            "far = tl.min(tl.where((index >= 0) & (d2 == far_d2[:, None]), index, 0x7FFFFFFF), axis=1)",
            "far = tl.max(tl.where((index >= 0) & (d2 == far_d2[:, None]), index, -1), axis=1)",
            "of equally far positives the last segment's is far", direct,
        ),
        (
            "far-tie-within-a-segment", TRITON + "order.py",
            "farther = farthest > far_d2", "farther = farthest >= far_d2",
            "of equally far positives the last tile's is far", direct,
        ),
        (
            "rest-of-a-hub-forgotten", gradients, "begin = last_whole\n", "begin = end\n",
            "edges behind the last whole chunk carry no gradient", hubs,
        ),
        (
            "chunk-behind-the-last", gradients, "tl.maximum(end // CHUNK * CHUNK, first_whole)",
            "tl.maximum((end + CHUNK - 1) // CHUNK * CHUNK, first_whole)",
            "a chunk that other targets share is taken for one row's", hubs,
        ),
        (
            "listed-edges-of-the-last-part", gradients, "place = count + tl.cumsum(found, axis=0) - 1",
            "place = tl.cumsum(found, axis=0) - 1", "edges of later parts take the places of earlier ones",
            "test_triton_edges.py::test_listed_edges",
        ),
    ]  # fmt: skip
    return [
        Mutant("triton-" + name, where, old, new, why, (BACKENDS + test,), ())
        for name, where, old, new, why, test in changes
    ]


def _small_batches() -> list[Mutant]:
    """Poison, listed edges, half precision off 16 elements, and bounds of plans."""
    search, bad = TRITON + "search.py", "test_one_bad_value_anywhere_poisons"
    changes = [
        # name, file, old, new, why, test
        (
            "bad-anchors-unseen", search, "tl.minimum(first_anchor + R, first_row + rows), D", "first_anchor, D",
            "a NaN of an anchor is lost", bad,
        ),
        (
            "far-is-bad", search, "bad = has_bad_rows(gX", "bad = 1 + has_bad_rows(gX",
            "an overflow of finite rows is taken for NaN", "test_far_rows_poison_nothing",
        ),
        (
            "flags-of-one-strip", search, "gFlags + first_flag + program", "gFlags + program",
            "later strips write over what earlier ones found", bad,
        ),
        (
            "one-loss-unpoisoned", TRITON + "loss.py", 'tl.full((FLAGS,), float("nan"), ACC), anchor < N)',
            'tl.full((FLAGS,), float("nan"), ACC), anchor < N - 1)', "the last anchor's loss stays a number", bad,
        ),
        (
            "list-too-short", TRITON + "gradients.py", "(found > 0) & (place < most)",
            "(found > 0) & (place < most - 1)", "an edge of a candidate of everybody is lost",
            "test_listed_and_sorted_edges_give_one_gradient",
        ),
        (
            "half-precision-misaligned", TRITON + "batch.py", "rows.stride(0) % 16 == 0 and aligned(rows)",
            "rows.stride(0) % 16 == 0", "rows off 16 bytes are read two bytes at a time",
            "test_where_half_precision_rows_lie_changes_no_bit",
        ),
        (
            "merged-without-bound", TRITON + "tuning.py", "tiles, 32, _MERGED_KEYS // list_size)", "tiles, 32)",
            "long lists of many segments do not fit registers", "test_plans_of_small_batches",
        ),
        (
            "edges-without-bound", TRITON + "tuning.py", "listed > _LISTED_EDGES or candidates", "candidates",
            "every program looks through very many edges", "test_many_edges_are_sorted",
        ),
    ]  # fmt: skip
    return [
        Mutant("triton-small-" + name, where, old, new, why, (f"{BACKENDS}test_triton_direct.py::{test}",), ())
        for name, where, old, new, why, test in changes
    ]


def _launches() -> list[Mutant]:
    """What chooses a compiled variant."""
    test = BACKENDS + "test_triton_launches.py::"
    return [
        Mutant(
            "triton-alignment-not-in-the-key", TRITON + "batch.py", "aligned(feats), aligned(candidates),",
            "True, True,", "a kernel that loads 16 bytes at a time is launched on rows that start elsewhere",
            (test + "test_the_key_of_a_variant_says_what_triton_specialises",), (),
        ),
        Mutant(
            "triton-dims-not-in-the-key", TRITON + "batch.py", "candidate_labels.dtype, feats.shape[1],",
            "candidate_labels.dtype,", "a kernel for D that 16 divides runs on other D",
            (test + "test_the_key_of_a_variant_says_what_triton_specialises",), (),
        ),
        Mutant(
            "triton-captured-cold", TRITON + "launch.py", "if torch.cuda.is_initialized() and", "if False and",
            "loading a kernel ends a capture with an error that names neither",
            (test + "test_a_capture_needs_warm_kernels",), (),
        ),
    ]  # fmt: skip


def triton() -> list[Mutant]:
    return [*_positives(), *_devices(), *_rows(), *_merges(), *_small_batches(), *_launches()]
