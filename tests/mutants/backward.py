"""Mutants of the backward: lists of edges, the search for them, and the sums of a target."""

from __future__ import annotations

from mutants.mutant import BACKWARD, EDGES, GRADIENTS, Mutant


def _resident(graphs: str, slices: str, sorts: str) -> list[tuple[str, str, str, str, str, str]]:
    """Rows, graph and lists in shared memory."""
    resident, guards = BACKWARD + "resident.cu", EDGES + "test_nothing_is_read_behind_an_input"
    return [
        (
            "resident-place-behind-its-own-bit", resident,
            "popcount(memory.sIncoming.get(word) & (bit_of(anchor) - 1u))",
            "popcount(memory.sIncoming.get(word) & (2u * bit_of(anchor) - 1u))",
            "every edge is listed one place too far", sorts,
        ),
        (
            "resident-lists-one-behind", resident,
            "+ up_to - count;", "+ up_to;",
            "a list begins where it ends", graphs,
        ),
        (
            "resident-reverses-count-twice", resident,
            "      memory.sWeights.set(at, 0);\n      return weight;", "      return weight;",
            "an edge that was merged is summed as well", sorts,
        ),
        (
            "resident-repeated-edges-have-one-bit", resident,
            "if ((before & bit_of(anchor)) != 0) memory", "if ((before & bit_of(anchor)) > bit_of(anchor)) memory",
            "two edges from one anchor are listed in one place", graphs,
        ),
        (
            "resident-repeated-own-edges-take-all", resident,
            "&& !(kTwice && repeats(edge, anchor, row))", "",
            "two own edges race for the weights of their reverses", graphs,
        ),
        (
            "resident-hubs-without-chunks", resident,
            "(list_end - list_begin) / kEdgeChunk;", "(list_end - list_begin) / (64 * kEdgeChunk);",
            "a hub's chunks are summed as one list", graphs,
        ),
        (
            "resident-rest-of-a-full-chunk", resident,
            "if (part > 0 && (listed || !held))", "if (part > 1 && (listed || !held))",
            "the first chunk of a hub and the second are summed as one", graphs,
        ),
        (
            "resident-list-of-the-next-target", resident,
            "if (end - from < kWarpSize) edges", "if (end - from + 1 < kWarpSize) edges",
            "a list of 31 edges takes the first of the next one", graphs,
        ),
        (
            "resident-groups-meet-other-columns", resident,
            "1 << (args.pack_shift + group)", "1 << group",
            "groups of lanes add up packs of different columns", graphs,
        ),
        (
            "resident-packs-in-one-order", resident,
            "lane_place() ^ (pack << args.pack_shift >> kPacksShift);", "lane_place() ^ pack;",
            "a thread's second pack is its neighbour's first", graphs,
        ),
        (
            "resident-row-behind-the-last", resident,
            "if (row >= rows) continue;", "if (row > rows) continue;",
            "a row is read behind the end of the input", guards,
        ),
        (
            "resident-pack-behind-the-row", resident,
            "if (column(0) < graph.dims) read", "if (column(0) <= graph.dims) read",
            "a pack is read behind the end of a row", guards,
        ),
        (
            "resident-writes-a-pack-too-many", resident,
            "if (first < graph.dims) store_pack", "if (first <= graph.dims) store_pack",
            "a pack is written over the beginning of the next row", slices,
        ),
        (
            "resident-lists-before-bits", resident,
            "  // 2. Room.\n", "  if (block.all > 0) block.make_room();\n  // 2. Room.\n",
            "room is found twice, and lists run over their end", graphs,
        ),
        (
            "resident-counts-before-reverses", resident,
            "    block.template merge_own_edges<false>();\n  }\n  sync_block();\n",
            "    block.template merge_own_edges<false>();\n  }\n",
            "edges are counted while their weights are taken", sorts,
        ),
        (
            "resident-padding-leads-somewhere", resident,
            "if (all + thread_id() < args.padded_edges)", "if (all + thread_id() + 1 < args.padded_edges)",
            "the slot behind the last edge has what an earlier launch left", sorts,
        ),
        (
            "resident-weights-without-their-upstream", resident,
            "graph.reduction == Reduction::kNone ? 1.0 :", "graph.reduction == Reduction::kNone ? 0.0 :",
            "where each anchor has its own upstream gradient all gradients are zero", graphs,
        ),
        (
            "resident-reads-before-the-forward-ends", resident,
            "  wait_for_primary();\n", "",
            "the graph is read while the forward may still write it", sorts,
        ),
        (
            "resident-more-targets-than-threads", "csrc/cuda/plan/sizes.h",
            "shape.targets <= kResidentTargets &&", "shape.targets <= 2 * kResidentTargets &&",
            "targets beyond the threads of a block have no list", graphs,
        ),
    ]  # fmt: skip


