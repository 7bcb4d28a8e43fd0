// The cost model. A kernel takes a launch, then the longer of two times, smoothly joined: that of one block alone, and
// that of all its work on all multiprocessors. Tiles of equal work come in waves instead. Everything grows with rows,
// candidates and dimensions (strips of whole tiles by a few per cent less), so the cheapest of several paths does, too.
//
// Constants are microseconds, and what one multiprocessor of an H200 does in one. They were read from
// benchmarks/results/nvidia-h200/2026-11-26-d45aac1840-measure.json (a "record" below), steps "paths", "kernels" and
// "ceilings", except where it says "counted, not measured". The tests hold the model to all of its times.
#include "cuda/plan/cost.h"

#include <algorithm>
#include <cmath>

#include "cuda/plan/cost_direct.h"
#include "cuda/plan/machine.h"
#include "cuda/plan/sizes.h"

namespace sn::cuda {
namespace {

// ---- constants ------------------------------------------------------------------------------------------------------

// A kernel that finds nothing to do: fallback 1.4 to 1.5, far thresholds 1.0 to 1.5.
constexpr double kIdle = 1.4;
constexpr double kCacheSize = 50e6;

// The sum of us_of(rows) over strips of anchors, of which the last may be shorter.
template <class UsOf>
double all_strips(const ForwardPlan& plan, const Problem& problem, const UsOf& us_of) {
  const std::int64_t before = std::max<std::int64_t>(plan.strips, 1) - 1;
  const double last = us_of(problem.N - before * plan.strip_rows);
  return before > 0 ? real(before) * us_of(plan.strip_rows) + last : last;
}

constexpr double kReduceStart = 3.0;  // of the last kernel where blocks have added up

// ---- direct sums ----------------------------------------------------------------------------------------------------

// Selection: a row alone, and rows one after the other on a multiprocessor, which are as many times shorter as blocks
// reside there. Where one warp extracts, 64 to 256 x 2048: 10.0 to 12.1, when it took the neighbours one by one, and
// each link of the finish waited for the one before. Now candidates within a bound are ranked all at once, roots and
// exponentials of an anchor are one each, sums meet together, and one logarithm and one division follow. Counted, not
// measured, by the stalls that the compiler wrote into the machine code of sm_90a (and 24 to 40 cycles for what has
// none), from the sums of a row to the record, K = 10: 7490 cycles of a warp that does it alone then, 3830 now. The
// record's 7490 were 6370 by this model, so of cycles saved 0.85 count. Another warp found near and far on the direct
// path, so there it is 1500 and the ranks. A neighbour: 1.2 entries of the list to compare with.
constexpr double kShortRowStart = 7.5 - 1500.0 / 1755.0;
constexpr double kShortRowEntry = 0.0083;
constexpr double kShortRows = 0.5;
constexpr double kShortRowsEntry = 0.0021;
// Lists (direct/lists.cuh): counted, not measured. A block alone sorts 32 keys a warp in some 600 cycles, and finds
// places among 8 lists in some 400. Bounding sorts once more, waits twice, and looks again at a thread's candidates.
// Rows of 385 to 1024 were extracted from when the record was made, and are taken to cost what those did.
constexpr double kListStart = 9.0;
constexpr double kBoundStart = 1.2;
constexpr double kListEntry = 0.64;  // the candidates of a thread: loads, one after the other
constexpr double kListRows = 0.53;
constexpr double kLargeListRows = 1.7;
constexpr double kFewListResident = 5.0;
constexpr double kListResident = 2.0;
// Of kListedKeys, each is searched for in 31 lists: 34,000 instructions, all schedulers.
constexpr double kSortAll = 5.0;
// Radix passes. 64 x 4096 x 128: 35 of 42; 64 x 16384 x 128: 87 of 104; 2048 x 2048 x 128: 148 of 180. All were of
// K = 10. Lists sort what they find, or a network does: counted, not measured, of 2048 keys 66 rounds of 1024 exchanges
// of 20 instructions each, all schedulers.
constexpr double kLongRowStart = 17.5;
constexpr double kLongRowEntry = 0.0046;
constexpr double kLongRows = 4.5;
constexpr double kLongRowsEntry = 0.0023;
constexpr double kNetworkKey = 6.0 / 1024.0;
double tiles_us(const ForwardPlan& plan, const Problem& problem, std::int64_t rows, const Machine& machine) {
  const double blocks = real(direct_tiles(rows, problem.M, plan.triangular)) * real(plan.d_slices);
  double element = kTileElement / machine.rate.ffma;
  if (problem.dtype == DType::kFloat64) element *= machine.rate.dfma;
  if (element_bytes(problem.dtype) == 2) element *= kHalfTiles;
  const double dims = std::min(real(plan.slice_elements), real(std::max<std::int64_t>(problem.D, 1)));
  return kGap + kTilesStart + waves(blocks, machine.device) * dims * element;
}

// Of a block alone, and of one row on a multiprocessor.
struct RowCost {
  double alone;
  double share;
};
RowCost select_row(const ForwardPlan& plan, const Problem& problem) {
  const double M = real(problem.M);
  const double K = real(plan.K);
  if (plan.selection == Selection::kExtracted) {
    return {kShortRowStart + K * kShortRowRank + kShortRowEntry * M,
            kShortRows + kSelectKey / kFewListResident * K + kShortRowsEntry * M};
  }
  const bool large = plan.select_threads > kFewListThreads;
  const double resident = large ? kListResident : kFewListResident;
  const auto sort_us = [](double keys) { return kSortAll * (keys / kListedKeys) * (keys / kListedKeys); };
  if (plan.selection == Selection::kSearched) {
    const double start = kLongRowStart + kLongRowEntry * (large ? 1.0 : 2.0) * M + kSelectKey * K;
    const double share = kLongRows + kLongRowsEntry * M;
    const double sort = plan.K <= kListedKeys ? sort_us(K) : kNetworkKey * K;
    return {start + sort, share + sort + kSelectKey / resident * K};
  }
  const bool bounds = plan.selection == Selection::kBounded;
  const double sorted = bounds ? std::min(M, K + K * K / kListThreads) : M;
  const double sort = sort_us(sorted);
  const double bound = bounds ? kBoundStart : 0.0;
  return {kListStart + bound + sort + kSelectKey * K + kListEntry * M / plan.select_threads,
          (large ? kLargeListRows : kListRows) + sort + (bound + kSelectKey * K) / resident + kShortRowsEntry * M};
}

double select_us(const ForwardPlan& plan, const Problem& problem, std::int64_t rows, const Machine& machine) {
  const double partials = real(rows) * real(problem.M) * real(plan.d_slices) * real(accumulator_bytes(problem.dtype));
  const RowCost row = select_row(plan, problem);
  const double start = kGap + machine.spread(partials / kCacheBytes);
  const double together = machine.spread(real(rows) * row.share);
  if (plan.selection != Selection::kSearched) return start + joined(row.alone, together);
  // 256 rows of 4096 took as long as 64.
  return start + std::sqrt(joined(row.alone * row.alone, together * together));
}

void predict_direct(const ForwardPlan& plan, const Problem& problem, const Machine& machine, Cost* cost) {
  cost->add("tiles", all_strips(plan, problem, [&](auto rows) { return tiles_us(plan, problem, rows, machine); }),
            plan.strips);
  cost->add("select",
            (plan.shared_reduction ? 0.0 : final_us(problem.N)) +
                all_strips(plan, problem, [&](auto rows) { return select_us(plan, problem, rows, machine); }),
            plan.strips);
  if (plan.shared_reduction) cost->add("reduce", kGap + kReduceStart + final_us(problem.N));
}

// ---- screening ------------------------------------------------------------------------------------------------------

constexpr double kSampleWide = 6.0;  // fp32: 6.2 at D = 512, 7.9 at 2048
constexpr double kSampleElement = 0.0008;
constexpr double kSampleHalf = 1.3;
constexpr double kFactsStart = 3.0;
// A row that a warp takes: 65536 x 128 of bf16 in 19.7. Of several in a warp, counted, not measured: their share of it.
constexpr double kFactsRow = 0.033;

double sample_us(const Problem& problem) {
  return kGap + (problem.dtype == DType::kFloat32 ? kSampleWide + kSampleElement * real(problem.D) : kSampleHalf);
}

double facts_us(const ForwardPlan& plan, const Problem& problem, const Machine& machine) {
  const bool others = !problem.symmetric && plan.path != ForwardPath::kBank;
  const double candidates = others ? real(problem.M) : 0.0;
  const double anchors = real(problem.N);
  const double copies = (plan.cast_anchors ? anchors : 0.0) + (plan.cast_candidates ? candidates : 0.0);
  const double bytes = (anchors + candidates) * real(problem.D) * real(element_bytes(problem.dtype)) +
                       copies * 2.0 * real(plan.padded_dims);
  const double row = kFactsRow * real(std::int64_t{1} << facts_row_shift(plan.padded_dims)) / 32.0;
  return kGap + kFactsStart + std::max(machine.memory_us(bytes), machine.spread(row * (anchors + candidates)));
}

// The search for positives (positives_shape): the table of a group of anchors, then for each batch of candidates of a
// block the latency of an atomic, and one look-up for each group and candidate. Counted, not measured. The number of
// groups, which falls where there are more look-ups than that shape wants, is followed by its limits here.
constexpr double kPositivesStart = 5.0;
constexpr double kPositivesBatchUs = 1.0;
constexpr double kPositiveLookup = 132.0 / 524288.0;

double positives_us(const Problem& problem, const Machine& machine) {
  const double pairs = real(problem.N) * real(problem.M);
  const double most = pairs / real(kFewPositiveAnchors) + real(problem.M);
  const double least = pairs / real(kMostPositiveAnchors) + real(problem.M);
  const double lookups = std::min(most, std::max(least, real(kPositiveLookups)));
  const double batches = lookups / (machine.processors * real(kPositivesResident * kPositivesBatch));
  return kGap + kPositivesStart + kPositivesBatchUs * std::max(1.0, batches) +
         machine.spread(kPositiveLookup * lookups);
}

// The sample of plan_sample, in real numbers that grow with N and M: a plan's own have steps, and need its buffers.
struct Sample {
  double columns;
  double values;  // bounds that it leaves of a row: some are single scores, some of groups of 32
  double ratio;   // candidates for each of the sample, so for each neighbour entries that the screening keeps
};
Sample sample_of(const ForwardPlan& plan, const Problem& problem) {
  constexpr double kSingleScores = 64.0;
  const double M = real(problem.M);
  const double K = real(plan.K);
  const double least = real(least_sample(plan.K));
  double ratio = real(kSampleRatio);
  if (plan.thin_sample) {
    // As thin as the buffer allows, which holds what nearly all rows keep: some 1.15 K + 6 sqrt(K) for each in
    // the sample.
    const double thinnest = real(kMostFewEntries) / (1.15 * K + 6.0 * std::sqrt(K));
    ratio = std::max(ratio, std::min(M / real(kFewSample), thinnest));
  }
  const double sampled = takes_lean_sample(problem.N, plan.K) ? real(kLeanRatio) : ratio;
  const double columns = std::min(M, std::max(least, M / sampled));
  return {columns, std::min(columns, kSingleScores) + columns / 32.0, std::max(1.0, std::min(ratio, M / least))};
}

// Counted, not measured: a warp an anchor issues some 400 instructions and half a one a value, and reads what the
// sample left. A multiprocessor issues four a clock.
constexpr double kThresholdsStart = 1.5;
constexpr double kThresholdRows = 0.058;
constexpr double kThresholdValue = 0.7e-4;

double thresholds_us(double rows, double values, const Machine& machine) {
  return kGap + kThresholdsStart + machine.spread(rows * (kThresholdRows + kThresholdValue * values)) +
         machine.memory_us(4.0 * rows * values);
}

// Entries of a row: what a sample of one in r leaves. Exact sums of a row: the support set, its positives (four images
// an identity, as in the record), and what the bounds of the entries leave, with one in 16 about as many again as K.
constexpr double kListed = 3.0;
constexpr double kBoundsLeave = 0.6;
constexpr double kRefineStart = 7.0;
constexpr double kRefineSum = 0.3;         // one after the other, in one warp: 1024 x 128 takes some 20, ..
constexpr double kRefineElement = 2.5e-4;  // .. 1024 x 2048 takes 68.7
constexpr double kRefineByte = 2.1e-4;
constexpr double kRefineRows = 0.8;  // 8192 x 512: 206.7, 8192 x 2048: 432.8
constexpr double kRefineRowsEntry = 0.008;
constexpr double kRefineRowsElement = 2.6e-5;  // of a sum, beside its bytes
// Four warps a row, three rows at a time on a multiprocessor: dense scores, the bank, few anchors. kDense finds its
// K-th bound among all scores of the row: 64 x 65536 x 128 some 830 of 945, 2048 x 128 192 of 247, 512 x 8192 x 2048
// some 280 of 397. An entry, counted, not measured: a warp of twelve takes that long for kRefineRowsEntry.
constexpr double kSharedRows = 3.0;
constexpr double kSharedStart = 4.0;
constexpr double kSharedEntry = kRefineRowsEntry * 12.0 / 4.0;
constexpr double kSharedSum = 0.15;
constexpr double kSharedElement = 3.0e-4;
constexpr double kDenseEntry = 0.0128;

// Of so many rows: a warp a row, or four.
struct RefineCost {
  double own;
  double shared;
};
RefineCost refine_cost(const ForwardPlan& plan, const Problem& problem, const Sample& sample, std::int64_t rows,
                       const Machine& machine) {
  const double D = real(problem.D);
  const double M = real(problem.M);
  const double K = real(plan.K);
  const bool dense = plan.path == ForwardPath::kDense;
  const double ratio = dense ? 1.0 : sample.ratio;
  const double sums = K + kListed + kBoundsLeave * std::min(ratio, 16.0);  // a thinner sample leaves no more
  const double element = real(element_bytes(problem.dtype));
  const double cached = std::min(1.0, kCacheSize / (M * D * element));
  const double byte_us = cached / kCacheBytes + (1.0 - cached) / kFarBytes;
  const double exact = sums * D * (kRefineRowsElement + element * byte_us);
  const double alone = kRefineStart + sums * (kRefineSum + D * (kRefineElement + kRefineByte * element));
  const double entries = dense ? 1.0 + kDenseEntry * M : kSharedStart + kSharedEntry * ratio * K;
  const double shared = entries + sums * (kSharedSum + kSharedElement * D);
  return {kGap + joined(alone, machine.spread(real(rows) * (kRefineRows + kRefineRowsEntry * ratio * K + exact))),
          kGap + waves(real(rows) / kSharedRows, machine.device) * shared + machine.spread(real(rows) * exact)};
}

double refine_us(const ForwardPlan& plan, const Problem& problem, const Sample& sample, std::int64_t rows,
                 const Machine& machine) {
  const RefineCost cost = refine_cost(plan, problem, sample, rows, machine);
  return plan.path == ForwardPath::kScreen ? std::min(cost.own, cost.shared) : cost.shared;
}

// Rows that overflowed their buffers, or of which too many entries survive: bounds of all, no exact sums.
double undecided_us(const ForwardPlan& plan, const Problem& problem, std::int64_t rows, const Machine& machine) {
  if (plan.path == ForwardPath::kDense) {
    return kGap + waves(real(rows) / kSharedRows, machine.device) * (1.0 + kDenseEntry * real(problem.M));
  }
  const double row = kRefineRows + kRefineRowsEntry * real(plan.buffer_capacity);
  return kGap + joined(kRefineStart, machine.spread(real(rows) * row));
}

constexpr double kMergeStart = 5.0;

// Rows of which the fallback only looks for near or far: a tile of 64 of them against candidates of their labels, of
// which a row has `seen`; a tile is taken to have one label. Of dense scores: against all candidates, at most. All
// counted, not measured: a block looks through the queue once, and again for each of its tiles (two dependent loads and
// eight barriers for 2048 rows); a scan of 256 labels has a load and three barriers; ranking 64 x 64 sums, or as many
// zeros of null rows, takes 2400 instructions of each of eight warps. Sums are those of direct tiles, in shorter
// stages: 83 instructions for 1000 multiply-adds, which take 77 there.
constexpr double kShortStages = 83.0 / 77.0;
constexpr double kQueueRow = 0.8e-3;
constexpr double kLabelScan = 0.8;
constexpr double kRanking = 3.5;
double fallback_us(const Problem& problem, double rows, double seen, bool null, const Machine& machine) {
  const double side = real(kDirectTile);
  const double tiles = std::ceil(rows / side);
  const double parts = std::clamp(std::floor(real(kLabelBlocks) / tiles), 1.0, real(kFallbackSegments));
  double element = kShortStages * kTileElement / machine.rate.ffma;
  if (element_bytes(problem.dtype) == 2) element *= kHalfTiles;
  const double tile = kRanking + (null ? 0.0 : element * real(problem.D));
  const double part = kQueueRow * rows + kLabelScan * std::ceil(real(problem.M) / parts / 256.0) +
                      std::ceil(seen / parts / side) * tile;
  return kGap + kTilesStart + kQueueRow * rows + waves(tiles * parts, machine.device) * part;
}
// Its rows in the merge: three dependent reads and the finish of an anchor, a warp each of eight in kPartials blocks.
constexpr double kMergeRow = 3.0 / 8.0;

// ---- scores ---------------------------------------------------------------------------------------------------------

// Multiply-adds of a multiprocessor by 128 x 128 tiles of mma.sync: 8192 x 2048 (414) against 8192 x 512 (154). Tiles
// of 64 x 64 reach two thirds: 256 x 4096 x 2048 takes 20.3.
constexpr double kTensor = 1.52e6;
constexpr double kSmallTileShare = 0.66;
// Tiles of 128 x 256, counted, not measured: warps of 64 x 64 move 0.086 bytes of shared memory for a multiply-add,
// those of the large tile 0.125, at which 128 bytes a clock allow little more than the 930 multiply-adds a clock that
// were measured. Of the 1290 that `mma.sync` is said to reach, nine tenths are 1.25 times as many. Alone on its
// multiprocessor, a block waits for its first stages while nobody multiplies.
constexpr double kWideTileShare = 1.25;
constexpr double kWideWait = 1.5;
// A gain that was only counted may not be there: the wide tile is taken where it is to gain a tenth, and predicted as
// slow. To be 1 once it is measured.
constexpr double kWideDoubt = 1.1;
// A last row of tiles (of a square also the last column) of which at most half exists: half of the warps multiply
// nothing. Counted, not measured: half of the operands' bytes of shared memory and all of the copies' are 0.156 bytes
// for a multiply-add of the large tile. A full tile has 0.125, and a tile of 64 x 64 has 0.188 and two thirds of its
// rate, measured. So it multiplies at 0.8 of the rate: half of the work in 0.625 of the time, which the epilogue is
// taken to need, too. One row of tiles alone counts as whole: there tiles of 64 x 64 were measured.
constexpr double kHalfEmptyTile = 0.625;
double tiles_along(std::int64_t count, std::int64_t side) {
  const std::int64_t rest = count % side;
  const double last = count > side && 2 * rest <= side ? kHalfEmptyTile : 1.0;
  return real(count / side) + (rest > 0 ? last : 0.0);
}
constexpr double kScoresStart = 4.0;
// Epilogue of a pair: written out; tested for its anchor; tested for both.
constexpr double kDensePair = 2.0e-4;
constexpr double kTestedPair = 1.5e-4;
constexpr double kTwicePair = 2.1e-4;

// The bank's kernel, a stage of 64 columns, and what its waves cost beside: 64 x 1024 x 2048 takes 100 longer than the
// screening in two passes. 64 x 65536 x 2048 reads 537 MB in some 400.
constexpr double kBankStage = 2.2;
constexpr double kBankStart = 2.5;
constexpr double kBankWave = 4.0;
constexpr double kBankBytes = 1.2e6 / 132;
constexpr std::int64_t kBankColumns = 128;

double bank_pass_us(const ForwardPlan& plan, std::int64_t columns, const Machine& machine) {
  const double stages = real(plan.padded_dims / kStageColumns);
  const double count = waves(real(divide_up(columns, kBankColumns)), machine.device);
  const double bytes = real(columns) * real(plan.padded_dims) * 4.0;
  return kGap + kBankStart +
         std::max(count * (kBankWave + kBankStage * stages),
                  machine.spread(bytes / (kBankBytes * machine.rate.memory)));
}

}  // namespace

double score_pass_us(const ScorePass& pass, const DeviceFacts& device) {
  const Rates rate = rates(device);
  const double down = tiles_along(pass.rows, pass.tile_rows);
  // Columns of a sample are walked in whole tiles, and elsewhere the last of many columns matters little.
  const double across =
      pass.symmetric ? tiles_along(pass.columns, pass.tile_columns) : real(divide_up(pass.columns, pass.tile_columns));
  // Of the square of the rows with themselves, tiles on and above the diagonal: with as many rows as columns in a tile,
  // down (down + 1) / 2. They serve both triangles. (A wide tile counts as whole where half of it lies below the
  // diagonal, which no warp multiplies.)
  const double own = pass.symmetric ? tiles_along(pass.rows, pass.tile_columns) : 0.0;
  const double twice = own * (down + static_cast<double>(pass.tile_columns) / pass.tile_rows) / 2.0;
  const double tiles = twice + down * (across - own);
  const double pairs = static_cast<double>(pass.tile_rows) * pass.tile_columns;
  const bool wide = pass.tile_columns > 128;
  const double share = wide ? kWideTileShare : pass.tile_columns < 128 ? kSmallTileShare : 1.0;
  const double epilogue = pass.dense ? kDensePair : kTestedPair;
  const double tile_us =
      pairs * (real(pass.dims) / (kTensor * share * rate.tensor) + epilogue) + (wide ? kWideWait : 0.0);
  const double second_tests = twice > 0.0 ? waves(twice, device) * pairs * (kTwicePair - kTestedPair) : 0.0;
  return kGap + kScoresStart + (waves(tiles, device) * tile_us + second_tests) * (wide ? kWideDoubt : 1.0);
}

namespace {

int cheapest(ScorePass pass, bool wide, const DeviceFacts& device, double* least) {
  int best = 0;
  for (const int columns : {64, 128, 256}) {
    if (columns == 256 && (!wide || device.shared_bytes < kWideTileBytes)) break;
    pass.tile_columns = columns;
    pass.tile_rows = std::min(columns, 128);
    const double us = score_pass_us(pass, device);
    if (best == 0 || us < *least) {
      *least = us;
      best = columns;
    }
  }
  return best;
}

enum class ScoresFor { kSample, kDense, kAppend };

}  // namespace

bool refines_by_warps(const ForwardPlan& plan, const Problem& problem, std::int64_t rows, const DeviceFacts& device) {
  const RefineCost cost = refine_cost(plan, problem, sample_of(plan, problem), rows, Machine(device));
  return cost.own < cost.shared;
}

int cheapest_score_tile(ScorePass pass, bool wide, const DeviceFacts& device) {
  double us = 0.0;
  return cheapest(pass, wide, device, &us);
}

namespace {

double scores_us(const ForwardPlan& plan, std::int64_t rows, std::int64_t columns, ScoresFor what,
                 const Machine& machine) {
  if (plan.path == ForwardPath::kBank) return bank_pass_us(plan, columns, machine);
  ScorePass pass{.rows = rows,
                 .columns = columns,
                 .dims = plan.padded_dims,
                 .symmetric = what == ScoresFor::kAppend && plan.triangular,
                 .dense = what != ScoresFor::kAppend};
  double least = 0.0;
  cheapest(pass, what != ScoresFor::kSample, machine.device, &least);
  return least;
}

// All counted, not measured. One block goes over the rows that wait five times, 1024 at once.
double groups_us(double waiting) {
  return kGap + kIdle + 0.005 * waiting;
}

// A block takes a tile of waiting rows against its segment of the candidates; before that a sample of all, and one pass
// over its rows. Eight warps issue some 370 instructions a stage of a tile of 64 x 128.
double rescores_us(const ForwardPlan& plan, const Problem& problem, double waiting, const Machine& machine) {
  if (waiting < 1.0) return kGap + kIdle;
  constexpr double kStage = 0.55;
  constexpr double kBlocks = 264.0;
  const double tiles = std::ceil(waiting / real(kRescreenRows));
  const double across = std::ceil(real(problem.M) / 128.0);
  const double segments = std::min(across, std::ceil(kBlocks / tiles));
  const double ratio = std::clamp(real(problem.M) / (24.0 * real(plan.K + 1)), 1.0, 16.0);
  const double sweeps = 1.0 + std::ceil(across / ratio) + std::ceil(across / segments);
  return kGap + waves(tiles * segments, machine.device) * sweeps * kStage * real(plan.padded_dims / kStageColumns);
}

void predict_screened(const ForwardPlan& plan, const Problem& problem, const Machine& machine, Batch batch,
                      Cost* cost) {
  const auto each = [&](const char* name, const auto& us_of) {
    cost->add(name, all_strips(plan, problem, us_of), plan.strips);
  };
  const bool identical = batch == Batch::kIdentical || batch == Batch::kLargeIdentical;
  const bool waits = batch == Batch::kClusters || batch == Batch::kLargeClusters;
  const auto scores = [&](const char* name, std::int64_t columns, ScoresFor what) {
    each(name, [&](auto rows) { return identical ? kGap + kIdle : scores_us(plan, rows, columns, what, machine); });
  };
  Sample sample = sample_of(plan, problem);
  if (identical) sample.ratio = 0.0;  // no entries: the K lowest indices are at distance 0
  cost->add("sample", sample_us(problem));
  cost->add("facts", facts_us(plan, problem, machine));
  cost->add("positives", positives_us(problem, machine));
  if (plan.path == ForwardPath::kDense) {
    scores("scores", problem.M, ScoresFor::kDense);
  } else {
    scores("sample scores", static_cast<std::int64_t>(sample.columns), ScoresFor::kSample);
    each("thresholds", [&](auto rows) { return thresholds_us(real(rows), sample.values, machine); });
    if (may_have_large_identities(problem.M)) each("far thresholds", [](auto) { return kGap + kIdle; });
    scores("scores", problem.M, ScoresFor::kAppend);
  }
  each("refine", [&](auto rows) {
    return waits ? undecided_us(plan, problem, rows, machine) : refine_us(plan, problem, sample, rows, machine);
  });
  if (plan.rescreen) {
    each("groups", [&](auto rows) { return groups_us(waits ? real(rows) : 0.0); });
    each("rescores", [&](auto rows) { return rescores_us(plan, problem, waits ? real(rows) : 0.0, machine); });
    each("second refine",
         [&](auto rows) { return waits ? refine_us(plan, problem, sample, rows, machine) : kGap + kIdle; });
  }
  const bool large = batch == Batch::kLargeClusters || batch == Batch::kLargeIdentical;
  const bool all = waits && plan.path == ForwardPath::kDense;
  const double seen = real(all ? problem.M : identical ? kIdenticalIdentity : kClusterIdentity);
  each("fallback", [&](auto rows) {
    return large || all ? fallback_us(problem, real(rows), seen, identical, machine) : kGap + kIdle;
  });
  const double merged = large || all ? kMergeRow * real(problem.N) / real(kPartials) : 0.0;
  cost->add("merge", real(plan.strips) * (kGap + kMergeStart) + merged + final_us(problem.N), plan.strips);
}

}  // namespace

Cost predict_forward(const ForwardPlan& plan, const Problem& problem, const DeviceFacts& device, Batch batch) {
  Cost cost;
  const Machine machine(device);
  switch (plan.path) {
    case ForwardPath::kCluster:
    case ForwardPath::kTickets:
      cost.add("small", small_us(plan, problem, machine));
      break;
    case ForwardPath::kSquare:
      cost.add("square", square_us(plan, problem, machine));
      break;
    case ForwardPath::kAuto:
    case ForwardPath::kDirect:
      predict_direct(plan, problem, machine, &cost);
      break;
    case ForwardPath::kDense:
    case ForwardPath::kScreen:
    case ForwardPath::kBank:
      predict_screened(plan, problem, machine, batch, &cost);
      break;
  }
  return cost;
}

}  // namespace sn::cuda
