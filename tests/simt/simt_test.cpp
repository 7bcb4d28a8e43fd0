// The harness itself: every planted fault is caught, under every schedule, and every wrapper does what it says.
// Exits non-zero on the first failure.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"

namespace sn::cuda {
namespace {

int checks = 0;

void check(bool holds, const std::string& what) {
  if (!holds) {
    std::printf("FAILED: %s\n%d passed, 1 failed\n", what.c_str(), checks);
    std::exit(1);
  }
  ++checks;
}

constexpr int kSeeds = 12;

simt::Options with_seed(std::uint64_t seed) {
  simt::Options options;
  options.seed = seed;
  options.mma_seed = seed;
  return options;
}

// ---- planted faults -------------------------------------------------------------------------------------------------

constexpr int kThreads = 64;

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
// Written, then read `apart` threads on.
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
// All read one element; one of them, the first, then writes it.
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
// Another number of rounds on one lane.
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
  // Whether a block leaves before another has read it depends on the schedule.
  int left = 0;
  for (int seed = 1; seed <= 40; ++seed) {
    simt::reset(with_seed(seed));
    left += launch(remote_kernel, pairs, nullptr, true, false) != cudaSuccess ? 1 : 0;
  }
  check(left > 0, "remote block that leaves: never caught");

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

// ---- wrappers -------------------------------------------------------------------------------------------------------

template <typename T>
__global__ void shuffles_kernel(const T* gIn, T* gOut, int amount) {
  const T mine = gIn[thread_id()];
  T* gMine = gOut + 4 * (block_id() * thread_count() + thread_id());
  gMine[0] = shuffle_xor(mine, amount);
  gMine[1] = shuffle(mine, (lane_id() * 5 + amount) % kWarpSize);
  gMine[2] = shuffle_up(mine, amount);
  gMine[3] = shuffle_down(mine, amount);
}

template <typename T>
void test_shuffles() {
  std::vector<T> in(kThreads);
  for (int t = 0; t < kThreads; ++t) in[t] = static_cast<T>(1000.25 * t + 3) * static_cast<T>(sizeof(T) == 8 ? 4e9 : 1);
  for (const int amount : {0, 1, 5, 16, 31}) {
    simt::reset(with_seed(amount));
    std::vector<T> out(4 * kThreads * 5);
    const cudaError_t error =
        launch(shuffles_kernel<T>, LaunchShape{5, kThreads, 0}, nullptr, in.data(), out.data(), amount);
    check(error == cudaSuccess, simt::fault());
    for (int t = 0; t < kThreads * 5; ++t) {
      const int lane = t % 32;
      const T* warp = &in[t % kThreads - lane];
      const T* got = &out[4 * t];
      check(got[0] == warp[lane ^ amount], "shuffle_xor");
      check(got[1] == warp[(lane * 5 + amount) % 32], "shuffle");
      check(got[2] == warp[lane >= amount ? lane - amount : lane], "shuffle_up");
      check(got[3] == warp[lane + amount < 32 ? lane + amount : lane], "shuffle_down");
    }
  }
}

__global__ void votes_kernel(const std::uint32_t* gIn, std::uint32_t* gOut) {
  const std::uint32_t mine = gIn[thread_id()];
  std::uint32_t* gMine = gOut + 16 * thread_id();
  gMine[0] = ballot(mine % 3 == 0);
  gMine[1] = any_lane(mine == 77) ? 1 : 0;
  gMine[2] = all_lanes(mine < 64 || warp_id() == 1) ? 1 : 0;
  gMine[3] = match_any(mine % 5);
  gMine[4] = match_any(static_cast<std::uint64_t>(mine % 7) << 40);
  gMine[5] = reduce_min(mine);
  gMine[6] = reduce_max(mine);
  gMine[7] = reduce_add(mine * 0x10000001u);
  gMine[8] = reduce_or(mine);
  gMine[9] = lanes_below();
  gMine[10] = static_cast<std::uint32_t>(popcount(mine) + 100 * find_first(mine) + 10000 * leading_zeros(mine));
  gMine[11] = static_cast<std::uint32_t>(leading_zeros(static_cast<std::uint64_t>(mine) << 20));
  gMine[12] = static_cast<std::uint32_t>(lane_id() + 100 * warp_id() + 10000 * thread_count());
  gMine[13] = static_cast<std::uint32_t>(find_first(0) + 2);
}

void test_votes() {
  std::mt19937 random(3);
  for (int round = 0; round < kSeeds; ++round) {
    std::vector<std::uint32_t> in(kThreads);
    for (std::uint32_t& value : in) value = random() % 100;
    std::vector<std::uint32_t> out(16 * kThreads);
    simt::reset(with_seed(round));
    check(launch(votes_kernel, LaunchShape{1, kThreads, 0}, nullptr, in.data(), out.data()) == cudaSuccess,
          simt::fault());
    for (int t = 0; t < kThreads; ++t) {
      const std::uint32_t* warp = &in[t / 32 * 32];
      const std::uint32_t mine = in[t];
      std::uint32_t votes = 0, any = 0, all = 1, same = 0, wide = 0, least = ~0u, most = 0, sum = 0, either = 0;
      for (int l = 0; l < 32; ++l) {
        votes |= (warp[l] % 3 == 0 ? 1u : 0u) << l;
        any |= warp[l] == 77 ? 1 : 0;
        all &= warp[l] < 64 || t >= 32 ? 1 : 0;
        same |= (warp[l] % 5 == mine % 5 ? 1u : 0u) << l;
        wide |= (warp[l] % 7 == mine % 7 ? 1u : 0u) << l;
        least = std::min(least, warp[l]);
        most = std::max(most, warp[l]);
        sum += warp[l] * 0x10000001u;
        either |= warp[l];
      }
      int bits = 0, first = -1, zeros = 32;
      for (int b = 0; b < 32; ++b) {
        if ((mine >> b & 1u) == 0) continue;
        ++bits;
        zeros = 31 - b;
        if (first < 0) first = b;
      }
      const std::uint32_t expected[14] = {votes,
                                          any,
                                          all,
                                          same,
                                          wide,
                                          least,
                                          most,
                                          sum,
                                          either,
                                          (1u << t % 32) - 1u,
                                          static_cast<std::uint32_t>(bits + 100 * first + 10000 * zeros),
                                          static_cast<std::uint32_t>(mine == 0 ? 64 : zeros + 12),
                                          static_cast<std::uint32_t>(t % 32 + 100 * (t / 32) + 10000 * kThreads),
                                          1};
      for (int e = 0; e < 14; ++e) check(out[16 * t + e] == expected[e], "votes, entry " + std::to_string(e));
    }
  }
}

__global__ void atomics_kernel(std::uint32_t* gWords, std::int32_t* gSigned, std::uint64_t* gLong,
                               std::uint32_t* gOrder) {
  SharedArena arena;
  const Shared<std::uint32_t> sWords = arena.take<std::uint32_t>(4);
  const Shared<std::int32_t> sSigned = arena.take<std::int32_t>(2);
  if (thread_id() == 0) {
    sWords.set(0, 0);
    sWords.set(1, 0);
    sWords.set(2, 0);
    sWords.set(3, ~0u);
    sSigned.set(0, -1000);
    sSigned.set(1, 1000);
  }
  sync_block();
  const auto id = static_cast<std::uint32_t>(block_id()) * static_cast<std::uint32_t>(thread_count()) +
                  static_cast<std::uint32_t>(thread_id());
  const std::uint64_t far = static_cast<std::uint64_t>(id) << 33;
  sWords.atomic_add(0, id);
  sWords.atomic_or(1, 1u << lane_id());
  sWords.atomic_max(2, id);
  sWords.atomic_min(3, id);
  sSigned.atomic_max(0, static_cast<std::int32_t>(id) - 500);
  sSigned.atomic_min(1, static_cast<std::int32_t>(id) - 500);
  atomic_add(&gLong[0], far);
  atomic_max(&gLong[1], far);
  atomic_min(&gLong[2], far);
  sync_block();
  if (thread_id() == 0) {
    atomic_add(&gWords[0], sWords.get(0));
    atomic_or(&gWords[1], sWords.get(1));
    atomic_max(&gWords[2], sWords.get(2));
    atomic_min(&gWords[3], sWords.get(3));
    atomic_max(&gSigned[0], sSigned.get(0));
    atomic_min(&gSigned[1], sSigned.get(1));
  }
  // Everyone draws a ticket of its own.
  const std::uint32_t ticket = atomic_add(&gWords[4], 1u);
  atomic_add(&gOrder[ticket], 1u + id);
  if (atomic_load(&gOrder[ticket]) != 1u + id) atomic_store(&gWords[5], 1u);
}

void test_atomics() {
  std::vector<std::uint32_t> first_order;
  bool another_order = false;
  for (int seed = 1; seed <= kSeeds; ++seed) {
    constexpr std::uint32_t kCount = 7 * kThreads;
    std::vector<std::uint32_t> words{0, 0, 0, ~0u, 0, 0}, order(kCount);
    std::vector<std::int32_t> signs{-1000, 1000};
    std::vector<std::uint64_t> longs{0, 0, ~std::uint64_t{0}};
    simt::reset(with_seed(seed));
    check(launch(atomics_kernel, LaunchShape{7, kThreads, 256}, nullptr, words.data(), signs.data(), longs.data(),
                 order.data()) == cudaSuccess,
          simt::fault());
    const std::uint32_t sum = kCount * (kCount - 1) / 2;
    check(words[0] == sum && words[1] == ~0u && words[2] == kCount - 1 && words[3] == 0, "atomics of uint32");
    check(signs[0] == static_cast<std::int32_t>(kCount) - 501 && signs[1] == -500, "atomics of int32");
    check(longs[0] == static_cast<std::uint64_t>(sum) << 33 &&
              longs[1] == static_cast<std::uint64_t>(kCount - 1) << 33 && longs[2] == 0,
          "atomics of uint64");
    check(words[4] == kCount && words[5] == 0, "tickets");
    if (seed == 1) first_order = order;
    another_order = another_order || order != first_order;
    std::sort(order.begin(), order.end());
    for (std::uint32_t id = 0; id < kCount; ++id) check(order[id] == id + 1, "every ticket once");
  }
  check(another_order, "another seed is another schedule");
}

__global__ void exchange_kernel(const double* gIn, double* gOut) {
  SharedArena arena;
  const Shared<double> sMine = arena.take<double>(kThreads);
  sMine.set(thread_id(), gIn[block_id() * kThreads + thread_id()]);
  sync_cluster();
  double sum = 0.0;
  for (int rank = 0; rank < cluster_size(); ++rank) sum += sMine.get_remote((thread_id() + rank) % kThreads, rank);
  const Pack<double> pack = sMine.get_remote_pack(thread_id() / 2 * 2, (cluster_rank() + 1) % cluster_size());
  gOut[block_id() * kThreads + thread_id()] = sum + 1e6 * pack.elements[thread_id() % 2];
  sync_cluster();
}

void test_clusters() {
  for (const int cluster : {1, 2, 3, 8, 16}) {
    const int blocks = 2 * cluster;
    std::vector<double> in(blocks * kThreads), out(in.size());
    for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<double>(i % 1013);
    simt::reset(with_seed(cluster));
    check(launch(exchange_kernel, LaunchShape{blocks, kThreads, shared_bytes<double>(kThreads), cluster}, nullptr,
                 in.data(), out.data()) == cudaSuccess,
          simt::fault());
    for (int b = 0; b < blocks; ++b) {
      const int first = b / cluster * cluster;
      for (int t = 0; t < kThreads; ++t) {
        double expected = 0.0;
        for (int rank = 0; rank < cluster; ++rank) expected += in[(first + rank) * kThreads + (t + rank) % kThreads];
        expected += 1e6 * in[(first + (b - first + 1) % cluster) * kThreads + t];
        check(out[b * kThreads + t] == expected, "exchange within a cluster");
      }
    }
  }
}

// ---- copies, matrices, products -------------------------------------------------------------------------------------

constexpr int kRows = 16;
constexpr int kColumns = 8;
constexpr int kDepth = 48;
constexpr int kPitch = kDepth + 8;

// D [16, 8] = A [16, kDepth] B [8, kDepth]^T, by one warp; B by the transposed load too when asked.
template <typename T16>
__global__ void product_kernel(const T16* gA, const T16* gB, float* gD, bool transposed) {
  SharedArena arena;
  const Shared<T16> sA = arena.take<T16>(kRows * kPitch);
  const Shared<T16> sB = arena.take<T16>(kColumns * kPitch);
  const Shared<T16> sBt = arena.take<T16>(kDepth * 8);
  for (int pack = lane_id(); pack < kRows * kDepth / 8; pack += kWarpSize) {
    const int row = pack / (kDepth / 8);
    const int column = pack % (kDepth / 8) * 8;
    async_copy16(sA, row * kPitch + column, gA + row * kDepth + column, true);
  }
  async_commit();
  for (int pack = lane_id(); pack < kColumns * kDepth / 8; pack += kWarpSize) {
    const int row = pack / (kDepth / 8);
    const int column = pack % (kDepth / 8) * 8;
    async_copy16(sB, row * kPitch + column, gB + row * kDepth + column, row < 7);  // the last row: zeros
  }
  async_commit();
  async_wait<1>();
  async_wait<0>();
  sync_warp();
  for (int i = lane_id(); i < kDepth * 8; i += kWarpSize) sBt.set(i, sB.get(i % 8 * kPitch + i / 8));
  sync_warp();
  float rD[4] = {};
  for (int depth = 0; depth < kDepth; depth += 16) {
    std::uint32_t rA[4], rBoth[4];
    const int matrix = lane_id() / 8;
    load_matrix_x4(rA, sA, (lane_id() % 8 + matrix % 2 * 8) * kPitch + depth + matrix / 2 * 8);
    if (transposed) {
      load_matrix_x4_transposed(rBoth, sBt, (depth + lane_id() % 16) * 8);
    } else {
      load_matrix_x4(rBoth, sB, lane_id() % 8 * kPitch + depth + matrix % 2 * 8);
    }
    const std::uint32_t rB[2] = {rBoth[0], rBoth[1]};
    mma_m16n8k16<T16>(rD, rA, rB);
  }
  const int group = lane_id() / 4;
  const int pair = lane_id() % 4 * 2;
  gD[group * 8 + pair] = rD[0];
  gD[group * 8 + pair + 1] = rD[1];
  gD[(group + 8) * 8 + pair] = rD[2];
  gD[(group + 8) * 8 + pair + 1] = rD[3];
}

// As simt.h has it: what the error of a step is a share of, beside what has been added up so far.
template <typename T16>
double alignment_of(double left, double right) {
  constexpr int kLeast = std::is_same_v<T16, Half> ? -14 : -126;
  const double least = std::ldexp(1.0, kLeast);
  if ((std::fabs(left) < least) == (std::fabs(right) < least)) return 0.0;
  return least * std::exp2(std::ilogb(std::fabs(left) < least ? right : left)) / 2;
}

template <typename T16>
void test_products() {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> uniform(-2.0f, 2.0f);
  double worst = 0.0, worst_subnormal = 0.0;
  for (int round = 0; round < 26; ++round) {
    const bool small = round < 4;  // small integers: exact without errors
    std::vector<T16> a(kRows * kDepth), b(kColumns * kDepth);
    const auto operand = [&] {
      const float value = uniform(random);
      return narrow<T16>(small ? std::round(value) : (round < 12 ? value : std::fabs(value)));
    };
    std::generate(a.begin(), a.end(), operand);
    std::generate(b.begin(), b.end(), operand);
    const bool subnormal = round >= 20;  // tiny ones and others against normal numbers, against both kinds
    if (subnormal) {
      const float least = std::is_same_v<T16, Half> ? 0x1p-14f : 0x1p-126f;
      const float large = std::is_same_v<T16, Half> ? 64.0f : 0x1p40f;  // sums that are normal floats
      for (T16& value : a) value = narrow<T16>(least * (uniform(random) / (round < 22 ? 128.0f : 2.0f)));
      for (T16& value : b) value = narrow<T16>(uniform(random) * (round < 24 ? large : 0.25f));
      if (round >= 24) {
        for (std::size_t i = 0; i < a.size(); i += 3) a[i] = narrow<T16>(0.0f);
        for (std::size_t i = 0; i < b.size(); i += 2) b[i] = narrow<T16>(least * uniform(random));
      }
    }
    std::vector<float> first;
    for (const simt::MmaError mode : {simt::MmaError::kNone, simt::MmaError::kRandom, simt::MmaError::kExtreme,
                                      simt::MmaError::kPlus, simt::MmaError::kMinus}) {
      simt::Options options = with_seed(round);
      options.mma_error = mode;
      std::vector<float> d(kRows * kColumns), again(d.size());
      simt::reset(options);
      check(launch(product_kernel<T16>, LaunchShape{1, 32, 8192}, nullptr, a.data(), b.data(), d.data(), false) ==
                cudaSuccess,
            simt::fault());
      check(launch(product_kernel<T16>, LaunchShape{1, 32, 8192}, nullptr, a.data(), b.data(), again.data(), true) ==
                cudaSuccess,
            simt::fault());
      check(std::memcmp(d.data(), again.data(), d.size() * sizeof(float)) == 0, "errors depend on the operands alone");
      if (mode == simt::MmaError::kNone) first = d;
      for (int row = 0; row < kRows; ++row) {
        for (int column = 0; column < kColumns; ++column) {
          double sum = 0.0, size = 0.0, allowed = 0.0, aligned = 0.0, squares = 0.0, relied_on = 0.0;
          for (int depth = 0; depth < kDepth; ++depth) {
            const double left = widen(a[row * kDepth + depth]);
            const double right = column == 7 ? 0.0 : static_cast<double>(widen(b[column * kDepth + depth]));
            sum += left * right;
            size += std::fabs(left * right);
            squares += left * left + right * right;
            aligned = std::max(depth % 16 == 0 ? 0.0 : aligned, alignment_of<T16>(left, right));
            if (depth % 16 == 15) {
              allowed += simt::mma_error_bound * (1 + 1e-5) * std::max(size, aligned);
              relied_on += simt::mma_error_bound * (1 + 1e-5) * squares / 2;
            }
          }
          const float got = d[row * kColumns + column];
          const double error = got - sum;
          check(std::fabs(error) <= allowed + 0x1p-148, "a product is off by more than the bound");
          check(std::fabs(error) <= relied_on + 0x1p-148, "a product is off by more than the kernels allow for");
          if (mode == simt::MmaError::kNone && small) check(got == sum, "exact products");
          if (mode == simt::MmaError::kNone) continue;
          (subnormal ? worst_subnormal : worst) =
              std::max(subnormal ? worst_subnormal : worst, std::fabs(error) / std::max(allowed, 0x1p-130));
          if (mode == simt::MmaError::kPlus) check(got >= first[row * kColumns + column], "errors upwards");
          if (mode == simt::MmaError::kMinus) check(got <= first[row * kColumns + column], "errors downwards");
        }
      }
    }
  }
  check(worst > 0.9, "the injected error reaches the bound");
  check(worst_subnormal > 0.9, "the injected error reaches the bound of subnormal rows");
}

// All of c + sum of 16 products, the same in every place.
template <typename T16>
__global__ void sum_kernel(const T16* gA, const T16* gB, float c, float* gD) {
  const int pair = lane_id() % 4 * 2;
  const auto word = [&](const T16* row, int k) {
    return static_cast<std::uint32_t>(bits_of(load(row + k))) | static_cast<std::uint32_t>(bits_of(load(row + k + 1)))
                                                                    << 16;
  };
  const std::uint32_t rA[4] = {word(gA, pair), word(gA, pair), word(gA, pair + 8), word(gA, pair + 8)};
  const std::uint32_t rB[2] = {word(gB, pair), word(gB, pair + 8)};
  float rD[4] = {c, c, c, c};
  mma_m16n8k16<T16>(rD, rA, rB);
  for (int d = 0; d < 4; ++d) gD[lane_id() * 4 + d] = rD[d];
}

struct Term {
  int k;
  double left, right;
};

template <typename T16>
double modelled(simt::MmaModel model, double c, const std::vector<Term>& terms) {
  std::vector<T16> a(16, narrow<T16>(0.0f)), b(16, narrow<T16>(0.0f));
  for (const Term& term : terms) {
    a[term.k] = narrow<T16>(static_cast<float>(term.left));
    b[term.k] = narrow<T16>(static_cast<float>(term.right));
    check(widen(a[term.k]) == term.left && widen(b[term.k]) == term.right, "factors of the case are exact");
  }
  simt::Options options = with_seed(3);
  options.mma_error = simt::MmaError::kPlus;  // a model injects none
  options.mma_model = model;
  simt::reset(options);
  std::vector<float> d(128);
  check(launch(sum_kernel<T16>, LaunchShape{1, 32, 0}, nullptr, a.data(), b.data(), static_cast<float>(c), d.data()) ==
            cudaSuccess,
        simt::fault());
  const bool same =
      std::all_of(d.begin(), d.end(), [&](float value) { return std::memcmp(&value, d.data(), sizeof(value)) == 0; });
  check(same, "one sum, whatever its place");
  return d[0];
}

// Each model by sums made by hand: what a group is, what is kept, which way it is cut off, which exponents count.
template <typename T16>
void test_models() {
  constexpr auto kHopper = simt::MmaModel::kGroup16Bits25;
  constexpr auto kAmpere = simt::MmaModel::kGroup8Bits24;
  constexpr auto kVolta = simt::MmaModel::kGroup4Bits23;
  constexpr auto kCrude = simt::MmaModel::kGroup4Bits22;
  const auto expect = [](simt::MmaModel model, double c, const std::vector<Term>& terms, double wanted,
                         const std::string& what) {
    const double got = modelled<T16>(model, c, terms);
    check(got == wanted, what + " under model " + std::to_string(static_cast<int>(model)) + ": " +
                             std::to_string(got / wanted) + " of what is expected");
  };
  const double tiny = 0x1p-14;
  // The last fraction bit that is kept beside a large accumulator, beside large products, of the accumulator itself.
  for (const auto& [model, bits] : {std::pair(kHopper, 25), {kAmpere, 24}, {kVolta, 23}, {kCrude, 22}}) {
    const double last = std::exp2(-bits), lost = last / 2;
    for (const double kept : {last, -last}) {
      expect(model, -1, {{0, 1, 1}, {3, kept * 0x1p10, 0x1p-10}}, kept, "a term that is kept");
      expect(model, 0, {{1, 1, 1}, {2, -1, 1}, {3, kept * 0x1p10, 0x1p-10}}, kept, "a term that is kept");
      expect(model, kept, {{1, 1, 1}, {2, -1, 1}}, kept, "an accumulator that is kept");
      expect(model, -1, {{0, 1, 1}, {3, 1.5 * kept * 0x1p10, 0x1p-10}}, kept, "a term cut off towards zero");
    }
    expect(model, -1, {{0, 1, 1}, {3, lost * 0x1p10, 0x1p-10}}, 0, "a term that is lost");
    expect(model, -1, {{0, 1, 1}, {3, -1.5 * lost * 0x1p10, 0x1p-10}}, 0, "a term that is lost");
    expect(model, lost, {{1, 1, 1}, {2, -1, 1}}, 0, "an accumulator that is lost");
    // 1.5 x 1.5 is aligned by exponent 0.
    expect(model, 0, {{0, 1.5, 1.5}, {1, -1.5, 1.5}, {2, last * 0x1p10, 0x1p-10}}, last, "unnormalised products");
    // As many as a group has, each just below what is kept.
    std::vector<Term> many, more;
    for (int k = 0; k < 16; ++k) many.push_back({k, lost * 1.9375 * 0x1p12, 0x1p-12});
    for (int k = 0; k < 16; ++k) more.push_back({k, last * 0x1p12, 0x1p-12});
    expect(model, 1, many, 1, "sixteen terms that are lost");
    expect(model, 2, more, 2, "sixteen terms that are lost beside 2");
  }
  expect(kHopper, 1, {{0, 3 * 0x1p-13, 0x1p-12}}, 1, "a sum cut off to a float");
  expect(kHopper, 1, {{0, 0x1p-12, 0x1p-12}, {9, 0x1p-13, 0x1p-12}}, 1, "three quarters of a last place");
  expect(kHopper, 1, {{0, 0x1p-12, 0x1p-11}, {9, 3 * 0x1p-13, 0x1p-12}}, 1 + 0x1p-23, "a last place and some");
  for (const double one : {1.0, -1.0}) {
    for (const simt::MmaModel model : {kHopper, kAmpere, kVolta}) {
      expect(model, one, {{0, one, 1}, {1, one, 1}, {2, one, 1}, {3, one * 1.5 * 0x1p-11, 0x1p-11}}, 4 * one,
             "a sum cut off towards zero");
    }
  }
  // Who meets the 1 before it is gone.
  for (int k = 1; k < 16; ++k) {
    for (const auto& [model, group] : {std::pair(kHopper, 16), {kAmpere, 8}, {kVolta, 4}, {kCrude, 4}}) {
      expect(model, -1, {{0, 1, 1}, {k, tiny, tiny}}, k < group ? 0 : 0x1p-28, "product " + std::to_string(k));
      expect(model, -1, {{15, 1, 1}, {15 - k, tiny, tiny}}, 0, "an earlier product " + std::to_string(k));
    }
  }
  // A subnormal is aligned by the least exponent, a zero by none.
  const bool half = std::is_same_v<T16, Half>;
  const double least = half ? 0x1p-24 : 0x1p-133, large = half ? 0x1p15 : 0x1p127;
  expect(kHopper, 0, {{5, least, 1}}, least, "a subnormal factor");
  expect(kHopper, 0, {{5, least, large}, {6, -least, large}, {7, 0x1p-12, 0x1p-12}}, 0x1p-24, "beside subnormals");
  expect(kHopper, 0, {{5, least, large}, {6, -least, large}, {7, 0x1p-12, 0x1p-13}}, 0, "beside subnormals");
  expect(kAmpere, 0, {{5, least, large}, {6, -least, large}, {7, 0x1p-12, 0x1p-12}}, 0, "beside subnormals");
  expect(kHopper, 0, {{5, 0, large}, {7, 0x1p-12, 0x1p-13}}, 0x1p-25, "beside a zero");
  // Sums that are subnormal, too small, too large.
  expect(kHopper, 0x1p-149, {}, 0x1p-149, "a subnormal accumulator");
  if (!half) {
    expect(kHopper, 0, {{0, 1.5 * 0x1p-75, 0x1p-74}}, 0x1p-149, "a sum cut off to a subnormal float");
    expect(kHopper, 0, {{0, 1.5 * 0x1p-75, 0x1p-75}}, 0, "a sum below all floats");
    expect(kHopper, 0, {{0, 0x1p100, -0x1p100}}, -HUGE_VAL, "a sum beyond all floats");
    check(std::isnan(modelled<T16>(kAmpere, HUGE_VAL, {{0, 0x1p100, -HUGE_VAL}})), "no number");
  }
}

// ---- numbers --------------------------------------------------------------------------------------------------------

// Nearest of all finite values of a 16-bit type, ties to even, by search.
template <typename T16>
struct Table {
  std::vector<double> values;  // of the patterns 0, 1, ... up to the largest finite one, ascending
  double overflow;             // from here on: infinity
  std::uint16_t infinity;

