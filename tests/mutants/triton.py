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
            "first-segment-alone", file, "inside = used[:, None] & (segment < segments)",
            "inside = used[:, None] & (segment < 1)",
            "what the other segments found is forgotten", near_and_far,
        ),
        (
            "last-segment-forgotten", file, "inside = used[:, None] & (segment < segments)",
            "inside = used[:, None] & (segment < tl.maximum(segments - 1, 1))",
            "what the last segment found is forgotten", near_and_far,
        ),
        (
            "far-of-segments-by-index", file, "far = tl.max(tl.load(gFarKeys + slot, inside, NO_FAR_KEY), axis=1)",
            "far = tl.load(gFarKeys + anchor.to(tl.int64) * segments, used, NO_FAR_KEY)",
            "far is the first segment's", near_and_far,
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


def triton() -> list[Mutant]:
    return [*_positives(), *_devices()]
