// Wrappers of ptx.cuh: collectives of a warp, atomics, clusters. A pipeline under many schedules.
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "simt_test.h"

namespace sn::cuda {
namespace {

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
  // Every thread draws its own ticket.
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

// Many blocks with warps out of step, partial sums through shared memory.
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

void test_wrappers() {
  test_shuffles<float>();
  test_shuffles<double>();
  test_shuffles<std::int32_t>();
  test_shuffles<std::uint32_t>();
  test_shuffles<std::int64_t>();
  test_shuffles<std::uint64_t>();
  test_votes();
  test_atomics();
  test_clusters();
  test_schedules();
}

}  // namespace sn::cuda
