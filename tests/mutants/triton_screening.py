"""Mutants of the Triton backend's screening: its bounds, what is kept, the buffers, flags and the plan."""

from __future__ import annotations

from mutants.mutant import BACKENDS, Mutant

SCREENING, OFFER, PLANS = (f"sn_ops/triton/{name}.py" for name in ("screening", "offer", "tuning"))


def triton_screening() -> list[Mutant]:
    """Each changes one bound, one condition or one size."""
    tests = BACKENDS + "test_triton_screening.py::"
    residuals, err = tests + "test_residuals_are_bounded", tests + "test_products_that_err_by_the_bound"
    adversarial, fallback = tests + "test_screening_selects_what_direct_sums_select", tests + "test_the_fallback"
    code = BACKENDS + "test_triton_assembly.py::test_the_inline_assembly_stores_what_the_plain_form_stores"
    bounds = BACKENDS + "test_triton_bounds.py::"
    apart = BACKENDS + "test_triton_edges.py::test_rows_that_32_bits_do_not_reach"
    narrow = "rows that lie far apart are read from elsewhere"
    changes = [
        # name, file, old, new, why, test
        (
            "rho-without-margin", SCREENING, "rho = rho * down * 1.001", "rho = rho * down",
            "roundings of the residual's own sum are forgotten", residuals,
        ),
        (
            "rho-without-rounding", SCREENING,
            "tl.sqrt(tl.sum(moved, axis=1)) + tl.sqrt(tl.sum(full, axis=1)) * (2.0**-24)",
            "tl.sqrt(tl.sum(moved, axis=1))", "the rounding of x - m is forgotten", residuals,
        ),
        (
            "threshold-without-rho", SCREENING, "t = (widened(upper, D) + rho) * UP", "t = widened(upper, D) * UP",
            "the anchor's own residual is forgotten", tests + "test_thresholds_allow_for_the_anchor_too",
        ),
        (
            "threshold-of-k-groups", SCREENING, "tl.arange(0, KP)[None, :] == K, best",
            "tl.arange(0, KP)[None, :] == K - 1 + 0, best", "a group may owe its bound to the anchor itself",
            tests + "test_thresholds_allow_for_the_anchor_too",
        ),
        (
            "samples-without-rho", SCREENING, "least + rho, used[:, None])", "least, used[:, None])",
            "a sample's bound leaves out the anchor's residual", bounds + "test_least_bounds_of_samples",
        ),
        (
            "samples-with-a-period", SCREENING, "((((sample * 40503) & 0xFFFF) * stride) >> 16)",
            "((sample * 40503) & 0xFFFF) % stride", "identities that repeat escape the sample",
            bounds + "test_samples_have_no_period",
        ),
        (
            "shortlist-without-rho", SCREENING, "0.0)) * DOWN - rhos", "0.0)) * DOWN",
            "candidates on the edge are left out", bounds + "test_shortlists_leave_out_what_cannot_matter",
        ),
        (
            "shortlist-of-k-minus-1", SCREENING, "tl.arange(0, KP)[None, :] == K - 1, best",
            "tl.arange(0, KP)[None, :] == K - 2, best", "the K-th neighbour may be left out",
            bounds + "test_shortlists_leave_out_what_cannot_matter",
        ),
        (
            "full-buffer-certified", SCREENING, "(count <= CAPACITY) & (total <= SHORT)", "(total <= SHORT)",
            "neighbours that found a full buffer are lost", bounds + "test_full_buffers_are_not_certified",
        ),
        (
            "eta-halved", SCREENING, "(1.28125 * D + 64.0) * (2.0**-23)", "(1.28125 * D + 64.0) * (2.0**-24)",
            "products may err by more than is allowed for", err,
        ),
        (
            "nan-dropped", OFFER, "keep = ~(value > limit)", "keep = value <= limit",
            "a product beyond float32 loses its candidate", tests + "test_products_beyond_float32_are_kept",
        ),
        (
            "compiled-nan-dropped", OFFER, "setp.leu.f32", "setp.le.f32",
            "the same, in the compiled code alone", code,
        ),
        (
            "compiled-full-buffer", OFFER, "setp.lt.and.u32", "setp.le.and.u32",
            "an entry behind a full buffer is the next anchor's", code,
        ),
        (
            "compiled-pair-skipped", OFFER, "for i in pairs[1:]),", "for i in pairs[2:]),",
            "a pack whose second pair alone is kept is passed over", code,
        ),
        (
            "unscreened-with-a-bound", SCREENING, 'tl.where(screenable, rho, float("inf"))', "rho",
            "rows beyond half precision count as screened", adversarial,
        ),
        (
            "long-shortlist-unnoticed", SCREENING, "(count <= CAPACITY) & (total <= SHORT)", "(count <= CAPACITY)",
            "neighbours that found a full shortlist are lost", fallback,
        ),
        (
            "flag-of-the-last-rows", SCREENING, "poisoned |= bad", "poisoned = bad",
            "a program tells of the last of its rows only", tests + "test_flags_are_few",
        ),
        (
            "small-buffers", PLANS, "cdiv((2 * stride + 4) * (neighbours + 1), 64)",
            "cdiv(stride * (neighbours + 1), 64)",
            "half of the anchors overflow their buffers", tests + "test_few_buffers_overflow",
        ),
        (
            "products-that-may-not-repeat", PLANS, "if not device.dots_repeat:", "if device is None:",
            "an old compiler screens on a GPU where its products were seen to differ", tests + "test_plans_of_devices",
        ),
        (
            "narrow-refined", SCREENING, "gX, x_offsets, gZ, candidate.to(tl.int64) * z_stride, present",
            "gX, x_offsets, gZ, candidate * z_stride, present", narrow, apart,
        ),
        (
            "narrow-anchors-refined", SCREENING, "tl.where(used, anchor, first_row).to(tl.int64) * x_stride",
            "tl.where(used, anchor, first_row) * x_stride", narrow, apart,
        ),
    ]  # fmt: skip
    return [
        Mutant("triton-screen-" + name, where, old, new, why, (test,), ())
        for name, where, old, new, why, test in changes
    ]
