#include "plan.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace sn::cpu {
namespace {

std::atomic<Path> forced_path{Path::kAuto};

// Scratch is at most kFixedScratch + 1 KB a row + 2 (N + M) D bytes (the copy), and 2 MB where K is large (the lists).
constexpr std::int64_t kFixedScratch = std::int64_t{6} << 20;
constexpr std::int64_t kWholeScratch = std::int64_t{5} << 20;
static_assert(kWholeScratch <= kFixedScratch);
constexpr std::int64_t kListBytesPerRow = 880;
constexpr std::int64_t kEntryBytes = sizeof(Entry);
// Of a row that is anchor and candidate: position, scale, norm, residual, slack, start, both biases, threshold, and
// three counts of its list. One that is only one of them takes less.
constexpr std::int64_t kRowBytes = 12 * 4;
constexpr std::int64_t kBucketBytes = 8;
static_assert(kListBytesPerRow + kRowBytes + 4 * kBucketBytes <= 1024, "the rows' share of scratch");
// Beyond that lists of an 8-bit copy are resolved rather than pruned.
constexpr double kMostOpen = 24.0;
constexpr std::int64_t kBytesMostDims = std::int64_t{1} << 16;
static_assert(255 * 127 * kBytesMostDims < std::int64_t{1} << 31, "sums of products fit in 32 bits");
// Cycles, measured on Zen 4: of an open candidate, a hit, an entry of a list, a distance; of a row, choosing among
// them; and of a column of the sample that tells how many are open: its rows are packed, their distances computed.
constexpr double kOpenCycles = 300.0;
constexpr double kRowCycles = 800.0;
constexpr double kSampleCycles = 80.0;
// Most batches of long rows leave too many open: a sample must cost little of what it may gain.
constexpr double kWorthASample = 16.0;
// Forms pay where their blocks are long, and large tiles where every worker has several.
constexpr std::int64_t kFormDims = 512;
constexpr std::int64_t kFormLeast = 128;
constexpr std::int64_t kTilesPerWorker = 8;
constexpr double kFormShare = 0.07;   // of products that a level saves, of which 8-bit integers save half
constexpr double kCoarseForms = 2.0;  // integers of which forms serve whatever the data
constexpr std::int64_t kDirectScratch = std::int64_t{4} << 20;
constexpr std::int64_t kDirectCopy = std::int64_t{2} << 20;
// Of features to copy.
constexpr double kCachedCopy = 8 << 20;
// Features about as large as the first-level cache need no gathering. Short rows arrive in whole cache lines anyway.
constexpr std::int64_t kCachedFeatures = std::int64_t{1} << 16;
constexpr std::int64_t kGatherFromDims = 256;
static_assert(2 * kRefineColumns * sizeof(float) <= 2 * kGatherFromDims, "two segments fit in the copy's place");

bool forces_bytes() {
  const Path forced = forced_path.load();
  return forced == Path::kBytes || forced == Path::kByteRows;
}

// Cycles of an anchor that products of 8 bits save.
double saved_cycles(std::int64_t M, std::int64_t D, bool symmetric, double product_cycles) {
  return (symmetric ? 0.25 : 0.5) * product_cycles * static_cast<double>(M * D);
}

// Candidates that the bounds leave open, in units of the K nearest, if distances were normal. At the K-th of M, which
// is z deviations below the mean, their number grows by about z + 1 / z a deviation of the window, up to half of all.
double growth(std::int64_t M, std::int64_t K, double window) {
  const double tail = std::log(static_cast<double>(M) / static_cast<double>(K));
  const double z = std::sqrt(std::max(1.0, 2.0 * tail - std::log(4.0 * 3.1416 * tail)));
  const double slope = z + 1.0 / z;
  const double deviations = std::min(window, slope);
  return std::exp(slope * deviations - 0.5 * deviations * deviations);
}

// Rows of a tile that are a multiple of 512 bytes apart would compete for a few sets of the cache.
std::int64_t tile_pitch(std::int64_t tile) {
  return tile < kTileHuge ? kTileLarge : tile + kPanel;
}

}  // namespace

void set_path(Path path) {
  forced_path.store(path);
}

