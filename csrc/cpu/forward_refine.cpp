// The end of the screening path: direct distances of the candidates that the bounds leave open, and of the positives.
#include <algorithm>
#include <bit>
#include <memory>
#include <mutex>
#include <vector>

#include "forward.h"
#include "memory.h"
#include "parallel.h"
#include "plan.h"

namespace sn::cpu {
namespace {

// Nearest and farthest positive of each anchor, from direct distances between the members of each identity. These are
// few pairs unless identities are huge.
void find_positives(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels,
                    const Identities& identities, Loss<float>& loss) {
  struct Item {
    std::int32_t identity;
    std::int32_t block;
  };
  std::vector<Item> items;
  double pairs = 0.0;
  for (std::size_t g = 0; g < identities.list.size(); ++g) {
    const Identity& identity = identities.list[g];
    const std::int64_t members = identity.anchor_end - identity.anchor_begin;
    pairs += static_cast<double>(members) * static_cast<double>(identity.candidate_end - identity.candidate_begin);
    for (std::int64_t block = 0; block * kDirectBlock < members; ++block) {
      items.push_back({static_cast<std::int32_t>(g), static_cast<std::int32_t>(block)});
    }
  }
  // In the symmetric case two blocks of pairs may offer to the same anchor: a lock for each block of positions.
  const auto locks = std::make_unique<std::mutex[]>(static_cast<std::size_t>(args.anchors.rows / kDirectBlock + 1));
  const std::vector<std::int32_t>& candidates = identities.candidate_order();
  const int workers = workers_for(pool, 0.1 * pairs * static_cast<double>(args.dims));
  for_each(pool, workers, static_cast<std::int64_t>(items.size()), [&](std::int64_t item) {
    const Identity& identity = identities.list[items[item].identity];
    const std::int64_t p0 = identity.anchor_begin + items[item].block * kDirectBlock;
    const std::int64_t np = std::min(kDirectBlock, identity.anchor_end - p0);
    const void* x[kDirectBlock];
    const void* z[kDirectBlock];
    float d2[kDirectBlock * kDirectBlock];
    for (std::int64_t i = 0; i < np; ++i) x[i] = row_of(args.anchors, args.dtype, identities.anchor_order[p0 + i]);
    // Offers to anchor p the nearest and the farthest of candidate(n) at distance value(n), n in [begin, end).
    const auto offer = [&](std::int64_t p, std::int64_t begin, std::int64_t end, const auto& value,
                           const auto& candidate) {
      const std::int64_t anchor = identities.anchor_order[p];
      const std::int64_t self = self_of(args, anchor);
      Positive<float> near{-1, 0.0f};
      Positive<float> far{-1, 0.0f};
      for (std::int64_t n = begin; n < end; ++n) {
        const std::int32_t j = candidate(n);
        if (j == self) continue;
        const float distance = value(n);
        if (near.index < 0 || nearer(distance, j, near.d2, near.index)) near = {j, distance};
        if (far.index < 0 || farther(distance, j, far.d2, far.index)) far = {j, distance};
      }
      if (near.index < 0) return;
      const std::lock_guard<std::mutex> guard(locks[p / kDirectBlock]);
      loss.offer_positive(anchor, near.index, near.d2);
      loss.offer_positive(anchor, far.index, far.d2);
    };
    for (std::int64_t q0 = args.symmetric ? p0 : identity.candidate_begin; q0 < identity.candidate_end;
         q0 += kDirectBlock) {
      const std::int64_t nq = std::min(kDirectBlock, identity.candidate_end - q0);
      for (std::int64_t j = 0; j < nq; ++j) z[j] = row_of(args.candidates, args.dtype, candidates[q0 + j]);
      const bool diagonal = args.symmetric && q0 == p0;
      kernels.direct_block(args.dtype, x, np, z, nq, args.dims, diagonal, d2, kDirectBlock);
      for (std::int64_t i = 0; i < np; ++i) {
        offer(
            p0 + i, diagonal ? i + 1 : 0, nq, [&](std::int64_t j) { return d2[i * kDirectBlock + j]; },
            [&](std::int64_t j) { return candidates[q0 + j]; });
      }
      for (std::int64_t j = 0; args.symmetric && j < nq; ++j) {
        offer(
            q0 + j, 0, diagonal ? j : np, [&](std::int64_t i) { return d2[i * kDirectBlock + j]; },
            [&](std::int64_t i) { return identities.anchor_order[p0 + i]; });
      }
    }
  });
}

// Every direct distance that a symmetric batch wants, or the entries of every list otherwise: pairs in groups of four
// with one anchor. Two rows that list each other have one distance, with the same bits from both sides, and so have the
// members of an identity: one of the two rows has the pair. An entry's score is the place of its pair in the meantime.
class SharedPairs {
 public:
  // `memory`: room for `bytes`. Check fits() before anything else.
  SharedPairs(const ForwardArgs& args, const Identities& identities, const Screen& screen, void* memory,
              std::size_t bytes)
      : identities_(identities), screen_(screen), symmetric_(args.symmetric) {
    const std::int64_t rows = screen.anchors.rows;
    std::int64_t pairs = 0;
    for (std::int64_t p = 0; p < rows; ++p) pairs += screen.list_counts[p] + kPairGroup - 1;
    if (symmetric_) {
      for (const Identity& identity : identities.list) {
        members_ = std::max(members_, identity.anchor_end - identity.anchor_begin);
      }
      with_positives_ = members_ <= kMostMembers;
      if (with_positives_) pairs += rows * (members_ - 1);
    }
    const std::int64_t most = round_up(pairs, kPanel);
    const auto lay_out = [&](Slices slices) {
      anchors_ = slices.take<std::int32_t>(most / kPairGroup);
      candidates_ = slices.take<std::int32_t>(most);
      distances_ = slices.take<float>(most);
      if (with_positives_) positives_ = slices.take<std::int32_t>(rows * members_);
      return slices.bytes();
    };
    fits_ = lay_out(Slices()) <= bytes;
    if (!fits_) return;
    lay_out(Slices(memory));
    list_pairs();
  }
  bool fits() const { return fits_; }
  bool with_positives() const { return with_positives_; }
  PairList list() const { return {anchors_, candidates_, distances_, count_ / kPanel}; }

