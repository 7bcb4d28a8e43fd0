// The thresholds that a sample gives, against true distances in double: never below what K others of the sample need,
// and hardly above it. The kernels that bring them about run one after the other, on a plan that is cut by hand.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/plan/plan.h"
#include "cuda/plan/sizes.h"
#include "cuda/screen/prepare.h"
#include "cuda/stages.h"
#include "simt_test.h"

namespace sn::cuda {
namespace {

struct Sampled {
  std::string name;
  std::int64_t N, M, D, K;
  std::int64_t stride = 1;
  std::int64_t group = 8;
  ForwardPath path = ForwardPath::kScreen;
  DType dtype = DType::kFloat32;
  std::int64_t offset = 0;  // of the anchors' own rows; -1: none
  int tile = 64;
  std::int64_t strip = 0;  // anchors of a strip; 0: all
  // From here on rows are spoilt.
  bool coarse = false;        // residuals as large as distances
  std::int64_t outlier = -1;  // this candidate has no copy
  bool nan = false;           // and is not finite
};

// Exact values of the rows, and the bytes that the kernels read.
struct Rows {
  std::vector<double> values;
  std::vector<char> bytes;

  Rows(const Sampled& s, std::int64_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform(-1.0, 1.0);
    const auto element = static_cast<std::size_t>(element_bytes(s.dtype));
    values.resize(static_cast<std::size_t>(count * s.D));
    bytes.resize(values.size() * element);
    for (std::int64_t row = 0; row < count; ++row) {
      const double point = std::round(16 * uniform(random)) / 16 + 0x1p-11 * uniform(random);
      for (std::int64_t c = 0; c < s.D; ++c) {
        const auto i = static_cast<std::size_t>(row * s.D + c);
        const auto value = static_cast<float>(s.coarse ? (c % 3 == 0 ? -point : point) : normal(random));
        set(s.dtype, i, value);
      }
    }
  }
  void set(DType dtype, std::size_t i, float value) {
    const auto put = [&](auto stored) {
      std::memcpy(bytes.data() + i * sizeof(stored), &stored, sizeof(stored));
      values[i] = widen(stored);
    };
    if (dtype == DType::kFloat32) put(value);
    if (dtype == DType::kFloat16) put(narrow<Half>(value));
    if (dtype == DType::kBFloat16) put(narrow<BFloat16>(value));
  }
};

void test_sample(const Sampled& s, simt::MmaError error, unsigned seed) {
  const std::string where = s.name + ", error " + std::to_string(static_cast<int>(error)) + ": ";
  const bool symmetric = s.path == ForwardPath::kScreen && s.N == s.M && s.offset == 0;
  Rows anchors(s, s.N, seed);
  Rows others(s, s.M, seed + 1);
  Rows& pool = symmetric ? anchors : others;
  if (s.outlier >= 0) pool.set(s.dtype, static_cast<std::size_t>(s.outlier * s.D), s.nan ? NAN : 0x1p100f);
  const std::vector<std::int64_t> labels(static_cast<std::size_t>(std::max(s.N, s.M)));
  ForwardArgs args{};
  args.dtype = s.dtype;
  args.dims = s.D;
  args.anchors = {anchors.bytes.data(), s.N, s.D};
  args.candidates = {pool.bytes.data(), s.M, s.D};
  args.anchor_labels = args.candidate_labels = labels.data();
  args.self = {nullptr, s.offset};
  args.symmetric = symmetric;
  args.options.k = s.K;

  const Problem problem{.N = s.N,
                        .M = s.M,
                        .D = s.D,
                        .k = s.K,
                        .dtype = s.dtype,
                        .symmetric = symmetric,
                        .aligned = rows_aligned(args.anchors, s.dtype)};
  ForwardPlan plan = plan_forward(problem, DeviceFacts(), s.path);
  plan.score_tile = s.tile;
  plan.sample_tile = s.tile;
  plan.strip_rows = s.strip > 0 ? s.strip : s.N;
  plan.sample_stride = s.stride;
  plan.sample_columns = divide_up(s.M, s.stride);
  plan.sample_group = s.group;
  plan.buffer = {round_up(plan.workspace_bytes, kWorkspaceAlignment), screened_buffer_bytes(plan)};
  std::vector<char> memory(static_cast<std::size_t>(plan.buffer.offset + plan.buffer.bytes + kWorkspaceAlignment));
  std::memset(memory.data(), 0xb1, memory.size());
  char* workspace = memory.data();
  workspace += kWorkspaceAlignment - reinterpret_cast<std::uintptr_t>(workspace) % kWorkspaceAlignment;

  simt::Options options = with_seed(seed);
  options.mma_error = error;
  simt::reset(options);
  const auto run = [&](cudaError_t result) { check(result == cudaSuccess, where + simt::fault()); };
  run(enqueue_sample(args, plan, workspace, nullptr));
  run(enqueue_facts(args, plan, workspace, nullptr));
  for (std::int64_t begin = 0; begin < s.N; begin += plan.strip_rows) {
    const Strip strip{begin, std::min(plan.strip_rows, s.N - begin)};
    const ScoreRequest request{.mode = s.group > 1 ? ScoreMode::kSample : ScoreMode::kDense,
                               .row_begin = strip.begin,
                               .rows = strip.rows,
                               .columns = plan.sample_columns,
                               .column_stride = plan.sample_stride};
    run(s.path == ForwardPath::kBank ? enqueue_bank_scores(args, plan, workspace, request, nullptr)
                                     : enqueue_scores(args, plan, workspace, request, nullptr));
    run(enqueue_thresholds(args, plan, workspace, strip, nullptr));
  }

  const double scale = std::ldexp(1.0, piece<Control>(workspace, plan.control)->exponent);
  const float* gRho = piece<float>(workspace, plan.anchor_facts) + s.N;
  const Thresholds found = thresholds(args, plan, workspace);
  const double eta = screening_error(plan.padded_dims);
  const auto groups = static_cast<double>(plan.sample_columns) / static_cast<double>(s.group);
  double ranks = 0.0;
  std::int64_t bounded = 0;
  for (std::int64_t i = 0; i < s.N; ++i) {
    const std::int64_t self = s.offset < 0 || i + s.offset >= s.M ? -1 : i + s.offset;
    const bool blind = symmetric && i == s.outlier;
    check(found.G[i] == HUGE_VALF, where + "no far threshold yet");
    if (blind) {
      check(found.T[i] == -HUGE_VALF, where + "nothing is known of an anchor without a copy");
      continue;
    }
    std::vector<double> distances;
    for (std::int64_t j = 0; j < s.M; j += s.stride) {
      double sum = 0.0;
      for (std::int64_t c = 0; c < s.D; ++c) {
        const double difference =
            anchors.values[static_cast<std::size_t>(i * s.D + c)] - pool.values[static_cast<std::size_t>(j * s.D + c)];
        sum += difference * difference;
      }
      if (j != self && j != s.outlier) distances.push_back(std::sqrt(sum) * scale);
    }
    std::sort(distances.begin(), distances.end());
    const auto wanted = static_cast<std::size_t>(std::min(s.K, s.M - (self >= 0 ? 1 : 0)));
    const double t = found.u[i] / 2.0;
    const double reach = t - gRho[i];
    if (found.T[i] == HUGE_VALF) continue;
    ++bounded;
    check(distances.size() >= wanted && reach >= distances[wanted - 1], where + "a threshold below what K others need");
    const float n = *(gRho - s.N + i);
    check(found.T[i] >= t * t - n * (1.0 - eta), where + "T is not that of u");
    // Whatever the groups, and those that share a place of the kernel: K + 1 of them hold so many candidates.
    const std::int64_t joined = s.group * divide_up(sample_groups(plan), 1024);
    const auto most = static_cast<std::size_t>(joined) * (wanted + 1);
    const double slack = s.coarse ? HUGE_VAL : 2.0 * gRho[i] + 4.0 * eta * n + 1e-3 * distances.back();
    check(most >= distances.size() || reach <= distances[most] + slack, where + "a threshold above all groups");
    ranks += static_cast<double>(std::lower_bound(distances.begin(), distances.end(), reach) - distances.begin());
  }
  const auto K = static_cast<double>(s.K);
  if (groups < K) {
    check(bounded == 0, where + "more candidates than groups");
  } else if (groups > 1.3 * (K + 1.0)) {
    check(bounded >= s.N - 1, where + "a row without a threshold");
    const double expected = s.group == 1 ? K : groups * std::log(groups / (groups - K - 0.5));
    const double mean = ranks / static_cast<double>(bounded);
    check(s.coarse || (mean >= K && mean <= 1.15 * expected + 1.0),
          where + "the threshold is candidate " + std::to_string(mean) + " of the sample, expected " +
              std::to_string(expected));
  }
}

}  // namespace

void test_thresholds() {
  const std::vector<Sampled> all{
      {.name = "groups, each anchor in one", .N = 200, .M = 200, .D = 40, .K = 5},
      {.name = "one anchor in three", .N = 330, .M = 330, .D = 70, .K = 4, .stride = 3, .tile = 128},
      {.name = "half precision", .N = 170, .M = 170, .D = 24, .K = 3, .dtype = DType::kFloat16},
      {.name = "bfloat16, strips", .N = 150, .M = 150, .D = 24, .K = 2, .dtype = DType::kBFloat16, .strip = 64},
      {.name = "a bank", .N = 20, .M = 700, .D = 40, .K = 7, .stride = 3, .path = ForwardPath::kBank, .offset = 5},
      {.name = "a bank, screened", .N = 70, .M = 700, .D = 40, .K = 7, .stride = 3, .offset = -1, .tile = 128},
      {.name = "dense scores", .N = 90, .M = 90, .D = 40, .K = 5, .stride = 2, .group = 1},
      {.name = "dense scores of a bank",
       .N = 9,
       .M = 500,
       .D = 40,
       .K = 5,
       .stride = 4,
       .group = 1,
       .path = ForwardPath::kBank,
       .offset = 3},
      {.name = "K = 128", .N = 20, .M = 1500, .D = 16, .K = 128, .offset = 7},
      {.name = "K = 128, joined groups", .N = 3, .M = 1500, .D = 16, .K = 128, .group = 1, .offset = 7},
      {.name = "more than 4 scores a lane", .N = 9, .M = 250, .D = 16, .K = 6, .group = 1, .offset = 11},
      {.name = "more than 8 groups a lane", .N = 9, .M = 3000, .D = 8, .K = 6, .offset = 11},
      {.name = "quads", .N = 70, .M = 1500, .D = 16, .K = 6, .group = 32, .offset = 11, .tile = 128},
      {.name = "quads of a bank",
       .N = 11,
       .M = 1500,
       .D = 16,
       .K = 6,
       .group = 32,
       .path = ForwardPath::kBank,
       .offset = -1},
      {.name = "more than 32 values a lane", .N = 4, .M = 9000, .D = 8, .K = 6, .offset = 11, .tile = 128},
      {.name = "too few groups", .N = 60, .M = 60, .D = 16, .K = 20},
      {.name = "all candidates wanted", .N = 12, .M = 12, .D = 16, .K = 12, .group = 1},
      {.name = "residuals", .N = 130, .M = 130, .D = 64, .K = 3, .coarse = true},
      {.name = "residuals of a bank",
       .N = 30,
       .M = 200,
       .D = 64,
       .K = 3,
       .path = ForwardPath::kBank,
       .offset = -1,
       .coarse = true},
      {.name = "a row without a copy", .N = 140, .M = 140, .D = 40, .K = 3, .outlier = 77},
      {.name = "a candidate without a copy",
       .N = 20,
       .M = 300,
       .D = 40,
       .K = 3,
       .path = ForwardPath::kBank,
       .offset = -1,
       .outlier = 77},
      {.name = "a row without a copy, in place",
       .N = 140,
       .M = 140,
       .D = 40,
       .K = 3,
       .dtype = DType::kBFloat16,
       .outlier = 77},
      {.name = "NaN", .N = 140, .M = 140, .D = 40, .K = 3, .outlier = 32, .nan = true},
      {.name = "NaN in half precision",
       .N = 140,
       .M = 140,
       .D = 40,
       .K = 3,
       .dtype = DType::kFloat16,
       .outlier = 32,
       .nan = true},
  };
  unsigned seed = 1;
  for (const Sampled& sampled : all) {
    for (const simt::MmaError error : {simt::MmaError::kExtreme, simt::MmaError::kMinus, simt::MmaError::kPlus}) {
      test_sample(sampled, error, ++seed);
    }
  }
}

}  // namespace sn::cuda
