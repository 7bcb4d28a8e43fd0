"""Mutants of the CPU kernels: bounds and whole rows of the screening, shared pairs, triangles, strips of edges."""

from __future__ import annotations

from mutants.mutant import BACKENDS, CPU, Mutant

EDGES, SELECTION = BACKENDS + "test_cpu_edges.py::", BACKENDS + "test_cpu_selection.py::"


def cpu() -> list[Mutant]:
    """Which terms a bound has, which pairs of a square are computed, and whose edges a strip lists."""
    kernels = "csrc/cpu/kernels/"
    tiles, strips = SELECTION + "test_documented_order_beside_tiles", EDGES + "test_lists_of_edges_in_several_strips"
    shared = SELECTION + "test_documented_order_where_pairs_are_shared"
    changes = [
        # name, file, old, new, why, test
        (
            "cpu-bound-without-the-copy", "csrc/cpu/forward_screen.cpp",
            "relative * norm + 36.0 * u * copy + rest * rest * (1.0 / theta + 1.0)",
            "(relative - theta) * norm + 36.0 * u * copy",
            "the rounding of the copy is left out of the bound",
            EDGES + "test_copies_that_all_round_one_way",
        ),
        (
            "cpu-bytes-without-their-residual", kernels + "pack.h",
            "residual[r] = f_fma(rest, rest, residual[r]);",
            "if constexpr (!kBytes) residual[r] = f_fma(rest, rest, residual[r]);",
            "the rounding of an 8-bit copy is left out of the bound",
            EDGES + "test_bytes_that_all_round_one_way",
        ),
        (
            "cpu-bytes-without-the-shift", kernels + "pack.h",
            "side.start[position + r] = -shifts[r];", "side.start[position + r] = 0;",
            "sums of an anchor keep what the shift of the candidates adds", tiles,
        ),
        (
            "cpu-refined-without-slack", kernels + "refine.h",
            "exact_upper_bound(screen, p, farthest) + screen.anchors.slack[p];",
            "exact_upper_bound(screen, p, farthest) - screen.candidates.slack[p];",
            "a distance leaves out candidates that its bound leaves open",
            EDGES + "test_bytes_that_all_round_one_way",
        ),
        (
            "cpu-strip-of-the-first-rows", "csrc/cpu/backward.cpp",
            "for (std::int64_t& cut : cuts) cut += edges.first_row;", "",
            "a later strip writes the gradients of other rows", strips,
        ),
        (
            "cpu-reverse-of-every-slot", "csrc/cpu/backward.cpp",
            "(slot >= 0) & (reverses[reverse] == e) &", "(slot >= 0) &",
            "edges to one candidate all take its one reverse",
            BACKENDS + "test_operators.py::test_backward_of_repeated_edges",
        ),
        (
            "cpu-a-hub-in-one-sum", kernels + "backward.h",
            "for (std::int64_t first = 0; first < count; first += kEdgesSummed) {\n"
            "    const std::int64_t some = count - first < kEdgesSummed ? count - first : kEdgesSummed;",
            "for (std::int64_t first = 0; first < count; first += count) {\n    const std::int64_t some = count;",
            "a row that thousands of edges meet sums them one after the other in fp32",
            BACKENDS + "test_operators.py::test_a_row_that_everybody_selects",
        ),
        (
            "cpu-lists-of-the-first-strip", kernels + "backward.h",
            "const std::int64_t first = lists.begin[row - lists.first_row];",
            "const std::int64_t first = lists.begin[row];",
            "a row of a later strip looks for its list as if the strip began with the first row", strips,
        ),
        (
            "cpu-half-of-a-panel-too-early", kernels + "blocks.h",
            "if (upper && p == q && g >= kGroups / 2) {", "if (upper && p == q && g >= kGroups / 4) {",
            "rows of a panel's first half miss the candidates of that half", tiles,
        ),
        (
            "cpu-half-of-the-columns-checked", kernels + "blocks.h",
            "f_add(f_add(poison[0], poison[1]), f_add(poison[2], poison[3]))", "f_add(poison[0], poison[1])",
            "a value that is not finite is overlooked in every other pair of columns",
            EDGES + "test_one_value_that_is_not_finite",
        ),
        (
            "cpu-diagonal-skips-a-vector", kernels + "products.h",
            "(row + 1 - column) / kPanel : 0;", "(row + kPanel - column) / kPanel : 0;",
            "at the diagonal products are left out that a row wants", tiles,
        ),
        (
            "cpu-pair-of-a-neighbour", "csrc/cpu/forward_refine.cpp",
            "at = listed[e].candidate == q ? e : at;", "at = listed[e].candidate >= q ? e : at;",
            "a row takes over the distance of another pair", tiles,
        ),
        (
            "cpu-positive-of-the-pair-behind", "csrc/cpu/forward_refine.cpp",
            "return positives_[p * members_ + q - p];", "return positives_[p * members_ + (q - p) / 2];",
            "members of an identity share one distance", shared,
        ),
        (
            "cpu-whole-row-without-slack", kernels + "rows.h",
            "rank_bound(values, count, wanted) + screen.anchors.slack[p];", "rank_bound(values, count, wanted);",
            "a threshold forgets the anchor's own error",
            EDGES + "test_anchors_longer_than_candidates",
        ),
        (
            "cpu-whole-row-finds-itself", kernels + "rows.h",
            "if (self >= 0 && self < tile.columns) row[self] = -__builtin_inff();", "static_cast<void>(self);",
            "an anchor is its own nearest neighbour", tiles,
        ),
        (
            "cpu-mirror-misses-a-panel", kernels + "rows.h",
            "tile.diagonal ? row + kPanel : tile.column;", "tile.diagonal ? row + 2 * kPanel : tile.column;",
            "rows below the diagonal read products that were never written", tiles,
        ),
        (
            "cpu-smallest-counts-itself", kernels + "smallest.h",
            "const std::int64_t bounded = wanted + 1;", "const std::int64_t bounded = wanted;",
            "a bound of K candidates may have the anchor among them", tiles,
        ),
        (
            "cpu-forms-of-the-wrong-quarter", kernels + "forms.h",
            "minus_to_f(b, f);  // f3", "minus_to_f(d, f);  // f3",
            "a form has another quarter than the algorithm's", tiles,
        ),
        (
            "cpu-forms-forget-their-sums", kernels + "forms.h",
            "multiply(d, g, sums_from(rows, 0), second_first);", "multiply(d, g, kNone, second_first);",
            "an inner level leaves out what its sums begin with", tiles,
        ),
        (
            "cpu-forms-leave-out-the-rest", kernels + "forms.h",
            "part(0, block.rows, block.columns, tile.columns - block.columns);",
            "part(0, block.rows, block.columns, 0);",
            "columns behind the last whole block have no products", tiles,
        ),
        (
            "cpu-forms-of-large-integers", kernels + "pack.h",
            "integer_most(screen.forms.levels)", "integer_most(0)",
            "forms exceed 16 bits", EDGES + "test_spikes_in_rows_of_forms",
        ),
    ]  # fmt: skip
    return [Mutant(name, file, old, new, why, (test,), CPU) for name, file, old, new, why, test in changes]