  // Hands the distances to the entries of rows [begin, end) and their positives.
  void hand_over(std::int64_t begin, std::int64_t end, Loss<float>& loss) const {
    for (std::int64_t p = begin; p < end; ++p) {
      Entry* listed = entries(p);
      for (std::int64_t e = 0; e < screen_.list_counts[p]; ++e) listed[e].score = distances_[place_of(listed[e])];
    }
    if (!with_positives_) return;
    const auto behind = [](const Identity& identity, std::int64_t p) { return identity.anchor_end <= p; };
    auto identity = std::lower_bound(identities_.list.begin(), identities_.list.end(), begin, behind);
    for (std::int64_t p = begin; p < end; ++p) {
      if (p >= identity->anchor_end) ++identity;
      for (std::int64_t q = identity->anchor_begin; q < identity->anchor_end; ++q) {
        if (q == p) continue;
        const std::int32_t place = positive(std::min(p, q), std::max(p, q));
        loss.offer_positive(identities_.anchor_order[p], identities_.anchor_order[q], distances_[place]);
      }
    }
  }

 private:
  // Larger identities have too many pairs for a table, and enough for blocks of their own.
  static constexpr std::int64_t kMostMembers = 16;
  // Longer lists, those of clusters, share nothing: to search them would cost as much as the distances.
  static constexpr std::int32_t kMostSearched = 64;

  Entry* entries(std::int64_t p) const { return screen_.lists + p * screen_.capacity; }
  static std::int32_t place_of(const Entry& entry) { return std::bit_cast<std::int32_t>(entry.score); }
  // The place of the pair of p and its q - p th follower in its identity.
  std::int32_t& positive(std::int64_t p, std::int64_t q) const { return positives_[p * members_ + q - p]; }

  std::int32_t append(std::int64_t p, std::int64_t q) {
    if (count_ % kPairGroup == 0) anchors_[count_ / kPairGroup] = static_cast<std::int32_t>(p);
    candidates_[count_] = static_cast<std::int32_t>(q);
    return static_cast<std::int32_t>(count_++);
  }
  // Ends a group, with its last pair once more.
  void fill_group() {
    for (; count_ % kPairGroup != 0; ++count_) candidates_[count_] = candidates_[count_ - 1];
  }
  // The place of the pair that row p lists with q, or -1.
  std::int32_t searched(std::int64_t p, std::int64_t q) const {
    const Entry* listed = entries(p);
    const std::int32_t count = screen_.list_counts[p];
    if (count > kMostSearched) return -1;
    std::int32_t at = -1;
    for (std::int32_t e = 0; e < count; ++e) at = listed[e].candidate == q ? e : at;
    return at < 0 ? -1 : place_of(listed[at]);
  }
  void list_row(std::int64_t p, const Identity& identity) {
    for (std::int64_t q = p + 1; with_positives_ && q < identity.anchor_end; ++q) positive(p, q) = append(p, q);
    Entry* listed = entries(p);
    for (std::int64_t e = 0; e < screen_.list_counts[p]; ++e) {
      const std::int64_t q = listed[e].candidate;
      std::int32_t place = -1;
      if (with_positives_ && q >= identity.anchor_begin && q < identity.anchor_end) {
        place = positive(std::min(p, q), std::max(p, q));
      } else if (symmetric_ && q < p) {
        place = searched(q, p);
      }
      listed[e].score = std::bit_cast<float>(place >= 0 ? place : append(p, q));
    }
    fill_group();
  }
  void list_pairs() {
    if (symmetric_) {
      for (const Identity& identity : identities_.list) {
        for (std::int64_t p = identity.anchor_begin; p < identity.anchor_end; ++p) list_row(p, identity);
      }
    } else {
      for (std::int64_t p = 0; p < screen_.anchors.rows; ++p) list_row(p, Identity{});
    }
    while (count_ % kPanel != 0) {
      append(anchors_[count_ / kPairGroup - 1], candidates_[count_ - 1]);
      fill_group();
    }
    std::fill_n(distances_, count_, 0.0f);
  }

