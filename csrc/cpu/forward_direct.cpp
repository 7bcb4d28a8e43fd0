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

// Whether every value is finite.
bool all_finite(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels, int workers) {
  std::atomic<bool> finite{true};
  for (const FeatureView* side : {&args.anchors, &args.candidates}) {
    for_blocks(pool, workers, side->rows, kAnchorBlock, [&](std::int64_t begin, std::int64_t end) {
      if (!kernels.all_finite(args.dtype, *side, args.dims, begin, end)) finite.store(false);
    });
    if (args.symmetric) break;
  }
  return finite.load();
}

// Copies a side into panels of interleaved rows. Returns whether every value is finite.
bool turn(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels, int workers, const FeatureView& side,
          std::int64_t columns, float* out) {
  std::atomic<bool> finite{true};
  for_each(pool, workers, divide_up(side.rows, kPanel), [&](std::int64_t panel) {
    float* to = out + panel * kPanel * columns;
    if (!kernels.turn_panel(args.dtype, side, panel, args.dims, to)) finite.store(false);
  });
  return finite.load();
}

// Mirrors a block of distances above the diagonal to below it. On the diagonal both are one block.
template <class Acc>
void mirror(Acc* d2, std::int64_t pitch, std::int64_t i0, std::int64_t ni, std::int64_t j0, std::int64_t nj) {
  for (std::int64_t i = 0; i < ni; ++i) {
    for (std::int64_t j = i0 == j0 ? i + 1 : 0; j < nj; ++j) {
      d2[(j0 + j) * pitch + i0 + i] = d2[(i0 + i) * pitch + j0 + j];
    }
  }
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
  // A strip of anchors against all candidates at a time. A small symmetric square is one strip, half of it mirrored.
  const DirectPlan plan = plan_direct(N, M, args.dims, args.dtype, args.symmetric, kernels.panels_from);
  const Scratch scratch(static_cast<std::size_t>(plan.bytes));
  Acc* d2 = static_cast<Acc*>(scratch.data());
  const Acc* anchor_panels = d2 + round_up(N, kPanel) * plan.pitch;
  const Acc* candidate_panels = anchor_panels;
  if constexpr (sizeof(Acc) == sizeof(float)) {
    if (plan.panels) {
      Acc* copy = d2 + round_up(N, kPanel) * plan.pitch;
      bool finite = turn(args, pool, kernels, workers, args.anchors, plan.columns, copy);
      if (!args.symmetric) {
        copy += round_up(N, kPanel) * plan.columns;
        candidate_panels = copy;
        finite = turn(args, pool, kernels, workers, args.candidates, plan.columns, copy) && finite;
      }
      if (!finite) return loss.poison();
    }
  }
  if (!plan.panels && !all_finite(args, pool, kernels, workers)) return loss.poison();

  // The candidates of each anchor's identity, by row.
  std::vector<Identity> identity_of(static_cast<std::size_t>(N), Identity{0, 0, 0, 0});
  for (const Identity& identity : identities.list) {
    for (std::int64_t p = identity.anchor_begin; p < identity.anchor_end; ++p) {
      identity_of[identities.anchor_order[p]] = identity;
    }
  }

  const std::int64_t strip = plan.strip;
  const bool mirrored = args.symmetric && strip >= N;
  const std::int64_t column_blocks = divide_up(M, kDirectBlock);
  for (std::int64_t first = 0; first < N; first += strip) {
    const std::int64_t rows = std::min(strip, N - first);
    const std::int64_t row_blocks = divide_up(rows, kDirectBlock);
    for_each(pool, workers, row_blocks * column_blocks, [&](std::int64_t item) {
      const std::int64_t i0 = item / column_blocks * kDirectBlock;
      const std::int64_t j0 = item % column_blocks * kDirectBlock;
      if (mirrored && j0 < i0) return;
      const std::int64_t ni = std::min(kDirectBlock, rows - i0);
      const std::int64_t nj = std::min(kDirectBlock, M - j0);
      Acc* block = d2 + i0 * plan.pitch + j0;
      if constexpr (sizeof(Acc) == sizeof(float)) {
        if (plan.panels) {
          kernels.panel_block(anchor_panels + i0 * plan.columns, divide_up(ni, kPanel),
                              candidate_panels + j0 * plan.columns, divide_up(nj, kPanel), kPanel * plan.columns,
                              mirrored && i0 == j0, block, plan.pitch);
        }
      }
      if (!plan.panels) {
        const void* x[kDirectBlock];
        const void* z[kDirectBlock];
        for (std::int64_t i = 0; i < ni; ++i) x[i] = row_of(args.anchors, args.dtype, first + i0 + i);
        for (std::int64_t j = 0; j < nj; ++j) z[j] = row_of(args.candidates, args.dtype, j0 + j);
        kernels.direct_block(args.dtype, x, ni, z, nj, args.dims, mirrored && i0 == j0, block, plan.pitch);
      }
      if (mirrored) mirror(d2, plan.pitch, i0, ni, j0, nj);
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
        const Acc* row = d2 + (i - first) * plan.pitch;
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
