// The CPU core without a framework: every instruction set, path and number of threads gives the same bits, and these
// select as a plain evaluation of the documented summation order does. Runs under sanitizers too, and cross-compiled on
// other architectures. Exits non-zero on the first failure.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/cpu.h"
#include "../../csrc/cpu/plan.h"

namespace {

using sn::cpu::Path;

int checks = 0;

[[noreturn]] void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::printf("%d passed, 1 failed\n", checks);
  std::exit(1);
}

void check(bool holds, const std::string& what) {
  if (!holds) fail(what);
  ++checks;
}

void threaded_for(std::int64_t begin, std::int64_t end, std::int64_t, void (*body)(std::int64_t, std::int64_t, void*),
                  void* context) {
  std::vector<std::thread> threads;
  for (std::int64_t i = begin; i < end; ++i) threads.emplace_back([=] { body(i, i + 1, context); });
  for (std::thread& thread : threads) thread.join();
}

struct Problem {
  std::string name;
  std::int64_t N, M, D, k;
  std::vector<float> anchors, candidates;
  std::vector<std::int64_t> anchor_labels, candidate_labels;
  std::int64_t self_offset = 0;
  bool symmetric = true;
};

struct Result {
  std::vector<float> loss, coefficients, squared, grad_anchors, grad_candidates;
  std::vector<std::int32_t> indices, near, far;
  std::vector<double> stats;
};

// The gradients of a result's support graph.
void differentiate(const Problem& p, int threads, sn::Reduction reduction, Result& r) {
  const std::vector<float> grad(r.loss.size(), 1.0f);
  const std::vector<float>& z = p.symmetric ? p.anchors : p.candidates;
  r.grad_anchors.assign(p.N * p.D, -7.0f);
  r.grad_candidates.assign(p.symmetric ? 0 : p.M * p.D, -7.0f);
  sn::BackwardArgs b{};
  b.dtype = sn::DType::kFloat32;
  b.dims = p.D;
  b.edges = std::min(p.k, p.M) + 2;
  b.anchors = {p.anchors.data(), p.N, p.D};
  b.candidates = {z.data(), p.M, p.D};
  b.symmetric = p.symmetric;
  b.reduction = reduction;
  b.grad_loss = grad.data();
  b.indices = r.indices.data();
  b.coefficients = r.coefficients.data();
  b.stats = r.stats.data();
  b.grad_anchors = r.grad_anchors.data();
  b.grad_candidates = p.symmetric ? nullptr : r.grad_candidates.data();
  sn::cpu::backward(b, sn::ThreadPool{threads, threaded_for});
}