Path choose_path(std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t K, DType dtype, bool symmetric,
                 const Kernels& kernels) {
  if (dtype == DType::kFloat64 || K > kScreenMostK || D > kScreenMostDims || K == 0 || N == 0 || D == 0) {
    return Path::kDirect;
  }
  const Path forced = forced_path.load();
  if (forced != Path::kAuto) return forced == Path::kDirect ? Path::kDirect : Path::kScreen;
  // Cycles per column of the features, measured on Zen 4. Direct: of a pair, fewer from panels; of copying a row to
  // them; and of choosing among pairs, whatever their length. Screened: of a pair beside its product; of copying and
  // gathering a row, from memory or from the cache; of an entry of a list, which two rows of a batch mostly share; and
  // of an anchor's lists, whatever its length. What both take is left out.
  const double n = static_cast<double>(N);
  const double columns = static_cast<double>(D);
  const double rows = static_cast<double>(symmetric ? N : N + M);
  const double pairs = static_cast<double>(round_up(N, kPanel) * round_up(M, kPanel));
  const bool halved = symmetric && N * M * static_cast<std::int64_t>(sizeof(float)) <= kDirectScratch;
  const bool panels = plan_direct(N, M, D, dtype, symmetric, kernels.panels_from).panels;
  const double summed = panels ? pairs * kernels.direct_cycles
                               : n * static_cast<double>(M) * std::max(kernels.direct_cycles, halved ? 0.14 : 0.16);
  const double direct = (halved ? 0.5 : 1.0) * summed + (panels ? rows * 0.5 : 0.0) + pairs * 0.6 / columns;
  const double copied = rows * columns * static_cast<double>(element_bytes(dtype)) <= kCachedCopy ? 1.6 : 3.5;
  const double screened = (symmetric ? 0.5 : 1.0) * pairs * (kernels.product_cycles + 0.006) + rows * copied +
                          n * static_cast<double>(K + 4) * (symmetric ? 0.75 : 1.5) * kernels.direct_cycles +
                          n * 600.0 / columns;
  return direct <= screened ? Path::kDirect : Path::kScreen;
}

bool may_multiply_bytes(std::int64_t N, std::int64_t M, std::int64_t D, bool symmetric, double product_cycles) {
  if (D > kBytesMostDims || forced_path.load() == Path::kTiles) return false;
  const double sample_cycles = kSampleCycles * static_cast<double>(D);
  const double gain = saved_cycles(M, D, symmetric, product_cycles) - kRowCycles;
  return forces_bytes() || static_cast<double>(N) * gain > kWorthASample * sample_cycles;
}

bool multiplies_bytes(std::int64_t M, std::int64_t D, std::int64_t K, bool symmetric, double product_cycles,
                      const Forms& forms, const CopySample& sample) {
  if (forces_bytes()) return true;
  if (M < 4 * K || !(sample.mean > 0.0) || !(sample.deviation > 0.0)) return false;
  // Clusters are not normal: all of one may be within the window.
  const double clustered = sample.near * static_cast<double>(M);
  const double open = static_cast<double>(K) * (growth(M, K, sample.window / sample.deviation) - 1.0) + clustered;
  // Forms make products of 16-bit integers cheaper.
  const double saved = saved_cycles(M, D, symmetric, product_cycles) * (1.0 - 2.0 * kFormShare * forms.levels);
  return open <= kMostOpen && open * kOpenCycles + kRowCycles <= saved;
}

bool keeps_forms(double coarseness) {
  return coarseness <= kCoarseForms || forced_path.load() == Path::kForms;
}

bool keeps_forms(std::int64_t M, std::int64_t D, std::int64_t K, bool symmetric, double product_cycles,
                 const Forms& forms, const CopySample& sample, double finest) {
  if (M < 4 * K || sample.near > 0.0 || !(sample.deviation > 0.0)) return false;
  const double opened = static_cast<double>(K) *
                        (growth(M, K, sample.window / sample.deviation) - growth(M, K, finest / sample.deviation));
  return opened * kOpenCycles <= 2.0 * kFormShare * forms.levels * saved_cycles(M, D, symmetric, product_cycles);
}

