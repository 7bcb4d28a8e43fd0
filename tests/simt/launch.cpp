// Launches: starts the blocks of a grid, runs them and ends them.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "runtime.h"

#if defined(SN_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace sn::simt {

Lane* current = nullptr;
Grid grid;

namespace {

constexpr int kMaxThreads = 1024;
static_assert(kMaxThreads - 1 == static_cast<int>(kThreadMask));
// Blocks of small grids run together up to this many threads.
constexpr int kResidentThreads = 2048;
// A launch that starts after this time resets the clock, so that each has room for at least 2^31 barriers.
constexpr std::uint32_t kLastStart = 0x80000000u;

Runtime& runtime() {
  static Runtime* const instance = new Runtime;  // never destroyed: it keeps stacks and slots
  return *instance;
}

}  // namespace

Runtime& rt = runtime();
std::uint64_t clock_high = 0;

namespace {

// Reports a thread that returns while others wait for it.
void expect_none_wait() {
  const Lane& lane = *current;
  for (const Meeting& meeting : lane.warp->meetings) {
    if (meeting.arrived != 0) {
      report("divergent warp collective: returns while lanes " + hex(meeting.arrived) + " of the warp wait at " +
                 name_of(meeting.op),
             meeting.site);
    }
  }
  const Block& block = *lane.block;
  if (block.waiting > 0) {
    report("divergent barrier: returns while " + std::to_string(block.waiting) + " threads wait at sync_block",
           block.barrier);
  }
  if (block.cluster->waiting > 0) {
    report(
        "divergent barrier: returns while " + std::to_string(block.cluster->waiting) + " threads wait at sync_cluster",
        block.cluster->barrier);
  }
  if (lane.arrivals != lane.waits) {
    report("returns without having waited for the barrier of the cluster at which it arrived", block.cluster->barrier);
  }
  if (block.remote_read >= lane.waits) {
    report("returns while another block of the cluster may still read its shared memory, which nothing orders before",
           block.remote_reader);
  }
  if (grid.dependent && !lane.released) report("returns without having waited for the kernel ahead", lane.site);
}

// While the kernel ahead is taken to run, memory that it may write or read holds poison.
constexpr int kUnready = 0x7d;

void begin_primary() {
  rt.primary_runs = true;
  rt.saved.clear();
  for (const Region& region : rt.regions) {
    const auto* bytes = static_cast<const char*>(region.data);
    rt.saved.emplace_back(bytes, bytes + region.bytes);
  }
  for (const Region& region : rt.regions) std::memset(region.data, kUnready, static_cast<std::size_t>(region.bytes));
}

// Puts the memory back. Returns whether it was as it had been left.
bool end_primary() {
  bool untouched = true;
  for (const Region& region : rt.regions) {
    const auto* bytes = static_cast<const char*>(region.data);
    untouched =
        untouched && std::all_of(bytes, bytes + region.bytes, [](char c) { return c == static_cast<char>(kUnready); });
  }
  for (std::size_t r = 0; r < rt.regions.size(); ++r) {
    std::memcpy(rt.regions[r].data, rt.saved[r].data(), rt.saved[r].size());
  }
  rt.primary_runs = false;
  return untouched;
}

// The kernel ahead has ended: threads that wait for it go on.
void release_waiting() {
  for (Cluster* cluster : rt.resident) {
    for (Block* block : cluster->blocks) {
      for (int w = 0; w < block->warp_count; ++w) {
        Warp& warp = block->warps[static_cast<std::size_t>(w)];
        for (int l = 0; l < kLanes; ++l) {
          if (warp.lanes[l].waits_for != Op::kWaitForPrimary) continue;
          warp.lanes[l].waits_for = Op::kNothing;
          make_runnable(warp, 1u << l);
        }
      }
    }
  }
}

[[noreturn]] void lane_returns() {
  Lane& lane = *current;
  Warp& warp = *lane.warp;
  Block& block = *lane.block;
  lane.returned = true;
  warp.returned |= 1u << lane.lane;
  ++block.returned;
  ++block.cluster->returned;
  make_waiting(lane);
  if (block.returned == grid.threads) leave(Outcome::kBlockDone);
  Lane* next = pick();
  if (next == nullptr) leave(Outcome::kStuck);
  switch_to(*next, true);
  std::abort();
}

void lane_main() {
  switched();
  try {
    rt.call(rt.context);
    expect_none_wait();
  } catch (const Fault& fault) {
    rt.fault = fault.what;
    rt.outcome = Outcome::kFault;
  }
  if (rt.outcome == Outcome::kFault) leave(Outcome::kFault);
  lane_returns();
}

Block* new_slot() {
  if (rt.free_slots.empty()) {
    rt.slots.push_back(std::make_unique<Block>());
    return rt.slots.back().get();
  }
  Block* slot = rt.free_slots.back();
  rt.free_slots.pop_back();
  return slot;
}

void release_shared(Block& block) {
  std::free(block.shared);
  delete[] block.writes;
  delete[] block.reads;
  delete[] block.byte_writes;
  delete[] block.byte_reads;
  block.shared = nullptr;
  block.writes = block.reads = block.byte_writes = block.byte_reads = nullptr;
  block.capacity = 0;
}

void start_block(Block& block, Cluster& cluster, std::int64_t id, int rank) {
  block.id = id;
  block.rank = rank;
  block.cluster = &cluster;
  block.shared_bytes = grid.shared_bytes;
  block.waiting = 0;
  block.returned = 0;
  block.remote_read = -1;
  if (block.capacity < grid.shared_bytes) {
    release_shared(block);
    const auto bytes = (static_cast<std::size_t>(grid.shared_bytes) + 127) / 128 * 128;
    block.shared = static_cast<unsigned char*>(std::aligned_alloc(128, bytes));
    if (block.shared == nullptr) throw std::bad_alloc();
    block.writes = new Record[bytes / kWordBytes]();
    block.reads = new Record[bytes / kWordBytes]();
    block.byte_writes = new Record[bytes]();
    block.byte_reads = new Record[bytes]();
    block.capacity = static_cast<int>(bytes);
  }
  if (grid.shared_bytes > 0) {
    const std::uint64_t word = draw();
    std::memset(block.shared, (word >> 62) == 0 ? 0xff : static_cast<int>(word >> 40 & 0xff),
                static_cast<std::size_t>(grid.shared_bytes));
  }
  block.start = tick();

  const int warps = grid.threads / kLanes;
  block.warp_count = warps;
  if (block.warps.size() < static_cast<std::size_t>(warps)) block.warps.resize(static_cast<std::size_t>(warps));
  if (block.lanes.size() < static_cast<std::size_t>(grid.threads)) {
    block.lanes.resize(static_cast<std::size_t>(grid.threads));
  }
  for (int w = 0; w < warps; ++w) {
    Warp& warp = block.warps[static_cast<std::size_t>(w)];
    warp.block = &block;
    warp.lanes = &block.lanes[static_cast<std::size_t>(w * kLanes)];
    warp.runnable = 0;
    warp.returned = 0;
    warp.place = -1;
    warp.sync[kOneThread] = 0xffffffffu;
    for (int s = kOneWarp; s <= kOneCluster; ++s) warp.sync[s] = block.start;
    for (Meeting& meeting : warp.meetings) meeting.arrived = 0;
  }
  for (int t = 0; t < grid.threads; ++t) {
    Lane& lane = block.lanes[static_cast<std::size_t>(t)];
    lane.warp = &block.warps[static_cast<std::size_t>(t / kLanes)];
    lane.block = &block;
    lane.lane = t % kLanes;
    lane.thread = t;
    lane.phase = 0;
    lane.waits_for = Op::kNothing;
    lane.returned = false;
    lane.released = false;
    lane.arrivals = 0;
    lane.waits = 0;
    lane.copies.clear();
    lane.groups.clear();
    lane.open_copies = 0;
    lane.fake_stack = nullptr;
    if (lane.stack == nullptr) lane.stack = new_stack();
#if defined(SN_SIMT_ASAN)
    // Frames that were never left still have their red zones.
    const std::size_t stale = rt.stale_stacks ? kStackBytes : 4096;
    __asan_unpoison_memory_region(lane.stack + kStackBytes - stale, stale);
#endif
    prepare_stack(lane, lane_main);
  }
  for (int w = 0; w < warps; ++w) make_runnable(block.warps[static_cast<std::size_t>(w)], kAllLanes);
}

void start_cluster(std::int64_t id) {
  auto* cluster = new Cluster;
  cluster->id = id;
  for (int rank = 0; rank < grid.cluster; ++rank) cluster->blocks.push_back(new_slot());
  for (int rank = 0; rank < grid.cluster; ++rank) {
    start_block(*cluster->blocks[static_cast<std::size_t>(rank)], *cluster, id * grid.cluster + rank, rank);
  }
  rt.resident.push_back(cluster);
}

void end_cluster(Cluster* cluster) {
  for (Block* block : cluster->blocks) rt.free_slots.push_back(block);
  rt.resident.erase(std::find(rt.resident.begin(), rt.resident.end(), cluster));
  delete cluster;
}

// The launches of this process, for SN_SIMT_LAUNCH_LOG. A kernel may be launched with several numbers of threads.
struct LaunchLog {
  struct Most {
    int shared_bytes = 0;
    int cluster = 1;
  };
  std::map<std::pair<const void*, int>, Most> kernels;