Result run(const Problem& p, int threads, sn::Squeeze squeeze, sn::Reduction reduction) {
  const std::int64_t K = std::min(p.k, p.M);
  Result r;
  r.loss.assign(reduction == sn::Reduction::kNone ? p.N : 1, -7.0f);
  r.coefficients.assign(p.N * (K + 2), -7.0f);
  r.squared.assign(p.N * (K + sn::kExtraEdges), -7.0f);
  r.indices.assign(p.N * (K + 2), -7);
  r.near.assign(p.N, -7);
  r.far.assign(p.N, -7);
  r.stats.assign(sn::kStatsSize, -7.0);
  const std::vector<float>& z = p.symmetric ? p.anchors : p.candidates;
  sn::ForwardArgs f{};
  f.dtype = sn::DType::kFloat32;
  f.dims = p.D;
  f.anchors = {p.anchors.data(), p.N, p.D};
  f.candidates = {z.data(), p.M, p.D};
  f.anchor_labels = p.anchor_labels.data();
  f.candidate_labels = p.symmetric ? p.anchor_labels.data() : p.candidate_labels.data();
  f.self = {nullptr, p.self_offset};
  f.symmetric = p.symmetric;
  f.options = {p.k, 20.0, 0.1, squeeze, reduction};
  f.loss = r.loss.data();
  f.indices = r.indices.data();
  f.coefficients = r.coefficients.data();
  f.nearest_positive = r.near.data();
  f.farthest_positive = r.far.data();
  f.squared = r.squared.data();
  f.stats = r.stats.data();
  sn::cpu::forward(f, sn::ThreadPool{threads, threaded_for});
  differentiate(p, threads, reduction, r);
  return r;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// The documented summation order, written plainly.
float direct_sum(const float* x, const float* z, std::int64_t D) {
  float total = 0.0f;
  for (std::int64_t s = 0; s < D; s += 64) {
    float lanes[16] = {};
    for (int t = 0; t < 4; ++t) {
      for (int l = 0; l < 16; ++l) {
        const std::int64_t c = s + 16 * t + l;
        if (c >= D) continue;
        const float difference = x[c] - z[c];
        lanes[l] = std::fmaf(difference, difference, lanes[l]);
      }
    }
    for (int width = 8; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
    }
    total += lanes[0];
  }
  return total;
}

void check_selection(const Problem& p, const Result& r, const std::string& where) {
  const std::int64_t K = std::min(p.k, p.M);
  const std::vector<float>& z = p.symmetric ? p.anchors : p.candidates;
  const std::vector<std::int64_t>& labels = p.symmetric ? p.anchor_labels : p.candidate_labels;
  const std::int64_t step = p.N > 600 ? 37 : 1;
  for (std::int64_t i = 0; i < p.N; i += step) {
    std::vector<std::pair<float, std::int32_t>> order;
    std::int32_t near = -1, far = -1;
    float near_d2 = 0, far_d2 = 0;
    for (std::int64_t j = 0; j < p.M; ++j) {
      if (p.self_offset >= 0 && j == p.self_offset + i) continue;
      const float d2 = direct_sum(&p.anchors[i * p.D], &z[j * p.D], p.D);
      order.emplace_back(d2, static_cast<std::int32_t>(j));
      if (labels[j] != p.anchor_labels[i]) continue;
      if (near < 0 || d2 < near_d2) near = static_cast<std::int32_t>(j), near_d2 = d2;
      if (far < 0 || d2 > far_d2) far = static_cast<std::int32_t>(j), far_d2 = d2;
    }
    std::sort(order.begin(), order.end());
    for (std::int64_t e = 0; e < K; ++e) {
      const std::int32_t want = e < static_cast<std::int64_t>(order.size()) ? order[e].second : -1;
      check(r.indices[i * (K + 2) + e] == want, where + ": anchor " + std::to_string(i) + " slot " + std::to_string(e) +
                                                    " expected " + std::to_string(want) + " got " +
                                                    std::to_string(r.indices[i * (K + 2) + e]));
    }
    check(r.near[i] == near && r.far[i] == far, where + ": positives of anchor " + std::to_string(i));
  }
}

// The gradient of the support graph, summed densely in double.
void check_gradient(const Problem& p, const Result& r, sn::Reduction reduction, const std::string& where) {
  const std::int64_t K = std::min(p.k, p.M);
  const std::vector<float>& z = p.symmetric ? p.anchors : p.candidates;
  std::vector<double> of_anchors(p.N * p.D, 0.0);
  std::vector<double> of_candidates(p.symmetric ? 0 : p.M * p.D, 0.0);
  std::vector<double> size(p.N, 0.0);  // sum of magnitudes in a row: the scale of its rounding
  std::vector<double> candidate_size(p.M, 0.0);
  const double valid = r.stats[sn::kValidAnchors];
  const double upstream = reduction == sn::Reduction::kMean ? (valid > 0 ? 1.0 / valid : 0.0) : 1.0;
  for (std::int64_t i = 0; i < p.N; ++i) {
    for (std::int64_t e = 0; e < K + 2; ++e) {
      const std::int64_t j = r.indices[i * (K + 2) + e];
      const double weight = upstream * r.coefficients[i * (K + 2) + e];
      if (j < 0 || weight == 0.0) continue;
      double largest = 0.0;
      for (std::int64_t c = 0; c < p.D; ++c) {
        const double part =
            weight * (static_cast<double>(p.anchors[i * p.D + c]) - static_cast<double>(z[j * p.D + c]));
        of_anchors[i * p.D + c] += part;
        (p.symmetric ? of_anchors : of_candidates)[j * p.D + c] -= part;
        largest = std::max(largest, std::abs(part));
      }
      size[i] += largest;
      (p.symmetric ? size : candidate_size)[j] += largest;
    }
  }
  for (std::size_t at = 0; at < of_anchors.size(); ++at) {
    const double bound = 2e-6 * size[at / p.D] + 1e-30;
    check(std::abs(r.grad_anchors[at] - of_anchors[at]) <= bound, where + ": gradient of the anchors");
  }
  for (std::size_t at = 0; at < of_candidates.size(); ++at) {
    const double bound = 2e-6 * candidate_size[at / p.D] + 1e-30;
    check(std::abs(r.grad_candidates[at] - of_candidates[at]) <= bound, where + ": gradient of the candidates");
  }
}

// Rows whose columns are alike, so that the screening's copy errs the same way in each of them. In units of 2^-7 an
// anchor has `middle` in each column; near candidates are `step` below, far ones `step` above and, in four columns more
// and more, one farther. That is what orders them, and far less than the error of the copy, a part of a step in every
// column: a bound without one of its terms selects wrongly. The first column, `first`, is largest. Each row has a
// negative, also among those that the mean samples, so that there is nothing to centre.
Problem make_lopsided(std::int64_t D, std::int64_t k, float middle, float step, float first) {
  constexpr std::int64_t kAnchors = 6;
  constexpr std::int64_t kFarColumns = 4;
  Problem p;
  p.name = "lopsided x" + std::to_string(D) + " of " + std::to_string(middle);
  p.N = 2 * kAnchors;
  p.M = 2 * (k + 3 * k);
  p.D = D;
  p.k = k;
  p.symmetric = false;
  p.self_offset = -1;
  const auto fill = [&](std::vector<float>& rows, std::vector<std::int64_t>& labels, std::int64_t half,
                        const auto& value) {
    for (std::int64_t i = 0; i < 2 * half; ++i) {
      labels.push_back(i % 3);
      for (std::int64_t c = 0; c < D; ++c) {
        rows.push_back((i < half ? 1.0f : -1.0f) / 128.0f * (c == 0 ? 128.0f * first : value(i % half, c)));
      }
    }
  };
  fill(p.anchors, p.anchor_labels, kAnchors,
       [&](std::int64_t i, std::int64_t c) { return c == 8 + i ? middle + 1.0f : middle; });
  fill(p.candidates, p.candidate_labels, 4 * k, [&](std::int64_t i, std::int64_t c) {
    if (i < k) return c == 40 + i ? middle - step - 1.0f : middle - step;
    const std::int64_t from = 40 + kFarColumns * (i - k);
    return c >= from && c < from + kFarColumns ? middle + step + 1.0f : middle + step;
  });
  return p;
}

Problem make(const std::string& kind, std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t k,
             std::int64_t identities, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Problem p;
  p.name =
      kind + " " + std::to_string(N) + "x" + std::to_string(M) + "x" + std::to_string(D) + " k" + std::to_string(k);
  p.N = N;
  p.M = M;
  p.D = D;
  p.k = k;
  const auto fill = [&](std::vector<float>& rows, std::vector<std::int64_t>& labels, std::int64_t count) {
    rows.resize(count * D);
    labels.resize(count);
    std::vector<float> centre(8 * D);
    std::mt19937 shared(seed + 1);
    for (float& v : centre) v = normal(shared);
    for (std::int64_t i = 0; i < count; ++i) {
      labels[i] = static_cast<std::int64_t>(random() % identities) * 1000003 - 5;
      const std::int64_t cluster = static_cast<std::int64_t>(random() % 8);
      const float outlier = kind == "outlier" && i == count / 2 ? 1000.0f : 1.0f;
      for (std::int64_t c = 0; c < D; ++c) {
        float v = normal(random);
        if (kind == "clusters") v = centre[cluster * D + c] + 1e-4f * v;
        if (kind == "two") v = centre[(cluster % 2) * D + c] + 1e-5f * v;
        if (kind == "collapsed") v = centre[c] + 1e-4f * v;
        if (kind == "identical") v = centre[c];
        if (kind == "duplicates") v = centre[cluster * D + c];
        if (kind == "grid") v = std::round(v);
        if (kind == "tiny") v *= 1e-21f;
        if (kind == "huge") v *= 1e15f;
        if (kind == "mixed") v *= std::pow(10.0f, static_cast<float>(i % 13) - 6.0f);
        rows[i * D + c] = v * outlier;
      }
    }
  };
  fill(p.anchors, p.anchor_labels, N);
  if (M != N || kind == "bank") {
    p.symmetric = false;
    p.self_offset = -1;
    fill(p.candidates, p.candidate_labels, M);
    if (M > N + 3) {  // the batch inside the bank
      p.self_offset = 3;
      std::copy(p.anchors.begin(), p.anchors.end(), p.candidates.begin() + 3 * D);
      std::copy(p.anchor_labels.begin(), p.anchor_labels.end(), p.candidate_labels.begin() + 3);
    }
  }
  return p;
}

void check_problem(const Problem& p, const std::vector<int>& thread_counts = {1, 3}) {
  const sn::Squeeze squeeze = static_cast<sn::Squeeze>((p.N + p.D) % 4);
  const sn::Reduction reduction = static_cast<sn::Reduction>((p.N + p.k) % 3);
  Result first;
  bool have_first = false;
  for (const std::string& level : sn::cpu::usable_capabilities()) {
    sn::cpu::set_capability(level);
    for (const Path path : {Path::kDirect, Path::kScreen, Path::kForms, Path::kTiles, Path::kBytes, Path::kByteRows}) {
      // Others have no products of bytes.
      if ((path == Path::kBytes || path == Path::kByteRows) && level != "avx512_vnni") continue;
      sn::cpu::set_path(path);
      for (const int threads : thread_counts) {
        if (path >= Path::kTiles && threads != thread_counts.back()) continue;  // lists under locks are the news here
        const std::string where = p.name + " " + level +
                                  (path == Path::kDirect   ? " direct "
                                   : path == Path::kScreen ? " screen "
                                   : path == Path::kTiles  ? " tiles "
                                   : path == Path::kForms  ? " forms "
                                   : path == Path::kBytes  ? " bytes "
                                                           : " byte rows ") +
                                  std::to_string(threads) + " threads";
        Result r = run(p, threads, squeeze, reduction);
        if (!have_first) {
          check_selection(p, r, where);
          check_gradient(p, r, reduction, where);
          first = std::move(r);
          have_first = true;
          continue;
        }
        check(same_bits(r.indices, first.indices), where + ": indices differ");
        check(same_bits(r.near, first.near) && same_bits(r.far, first.far), where + ": positives differ");
        check(same_bits(r.squared, first.squared), where + ": squared distances differ");
        check(same_bits(r.coefficients, first.coefficients), where + ": coefficients differ");
        check(same_bits(r.loss, first.loss), where + ": loss differs");
        check(same_bits(r.stats, first.stats), where + ": statistics differ");
        check(same_bits(r.grad_anchors, first.grad_anchors), where + ": anchors' gradient differs");
        check(same_bits(r.grad_candidates, first.grad_candidates), where + ": candidates' gradient differs");
      }
    }
  }
}

// A graph as no forward makes one: anchors list a candidate several times, which lists them back as often or not, with
// a weight or without one.
void check_repeated_edges(const Problem& p) {
  const std::int64_t edges = std::min(p.k, p.M) + 2;
  std::mt19937 random(7);
  Result graph = run(p, 1, sn::Squeeze::kSpan, sn::Reduction::kSum);
  for (std::size_t at = 0; at < graph.indices.size(); ++at) {
    const std::int64_t i = static_cast<std::int64_t>(at) / edges;
    graph.indices[at] = static_cast<std::int32_t>((i + 1 + random() % 3) % p.M);  // three candidates for all slots
    graph.coefficients[at] = random() % 4 == 0 ? 0.0f : 1.0f + static_cast<float>(random() % 1000) / 1000.0f;
  }
  if (p.symmetric) {  // of each two rows the first lists the second, and the second the first, among others
    for (std::int64_t i = 0; i + 1 < p.N; i += 2) {
      for (std::int64_t e = 0; e < edges; ++e) {
        if (random() % 3 == 0) graph.indices[i * edges + e] = static_cast<std::int32_t>(i + 1);
        if (random() % 3 == 0) graph.indices[(i + 1) * edges + e] = static_cast<std::int32_t>(i);
      }
    }
  }
  Result first;
  for (const std::string& level : sn::cpu::usable_capabilities()) {
    sn::cpu::set_capability(level);
    for (const int threads : {1, 3}) {
      const std::string where = p.name + " repeated edges " + level + " " + std::to_string(threads) + " threads";
      differentiate(p, threads, sn::Reduction::kSum, graph);
      check_gradient(p, graph, sn::Reduction::kSum, where);
      if (first.grad_anchors.empty()) first = graph;
      check(same_bits(graph.grad_anchors, first.grad_anchors), where + ": anchors' gradient differs");
      check(same_bits(graph.grad_candidates, first.grad_candidates), where + ": candidates' gradient differs");
    }
  }
}

// A block of the copy for the products of forms: integers of 16 bits, the largest that may be, with the signs that add
// up in forms, or any.
struct Copy {
  std::vector<std::int32_t> integers;  // [rows][2 words]
  std::vector<std::uint32_t> packed;
  std::vector<float> scale;
  std::vector<std::int32_t> start;
  sn::cpu::ScreenSide side{};
  std::uint32_t* aligned = nullptr;
};
constexpr std::int64_t kLine = 64 / sizeof(std::uint32_t);

template <class T>
T* line_start(std::vector<T>& values) {
  const auto address = reinterpret_cast<std::uintptr_t>(values.data());
  return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

void fill_copy(Copy& copy, std::int64_t rows, std::int64_t words, std::int32_t most, bool aligned_signs,
               std::mt19937& random) {
  const std::int64_t padded = (rows + sn::cpu::kTileGrain - 1) / sn::cpu::kTileGrain * sn::cpu::kTileGrain;
  copy.integers.assign(rows * 2 * words, 0);
  copy.packed.assign(padded * words + kLine, 0);
  copy.scale.assign(padded + kLine, 0.0f);
  copy.start.assign(padded, 0);
  copy.aligned = line_start(copy.packed);
  float* scale = line_start(copy.scale);
  for (std::int64_t r = 0; r < rows; ++r) {
    scale[r] = std::ldexp(1.0f, static_cast<int>(random() % 5) - 2);  // products stay exact until they are rounded once
    for (std::int64_t c = 0; c < 2 * words; ++c) {
      // A form of all quarters has a and b on one side, c and d on the other, of rows and of candidates alike.
      const bool negative = aligned_signs ? (r >= rows / 2) != (r % (rows / 2) >= rows / 4) : random() % 2 == 0;
      const std::int32_t size =
          aligned_signs || random() % 4 == 0 ? most : static_cast<std::int32_t>(random() % (most + 1));
      const std::int32_t value = negative ? -size : size;
      copy.integers[r * 2 * words + c] = value;
      const std::uint32_t bits = static_cast<std::uint32_t>(value) & 0xffffu;
      copy.aligned[(r / sn::cpu::kPanel * words + c / 2) * sn::cpu::kPanel + r % sn::cpu::kPanel] |=
          c % 2 == 0 ? bits : bits << 16;
    }
  }
  copy.side.rows = rows;
  copy.side.padded = padded;
  copy.side.packed = copy.aligned;
  copy.side.scale = scale;
  copy.side.start = copy.start.data();
}

// Products of forms are those of the integers, modulo 2^32, of every part of a tile and whatever their size.
void check_forms() {
  std::mt19937 random(11);
  struct Shape {
    std::int64_t rows, columns, words;
    bool diagonal;
  };
  for (const auto& [rows, columns, words, diagonal] :
       {Shape{64, 64, 4, false}, Shape{128, 64, 12, false}, Shape{80, 112, 8, false}, Shape{48, 208, 20, false},
        Shape{64, 96, 2 * sn::cpu::kFormWords + 8, false}, Shape{96, 96, 16, true}, Shape{208, 208, 4, true}}) {
    for (const int levels : {0, 1, 2}) {
      for (const bool aligned_signs : {false, true}) {
        const auto most = static_cast<std::int32_t>(sn::cpu::integer_most(levels));
        Copy anchors, candidates;
        fill_copy(anchors, rows, words, most, aligned_signs, random);
        if (!diagonal) fill_copy(candidates, columns, words, most, aligned_signs, random);
        sn::cpu::Screen screen{};
        screen.words = words;
        screen.panel_stride = words * sn::cpu::kPanel;
        screen.forms = {levels, sn::cpu::kPanel, 1};
        screen.anchors = anchors.side;
        screen.candidates = diagonal ? anchors.side : candidates.side;
        const Copy& others = diagonal ? anchors : candidates;
        // A panel behind every row, which nothing may write.
        const sn::cpu::Tile tile{0, rows, 0, columns, diagonal, columns + sn::cpu::kPanel};
        for (const std::string& level : sn::cpu::usable_capabilities()) {
          sn::cpu::set_capability(level);
          std::vector<float> memory(rows * tile.pitch + kLine, -1.0f);
          std::vector<std::uint32_t> scratch(sn::cpu::form_words(levels, rows, columns, words) + kLine);
          float* products = line_start(memory);
          sn::cpu::active_kernels().tile_products(screen, tile, tile, products, line_start(scratch));
          const std::string where = "forms of " + std::to_string(rows) + " x " + std::to_string(columns) + " x " +
                                    std::to_string(words) + ", " + std::to_string(levels) + " levels, " + level;
          for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t c = diagonal ? r + 1 : 0; c < columns; ++c) {
              std::uint32_t sum = 0;
              for (std::int64_t i = 0; i < 2 * words; ++i) {
                sum += static_cast<std::uint32_t>(anchors.integers[r * 2 * words + i] *
                                                  others.integers[c * 2 * words + i]);
              }
              const float exact = static_cast<float>(static_cast<std::int32_t>(sum)) *
                                  (screen.anchors.scale[r] * screen.candidates.scale[c]);
              check(products[r * tile.pitch + c] == exact, where);
            }
            for (std::int64_t c = columns; c < tile.pitch; ++c) check(products[r * tile.pitch + c] == -1.0f, where);
          }
        }
      }
    }
  }
}