  explicit Table(std::uint16_t infinity_bits) : infinity(infinity_bits) {
    for (std::uint32_t bits = 0; bits < infinity_bits; ++bits) {
      values.push_back(decode(static_cast<std::uint16_t>(bits)));
    }
    overflow = values.back() + (values.back() - values[values.size() - 2]) / 2;
  }
  // From the definition of the format.
  static double decode(std::uint16_t bits) {
    constexpr int kMantissa = std::is_same_v<T16, Half> ? 10 : 7;
    constexpr int kBias = std::is_same_v<T16, Half> ? 15 : 127;
    const int exponent = (bits & 0x7fff) >> kMantissa;
    const int mantissa = bits & ((1 << kMantissa) - 1);
    if (exponent == 0) return std::ldexp(mantissa, 1 - kBias - kMantissa);
    return std::ldexp(mantissa + (1 << kMantissa), exponent - kBias - kMantissa);
  }
  std::uint16_t nearest(double value) const {
    if (value != value) return 0x7fff;
    const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::fabs(value);
    if (magnitude >= overflow) return sign | infinity;
    auto above = std::lower_bound(values.begin(), values.end(), magnitude);
    if (above == values.end()) return static_cast<std::uint16_t>(sign | (infinity - 1));
    auto at = static_cast<std::uint32_t>(above - values.begin());
    if (at > 0) {
      const double up = values[at] - magnitude;
      const double down = magnitude - values[at - 1];
      if (down < up || (down == up && at % 2 == 1)) --at;
    }
    return static_cast<std::uint16_t>(sign | at);
  }
};

template <typename T16>
void test_conversions(std::uint16_t infinity) {
  const Table<T16> table(infinity);
  const auto make = [](std::uint32_t bits) {
    if constexpr (std::is_same_v<T16, Half>) {
      return half_from_bits(static_cast<std::uint16_t>(bits));
    } else {
      return bfloat16_from_bits(static_cast<std::uint16_t>(bits));
    }
  };
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const T16 half = make(bits);
    const float wide = widen(half);
    check(bits_of(half) == bits, "bits_of");
    const std::uint32_t magnitude = bits & 0x7fffu;
    if (magnitude > infinity) {
      check(is_nan(wide) && bits_of(narrow<T16>(wide)) == 0x7fff && !is_finite(half), "NaN");
      continue;
    }
    const double sign = bits >= 0x8000u ? -1.0 : 1.0;
    if (magnitude == infinity) {
      check(wide == sign * HUGE_VAL && !is_finite(half), "infinity");
    } else {
      check(wide == sign * table.values[magnitude] && std::signbit(wide) == (bits >= 0x8000u) && is_finite(half),
            "widen");
    }
    check(bits_of(narrow<T16>(wide)) == bits && bits_of(narrow<T16>(static_cast<double>(wide))) == bits,
          "there and back");
    if (magnitude == infinity) continue;
    // Between this value and the next: the middle, and next to it.
    const double next =
        magnitude + 1u < infinity ? table.values[magnitude + 1] : 2 * table.overflow - table.values[magnitude];
    const double middle = sign * (table.values[magnitude] + (next - table.values[magnitude]) / 2);
    for (const double value :
         {middle, std::nextafter(middle, 0.0), std::nextafter(middle, 2 * middle), 0.9999 * middle}) {
      check(bits_of(narrow<T16>(value)) == table.nearest(value), "narrow of double");
    }
    const auto narrowed = static_cast<float>(middle);
    for (const float value : {narrowed, std::nextafterf(narrowed, 0.0f), std::nextafterf(narrowed, 2 * narrowed)}) {
      check(bits_of(narrow<T16>(value)) == table.nearest(value), "narrow of float");
      check(narrow_pair<T16>(value, wide) == (table.nearest(value) | bits << 16), "narrow_pair");
    }
  }
  std::mt19937_64 random(7);
  for (int i = 0; i < 200000; ++i) {
    const auto bits = random();
    const float value = float_from_bits(static_cast<std::uint32_t>(bits));
    check(bits_of(narrow<T16>(value)) == table.nearest(value), "narrow of any float");
    const double wide = double_from_bits((bits & 0x800fffffffffffffu) | ((bits >> 52 & 0xff) + 896) << 52);
    check(bits_of(narrow<T16>(wide)) == table.nearest(wide), "narrow of any double");
  }
}

void test_directed_rounding() {
  std::mt19937 random(11);
  const auto any = [&](int spread) {
    const std::uint32_t exponent =
        127u - static_cast<std::uint32_t>(spread) + random() % (2 * static_cast<std::uint32_t>(spread) + 1);
    return float_from_bits((random() & 0x807fffffu) | exponent << 23);
  };
  const auto around = [&](float down, float up, long double exact, const char* what) {
    check(down <= exact && exact <= up, what);
    check(down == up || std::nextafterf(down, HUGE_VALF) == up, what);
    if (down == up) check(down == exact, what);
  };
  for (int i = 0; i < 300000; ++i) {
    // 64 bits of long double hold sums of products whose exponents are this close.
    const float a = any(3), b = any(3), c = any(6);
    around(add_down(a, b), add_up(a, b), static_cast<long double>(a) + b, "add");
    around(multiply_down(a, b), multiply_up(a, b), static_cast<long double>(a) * b, "multiply");
    around(fma_down(a, b, c), fma_up(a, b, c), static_cast<long double>(a) * b + c, "fma");
    const float x = std::fabs(any(100));
    const float down = sqrt_down(x), up = sqrt_up(x);
    check(static_cast<double>(down) * down <= x && static_cast<double>(up) * up >= x, "sqrt");
    check(down == up || std::nextafterf(down, HUGE_VALF) == up, "sqrt");
  }
  const float huge = std::numeric_limits<float>::max();
  check(add_up(huge, huge) == HUGE_VALF && add_down(huge, huge) == huge && add_up(-huge, -huge) == -huge, "overflow");
  check(add_up(1.0f, 1e-30f) == std::nextafterf(1.0f, 2.0f) && add_down(1.0f, 1e-30f) == 1.0f, "a far smaller term");
  check(add_down(1.0f, -1e-30f) == std::nextafterf(1.0f, 0.0f) && add_up(1.0f, -1e-30f) == 1.0f, "a far smaller term");
  check(multiply_up(1e-30f, 1e-30f) > 0.0f && multiply_down(1e-30f, 1e-30f) == 0.0f, "underflow");
  check(add_up(HUGE_VALF, 1.0f) == HUGE_VALF && multiply_down(HUGE_VALF, 2.0f) == HUGE_VALF, "infinity");
  check(is_nan(add_up(NAN, 1.0f)) && is_nan(fma_down(1.0f, NAN, 1.0f)) && is_nan(sqrt_up(NAN)), "NaN");
  check(sqrt_up(0.0f) == 0.0f && sqrt_down(0.0f) == 0.0f && sqrt_up(HUGE_VALF) == HUGE_VALF, "sqrt at the ends");
  check(std::signbit(add_down(1.0f, -1.0f)) && !std::signbit(add_up(1.0f, -1.0f)), "zeros");
  check(minimum(NAN, 1.0f) == 1.0f && maximum(1.0f, NAN) == 1.0f, "minimum and maximum of NaN");
  check(std::signbit(minimum(0.0f, -0.0f)) && !std::signbit(maximum(-0.0f, 0.0f)), "minimum and maximum of zeros");
}

// Many blocks, warps out of step: partial sums through shared memory, results in order.
__global__ void pipeline_kernel(const float* gIn, float* gOut, int rounds) {
  SharedArena arena;
  const Shared<float> sRow = arena.take<float>(thread_count());
  const Shared<float> sTwin = sRow.offset(thread_count() / 2);
  float value = load(gIn + block_id() * thread_count() + thread_id());
  for (int round = 0; round < rounds; ++round) {
    sRow.set(thread_id(), value);
    sync_block();
    value = 0.5f * (sRow.get((thread_id() + 1) % thread_count()) + sTwin.get((thread_id() % (thread_count() / 2))));
    for (int turn = 0; turn < warp_id(); ++turn) value += shuffle_xor(value, 1 + turn) * 0.0f;
    sync_block();
  }
  gOut[block_id() * thread_count() + thread_id()] = value;
}

void test_schedules() {
  constexpr int kBlocks = 9, kWide = 128, kRounds = 10;
  std::vector<float> in(kBlocks * kWide);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 17);
  std::vector<float> expected = in;
  for (int round = 0; round < kRounds; ++round) {
    const std::vector<float> last = expected;
    for (int i = 0; i < kBlocks * kWide; ++i) {
      const int block = i / kWide * kWide, t = i % kWide;
      expected[i] = 0.5f * (last[block + (t + 1) % kWide] + last[block + kWide / 2 + t % (kWide / 2)]);
    }
  }
  for (int seed = 1; seed <= 30; ++seed) {
    std::vector<float> out(in.size(), -1.0f);
    simt::reset(with_seed(seed));
    check(launch(pipeline_kernel, LaunchShape{kBlocks, kWide, shared_bytes<float>(kWide)}, nullptr, in.data(),
                 out.data(), kRounds) == cudaSuccess,
          simt::fault());
    check(out == expected, "a pipeline under seed " + std::to_string(seed));
  }
}

}  // namespace
}  // namespace sn::cuda

int main(int argc, char** argv) {
  using namespace sn::cuda;
  if (argc == 3 && std::string(argv[1]) == "--overrun") return overrun(argv[2]);
  test_faults();
  test_overruns(argv[0]);
  test_shuffles<float>();
  test_shuffles<double>();
  test_shuffles<std::int32_t>();
  test_shuffles<std::uint32_t>();
  test_shuffles<std::int64_t>();
  test_shuffles<std::uint64_t>();
  test_votes();
  test_atomics();
  test_clusters();
  test_products<Half>();
  test_products<BFloat16>();
  test_models<Half>();
  test_models<BFloat16>();
  test_conversions<Half>(0x7c00);
  test_conversions<BFloat16>(0x7f80);
  test_directed_rounding();
  test_schedules();
  std::printf("%d passed, 0 failed\n", checks);
  return 0;
}