ScreenPlan plan_screen(std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t K, bool symmetric, int threads,
                       const Kernels& kernels) {
  ScreenPlan plan{};
  // Room for candidates that the bounds leave open beside the K nearest, within the rows' share of memory.
  const std::int64_t spare = symmetric ? 2 * D : 0;  // the budget counts the copy of both sides
  const std::int64_t budget =
      ((std::int64_t{2} << 20) / std::max<std::int64_t>(N, 1) + kListBytesPerRow + spare) / kEntryBytes;
  const std::int64_t wanted = K + 64 + K / 4;
  plan.capacity =
      std::clamp(std::min(wanted, budget) / kPanel * kPanel + kPanel, round_up(K, kPanel) + 2 * kPanel, kListMost);
  plan.first_pruning = std::min(plan.capacity, K + 32);
  constexpr std::int64_t kValue = sizeof(float);
  // A panel more, so that the rows of a tile do not compete for a few sets of the cache.
  plan.pitch = round_up(M, kTileGrain) + kPanel;
  plan.product_floats = round_up(N, kTileGrain) * plan.pitch;
  const Path forced = forced_path.load();
  plan.whole = forced != Path::kTiles && forced != Path::kBytes && M <= kWholeMost &&
               plan.product_floats * kValue <= kWholeScratch;
  const bool large = std::min(N, M) >= 4 * kTileLarge;
  plan.tile = large && threads <= 16 ? kTileLarge : kTileSmall;
  // What lists leave of the spare memory is room, too.
  const std::int64_t room = kFixedScratch - (plan.whole ? plan.product_floats * kValue : 0) +
                            std::max<std::int64_t>(0, N * (kListBytesPerRow + spare - plan.capacity * kEntryBytes));
  const bool forced_forms = forced == Path::kForms;
  Forms forms{kFormLevels, forced_forms ? kPanel : kernels.form_rows, forced_forms ? 1 : kFormLeast};
  const std::int64_t words = copy_words(D, false, forms);
  // As many levels as there is room for, or none.
  const auto use_forms = [&](std::int64_t tile) {
    const std::int64_t tile_floats = plan.whole ? 0 : tile * tile_pitch(tile);
    forms.levels = kFormLevels;
    forms.levels = levels_of(forms, tile, tile, std::min(words, kFormWords));
    for (; forms.levels > 0; --forms.levels) {
      if (threads * (tile_floats + form_words(forms.levels, tile, tile, words)) * kValue > room) continue;
      plan.tile = tile;
      plan.forms = forms;
      return true;
    }
    return false;
  };
  if (forced_forms || (large && D >= kFormDims)) {
    const std::int64_t side = divide_up(N, kTileHuge);
    const std::int64_t huge = symmetric ? side * (side + 1) / 2 : side * divide_up(M, kTileHuge);
    const bool halves = threads == 1 && plan.whole && symmetric;
    for (const std::int64_t tile : {halves ? round_up(divide_up(N, 2), kPanel) : 0,
                                    threads == 1 || huge >= kTilesPerWorker * threads ? kTileHuge : 0, plan.tile}) {
      if (tile > 0 && use_forms(tile)) break;
    }
  }
  plan.form_words = form_words(plan.forms.levels, plan.tile, plan.tile, words);
  plan.workers = threads;
  if (plan.whole) return plan;
  plan.pitch = tile_pitch(plan.tile);
  const std::int64_t worker_floats = plan.tile * plan.pitch;
  if (plan.forms.levels == 0) {
    plan.workers = static_cast<int>(std::clamp<std::int64_t>(threads, 1, kFixedScratch / (worker_floats * kValue)));
  }
  plan.product_floats = plan.workers * worker_floats;
  return plan;
}

std::int64_t copy_words(std::int64_t D, bool bytes, const Forms& forms) {
  return bytes ? divide_up(D, 4) : round_up(divide_up(D, 2), std::int64_t{1} << forms.levels);
}

DirectPlan plan_direct(std::int64_t N, std::int64_t M, std::int64_t D, DType dtype, bool symmetric,
                       std::int64_t panels_from) {
  const std::int64_t value_bytes = accumulator_bytes(dtype);
  DirectPlan plan{std::max<std::int64_t>(N, 1), M, false, round_up(D, kSegmentColumns), N * M * value_bytes};
  if (plan.bytes > kDirectScratch) {
    const std::int64_t rows = kDirectScratch / (M * value_bytes);
    plan.strip = std::max<std::int64_t>(1, rows >= kDirectBlock ? rows / kDirectBlock * kDirectBlock : rows);
    plan.bytes = plan.strip * M * value_bytes;
    return plan;
  }
  const std::int64_t rows = round_up(N, kPanel);
  const std::int64_t columns = round_up(M, kPanel);
  const std::int64_t copy = (symmetric ? rows : rows + columns) * plan.columns * value_bytes;
  const bool fills_panels = std::min(N, M) >= panels_from && rows * columns * 4 <= N * M * 5;
  if (dtype == DType::kFloat64 || !fills_panels || copy > kDirectCopy + 2 * (N + M) * D) return plan;
  plan.panels = true;
  plan.pitch = columns;
  plan.bytes = rows * columns * value_bytes + copy;
  return plan;
}

std::int64_t duplicate_buckets(std::int64_t candidates) {
  std::int64_t buckets = 16;
  while (buckets < 2 * candidates) buckets *= 2;
  return buckets;
}

bool refines_by_columns(std::int64_t N, std::int64_t M, std::int64_t D) {
  return D >= kGatherFromDims && std::max(N, M) * D * static_cast<std::int64_t>(sizeof(float)) > kCachedFeatures;
}

Plan plan_forward(std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t k, DType dtype, bool symmetric,
                  int threads) {
  const Kernels& kernels = active_kernels();
  const std::int64_t K = std::min(k, M);
  Plan plan{};
  plan.path = choose_path(N, M, D, K, dtype, symmetric, kernels);
  if (plan.path == Path::kDirect) {
    plan.workspace_bytes = plan_direct(N, M, D, dtype, symmetric, kernels.panels_from).bytes;
    return plan;
  }
  const ScreenPlan screen = plan_screen(N, M, D, K, symmetric, threads, kernels);
  plan.list_capacity = screen.capacity;
  const std::int64_t rows = symmetric ? N : N + M;
  plan.workspace_bytes = round_up(rows, kTileGrain) * copy_words(D, false, screen.forms) * 4 +
                         N * screen.capacity * kEntryBytes +
                         (screen.product_floats + screen.workers * screen.form_words) * 4 + rows * kRowBytes +
                         duplicate_buckets(M) * kBucketBytes;
  return plan;
}

}  // namespace sn::cpu
