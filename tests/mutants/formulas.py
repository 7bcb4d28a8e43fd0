"""Mutants of the bounds: every formula that exactness rests on."""

from __future__ import annotations

from mutants.mutant import BOUNDS, FORMULAS, SCREEN, Mutant


def formulas() -> list[Mutant]:
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
            "framed-error-missing", bound,
            "const float least = add_down(square, -error);",
            "const float least = square; static_cast<void>(error);",
            "a row that is screened again is taken for one without errors", "test_rows_that_are_screened_again",
        ),
        (
            "framed-upper-down", bound,
            "const float most = add_up(square, error);", "const float most = add_down(square, error);",
            "the upper bound of a row that is screened again rounded down", "test_rows_that_are_screened_again",
        ),
        (
            "rounding-of-a-copy-halved", "csrc/cuda/rescreen/rescreen.cuh",
            "0x1p-11f + 0x1p-20f", "0x1p-12f + 0x1p-20f",
            "half of what rounding to 11 bits may take", "test_rows_that_are_screened_again",
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