def backward() -> list[Mutant]:
    """The gather of gradients: where rows are, whose edges are whose, and in which order they are added."""
    rows, search, place = BACKWARD + "rows.cuh", BACKWARD + "search.cu", BACKWARD + "place.cu"
    sums, gather, lists = BACKWARD + "gather.cuh", BACKWARD + "gather.cu", BACKWARD + "lists.cu"
    apart, sorts = EDGES + "test_rows_that_32_bits_do_not_reach", GRADIENTS + "test_backward_with_and_without_lists"
    graphs, slices = GRADIENTS + "test_any_graph", GRADIENTS + "test_slices_end_anywhere"
    changes = [
        *_resident(graphs, slices, sorts),
        # name, file, old, new, why, test
        (
            "search-stride-of-32-bits", rows,
            "slice + places.get(at) * stride;", "slice + places.get(at) * static_cast<std::int32_t>(stride);",
            "rows 2^31 elements apart are looked for elsewhere", apart,
        ),
        (
            "gather-stride-of-32-bits", rows,
            "? source * stride :", "? source * static_cast<std::int32_t>(stride) :",
            "rows 2^31 elements apart are looked for elsewhere", GRADIENTS + "test_rows_far_apart",
        ),
        (
            "gather-own-row-of-32-bits", sums,
            "std::int64_t{of} * block.side.own_stride", "of * static_cast<std::uint32_t>(block.side.own_stride)",
            "rows 2^32 elements apart are looked for elsewhere", apart,
        ),
        (
            "gather-pack-behind-the-row", rows,
            "load_pack<T, kRowPackBytes>(row + (p * step < left", "load_pack<T, kRowPackBytes>(row + (p * step <= left",
            "a pack is read behind the end of a row", EDGES + "test_nothing_is_read_behind_an_input",
        ),
        (
            "gather-half-pack-behind-the-row", rows,
            "row + (half_at < left ?", "row + (half_at <= left ?",
            "half a pack is read behind the end of a row", EDGES + "test_nothing_is_read_behind_an_input",
        ),
        (
            "gather-half-packs-far-apart", rows,
            "half_at = kWholePacks * step - sub * kHalfPack;", "half_at = kWholePacks * step;",
            "halves of packs are summed as far apart as whole ones: every second one is left out", slices,
        ),
        (
            "gather-writes-half-a-pack-too-many", rows,
            "if (half_at < left) store", "if (half_at <= left) store",
            "half a pack is written over the beginning of the next row", slices,
        ),
        (
            "gather-half-pack-of-one-element", rows,
            ".elements[e] = half.elements[e];", ".elements[e] = half.elements[0];",
            "of half a pack the first element is summed twice", slices,
        ),
        (
            "gather-sums-of-broken-packs", rows,
            "kPacked = kValues % kPack == 0;", "kPacked = kValues >= kPack;",
            "chunk sums of six floats a lane lose the last two", slices,
        ),
        (
            "gather-row-of-another-group", rows,
            "part + full, mine - full,", "part + full, all - full,",
            "groups of lanes that have an edge less than the first add another row", graphs,
        ),
        (
            "tail-one-too-long", search,
            "if (waiting + rank < kEdgeChunk) {", "if (waiting + rank <= kEdgeChunk) {",
            "an edge too many is written behind a target's tail, into the next one's", graphs,
        ),
        (
            "chunks-of-the-next-target", search,
            "round + by >= end) continue;", "round + by > end) continue;",
            "a target adds the first chunk of the next one", graphs,
        ),
        (
            "chunks-of-the-next-list", gather,
            "served < own_end)", "served <= own_end)",
            "a target adds the first chunk of the next one", graphs,
        ),
        (
            "chunk-for-the-target-before", gather,
            "&& rUpTo <= chunk;", "&& rUpTo < chunk;",
            "the first chunk of a list is looked for behind the one before", graphs,
        ),
        (
            "lists-lose-a-single-edge", gather,
            "edge < count; edge += kLanes", "edge + 1 < count; edge += kLanes",
            "the last edge that stands ready is left out", graphs,
        ),
        (
            "buckets-without-an-end", place,
            "if (block_id() == 0 && bucket == count - 1) buckets.begins[count] = rBegin;",
            "if (block_id() == 0 && bucket == count - 2) buckets.begins[count] = rBegin;",
            "the last bucket ends where it begins", sorts,
        ),
        (
            "buckets-out-of-order", place,
            "popcount(peers & lanes_below()));", "popcount(peers & ~lanes_below()) - 1);",
            "edges of one bucket change their order", sorts,
        ),
        (
            "lists-of-the-bucket-before", lists,
            "bucket = block_id() / args.blocks_per_bucket;", "bucket = block_id() / (2 * args.blocks_per_bucket);",
            "targets look for their edges in another bucket", sorts,
        ),
        (
            "lists-without-an-end", lists,
            "if (first + targets == graph.targets) lists", "if (first + targets > graph.targets) lists",
            "the last list ends anywhere", sorts,
        ),
        (
            "lists-out-of-order", lists,
            "popcount(peers & lanes_below()));", "popcount(peers & ~lanes_below()) - 1);",
            "edges of one target change their order", sorts,
        ),
        (
            "lists-forget-earlier-targets", lists,
            "rBefore += rPlaces[l] < 0 ? 1u : 0u;", "rBefore += 0u;",
            "the second block of a bucket writes over the lists of the first", graphs,
        ),
        (
            "reverses-for-the-last-own-edge", lists,
            "(peers & lanes_below()) == 0", "(peers >> lane_id()) == 1",
            "of several own edges to one target another one takes the weights", graphs,
        ),
        (
            "reverses-count-twice", lists,
            "    gWeights[at] = 0;\n", "",
            "an edge that was merged is summed as well", sorts,
        ),
        (
            "reverses-over-chunks", lists,
            "if (at % kEdgeChunk == 0) {", "if (at == 0) {",
            "weights of two chunks are added in another order", graphs,
        ),
        (
            "reverses-behind-the-first", lists,
            "gSources[middle] < source", "gSources[middle] <= source",
            "the search ends behind the reverses", sorts,
        ),
        (
            "lists-close-up-with-the-neighbors", lists,
            " & (kFullWarp >> (kWarpSize - lanes));", ";",
            "a target's list has gaps for edges of those whose lanes come behind", graphs,
        ),
        (
            "lists-close-up-once", lists,
            "      rest += static_cast<std::uint32_t>(popcount(counting));\n",
            "      rest = static_cast<std::uint32_t>(popcount(counting));\n",
            "a further round of a list is written over the one before", graphs,
        ),
        (
            "own-edges-over-the-rest", lists,
            "const bool counts = rIndex >= 0", "rest = list_edges % kEdgeChunk;\n    const bool counts = rIndex >= 0",
            "own edges follow a gap, in which something else stands", graphs,
        ),
        (
            "own-edges-beyond-the-rows", lists,
            "rIndex >= 0 && rIndex < graph.targets && rWeight", "rIndex >= 0 && rWeight",
            "an own edge to no row is listed", graphs,
        ),
        (
            "own-edges-uncounted", lists,
            "= rest + static_cast<std::uint32_t>(popcount(counting));", "= rest;",
            "the gather does not read own edges", sorts,
        ),
        (
            "lists-without-room-for-own-edges", BACKWARD + "lists.cuh",
            "return begin + target * own_slots;", "return begin + target * (own_slots - (own_slots > 0 ? 1u : 0u));",
            "a list whose own edges all count ends in the next one", graphs,
        ),
        (
            "ready-edges-before-the-chunks", gather,
            "begin + edges / kEdgeChunk * kEdgeChunk", "begin + edges % kEdgeChunk",
            "what stands behind a hub's chunks is looked for among them", graphs,
        ),
        (
            "votes-of-both-targets", rows,
            ": 0xffffu << (thread_id() & kHalfWarp);", ": kFullWarp;",
            "of two targets that share a warp one's list has gaps for the other's edges", graphs,
        ),
        (
            "sums-of-both-targets", rows,
            "kElements = kValues * kLanes;", "kElements = kValues * kHalfWarp;",
            "chunk sums of whole warps overlap", graphs,
        ),
        (
            "half-a-warp-writes-no-target", sums,
            "if (exists() && target_lane", "if (target_lane",
            "behind the last row half a warp writes another", graphs,
        ),
        (
            "chunks-of-eight-targets", gather,
            "for (int by = 0; by < kTargets; ++by) {", "for (int by = 0; by < kGroupWarps; ++by) {",
            "chunks that the second eight of 16 targets have summed are lost", graphs,
        ),
    ]  # fmt: skip
    return [Mutant(name, file, old, new, why, (test,)) for name, file, old, new, why, test in changes]