// The copy's integers are so small that forms fit in 16 bits, whatever the rows: spikes, equal columns, any.
void check_form_integers() {
  constexpr std::int64_t kRows = 48, kDims = 200;
  std::mt19937 random(12);
  std::normal_distribution<float> normal;
  std::vector<float> rows(kRows * kDims);
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (std::int64_t c = 0; c < kDims; ++c) {
      const bool spike = c == r * 3 % kDims;
      rows[r * kDims + c] = r % 3 == 0   ? (spike ? 1.0f : 0.0f)
                            : r % 3 == 1 ? 0.37f
                                         : normal(random) * (spike ? 20.0f : 1.0f);
    }
  }
  std::vector<std::int32_t> order(kRows), start(kRows);
  for (std::int64_t r = 0; r < kRows; ++r) order[r] = static_cast<std::int32_t>(r);
  std::vector<float> mean(256 + kLine), scale(kRows), norm(kRows), residual(kRows);
  for (const int levels : {0, 1, 2}) {
    sn::cpu::Screen screen{};
    screen.dtype = sn::DType::kFloat32;
    screen.dims = kDims;
    screen.forms = {levels, sn::cpu::kPanel, 1};
    screen.words = sn::cpu::copy_words(kDims, false, screen.forms);
    screen.panel_stride = screen.words * sn::cpu::kPanel;
    screen.mean = line_start(mean);
    std::vector<std::uint32_t> packed(kRows * screen.words + kLine);
    screen.anchors = {{rows.data(), kRows, kDims},
                      order.data(),
                      kRows,
                      kRows,
                      line_start(packed),
                      scale.data(),
                      norm.data(),
                      residual.data(),
                      nullptr,
                      start.data()};
    for (const std::string& level : sn::cpu::usable_capabilities()) {
      sn::cpu::set_capability(level);
      const std::string where = "integers for " + std::to_string(levels) + " levels, " + level;
      check(sn::cpu::active_kernels().pack(screen, screen.anchors, 0, kRows / sn::cpu::kPanel), where);
      for (std::int64_t r = 0; r < kRows; ++r) {
        double rest = 0.0;
        for (std::int64_t c = 0; c < 2 * screen.words; ++c) {
          const std::uint32_t word =
              screen.anchors
                  .packed[(r / sn::cpu::kPanel * screen.words + c / 2) * sn::cpu::kPanel + r % sn::cpu::kPanel];
          const std::int32_t value = static_cast<std::int16_t>(c % 2 == 0 ? word & 0xffffu : word >> 16);
          check(std::abs(value) <= static_cast<std::int32_t>(sn::cpu::integer_most(levels)), where);
          const double t = c < kDims ? rows[r * kDims + c] : 0.0;
          rest += (t - static_cast<double>(scale[r]) * value) * (t - static_cast<double>(scale[r]) * value);
        }
        check(std::abs(rest - residual[r]) <= 1e-3 * rest + 1e-12 * norm[r], where + ": residual");
      }
    }
  }
}

