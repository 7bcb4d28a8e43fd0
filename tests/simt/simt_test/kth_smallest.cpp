// The k-th smallest of random values, ties, infinities and nothing at all, against sorted ones.
#include "cuda/screen/kth_smallest.cuh"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "simt_test.h"

namespace sn::cuda {
namespace {

// The block finds the k-th smallest twice, so that what the first search leaves behind is met by the second.
template <int kStaged>
__global__ void kth_kernel(const std::uint32_t* gValues, std::int64_t count, std::uint32_t k, float* gFound) {
  SharedArena arena;
  const Shared<std::uint32_t> sStage = arena.take<std::uint32_t>(kStaged);
  const Shared<std::uint32_t> sWord = arena.take<std::uint32_t>(1);
  for (int again = 0; again < 2; ++again) {
    sync_block();
    const float found = kth_smallest<kStaged>(
        sStage, sWord, count, k, [&](std::int64_t e) { return load(gValues + e); },
        [](std::uint32_t bits) { return bits; });
    gFound[again * thread_count() + thread_id()] = found;
  }
}

template <int kStaged>
void test_kth(int threads, std::int64_t count, std::uint32_t k, int kind, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::uint32_t> values(static_cast<std::size_t>(count));
  for (std::uint32_t& value : values) {
    // Kinds: bounds that differ little, few different ones, all the same, anything; some are infinite or missing.
    const auto any = static_cast<std::uint32_t>(random());
    value = bits_of(1.0f) + any % 4096 * 256;
    if (kind == 1) value = any % 3;
    if (kind == 2) value = bits_of(2.5f);
    if (kind == 3) value = any % kInfinityBits;
    if (kind != 2 && any >> 16 < 3000) value = any % 2 == 0 ? kInfinityBits : kNoBits;
  }
  std::vector<float> found(static_cast<std::size_t>(2 * threads));
  simt::reset(with_seed(seed));
  const LaunchShape shape{1, threads, shared_bytes<std::uint32_t>(kStaged) + shared_bytes<std::uint32_t>(1)};
  check(launch(kth_kernel<kStaged>, shape, nullptr, values.data(), count, k, found.data()) == cudaSuccess,
        simt::fault());
  std::sort(values.begin(), values.end());
  const bool exists = k <= values.size() && values[k - 1] < kInfinityBits;
  const float expected = exists ? float_from_bits(values[k - 1]) : std::numeric_limits<float>::infinity();
  const std::string where = std::to_string(count) + " values of kind " + std::to_string(kind) + ", the " +
                            std::to_string(k) + "-th, staged " + std::to_string(kStaged);
  check(std::all_of(found.begin(), found.end(), [&](float one) { return one == found[0]; }), where + ": all the same");
  check(found[0] >= expected, where + ": below the k-th");
  // Where values share places, the k-th place bounds what is staged next: values that tie with it may be too many.
  if (count <= kStaged || kind != 1) check(found[0] == expected, where + ": above the k-th");
}

}  // namespace

void test_kth_smallest() {
  std::uint64_t seed = 0;
  for (const std::uint32_t k : {1u, 2u, 10u, 31u, 33u, 128u}) {
    for (int kind = 0; kind < 4; ++kind) {
      for (const std::int64_t count : {0, 1, 31, 33, 200, 512}) test_kth<512>(32, count, k, kind, ++seed);
      for (const std::int64_t count : {513, 1500}) test_kth<512>(32, count, k, kind, ++seed);
      for (const std::int64_t count : {9, 700, 1024, 1025, 4000}) test_kth<1024>(128, count, k, kind, ++seed);
    }
  }
}

}  // namespace sn::cuda
