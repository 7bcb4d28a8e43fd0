// The direct path: computes every distance in the one summation order (kernels/direct.h).
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "forward.h"
#include "memory.h"
#include "parallel.h"
#include "plan.h"

namespace sn::cpu {
namespace {

// The support set of one row of distances, for any K. keys, ids: scratch.
template <class Acc>
std::int64_t select(const Kernels& kernels, const Acc* d2, std::int64_t count, std::int64_t self, std::int64_t K,
                    std::vector<std::uint64_t>& keys, std::vector<std::int32_t>& ids, std::int32_t* support,
                    Acc* support_d2) {
  if constexpr (sizeof(Acc) == sizeof(float)) {
    if (K <= kListMost) {
      keys.resize(static_cast<std::size_t>(kListMost));
      const std::int64_t found = kernels.smallest(d2, count, self, K, keys.data());
      for (std::int64_t e = 0; e < found; ++e) {
        support[e] = key_index(keys[e]);
        support_d2[e] = key_squared_distance(keys[e]);
      }
      return found;
    }
  }
  ids.clear();
  for (std::int64_t j = 0; j < count; ++j) {
    if (j != self) ids.push_back(static_cast<std::int32_t>(j));
  }
  const auto before = [d2](std::int32_t a, std::int32_t b) { return nearer(d2[a], a, d2[b], b); };
  const std::int64_t found = std::min<std::int64_t>(K, static_cast<std::int64_t>(ids.size()));
  if (found < static_cast<std::int64_t>(ids.size())) {
    std::nth_element(ids.begin(), ids.begin() + found, ids.end(), before);
  }
  std::sort(ids.begin(), ids.begin() + found, before);
  for (std::int64_t e = 0; e < found; ++e) {
    support[e] = ids[e];
    support_d2[e] = d2[ids[e]];
  }
  return found;
}

}  // namespace

template <class Acc>
void forward_direct(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels,
                    const Identities& identities, Loss<Acc>& loss) {
  const std::int64_t N = args.anchors.rows;
  const std::int64_t M = args.candidates.rows;
  const std::int64_t K = loss.K();
  const int workers =
      workers_for(pool, 0.1 * static_cast<double>(N) * static_cast<double>(M) * static_cast<double>(args.dims));
  for (const FeatureView* side : {&args.anchors, &args.candidates}) {
    std::atomic<bool> finite{true};
    for_blocks(pool, workers, side->rows, kAnchorBlock, [&](std::int64_t begin, std::int64_t end) {
      if (!kernels.all_finite(args.dtype, *side, args.dims, begin, end)) finite.store(false);
    });
    if (!finite.load()) return loss.poison();
    if (args.symmetric) break;
  }

  // The candidates of each anchor's identity, by row.
  std::vector<Identity> identity_of(static_cast<std::size_t>(N), Identity{0, 0, 0, 0});
  for (const Identity& identity : identities.list) {
    for (std::int64_t p = identity.anchor_begin; p < identity.anchor_end; ++p) {
      identity_of[identities.anchor_order[p]] = identity;
    }
  }

  // A strip of anchors against all candidates at a time. A small symmetric square is one strip, half of it mirrored.
  const std::int64_t strip = direct_strip(N, M, static_cast<std::int64_t>(sizeof(Acc)));
  const bool mirrored = args.symmetric && strip >= N;
  Scratch scratch(static_cast<std::size_t>(strip) * static_cast<std::size_t>(M) * sizeof(Acc));
  Acc* d2 = static_cast<Acc*>(scratch.data());
  const std::int64_t column_blocks = (M + kDirectBlock - 1) / kDirectBlock;
  for (std::int64_t first = 0; first < N; first += strip) {
    const std::int64_t rows = std::min(strip, N - first);
    const std::int64_t row_blocks = (rows + kDirectBlock - 1) / kDirectBlock;
    for_each(pool, workers, row_blocks * column_blocks, [&](std::int64_t item) {
      const std::int64_t i0 = item / column_blocks * kDirectBlock;
      const std::int64_t j0 = item % column_blocks * kDirectBlock;
      if (mirrored && j0 < i0) return;
      const std::int64_t ni = std::min(kDirectBlock, rows - i0);
      const std::int64_t nj = std::min(kDirectBlock, M - j0);
      const void* x[kDirectBlock];
      const void* z[kDirectBlock];
      for (std::int64_t i = 0; i < ni; ++i) x[i] = row_of(args.anchors, args.dtype, first + i0 + i);
      for (std::int64_t j = 0; j < nj; ++j) z[j] = row_of(args.candidates, args.dtype, j0 + j);
      Acc* block = d2 + i0 * M + j0;
      kernels.direct_block(args.dtype, x, ni, z, nj, args.dims, mirrored && i0 == j0, block, M);
      if (!mirrored) return;
      for (std::int64_t i = 0; i < ni; ++i) {
        for (std::int64_t j = i0 == j0 ? i + 1 : 0; j < nj; ++j) d2[(j0 + j) * M + i0 + i] = block[i * M + j];
      }
    });
    // One worker adds up the anchors of one block: blocks of a strip must be blocks of the whole batch.
    const int selectors = workers_for(pool, static_cast<double>(rows) * (static_cast<double>(M) + 2500.0));
    const std::int64_t first_block = first / kAnchorBlock;
    const std::int64_t last_block = (first + rows - 1) / kAnchorBlock;
    for_each(pool, selectors, last_block - first_block + 1, [&](std::int64_t item) {
      std::vector<std::uint64_t> keys;
      std::vector<std::int32_t> ids;
      std::vector<std::int32_t> support(static_cast<std::size_t>(K));
      std::vector<Acc> support_d2(static_cast<std::size_t>(K));
      std::vector<std::uint8_t> positive(static_cast<std::size_t>(K));
      const std::int64_t begin = std::max(first, (first_block + item) * kAnchorBlock);
      const std::int64_t end = std::min(first + rows, (first_block + item + 1) * kAnchorBlock);
      for (std::int64_t i = begin; i < end; ++i) {
        const Acc* row = d2 + (i - first) * M;
        const std::int64_t self = self_of(args, i);
        const Identity& identity = identity_of[i];
        for (std::int64_t q = identity.candidate_begin; q < identity.candidate_end; ++q) {
          const std::int32_t j = identities.candidate_order()[q];
          if (j != self) loss.offer_positive(i, j, row[j]);
        }
        const std::int64_t found = select(kernels, row, M, self, K, keys, ids, support.data(), support_d2.data());
        loss.finish(i, support.data(), support_d2.data(), found, positive.data());
      }
    });
  }
  loss.reduce();
}

template void forward_direct<float>(const ForwardArgs&, const ThreadPool&, const Kernels&, const Identities&,
                                    Loss<float>&);
template void forward_direct<double>(const ForwardArgs&, const ThreadPool&, const Kernels&, const Identities&,
                                     Loss<double>&);

}  // namespace sn::cpu