// When 8-bit integers serve, of rows whose distances are about normal.
void check_width() {
  sn::cpu::set_path(Path::kAuto);
  const auto chosen = [](std::int64_t M, const sn::cpu::CopySample& sample) {
    return sn::cpu::multiplies_bytes(M, 128, 10, true, 0.036, sn::cpu::Forms{}, sample);
  };
  check(chosen(8192, {2.0, 0.177, 0.0, 0.049}), "width: random rows");
  check(!chosen(1024, {2.0, 0.177, 0.0, 0.049}), "width: too few candidates to gain by it");
  check(!chosen(8192, {2.0, 0.088, 0.0, 0.049}), "width: distances alike");
  check(!chosen(8192, {2.0, 0.177, 0.01, 0.049}), "width: clusters");
  // Rows that are screened as a whole, too: kByteRows forces what a call may come to.
  const sn::cpu::CopySample longer{2.0, 0.177, 0.0, 0.049};
  check(sn::cpu::multiplies_bytes(1024, 512, 10, true, 0.036, sn::cpu::Forms{}, longer), "width: longer rows");
  check(!sn::cpu::multiplies_bytes(1024, 512, 10, true, 0.036, sn::cpu::Forms{2, 96, 128}, longer),
        "width: forms of 16-bit integers cost less");
  // Forms of integers that a few large columns make coarse.
  const auto kept = [](const sn::cpu::CopySample& sample) {
    return sn::cpu::keeps_forms(4096, 1024, 10, true, 0.036, sn::cpu::Forms{2, 96, 128}, sample, 0.002);
  };
  check(sn::cpu::keeps_forms(1.9) && !sn::cpu::keeps_forms(2.1), "forms: as coarse as serves any data");
  check(kept({2.0, 0.06, 0.0, 0.008}), "forms: rows far apart");
  check(!kept({2.0, 0.06, 0.0, 0.1}) && !kept({2.0, 0.06, 0.0, 6.0}), "forms: distances alike");
  check(!kept({2.0, 0.06, 0.01, 0.008}) && !kept({0.0, 0.0, 0.0, 0.008}), "forms: clusters");
  check(sn::cpu::plan_screen(1024, 1024, 512, 10, true, 1, sn::cpu::active_kernels()).whole, "width: whole rows");
  check(!chosen(8192, {2.0, 0.177, 0.0, 0.2}), "width: a coarse copy");
  check(!chosen(8192, {2.0, 0.1, 0.0, 3.0}), "width: a copy that tells nothing apart");
  check(!chosen(8192, {0.0, 0.0, 0.0, 0.0}), "width: equal rows");
  check(!chosen(8192, {2.0, std::nan(""), 0.0, 0.049}), "width: a distance that is not finite");
}

}  // namespace

