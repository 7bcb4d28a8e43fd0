// The cost model of the backward; cost.cpp says what the model is and which record its constants are from.
#include <algorithm>

#include "cuda/plan/cost.h"
#include "cuda/plan/machine.h"
#include "cuda/plan/sizes.h"

namespace sn::cuda {
namespace {

// Buckets: 8192 x 12 edges 2.8, 1.8 and 10; 65536 x 12 edges 6.9, 3.5 and 34. Lists, counted, not measured: two rounds
// of loads, two of a search, three barriers and two rounds of loads that close up in a row, then each edge as where it
// is placed.
constexpr double kCountStart = 2.0;
constexpr double kCountEdge = 0.0008;
constexpr double kPrefixStart = 1.5;
constexpr double kPrefixEdge = 0.0003;
constexpr double kPlaceStart = 5.5;
constexpr double kPlaceEdge = 0.0048;
constexpr double kListStart = 6.0;
constexpr double kListEdge = 0.0048;

// Edges whose row is fetched, for each edge of the graph: some have weight 0, two that are each other's reverse are one
// row. The record's counters have 0.39 of the L2's peak where 8192 x 2048 takes 152: about 8 rows of 12 edges beside
// the target's own.
constexpr double kFetched = 0.75;

// Instructions, counted in the machine code of sm_90a, not measured: of a target's lanes beside the rows, and for a
// row, where they read a list and where they search; for a lane's element of a row; for widening it. Two targets of a
// warp take as many rows as the longer list has: of lists of some 10 rows a fifth more than a target has. A
// multiprocessor issues 4 a clock of 1.755 GHz, of which the gather of the record reached 0.6 of the peak, with
// barriers that the lists have made unnecessary.
constexpr double kListInstructions = 320.0;
constexpr double kListRowInstructions = 5.0;
constexpr double kSearchInstructions = 340.0;
constexpr double kSearchRowInstructions = 8.0;
constexpr double kLongerList = 1.2;
constexpr double kElementInstructions = 2.5;
constexpr double kWidenInstructions = 1.0;
constexpr double kInstruction = 1.0 / (4.0 * 1755.0 * 0.65);

// A block that searches the graph, beside that. Read from 1024 x 2048 in 46.3 (6 windows), 256 x 2048 in 16.6 (1.5),
// 128 x 2048 in 8.0, 64 x 2048 in 7.1. Fewer blocks than are resident take as long as those.
constexpr double kSearchBlock = 1.1;
constexpr double kSearchWindow = 0.6;
constexpr double kWindowEdges = 2048.0;
constexpr double kResident = 3.0;  // blocks of a multiprocessor
constexpr double kGatherStart = 2.5;

// What all warps of a gather do, beside looking for edges.
struct GatherWork {
  double targets;
  double issued;      // instructions, in microseconds of a multiprocessor
  double read_bytes;  // of rows
  double written_bytes;
};

GatherWork gather_work(const BackwardPlan& plan, const BackwardProblem& problem, const Machine& machine) {
  const double lanes = real(plan.row_lanes);
  const double row_bytes = real(problem.D) * real(element_bytes(problem.dtype));
  const double lane_elements = real(plan.slice_elements) / lanes;
  const double element = (kElementInstructions + (element_bytes(problem.dtype) == 2 ? kWidenInstructions : 0.0)) *
                         (problem.dtype == DType::kFloat64 ? machine.rate.dfma : 1.0);
  const bool candidates = problem.need_candidates && !problem.symmetric;
  const double targets = (problem.need_anchors ? real(problem.N) : 0.0) + (candidates ? real(problem.M) : 0.0);
  const double sides = (problem.need_anchors ? 1.0 : 0.0) + (candidates ? 1.0 : 0.0);
  const double rows = kFetched * sides * real(problem.N) * real(problem.edges);

  // Groups of lanes that share a list take its rows side by side, and two targets of a warp theirs.
  const double shared = real(plan.target_lanes) / 32.0;
  const double beside = (plan.searches ? kSearchInstructions : kListInstructions) * shared;
  const double row = ((plan.searches ? kSearchRowInstructions : kListRowInstructions) + element * lane_elements) *
                     lanes / 32.0 * (plan.target_lanes < 32 ? kLongerList : 1.0);
  return {.targets = targets,
          .issued = real(plan.slices) * (targets * beside + rows * row) * kInstruction,
          .read_bytes = (rows + targets) * row_bytes,
          .written_bytes = targets * row_bytes};
}

double gather_us(const BackwardPlan& plan, const BackwardProblem& problem, const Machine& machine) {
  const GatherWork all = gather_work(plan, problem, machine);
  double work = all.issued;
  const double blocks = real(plan.slices) * all.targets * real(plan.target_lanes) / 32.0 / real(kBackwardGroup);
  if (plan.searches) {
    const double windows = real(problem.N) * real(problem.edges) / kWindowEdges;
    const double searching =
        problem.symmetric || !problem.need_anchors ? blocks : blocks * real(problem.M) / all.targets;
    work += blocks * kSearchBlock + searching * kSearchWindow * windows;
  }
  const double filled = std::min(1.0, blocks / (kResident * machine.processors));
  const double issued = machine.spread(work) / std::max(filled, 1e-9);

  // Rows come from the second-level cache, as far as the slice of all is near.
  const double near = std::min(1.0, real(kNearBytes) / std::max(1.0, real(slice_bytes(plan, problem))));
  const double far_bytes = std::min(kCacheBytes, kFarBytes * machine.rate.memory);  // they come through the cache
  const double byte_us = near / kCacheBytes + (1.0 - near) / far_bytes;
  const double fetched = machine.spread(all.read_bytes * byte_us);
  const double written = machine.memory_us(all.written_bytes);
  return kGap + joined(joined(kGatherStart, issued), joined(fetched, written));
}

// A block that has all rows and edges in shared memory. Instructions of a warp, counted in the machine code of sm_90a,
// not measured: what each of the 16 warps does once, for 32 edges, for 32 packs of rows; of sums what they do beside
// edges, for each pack, for an edge, and for a value that an edge adds to. Groups of lanes that share a list of short
// rows look at each of its edges. The longest list of a warp is some 1.3 times as long as most. Of an edge three
// instructions are fp64. Alone a block has a round of loads and some 25 dependent rounds of shared memory, and waits at
// six barriers.
//
// Threads that sum 4 packs are fewer, and walk a list for twice as many values: 113 instructions for 2 rows and 16
// values a thread, where those of 2 packs take 141 for 4 rows and 8. A scheduler that has one warp left waits for
// shared memory, so there they are taken to be at least two warps for each of the four.
constexpr double kResidentStart = 2.0;
constexpr double kResidentWarp = 200.0;
constexpr double kResidentEdges = 131.0;
constexpr double kResidentDoubles = 3.0;
constexpr double kResidentPacks = 30.0;
constexpr double kResidentSum = 240.0;
constexpr double kResidentSumPack = 30.0;
constexpr double kResidentFewWarps = 8.0;
constexpr double kResidentRow = 20.0;
constexpr double kResidentLook = 8.0;
constexpr double kResidentLonger = 1.3;

double resident_us(const BackwardPlan& plan, const BackwardProblem& problem, const Machine& machine) {
  const ResidentShape shape = resident_shape(problem);
  const bool wide = problem.dtype == DType::kFloat64;
  const double groups = 32.0 / real(plan.row_lanes);
  const double thread_packs = plan.thread_packs;
  const double sides =
      problem.symmetric ? 1.0 : (problem.need_anchors ? 1.0 : 0.0) + (problem.need_candidates ? 1.0 : 0.0);
  const double targets =
      real(problem.need_anchors ? problem.N : 0) + real(problem.need_candidates && !problem.symmetric ? problem.M : 0);
  const double rows = kFetched * sides * real(shape.edges);

  const double lanes = real(plan.row_packs) / thread_packs * groups;  // of a target
  const double values = thread_packs * (wide ? 2.0 : 4.0) * kElementInstructions * (wide ? machine.rate.dfma : 1.0);
  const double look = groups > 1.0 ? kResidentLook * rows * groups : 0.0;
  const double few = thread_packs > 2.0 ? std::max(1.0, kResidentFewWarps * 32.0 / (targets * lanes)) : 1.0;
  const double sums =
      few * (targets * lanes * (kResidentSum + kResidentSumPack * thread_packs) +
             kResidentLonger * (rows * lanes / groups * (kResidentRow + values) + look * lanes / groups));
  const double edges = kResidentEdges + kResidentDoubles * (machine.rate.dfma - 1.0);
  const double instructions =
      kResidentThreads / 32.0 * kResidentWarp +
      (real(shape.padded_edges) * edges + real(shape.rows * kResidentLinePacks) * kResidentPacks + sums) / 32.0;
  // Blocks of one multiprocessor share it.
  const double shared = std::max(1.0, real(plan.slices) / machine.processors);
  const double row_bytes = real(problem.D) * real(element_bytes(problem.dtype));
  const double fetched = machine.spread(real(shape.rows) * row_bytes / kCacheBytes);
  const double written = machine.memory_us(targets * row_bytes);
  return kGap + joined(joined(kResidentStart, shared * instructions * kInstruction), joined(fetched, written));
}

}  // namespace

Cost predict_backward(const BackwardPlan& plan, const BackwardProblem& problem, const DeviceFacts& device) {
  Cost cost;
  if (plan.launches == 0) return cost;
  const Machine machine(device);
  const double edges = real(problem.N) * real(problem.edges);
  if (plan.partitioned) {
    cost.add("count", kGap + kCountStart + machine.spread(kCountEdge * edges));
    cost.add("prefix sums", kGap + kPrefixStart + machine.spread(kPrefixEdge * edges));
    cost.add("place", kGap + kPlaceStart + machine.spread(kPlaceEdge * edges));
    cost.add("lists", kGap + kListStart + machine.spread(kListEdge * edges));
  }
  if (plan.resident) {
    cost.add("resident", resident_us(plan, problem, machine));
    return cost;
  }
  cost.add(plan.searches ? "search" : "gather", gather_us(plan, problem, machine));
  return cost;
}

}  // namespace sn::cuda
