"""What a mutant is, and where things are that several name."""

from __future__ import annotations

from dataclasses import dataclass

LIBRARY = ("sn_simt",)
BOUNDS = ("sn_simt_bounds",)
CPU = ("_C",)
"""The package's own library, not one of the emulator."""


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
GRADIENTS = BACKENDS + "test_simt_backward.py::"
RESCREEN = BACKENDS + "test_rescreen.py::"
LINE_SUPPORT = (LINES + "test_support_of_rows_on_a_line", LINES + "test_support_among_a_bank_on_a_line")
LINE_FAR = (LINES + "test_farthest_of_a_large_identity_on_a_line",)
LINE_GROUPS = (
    LINES + "test_a_group_has_its_own_residual_and_may_be_the_anchors",
    LINES + "test_thresholds_of_groups_on_a_line",
)
FENCES = (PACKAGE + "test_tickets.py::test_every_ticket_has_its_fences",)
SCREEN, DIRECT, BACKWARD = "csrc/cuda/screen/", "csrc/cuda/direct/", "csrc/cuda/backward/"
FALLBACK = "csrc/cuda/fallback/"
