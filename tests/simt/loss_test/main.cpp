// Runs the tests of the loss on the harness. Exits non-zero on the first failure. `--only text` runs the problems whose
// name contains the text. `--scale s` multiplies the injected error of mma, to show what too small a bound does.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "loss_test.h"

namespace sn::loss_test {

namespace {

int checks = 0;

const char* const kPathNames[] = {"auto", "cluster", "direct", "dense", "screen", "bank", "tickets", "square"};
constexpr int kPaths = 8;

}  // namespace

std::string where;

void check(bool holds, const char* what) {
  if (holds) {
    ++checks;
    return;
  }
  std::printf("FAILED: %s: %s\n%d passed, 1 failed\n", where.c_str(), what, checks);
  std::exit(1);
}

namespace {

void check_same(const Result& r, const Result& first) {
  check(r.indices.same(first.indices), "neighbours differ between two runs");
  check(r.near.same(first.near) && r.far.same(first.far), "positives differ between two runs");
  check(r.squared.same(first.squared), "squared distances differ between two runs");
  check(r.coefficients.same(first.coefficients), "coefficients differ between two runs");
  check(r.loss.same(first.loss), "the loss differs between two runs");
  check(r.stats.same(first.stats), "statistics differ between two runs");
}

// Over all problems: how often each path was taken, and the rows that the screening left undecided.
std::int64_t taken[kPaths] = {};
std::int64_t fallen_back = 0;
double seconds[kPaths] = {};

double now() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

bool path_serves(const Problem& p, ForwardPath path, const sn_simt_settings& settings) {
  const cuda::Problem shape{.N = p.N(),
                            .M = p.M(),
                            .D = p.D(),
                            .k = p.options.k,
                            .dtype = p.anchors.dtype,
                            .symmetric = p.symmetric,
                            .aligned = true};
  return sn_simt_serves(static_cast<std::int32_t>(path), &shape, &settings) != 0;
}

// Calls `each` for every path that serves, with several schedules and errors each.
void for_runs(const Problem& p, const std::function<void(const Result&, const sn_simt_settings&)>& each) {
  std::uint64_t seed = std::hash<std::string>()(p.name) % 1000;
  for (const ForwardPath path : {ForwardPath::kDirect, ForwardPath::kCluster, ForwardPath::kDense, ForwardPath::kScreen,
                                 ForwardPath::kBank, ForwardPath::kTickets, ForwardPath::kSquare}) {
    if (!path_serves(p, path, settings_for(seed, simt::MmaError::kNone, path))) continue;
    const bool screened = path >= ForwardPath::kDense && path <= ForwardPath::kBank;
    const bool once = path == ForwardPath::kSquare;  // of many threads
    const int runs = screened && p.anchors.dtype == DType::kFloat32 ? 3 : once ? 1 : 2;
    for (int run = 0; run < runs; ++run) {
      ++seed;
      const auto error = static_cast<simt::MmaError>(screened ? 1 + (seed + static_cast<std::uint64_t>(run)) % 4 : 0);
      sn_simt_settings settings = settings_for(seed, error, path);
      if (run > 0) vary(settings, seed * 2654435761u >> 7);
      where = p.name + ", path " + kPathNames[static_cast<int>(path)] + ", seed " + std::to_string(seed) + ", error " +
              std::to_string(settings.mma_error) + ", strips of " + std::to_string(settings.strip_rows) + ", slice " +
              std::to_string(settings.slice_elements) + ", tile " + std::to_string(settings.score_tile) + ", stride " +
              std::to_string(settings.sample_stride) + ", groups of " + std::to_string(settings.sample_group) +
              ", far " + std::to_string(settings.far_capacity);
      const double start = now();
      const Result r = forward(p, settings);
      seconds[static_cast<int>(path)] += now() - start;
      check(r.report.path == static_cast<std::int32_t>(path), "the path that was asked for");
      ++taken[static_cast<int>(path)];
      if (screened) fallen_back += r.report.control.fallen_back;
      each(r, settings);
    }
  }
}

void check_problem(const Problem& p) {
  const std::vector<double> all = distances_of(p);
  Result first;
  bool have_first = false;
  for_runs(p, [&](const Result& r, const sn_simt_settings& settings) {
    if (have_first) {
      check_same(r, first);
      return;
    }
    have_first = true;
    check_selection(p, r, all);
    Gradients gradients;
    // As planned, then searched for, then from lists in slices of every width, then resident ones.
    constexpr std::array kPartitions{0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3};
    constexpr std::array kLaneBytes{0, 16, 24, 32, 16, 32, 16, 24, 32, 16, 64, 128};
    constexpr std::array kTargetLanes{0, 32, 32, 32, 32, 32, 16, 16, 16, 32, 16, 32};
    for (std::size_t run = 0; run < kPartitions.size(); ++run) {
      const int partition = kPartitions[run];
      sn_simt_settings back = settings;
      back.partition = partition;
      back.lane_bytes = kLaneBytes[run];
      back.target_lanes = kTargetLanes[run];
      back.seed += run;
      where = p.name + ", backward, partition " + std::to_string(partition) + ", " + std::to_string(back.target_lanes) +
              " lanes of " + std::to_string(back.lane_bytes);
      const double start = now();
      Gradients g = backward(p, r, back);
      seconds[0] += now() - start;
      if (run == 0) {
        gradients = std::move(g);
      } else {
        check(g.anchors.same(gradients.anchors) && g.candidates.same(gradients.candidates),
              "gradients depend on the partition");
      }
    }
    check_loss(p, r, gradients, all);
    first.loss = Bytes(r.loss.size());
    const auto copy = [](Bytes& to, const Bytes& from) {
      to = Bytes(from.size());
      std::memcpy(to.as<void>(), from.as<void>(), static_cast<std::size_t>(from.size()));
    };
    copy(first.loss, r.loss);
    copy(first.indices, r.indices);
    copy(first.coefficients, r.coefficients);
    copy(first.near, r.near);
    copy(first.far, r.far);
    copy(first.squared, r.squared);
    copy(first.stats, r.stats);
  });
}

// One value that is not finite poisons all outputs.
void check_poison(Problem p, bool in_candidates, double value) {
  Matrix& matrix = in_candidates && !p.symmetric ? p.candidates : p.anchors;
  matrix.set(matrix.rows / 2, matrix.dims - 1, value);
  p.name += std::string(", poisoned ") + (in_candidates ? "candidate " : "anchor ") + std::to_string(value);
  const auto all_nan = [&](const Bytes& bytes, DType dtype) {
    bool nan = true;
    for (std::int64_t at = 0; at < bytes.size() / element_bytes(dtype); ++at) {
      nan = nan && std::isnan(read(bytes.as<void>(), dtype, at));
    }
    return nan;
  };
  for_runs(p, [&](const Result& r, const sn_simt_settings& settings) {
    check(all_nan(r.loss, accumulation(p)), "a value that is not finite poisons the loss");
    check(std::isnan(r.stats.as<double>()[kPoison]), "and is told in the statistics");
    for (std::int64_t at = 0; at < r.indices.size() / 4; ++at) {
      check(r.index(at) >= -1 && r.index(at) < p.M(), "indices stay within range");
    }
    const Gradients g = backward(p, r, settings);
    check(all_nan(g.anchors, p.anchors.dtype) && all_nan(g.candidates, p.anchors.dtype), "and poisons the gradients");
  });
}

// With ten times the error that the bound allows, neighbours are lost and these tests see it: the kernels rely on the
// bound to within that factor, and on nothing beyond it.
void check_bound_matters() {
  const Problem p = make("halves", DType::kFloat32, {33, 33, 20, 5, 4}, 3);
  where = "a bound that is too small";
  const Result exact = forward(p, settings_for(5, simt::MmaError::kNone, ForwardPath::kDirect));
  for (const ForwardPath path : {ForwardPath::kDense, ForwardPath::kScreen}) {
    int lost = 0;
    for (std::uint64_t seed = 1; seed <= 4; ++seed) {
      sn_simt_settings settings = settings_for(seed, simt::MmaError::kExtreme, path);
      check(forward(p, settings).indices.same(exact.indices), "within the bound nothing is lost");
      settings.mma_error_scale = 10.0;
      if (!forward(p, settings).indices.same(exact.indices)) ++lost;
    }
    check(lost > 0, "beyond the bound neighbours are lost");
  }
}

}  // namespace

int run_all(int argc, char** argv) {
  std::string only;
  for (int a = 1; a + 1 < argc; a += 2) {
    if (std::string(argv[a]) == "--scale") mma_error_scale = std::atof(argv[a + 1]);
    if (std::string(argv[a]) == "--only") only = argv[a + 1];
  }
  unsigned seed = 0;
  const auto run = [&](const std::string& kind, DType dtype, const Shape& shape) {
    ++seed;
    const Problem p = make(kind, dtype, shape, seed);
    if (!only.empty() && p.name.find(only) == std::string::npos) return;
    const double start = now();
    check_problem(p);
    if (std::getenv("SN_VERBOSE") != nullptr) std::printf("%6.2f s  %s\n", now() - start, p.name.c_str());
  };
  const auto poisoned = [&](const std::string& kind, DType dtype, const Shape& shape, bool in_candidates,
                            double value) {
    ++seed;
    Problem p = make(kind, dtype, shape, seed);
    if (!only.empty() && p.name.find(only) == std::string::npos) return;
    check_poison(std::move(p), in_candidates, value);
  };
  constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64};

