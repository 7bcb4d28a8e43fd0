// Planted faults, each caught under every schedule, and the same kernels without them, which pass.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "simt_test.h"

namespace sn::cuda {
namespace {

__global__ void beyond_kernel(int index) {
  SharedArena arena;
  const Shared<float> first = arena.take<float>(30);  // 120 bytes: the next array begins 8 bytes later
  const Shared<float> second = arena.take<float>(8);
  if (thread_id() == 33) (index < 0 ? second : first).set(index, 1.0f);
}
__global__ void misaligned_kernel() {
  SharedArena arena;
  const Shared<float> s = arena.take<float>(64);
  s.set_pack(2, Pack<float>{});
}
__global__ void too_much_kernel() {
  SharedArena arena;
  arena.take<float>(kThreads);
  arena.take<float>(1);
}
__global__ void unwritten_kernel(int unwritten) {
  SharedArena arena;
  const Shared<std::uint16_t> s = arena.take<std::uint16_t>(kThreads);
  if (thread_id() != unwritten) s.set(thread_id(), 1);
  sync_block();
  s.get((thread_id() + 1) % kThreads);
}

enum class Barrier { kNone, kWarp, kBlock };
__device__ void barrier(Barrier kind) {
  if (kind == Barrier::kWarp) sync_warp();
  if (kind == Barrier::kBlock) sync_block();
}
// Each thread writes, then reads what the thread `apart` further wrote.
__global__ void read_after_write_kernel(int apart, Barrier between) {
  SharedArena arena;
  const Shared<float> s = arena.take<float>(thread_count());
  s.set(thread_id(), 0.0f);
  sync_block();
  s.set(thread_id(), 1.0f);
  barrier(between);
  s.get((thread_id() + apart) % thread_count());
}
__global__ void write_after_read_kernel(int apart, Barrier between) {
  SharedArena arena;
  const Shared<float> s = arena.take<float>(thread_count());
  s.set(thread_id(), 1.0f);
  sync_block();
  s.get((thread_id() + apart) % thread_count());
  barrier(between);
  s.set(thread_id(), 2.0f);
}
__global__ void write_after_write_kernel(int apart, Barrier between) {
  SharedArena arena;
  const Shared<std::uint8_t> s = arena.take<std::uint8_t>(thread_count());
  s.set(thread_id(), 1);
  barrier(between);
  s.set((thread_id() + apart) % thread_count(), 2);
}
// All read one element, then the first thread writes it.
__global__ void write_after_many_reads_kernel(Barrier between) {
  SharedArena arena;
  const Shared<float> s = arena.take<float>(1);
  if (thread_id() == 0) s.set(0, 1.0f);
  sync_block();
  s.get(0);
  barrier(between);
  if (thread_id() == 0) s.set(0, 2.0f);
}
// A shuffle keeps lanes together, but orders no memory.
__global__ void shuffle_for_barrier_kernel() {
  SharedArena arena;
  const Shared<float> s = arena.take<float>(kThreads);
  s.set(thread_id(), 0.0f);
  sync_warp();
  s.set(thread_id(), 1.0f);
  shuffle_xor(1, 1);
  s.get(thread_id() ^ 1);
}
__global__ void atomic_and_plain_kernel(Barrier between) {
  SharedArena arena;
  const Shared<std::uint32_t> s = arena.take<std::uint32_t>(1);
  if (thread_id() == 0) s.set(0, 0);
  sync_block();
  s.atomic_add(0, 1);
  barrier(between);
  s.get(0);
}
__global__ void plain_and_atomic_kernel(Barrier between) {
  SharedArena arena;
  const Shared<std::uint32_t> s = arena.take<std::uint32_t>(1);
  if (thread_id() == 5) s.set(0, 0);
  sync_block();
  if (thread_id() == 5) s.set(0, 1);
  barrier(between);
  s.atomic_add(0, 1);
}

__global__ void divergent_barrier_kernel(int threads) {
  if (thread_id() < threads) sync_block();
}
__global__ void two_barriers_kernel() {
  if (thread_id() < 32) {
    sync_block();
  } else {
    sync_block();
  }
}
__global__ void barrier_and_shuffle_kernel() {
  if (lane_id() < 7) {
    sync_block();
  } else {
    shuffle_xor(1, 1);
  }
}
__global__ void divergent_shuffle_kernel(int lanes) {
  if (lane_id() < lanes) shuffle_xor(1, 1);
}
__global__ void returned_lanes_kernel() {
  if (lane_id() == 9) return;
  ballot(true);
}
__global__ void two_collectives_kernel() {
  if (lane_id() < 16) {
    ballot(true);
  } else {
    sync_warp();
  }
}
__global__ void two_shuffles_kernel() {
  if (lane_id() < 16) {
    shuffle_xor(1, 1);
  } else {
    shuffle_xor(1, 1);
  }
}
// One lane runs fewer rounds.
__global__ void ragged_loop_kernel() {
  for (int round = 0; round < (lane_id() == 3 ? 2 : 3); ++round) shuffle_xor(round, 1);
}

__global__ void early_copy_kernel(const float* gSource, int groups, int pending, Barrier between, int apart) {
  SharedArena arena;
  const Shared<float> s = arena.take<float>(4 * kThreads * groups);
  for (int group = 0; group < groups; ++group) {
    async_copy16(s, 4 * (kThreads * group + thread_id()), gSource + 4 * thread_id(), true);
    async_commit();
  }
  if (pending == 0) async_wait<0>();
  if (pending == 1) async_wait<1>();
  barrier(between);
  s.get(4 * (kThreads * (groups - 1) + (thread_id() + apart) % kThreads));
}
__global__ void uncommitted_copy_kernel(const float* gSource) {
  SharedArena arena;
  const Shared<float> s = arena.take<float>(4 * kThreads);
  async_copy16(s, 4 * thread_id(), gSource + 4 * thread_id(), true);
  async_wait<0>();
  s.get(4 * thread_id());
}
__global__ void overwritten_copy_kernel(const float* gSource) {
  SharedArena arena;
  const Shared<float> s = arena.take<float>(4 * kThreads);
  async_copy16(s, 4 * thread_id(), gSource + 4 * thread_id(), true);
  async_commit();
  s.set(4 * thread_id() + 1, 0.0f);
}
__global__ void early_matrix_kernel(Barrier between) {
  SharedArena arena;
  const Shared<Half> s = arena.take<Half>(8 * kThreads);
  s.set_pack(8 * thread_id(), Pack<Half>{});
  barrier(between);
  std::uint32_t r[4];
  load_matrix_x4(r, s, 8 * thread_id());
}

__global__ void remote_kernel(bool before, bool after) {
  SharedArena arena;
  const Shared<int> s = arena.take<int>(1);
  if (thread_id() == 0) s.set(0, cluster_rank());
  if (before) sync_cluster();
  s.get_remote(0, (cluster_rank() + 1) % cluster_size());
  if (after) sync_cluster();
}
// A barrier that orders no memory, then a read of the block beside.
enum class ClusterBarrier { kNone, kRelaxed, kFull };
__device__ void cluster_barrier(ClusterBarrier kind) {
  if (kind == ClusterBarrier::kFull) sync_cluster();
  if (kind != ClusterBarrier::kRelaxed) return;
  arrive_cluster_relaxed();
  wait_cluster();
}
__global__ void split_kernel(ClusterBarrier before, ClusterBarrier after) {
  SharedArena arena;
  const Shared<int> s = arena.take<int>(1);
  if (thread_id() == 0) s.set(0, cluster_rank());
  cluster_barrier(before);
  s.get_remote(0, (cluster_rank() + 1) % cluster_size());
  cluster_barrier(after);
}
// Arrives, then reads: the barrier does not cover the read.
__global__ void late_read_kernel() {
  SharedArena arena;
  const Shared<int> s = arena.take<int>(1);
  if (thread_id() == 0) s.set(0, cluster_rank());
  sync_cluster();
  arrive_cluster_relaxed();
  s.get_remote(0, (cluster_rank() + 1) % cluster_size());
  wait_cluster();
}
__global__ void no_wait_kernel() {
  sync_cluster();
  arrive_cluster_relaxed();
}
__global__ void two_arrivals_kernel() {
  arrive_cluster_relaxed();
  arrive_cluster_relaxed();
  wait_cluster();
}
// Work between the halves of a barrier, warps at barriers of their block among it.
__global__ void between_kernel() {
  SharedArena arena;
  const Shared<int> s = arena.take<int>(thread_count());
  for (int round = 0; round < 3; ++round) {
    arrive_cluster_relaxed();
    s.set(thread_id(), round);
    sync_block();
    s.get((thread_id() + 32) % thread_count());
    sync_block();
    wait_cluster();
  }
}

// What a dependent kernel may do before it waits, and what not.
enum class Early { kNothing, kLoad, kAtomic, kStore, kCopy, kPlainRead, kPlainWrite, kNoWait, kNoWaitOfOne };
__global__ void dependent_kernel(Early early, float* gData, float* gOut) {
  SharedArena arena;
  const Shared<float> s = arena.take<float>(4 * kThreads);
  s.set_pack(4 * thread_id(), Pack<float>{});
  const int at = thread_id();
  float rValue = 1.0f;
  if (early == Early::kLoad) load(gData + at);
  if (early == Early::kAtomic) atomic_load(gData + at);
  if (early == Early::kStore) store_pack(gData + 4 * at, Pack<float>{});
  if (early == Early::kCopy) async_copy16(s, 4 * at, gData + 4 * at, true);
  if (early == Early::kPlainRead) rValue = gData[at];
  if (early == Early::kPlainWrite && block_id() == 1) gData[at] = 5.0f;
  if (early == Early::kNoWait) return;
  sync_block();
  if (early != Early::kNoWaitOfOne || at != 40) wait_for_primary();
  if (early == Early::kNothing) wait_for_primary();  // again: nothing more
  if (early != Early::kPlainRead) rValue = gData[at];
  sync_block();
  gOut[block_id() * kThreads + at] = rValue;
}

__global__ void divergent_cluster_kernel() {
  if (cluster_rank() != 1) sync_cluster();
}
// Waits for a flag that nobody sets.
__global__ void spin_kernel(const std::uint32_t* gFlag) {
  while (atomic_load(gFlag) == 0) {
  }
}
__global__ void nothing_kernel() {}

void caught(const std::string& name, const std::string& expected, const std::function<cudaError_t()>& launch_it) {
  for (int seed = 1; seed <= kSeeds; ++seed) {
    simt::reset(with_seed(seed));
    const cudaError_t error = launch_it();
    check(error != cudaSuccess && simt::fault().find(expected) != std::string::npos,
          name + ": expected a fault that says \"" + expected + "\", got \"" + simt::fault() + "\"");
    if (seed == 1) std::printf("%-28s %s\n", name.c_str(), simt::fault().c_str());
    check(launch(nothing_kernel, LaunchShape{1, 32, 0}, nullptr) != cudaSuccess, name + ": a fault stays");
  }
}
void passes(const std::string& name, const std::function<cudaError_t()>& launch_it) {
  for (int seed = 1; seed <= kSeeds; ++seed) {
    simt::reset(with_seed(seed));
    const cudaError_t error = launch_it();
    check(error == cudaSuccess, name + ": " + simt::fault());
  }
}

}  // namespace

void test_faults() {
  const std::vector<float> source(4 * kThreads, 1.0f);
  const float* gSource = source.data();
  const LaunchShape plain{3, kThreads, 4096};
  const auto shape = [](int bytes) { return LaunchShape{2, kThreads, bytes}; };

  caught("element beyond", "out of range", [&] { return launch(beyond_kernel, plain, nullptr, 30); });
  caught("element before", "out of range", [&] { return launch(beyond_kernel, plain, nullptr, -1); });
  passes("last element", [&] { return launch(beyond_kernel, plain, nullptr, 29); });
  caught("misaligned pack", "misaligned", [&] { return launch(misaligned_kernel, plain, nullptr); });
  caught("too much taken", "takes 272 bytes", [&] { return launch(too_much_kernel, shape(256), nullptr); });
  caught("unwritten", "nothing has written", [&] { return launch(unwritten_kernel, plain, nullptr, 17); });
  passes("all written", [&] { return launch(unwritten_kernel, plain, nullptr, -1); });

  const std::pair<std::string, void (*)(int, Barrier)> hazards[] = {{"read after write", read_after_write_kernel},
                                                                    {"write after read", write_after_read_kernel},
                                                                    {"write after write", write_after_write_kernel}};
  for (const auto& hazard : hazards) {
    const std::string& what = hazard.first;
    const auto with = [&](int apart, Barrier kind) {
      return [&hazard, plain, apart, kind] { return launch(hazard.second, plain, nullptr, apart, kind); };
    };
    passes(what + ", own", with(0, Barrier::kNone));
    caught(what + ", no barrier", "race", with(1, Barrier::kNone));
    caught(what + ", only sync_warp", "race", with(32, Barrier::kWarp));
    passes(what + ", sync_block", with(32, Barrier::kBlock));
    passes(what + ", sync_block, near", with(1, Barrier::kBlock));
  }
  caught("many reads, no barrier", "race",
         [&] { return launch(write_after_many_reads_kernel, plain, nullptr, Barrier::kNone); });
  caught("many reads, only sync_warp", "race",
         [&] { return launch(write_after_many_reads_kernel, plain, nullptr, Barrier::kWarp); });
  passes("many reads, sync_block",
         [&] { return launch(write_after_many_reads_kernel, plain, nullptr, Barrier::kBlock); });
  passes("one warp, sync_warp",
         [&] { return launch(write_after_many_reads_kernel, LaunchShape{2, 32, 16}, nullptr, Barrier::kWarp); });
  passes("neighbour, sync_warp",
         [&] { return launch(read_after_write_kernel, LaunchShape{2, 32, 256}, nullptr, 1, Barrier::kWarp); });
  caught("shuffle is no barrier", "race", [&] { return launch(shuffle_for_barrier_kernel, plain, nullptr); });
  for (const Barrier kind : {Barrier::kNone, Barrier::kWarp}) {
    caught("atomic, then plain", "race", [&] { return launch(atomic_and_plain_kernel, plain, nullptr, kind); });
    caught("plain, then atomic", "race", [&] { return launch(plain_and_atomic_kernel, plain, nullptr, kind); });
  }
  passes("atomic, sync_block", [&] { return launch(atomic_and_plain_kernel, plain, nullptr, Barrier::kBlock); });
  passes("plain, sync_block", [&] { return launch(plain_and_atomic_kernel, plain, nullptr, Barrier::kBlock); });

  for (const int threads : {32, 40, 63}) {
    caught("barrier of some", "divergent barrier",
           [&] { return launch(divergent_barrier_kernel, plain, nullptr, threads); });
  }
  passes("barrier of all", [&] { return launch(divergent_barrier_kernel, plain, nullptr, kThreads); });
  caught("barriers in two places", "divergent barrier", [&] { return launch(two_barriers_kernel, plain, nullptr); });
  caught("barrier and shuffle", "", [&] { return launch(barrier_and_shuffle_kernel, plain, nullptr); });
  caught("shuffle of some", "divergent warp collective",
         [&] { return launch(divergent_shuffle_kernel, plain, nullptr, 31); });
  passes("shuffle of all", [&] { return launch(divergent_shuffle_kernel, plain, nullptr, 32); });
  caught("vote of lanes that are left", "divergent warp collective",
         [&] { return launch(returned_lanes_kernel, plain, nullptr); });
  caught("two collectives", "divergent warp collective",
         [&] { return launch(two_collectives_kernel, plain, nullptr); });
  caught("two shuffles", "divergent warp collective", [&] { return launch(two_shuffles_kernel, plain, nullptr); });
  caught("ragged loop", "divergent warp collective", [&] { return launch(ragged_loop_kernel, plain, nullptr); });

  const auto copy = [&](int groups, int pending, Barrier kind, int apart) {
    return [=] {
      return launch(early_copy_kernel, LaunchShape{2, kThreads, 4096}, nullptr, gSource, groups, pending, kind, apart);
    };
  };
  caught("copy read at once", "before the wait", copy(1, -1, Barrier::kNone, 0));
  caught("copy read behind barrier", "before the wait", copy(1, -1, Barrier::kBlock, 0));
  caught("copy still pending", "before the wait", copy(2, 1, Barrier::kBlock, 0));
  caught("copy of another, no barrier", "", copy(1, 0, Barrier::kNone, 1));
  caught("copy of another warp", "", copy(1, 0, Barrier::kWarp, 32));
  passes("own copy", copy(1, 0, Barrier::kNone, 0));
  passes("copy of another", copy(2, 0, Barrier::kBlock, 33));
  caught("copy not committed", "before the wait",
         [&] { return launch(uncommitted_copy_kernel, plain, nullptr, gSource); });
  caught("copy overwritten", "before the wait",
         [&] { return launch(overwritten_copy_kernel, plain, nullptr, gSource); });
  caught("matrix not synchronised", "race",
         [&] { return launch(early_matrix_kernel, plain, nullptr, Barrier::kNone); });
  passes("matrix synchronised", [&] { return launch(early_matrix_kernel, plain, nullptr, Barrier::kWarp); });

  const LaunchShape pairs{6, kThreads, 64, 2};
  caught("remote, no barrier", "", [&] { return launch(remote_kernel, pairs, nullptr, false, true); });
  passes("remote", [&] { return launch(remote_kernel, pairs, nullptr, true, true); });
  caught("cluster barrier of some", "divergent barrier",
         [&] { return launch(divergent_cluster_kernel, LaunchShape{6, kThreads, 0, 3}, nullptr); });
  caught("remote block that leaves", "shared memory",
         [&] { return launch(remote_kernel, pairs, nullptr, true, false); });

  const auto split = [&](ClusterBarrier before, ClusterBarrier after) {
    return [=] { return launch(split_kernel, pairs, nullptr, before, after); };
  };
  for (const ClusterBarrier before : {ClusterBarrier::kNone, ClusterBarrier::kRelaxed}) {
    caught("remote, unordered", "", split(before, ClusterBarrier::kFull));
  }
  caught("remote, relaxed barrier", "race", split(ClusterBarrier::kRelaxed, ClusterBarrier::kFull));
  passes("remote, relaxed behind", split(ClusterBarrier::kFull, ClusterBarrier::kRelaxed));
  caught("block that leaves", "shared memory", split(ClusterBarrier::kFull, ClusterBarrier::kNone));
  caught("read behind the arrival", "still read its shared memory",
         [&] { return launch(late_read_kernel, pairs, nullptr); });
  caught("no wait for a barrier", "", [&] { return launch(no_wait_kernel, pairs, nullptr); });
  caught("two arrivals", "twice", [&] { return launch(two_arrivals_kernel, pairs, nullptr); });
  passes("work between the halves", [&] { return launch(between_kernel, LaunchShape{6, kThreads, 4096, 3}, nullptr); });
  caught("cluster that does not fit", "no group of 16 multiprocessors", [&] {
    simt::Options options = with_seed(1);
    options.max_cluster = 32;
    simt::reset(options);
    return launch(nothing_kernel, LaunchShape{32, 32, 120000, 32}, nullptr);
  });
  simt::reset(with_seed(1));
  check(simt::active_clusters(8, 256, 200000) == 2 && simt::active_clusters(16, 256, 100000) == 2 &&
            simt::active_clusters(8, 1024, 100) == 4 && simt::active_clusters(17, 32, 0) == 0,
        "clusters at once");

  std::vector<float> data(4 * kThreads);
  std::vector<float> out(static_cast<std::size_t>(6 * kThreads));
  const auto dependent = [&](Early early, bool is_dependent = true) {
    return [&data, &out, early, is_dependent] {
      for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
      simt::set_global({{data.data(), static_cast<std::int64_t>(data.size() * sizeof(float))}, {nullptr, 0}});
      LaunchShape of{6, kThreads, 4096};
      of.dependent = is_dependent;
      const cudaError_t error = launch(dependent_kernel, of, nullptr, early, data.data(), out.data());
      for (std::size_t i = 0; error == cudaSuccess && early == Early::kNothing && i < out.size(); ++i) {
        check(out[i] == static_cast<float>(i % kThreads), "what a dependent kernel reads");
      }
      return error;
    };
  };
  passes("waits first", dependent(Early::kNothing));
  for (const Early early : {Early::kLoad, Early::kAtomic, Early::kStore, Early::kCopy}) {
    caught("early use of memory", "before wait_for_primary", dependent(early));
    passes("nothing ahead", dependent(early, false));
  }
  caught("early plain write", "written before wait_for_primary", dependent(Early::kPlainWrite));
  caught("no wait for the kernel ahead", "without having waited", dependent(Early::kNoWait));
  caught("no wait of a thread", "without having waited", dependent(Early::kNoWaitOfOne));
  passes("nothing ahead, no wait", dependent(Early::kNoWait, false));
  // A plain read is not seen, but it gets poison.
  passes("early plain read", dependent(Early::kPlainRead));
  check(out[0] != 0.0f && out[1] != 1.0f, "what an early plain read gets");

  const std::uint32_t flag = 0;
  simt::Options impatient = with_seed(1);
  impatient.max_switches = 10000;
  simt::reset(impatient);
  check(launch(spin_kernel, plain, nullptr, &flag) != cudaSuccess &&
            simt::fault().find("changes of threads") != std::string::npos,
        "a kernel that hangs");

  caught("not whole warps", "whole warps", [&] { return launch(nothing_kernel, LaunchShape{1, 33, 0}, nullptr); });
  caught("too much shared memory", "shared memory",
         [&] { return launch(nothing_kernel, LaunchShape{1, 32, 300000}, nullptr); });
  caught("ragged cluster", "cluster", [&] { return launch(nothing_kernel, LaunchShape{3, 32, 0, 2}, nullptr); });
  caught("no blocks", "blocks", [&] { return launch(nothing_kernel, LaunchShape{0, 32, 0}, nullptr); });
}

// ---- global memory: AddressSanitizer's part -------------------------------------------------------------------------

namespace {

__global__ void overrun_kernel(float* gData, int count) {
  if (thread_id() < count) gData[thread_id()] = 1.0f;
}
__global__ void copy_overrun_kernel(const float* gData) {
  SharedArena arena;
  const Shared<float> s = arena.take<float>(4 * kThreads);
  async_copy16(s, 4 * thread_id(), gData + 4 * thread_id(), true);
  async_commit();
  async_wait<0>();
}

}  // namespace

int overrun(const std::string& kind) {
  std::unique_ptr<float, void (*)(void*)> data(static_cast<float*>(std::aligned_alloc(16, 4 * kThreads)), std::free);
  simt::reset(with_seed(1));
  if (kind == "store")
    return launch(overrun_kernel, LaunchShape{1, 2 * kThreads, 0}, nullptr, data.get(), kThreads + 1);
  if (kind == "copy") return launch(copy_overrun_kernel, LaunchShape{1, kThreads, 1024}, nullptr, data.get());
  return launch(overrun_kernel, LaunchShape{1, 2 * kThreads, 0}, nullptr, data.get(), kThreads);
}

void test_overruns(const char* program) {
#if defined(__SANITIZE_ADDRESS__)
  for (const std::string kind : {"nothing", "store", "copy"}) {
    const std::string command = std::string(program) + " --overrun " + kind + " 2>&1";
    std::FILE* child = popen(command.c_str(), "r");
    check(child != nullptr, "a child process");
    std::string said;
    char part[512];
    while (std::fgets(part, sizeof(part), child) != nullptr) said += part;
    const int status = pclose(child);
    const bool reported = said.find("AddressSanitizer: heap-buffer-overflow") != std::string::npos;
    check(kind == "nothing" ? status == 0 && !reported : status != 0 && reported,
          "overrun of global memory, " + kind + ": status " + std::to_string(status) + ", " + said);
  }
  std::printf("overruns of global memory: stopped by AddressSanitizer\n");
#else
  std::printf("overruns of global memory: skipped, this build is without AddressSanitizer (%s)\n", program);
#endif
}

}  // namespace sn::cuda
