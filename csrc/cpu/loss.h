// From selections to the loss: each anchor's terms, their totals, the statistics.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../sn_math.h"
#include "../sn_types.h"

namespace sn::cpu {

// Terms are added within blocks of this many anchors, then over the blocks: one order for any number of threads.
inline constexpr std::int64_t kAnchorBlock = 64;

inline void add(AnchorTerms& to, const AnchorTerms& terms) {
  to.loss += terms.loss;
  to.positive_sum += terms.positive_sum;
  to.negative_sum += terms.negative_sum;
  to.positives += terms.positives;
  to.negatives += terms.negatives;
  to.valid += terms.valid;
  to.nearest_is_positive += terms.nearest_is_positive;
  to.support_positives += terms.support_positives;
}

template <class Acc>
class Loss {
 public:
  explicit Loss(const ForwardArgs& args)
      : args_(args),
        N_(args.anchors.rows),
        K_(std::min(args.options.k, args.candidates.rows)),
        near_d2_(static_cast<std::size_t>(N_)),
        far_d2_(static_cast<std::size_t>(N_)),
        blocks_(static_cast<std::size_t>((N_ + kAnchorBlock - 1) / kAnchorBlock)) {
    std::fill_n(args.nearest_positive, N_, -1);
    std::fill_n(args.farthest_positive, N_, -1);
  }
  std::int64_t K() const { return K_; }

  void offer_positive(std::int64_t anchor, std::int32_t candidate, Acc d2) {
    std::int32_t& near = args_.nearest_positive[anchor];
    std::int32_t& far = args_.farthest_positive[anchor];
    if (near < 0 || nearer(d2, candidate, near_d2_[anchor], near)) {
      near = candidate;
      near_d2_[anchor] = d2;
    }
    if (far < 0 || farther(d2, candidate, far_d2_[anchor], far)) {
      far = candidate;
      far_d2_[anchor] = d2;
    }
  }

  // Finishes an anchor whose positives have been offered. support, d2: `count` entries in order. positive: scratch [K].
  void finish(std::int64_t anchor, const std::int32_t* support, const Acc* d2, std::int64_t count,
              std::uint8_t* positive) {
    std::int32_t* indices = args_.indices + anchor * (K_ + kExtraEdges);
    const std::int64_t label = args_.anchor_labels[anchor];
    for (std::int64_t e = 0; e < K_; ++e) {
      indices[e] = e < count ? support[e] : -1;
      positive[e] = e < count && args_.candidate_labels[support[e]] == label ? 1 : 0;
    }
    const AnchorTerms terms =
        anchor_terms<Acc>(OneLane(), args_.options, K_, SupportArrays<Acc>{indices, d2, positive},
                          Positive<Acc>{args_.nearest_positive[anchor], near_d2_[anchor]},
                          Positive<Acc>{args_.farthest_positive[anchor], far_d2_[anchor]}, indices + K_,
                          static_cast<Acc*>(args_.coefficients) + anchor * (K_ + kExtraEdges));
    add(blocks_[anchor / kAnchorBlock], terms);
    if (args_.options.reduction == Reduction::kNone)
      static_cast<Acc*>(args_.loss)[anchor] = static_cast<Acc>(terms.loss);
    if (args_.squared != nullptr) {
      Acc* squared = static_cast<Acc*>(args_.squared) + anchor * (K_ + kExtraEdges);
      constexpr Acc kNone = std::numeric_limits<Acc>::infinity();
      for (std::int64_t e = 0; e < K_; ++e) squared[e] = e < count ? d2[e] : kNone;
      squared[K_] = indices[K_] >= 0 ? near_d2_[anchor] : kNone;
      squared[K_ + 1] = indices[K_ + 1] >= 0 ? far_d2_[anchor] : kNone;
    }
  }

  void reduce() {
    AnchorTerms all;
    for (const AnchorTerms& block : blocks_) add(all, block);
    const double valid = static_cast<double>(all.valid);
    const auto ratio = [](double sum, double count) { return count > 0.0 ? sum / count : 0.0; };
    if (args_.options.reduction == Reduction::kMean)
      *static_cast<Acc*>(args_.loss) = static_cast<Acc>(ratio(all.loss, valid));
    if (args_.options.reduction == Reduction::kSum) *static_cast<Acc*>(args_.loss) = static_cast<Acc>(all.loss);
    args_.stats[kValidAnchors] = valid;
    args_.stats[kPositiveDistance] = ratio(all.positive_sum, static_cast<double>(all.positives));
    args_.stats[kNegativeDistance] = ratio(all.negative_sum, static_cast<double>(all.negatives));
    args_.stats[kNearestIsPositive] = ratio(static_cast<double>(all.nearest_is_positive), valid);
    args_.stats[kSupportPositives] = ratio(static_cast<double>(all.support_positives), valid);
    args_.stats[kPoison] = 0.0;
  }

  // For an input with a value that is not finite: no selection has a meaning, and no output is finite.
  void poison() {
    constexpr Acc kNaN = std::numeric_limits<Acc>::quiet_NaN();
    std::fill_n(args_.nearest_positive, N_, -1);
    std::fill_n(args_.farthest_positive, N_, -1);
    std::fill_n(args_.indices, N_ * (K_ + kExtraEdges), -1);
    std::fill_n(static_cast<Acc*>(args_.coefficients), N_ * (K_ + kExtraEdges), Acc(0));
    std::fill_n(static_cast<Acc*>(args_.loss), args_.options.reduction == Reduction::kNone ? N_ : 1, kNaN);
    if (args_.squared != nullptr) std::fill_n(static_cast<Acc*>(args_.squared), N_ * (K_ + kExtraEdges), kNaN);
    std::fill_n(args_.stats, static_cast<int>(kStatsSize), std::numeric_limits<double>::quiet_NaN());
  }

 private:
  const ForwardArgs& args_;
  std::int64_t N_;
  std::int64_t K_;
  std::vector<Acc> near_d2_;
  std::vector<Acc> far_d2_;
  std::vector<AnchorTerms> blocks_;  // totals of each block of anchors
};

}  // namespace sn::cpu