  // Sizes at and just beyond warps, tiles of 64, chunks of 64; every type.
  for (const DType dtype : kTypes) {
    run("grid", dtype, {1, 1, 1, 1, 1});
    run("grid", dtype, {2, 2, 3, 1, 1});
    run("halves", dtype, {33, 33, 20, 5, 4});
    run("grid", dtype, {65, 65, 65, 10, 9});
    run("binary", dtype, {64, 64, 128, 33, 16});
    run("grid", dtype, {7, 131, 63, 10, 5});
    run("halves", dtype, {67, 33, 17, 40, 6});
    run("random", dtype, {66, 66, 130, 10, 20});
    run("random", dtype, {1, 200, 65, 10, 20});
    run("clusters", dtype, {40, 40, 257, 7, 10});
    run("duplicates", dtype, {50, 50, 31, 6, 5});
  }
  // Ties, extreme scales, labels.
  run("identical", DType::kFloat32, {37, 37, 19, 5, 4});
  run("identical", DType::kFloat16, {20, 70, 64, 5, 4});
  run("duplicates", DType::kFloat32, {30, 140, 33, 10, 3});
  run("binary", DType::kFloat32, {130, 130, 9, 10, 1});  // one identity: more positives than are listed
  run("random", DType::kFloat32, {140, 140, 40, 4, 1});
  run("random", DType::kFloat32, {50, 50, 20, 5, 1000000});  // hardly a positive
  run("grid", DType::kFloat32, {21, 20, 20, 30, 2});         // k above M
  run("grid", DType::kFloat32, {20, 20, 20, 20, 2});         // k reaches the anchor itself
  run("collapsed", DType::kFloat32, {70, 70, 96, 10, 20});
  run("tiny", DType::kFloat32, {40, 40, 33, 10, 8});
  run("huge", DType::kFloat32, {40, 40, 33, 10, 8});
  run("spread", DType::kFloat32, {60, 60, 33, 10, 8});
  run("outlier", DType::kFloat32, {60, 60, 64, 10, 8});
  run("zeros", DType::kFloat32, {45, 90, 64, 10, 8});
  run("clusters", DType::kFloat32, {64, 190, 72, 10, 20});
  run("random", DType::kFloat32, {2, 300, 300, 100, 20});
  run("random", DType::kFloat32, {9, 9, 2113, 3, 2});  // more than a section of the sum
  run("random", DType::kBFloat16, {9, 30, 2113, 3, 2});
  // Rows of candidates between the short and the long ones. Rows wide enough for two packs a lane of the backward.
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    run("grid", dtype, {5, 500, 20, 10, 5});
    for (int again = 0; again < 3; ++again) run("random", dtype, {40, 40, 300, 5, 8});
  }
  // Neighbouring candidates with many edges each: chunk sums of one round of the backward meet those of the next.
  run("grid", DType::kFloat32, {260, 20, 40, 10, 5});
  run("random", DType::kFloat64, {300, 12, 9, 7, 3});
  // Few anchors, and identities with more candidates than a list of positives holds.
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) run("random", dtype, {9, 700, 40, 5, 2});
  // More rows that no bound decides than the merge has blocks.
  run("tiny", DType::kFloat32, {280, 280, 3, 5, 8});
  // No anchors, no candidates.
  run("grid", DType::kFloat32, {0, 0, 5, 3, 2});
  run("grid", DType::kFloat32, {0, 9, 5, 3, 2});
  run("grid", DType::kFloat32, {4, 0, 5, 3, 2});

  const double infinity = std::numeric_limits<double>::infinity();
  poisoned("random", DType::kFloat32, {40, 40, 33, 5, 6}, false, NAN);
  poisoned("random", DType::kFloat32, {40, 80, 33, 5, 6}, true, infinity);
  poisoned("random", DType::kFloat16, {40, 80, 64, 5, 6}, false, -infinity);
  poisoned("random", DType::kBFloat16, {70, 70, 64, 5, 6}, false, NAN);
  poisoned("random", DType::kFloat64, {10, 30, 7, 5, 6}, true, NAN);
  poisoned("random", DType::kFloat32, {30, 30, 8, 5, 1000000}, false, infinity);
  // More anchors than half of the bank's tile holds.
  run("random", DType::kFloat32, {130, 40, 30, 5, 6});
  // Rows of half precision wide enough for slices of half a warp, in whole packs.
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (int again = 0; again < 2; ++again) run("random", dtype, {40, 40, 328, 5, 8});
  }
  if (only.empty()) check_bound_matters();

  for (int path = 1; path < kPaths; ++path) {
    std::printf("path %-8s %4d runs %7.1f s\n", kPathNames[path], static_cast<int>(taken[path]), seconds[path]);
    if (only.empty()) check(taken[path] > 0, "every path was taken");
  }
  std::printf("backward %7.1f s; rows that the screening left to exact search: %d\n", seconds[0],
              static_cast<int>(fallen_back));
  std::printf("%d passed, 0 failed\n", checks);
  return 0;
}

}  // namespace sn::loss_test

int main(int argc, char** argv) {
  return sn::loss_test::run_all(argc, argv);
}