  ~LaunchLog() {
    const char* path = std::getenv("SN_SIMT_LAUNCH_LOG");
    if (path == nullptr || kernels.empty()) return;
    std::ofstream out(path, std::ios::app);
    for (const auto& [which, most] : kernels) {
      out << symbol_of(which.first) << '\t' << which.second << '\t' << most.shared_bytes << '\t' << most.cluster
          << '\n';
    }
  }
};

void log_launch(const Grid& shape) {
  static LaunchLog log;
  LaunchLog::Most& most = log.kernels[{shape.kernel, shape.threads}];
  most.shared_bytes = std::max(most.shared_bytes, shape.shared_bytes);
  most.cluster = std::max(most.cluster, shape.cluster);
}

std::string refusal(const Grid& shape) {
  if (shape.blocks <= 0 || shape.blocks > 0x7fffffff)
    return "expected 1 to 2^31 - 1 blocks, got " + std::to_string(shape.blocks);
  if (shape.threads <= 0 || shape.threads > kMaxThreads || shape.threads % kLanes != 0) {
    return "expected whole warps of at most 1024 threads, got " + std::to_string(shape.threads);
  }
  if (shape.shared_bytes < 0 || shape.shared_bytes > rt.options.shared_bytes) {
    return "expected at most " + std::to_string(rt.options.shared_bytes) + " bytes of shared memory, got " +
           std::to_string(shape.shared_bytes);
  }
  if (shape.cluster < 1 || shape.cluster > rt.options.max_cluster || shape.blocks % shape.cluster != 0) {
    return "expected a cluster of at most " + std::to_string(rt.options.max_cluster) + " blocks that divides " +
           std::to_string(shape.blocks) + ", got " + std::to_string(shape.cluster);
  }
  if (active_clusters(shape.cluster, shape.threads, shape.shared_bytes) == 0) {
    return "no group of " + std::to_string(rt.options.cluster_multiprocessors) +
           " multiprocessors holds a cluster of " + std::to_string(shape.cluster) + " blocks of " +
           std::to_string(shape.shared_bytes) + " bytes of shared memory";
  }
  return "";
}

}  // namespace