// `--few`: of the largest problems those that differ in what memory they touch, each with several threads only. For a
// build with sanitizers, where all of them take minutes; the values of the others are no news there.
int main(int argc, char** argv) {
  const bool few = argc > 1 && std::string(argv[1]) == "--few";
  unsigned seed = 1;
  const std::vector<std::string> kinds = {"random", "clusters", "two",  "collapsed", "identical", "duplicates",
                                          "grid",   "outlier",  "tiny", "huge",      "mixed",     "bank"};
  check_width();
  check_forms();
  check_form_integers();
  // For 16-bit integers; for 8-bit ones, of which the first column is 127, the others 19.375, 20 and 20.625 before.
  for (const std::int64_t D : {2048, 4096}) check_problem(make_lopsided(D, 10, 131.0f, 1.0f, 96.0f));
  for (const std::int64_t D : {128, 192, 1024}) check_problem(make_lopsided(D, 10, 160.0f, 5.0f, 127.0f / 16.0f));
  check_repeated_edges(make("random", 300, 300, 65, 10, 80, ++seed));
  check_repeated_edges(make("bank", 130, 90, 33, 4, 30, ++seed));
  for (const std::string& kind : kinds) {
    for (const auto& [N, M, D, k, identities] : std::vector<std::array<std::int64_t, 5>>{{1, 1, 1, 1, 1},
                                                                                         {2, 2, 3, 1, 1},
                                                                                         {17, 17, 65, 10, 4},
                                                                                         {49, 49, 31, 60, 3},
                                                                                         {97, 97, 100, 10, 100000},
                                                                                         {130, 130, 1030, 3, 30},
                                                                                         {5, 300, 70, 10, 7},
                                                                                         {40, 40, 700, 10, 10},
                                                                                         {30, 60, 600, 5, 9},
                                                                                         {200, 131, 33, 20, 1},
                                                                                         {333, 333, 300, 10, 80}}) {
      check_problem(make(kind, N, M, D, k, identities, ++seed));
    }
    // Lists that stay short, that everything ties for, and a candidate matrix of its own.
    const bool large = !few || kind == "random" || kind == "identical" || kind == "bank";
    for (const auto& [N, M, D, k, identities] : std::vector<std::array<std::int64_t, 5>>{
             {1000, 1000, 96, 10, 250}, {450, 450, 520, 128, 20}, {70, 2500, 260, 40, 20}}) {
      ++seed;
      if (large) check_problem(make(kind, N, M, D, k, identities, seed), few ? std::vector{3} : std::vector{1, 3});
    }
    // A gradient of more than a megabyte.
    ++seed;
    if (kind == "random") check_problem(make(kind, 520, 520, 530, 3, 130, seed));
  }
  std::printf("%d passed, 0 failed\n", checks);
  return 0;
}
