"""Mutants of the selection by direct sums: parts of a row, bounds, lists, slices."""

from __future__ import annotations

from mutants.mutant import BACKENDS, DIRECT, Mutant


def selection() -> list[Mutant]:
    """Each changes one way to select from a row."""
    lists, select = DIRECT + "lists.cuh", DIRECT + "select.cuh"
    bounded, whole = "test_rows_that_are_bounded", "test_rows_of_one_candidate_a_thread"
    searched = "test_rows_that_are_searched"
    changes = [
        # name, file, old, new, why, test
        (
            "select-ties-of-lists-by-chance", lists,
            "return before(sList.get(count), key) ? count + 1 : count;", "return count;",
            "a key behind all of another list is placed one too early", whole,
        ),
        (
            "select-last-list-short", lists,
            "const int lists = (count + kWarpSize - 1) / kWarpSize;", "const int lists = count / kWarpSize;",
            "a list that is not full is left out", bounded,
        ),
        (
            "select-second-group-forgotten", lists,
            "sLists.set(kGroups / 2 + thread_id(), rLeast.next);",
            "sLists.set(kGroups / 2 + thread_id(), last_key<Key<A>>());",
            "every other candidate of a thread is not looked at for the bound", whole,
        ),
        (
            "select-bound-one-rank-low", lists,
            "within >= wanted ? bound : last_key<Key<A>>()", "within + 1 >= wanted ? bound : last_key<Key<A>>()",
            "the bound may hold one neighbour too few", bounded,
        ),
        (
            "select-own-list-again", lists,
            "const int other = list + turn < lists ? list + turn : list + turn - lists;",
            "const int other = list + turn < lists ? list + turn : list;",
            "keys of later lists are not held against the first ones", bounded,
        ),
        (
            "select-overflow-unnoticed", lists,
            "count = list_within(row, bound_of(rLeast, wanted), rLeast.least());",
            "count = list_within(row, bound_of(rLeast, wanted), rLeast.least());\n"
            "      if (count > kKeys) count = kKeys;",
            "what did not fit the lists is no neighbour", bounded,
        ),
        (
            "select-search-too-short", select,
            "listed = static_cast<int>(found);", "listed = static_cast<int>(found) - 1;",
            "of what the search found, the last is not sorted", searched,
        ),
        (
            "select-search-of-lists-beyond-them", select,
            "if (listed > KeyLists<A>::kKeys && found <= KeyLists<A>::kKeys) {",
            "if (listed > KeyLists<A>::kKeys && found <= KeyLists<A>::kKeys + 1) {",
            "1025 keys go where 1024 have a place", searched,
        ),
        (
            "select-itself", select,
            "rLeast.add(j == self ? last_key<Key<A>>() : make_key(d2, static_cast<std::int32_t>(j)));",
            "rLeast.add(make_key(d2, static_cast<std::int32_t>(j)));",
            "an anchor is among the least keys of its row, and its own neighbour", whole,
        ),
    ]  # fmt: skip
    return [
        Mutant(name, file, old, new, why, (f"{BACKENDS}test_simt_select.py::{test}",))
        for name, file, old, new, why, test in changes
    ]