void reset(const Options& options) {
  rt.options = options;
  rt.statistics = {};
  rt.fault.clear();
  rt.launches_since_reset = 0;
  rt.regions.clear();
}
void set_global(std::vector<Region> regions) {
  std::erase_if(regions, [](const Region& region) { return region.data == nullptr || region.bytes <= 0; });
  rt.regions = std::move(regions);
}
int active_clusters(int blocks, int threads, int shared_bytes) {
  constexpr int kReserved = 1024;  // bytes of shared memory that the device keeps for itself, of each block
  constexpr int kThreadsAtOnce = 2048;
  if (shared_bytes > rt.options.shared_bytes || blocks > rt.options.max_cluster) return 0;
  const int resident =
      std::min(rt.options.multiprocessor_shared_bytes / (shared_bytes + kReserved), kThreadsAtOnce / threads);
  return resident * rt.options.cluster_multiprocessors / blocks;
}
const Options& options() {
  return rt.options;
}
const std::string& fault() {
  return rt.fault;
}
const Statistics& statistics() {
  return rt.statistics;
}

cudaError_t run(const Grid& shape, void (*call)(void*), void* context) {
  if (!rt.fault.empty()) return cudaErrorLaunchFailure;
  grid = shape;
  if (const std::string why = refusal(shape); !why.empty()) {
    rt.fault = kernel_text() + ": " + why;
    return cudaErrorInvalidConfiguration;
  }
  if (now() >= kLastStart) {
    clock_high = 0;
    for (const std::unique_ptr<Block>& slot : rt.slots) release_shared(*slot);
  }
  rt.random = mix(rt.options.seed * 0x2545f4914f6cdd1du + ++rt.launches_since_reset) | 1u;
  rt.call = call;
  rt.context = context;
  rt.main_stack = nullptr;
  rt.switches = 0;
  rt.runnable.clear();
  rt.last = nullptr;
  current = &rt.main;
  log_launch(shape);
  ++rt.statistics.launches;
  rt.statistics.blocks += shape.blocks;

  // From warp by warp to lanes in any order.
  constexpr std::uint32_t kStay[3] = {248, 128, 0};
  rt.stay = kStay[below(draw(), 3)];
  const std::int64_t clusters = shape.blocks / shape.cluster;
  const int fit = std::max(1, kResidentThreads / (shape.threads * shape.cluster));
  const std::size_t together = 1 + below(draw(), static_cast<std::uint32_t>(std::min(fit, 4)));
  std::vector<std::int32_t> order(static_cast<std::size_t>(clusters));
  for (std::size_t c = 0; c < order.size(); ++c) order[c] = static_cast<std::int32_t>(c);
  for (std::size_t c = order.size(); c > 1; --c) {
    std::swap(order[c - 1], order[below(draw(), static_cast<std::uint32_t>(c))]);
  }

  std::size_t next = 0;
  cudaError_t error = cudaSuccess;
  while (true) {
    // Of a dependent launch those that run together start together, while the kernel ahead runs.
    if (!shape.dependent || rt.resident.empty()) {
      while (next < order.size() && rt.resident.size() < together) start_cluster(order[next++]);
      if (shape.dependent && !rt.resident.empty()) begin_primary();
    }
    if (rt.resident.empty()) break;
    if (Lane* lane = pick(); lane != nullptr) {
      rt.outcome = Outcome::kBlockDone;
      switch_to(*lane);
    } else {
      rt.outcome = Outcome::kStuck;
    }
    if (rt.outcome == Outcome::kBlockDone) {
      for (std::size_t c = 0; c < rt.resident.size(); ++c) {
        if (rt.resident[c]->returned == shape.threads * shape.cluster) end_cluster(rt.resident[c--]);
      }
      continue;
    }
    if (rt.outcome == Outcome::kStuck && rt.primary_runs) {
      if (end_primary()) {
        release_waiting();
        continue;
      }
      rt.fault = kernel_text() + ": global memory was written before wait_for_primary, while the kernel ahead may run";
    } else if (rt.outcome == Outcome::kStuck) {
      rt.fault = stuck_text();
    }
    error = cudaErrorLaunchFailure;
    break;
  }
  if (rt.primary_runs) end_primary();
  rt.stale_stacks = rt.stale_stacks || error != cudaSuccess;
  while (!rt.resident.empty()) end_cluster(rt.resident.back());
  rt.statistics.switches += rt.switches;
  current = nullptr;
  return error;
}

}  // namespace sn::simt
