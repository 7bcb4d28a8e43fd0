"""Mutants of tiles of scores of which some warps have no pair."""

from __future__ import annotations

from mutants.mutant import BACKENDS, PATHS, SCREEN, Mutant

TESTS = BACKENDS + "test_simt_tiles.py::"


def partial_tiles() -> list[Mutant]:
    """Which warps are skipped, and what they do still."""
    scores = SCREEN + "scores.cu"
    around, square = TESTS + "test_rows_and_columns_around_those_of_warps", TESTS + "test_the_square_of_a_partial_batch"
    sample, once = TESTS + "test_the_last_tile_of_a_sample_is_not_skipped", PATHS + "test_each_pair_is_appended_once"
    foreign = PATHS + "test_each_foreign_pair_is_appended_once"
    copies = "  arrive();\n        copy_stage(slot == 0 ? Tile::kStages - 1 : slot - 1);\n        slot = next(slot);\n"
    changes = [
        # name, file, old, new, why, test
        (
            "warp-without-its-last-row-skipped", scores,
            "if (row + warp.row >= args.anchors.count) return false;",
            "if (row + warp.row + Tile::kWarpRows > args.anchors.count) return false;",
            "rows of a warp that is not full are not scored", once,
        ),
        (
            "warp-without-its-last-column-skipped", scores,
            "(column + warp.column < args.candidates.count && serves_rows(warp_block));",
            "(column + warp.column + Tile::kWarpColumns <= args.candidates.count && serves_rows(warp_block));",
            "columns of a warp that is not full are not scored", foreign,
        ),
        (
            "sample-skipped-by-columns", scores,
            "return kMode == ScoreMode::kSample || (column", "return (column",
            "candidates of a sample's last tile, which are spread over all, are not scored", sample,
        ),
        (
            "warp-of-one-row-skipped", scores,
            "if (row + warp.row >= args.anchors.count) return false;",
            "if (row + warp.row + 1 >= args.anchors.count) return false;",
            "a warp of which the first row alone exists is skipped", once,
        ),
        (
            "idle-warps-copy-nothing", scores,
            copies, copies.replace("copy_stage(slot == 0 ? Tile::kStages - 1 : slot - 1)", "async_commit()"),
            "other warps multiply what idle ones should have copied", around,
        ),
        (
            "idle-warps-copy-into-the-slot-that-is-read", scores,
            copies, copies.replace("slot == 0 ? Tile::kStages - 1 : slot - 1", "slot"),
            "a stage is overwritten while it is multiplied", around,
        ),
        (
            "idle-warps-of-the-wide-tile-a-barrier-short", scores,
            "if constexpr (Tile::kAhead) arrive();\n    } else", "} else",
            "warps that multiply wait for the others after the last stage", around,
        ),
        (
            "idle-warps-have-hits", scores,
            "if (works) epilogue.template append_support<kSymmetric>(rProducts, columns_too);",
            "epilogue.template append_support<kSymmetric>(rProducts, columns_too);",
            "blocks below the diagonal are served, from products that nobody made", square,
        ),
        (
            "idle-warps-have-far-hits", scores,
            "if (works) epilogue.template append_far<kSymmetric>(rProducts, columns_too);",
            "epilogue.template append_far<kSymmetric>(rProducts, columns_too);",
            "positives below the diagonal are looked at, by products that nobody made", square,
        ),
    ]  # fmt: skip
    return [Mutant(name, file, old, new, why, (test,)) for name, file, old, new, why, test in changes]