  const Identities& identities_;
  const Screen& screen_;
  bool symmetric_;
  bool with_positives_ = false;
  bool fits_ = false;
  std::int64_t members_ = 0;  // of the largest identity
  std::int64_t count_ = 0;
  std::int32_t* anchors_ = nullptr;
  std::int32_t* candidates_ = nullptr;
  float* distances_ = nullptr;
  std::int32_t* positives_ = nullptr;
};

}  // namespace

void refine(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels, const Identities& identities,
            const Screen& screen, Loss<float>& loss) {
  const std::int64_t N = args.anchors.rows;
  const int workers = pool.threads;
  constexpr std::int64_t kRows = 64;
  if (!refines_by_columns(N, args.candidates.rows, args.dims)) {
    find_positives(args, pool, kernels, identities, loss);
    for_blocks(pool, workers, N, kRows, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) kernels.refine_rows(screen, p);
    });
    return;
  }
  // Rows are far apart in memory and each is used many times: gathers a segment of columns where it stays in cache,
  // uses it for all lists, goes on. The screening copy is no longer needed: its memory holds two such buffers and, of
  // rows long enough, the list of pairs.
  const std::int64_t M = args.symmetric ? 0 : args.candidates.rows;
  float* buffers[2] = {reinterpret_cast<float*>(screen.anchors.packed), nullptr};
  float* candidate_buffers[2] = {reinterpret_cast<float*>(screen.candidates.packed), nullptr};
  buffers[1] = buffers[0] + N * kRefineColumns;
  candidate_buffers[1] = candidate_buffers[0] + args.candidates.rows * kRefineColumns;
  const std::int64_t copy_bytes = screen.anchors.padded * divide_up(args.dims, 2) * std::int64_t{sizeof(std::uint32_t)};
  const std::int64_t buffer_bytes = 2 * N * kRefineColumns * std::int64_t{sizeof(float)};
  SharedPairs shared(args, identities, screen, buffers[1] + N * kRefineColumns,
                     static_cast<std::size_t>(copy_bytes - buffer_bytes));
  if (!shared.with_positives() || !shared.fits()) find_positives(args, pool, kernels, identities, loss);
  if (!shared.fits()) {
    for (std::int64_t p = 0; p < N; ++p) {
      for (std::int64_t e = 0; e < screen.list_counts[p]; ++e) screen.lists[p * screen.capacity + e].score = 0.0f;
    }
  }
  const std::int64_t segments = divide_up(args.dims, kRefineColumns);
  const std::int64_t anchor_items = divide_up(N, kRows);
  const std::int64_t candidate_items = divide_up(M, kRows);
  const auto gather = [&](std::int64_t segment, std::int64_t item, std::int64_t buffer) {
    const bool of_anchors = item < anchor_items;
    const ScreenSide& side = of_anchors ? screen.anchors : screen.candidates;
    const std::int64_t begin = (of_anchors ? item : item - anchor_items) * kRows;
    const std::int64_t column = segment * kRefineColumns;
    kernels.gather_columns(args.dtype, side.features, side.order, begin, std::min(side.rows, begin + kRows), column,
                           std::min(kRefineColumns, args.dims - column), kRefineColumns,
                           of_anchors ? buffers[buffer] : candidate_buffers[buffer]);
  };
  if (!shared.fits()) {
    const auto use = [&](std::int64_t, std::int64_t item, std::int64_t buffer) {
      for (std::int64_t p = item * kRows; p < std::min(N, (item + 1) * kRows); ++p) {
        kernels.refine_columns(screen, buffers[buffer], candidate_buffers[buffer], p);
      }
    };
    gather_and_use(pool, workers, segments, anchor_items + candidate_items, anchor_items, true, gather, use);
    return;
  }
  const PairList list = shared.list();
  const auto use = [&](std::int64_t, std::int64_t item, std::int64_t buffer) {
    kernels.refine_pairs(list, item * kRows, std::min(list.vectors, (item + 1) * kRows), buffers[buffer],
                         candidate_buffers[buffer]);
  };
  gather_and_use(pool, workers, segments, anchor_items + candidate_items, divide_up(list.vectors, kRows), true, gather,
                 use);
  for_blocks(pool, workers, N, kRows,
             [&](std::int64_t begin, std::int64_t end) { shared.hand_over(begin, end, loss); });
}

}  // namespace sn::cpu
