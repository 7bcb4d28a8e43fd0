#include "capi.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/backend.h"
#include "cuda/plan/sizes.h"
#include "cuda/plan/sizes_small.h"
#include "cuda/slots.h"
#include "cuda/stages.h"
#include "simt.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define SN_SIMT_EXPORT __attribute__((visibility("default")))

namespace {

using sn::cuda::Piece;

// As a float 1.3e36, as a half 6.1e4, as an index out of any range: never a plausible result.
constexpr int kPoison = 0x7b;
constexpr std::int64_t kGuardBytes = 512;
static_assert(kGuardBytes % sn::cuda::kWorkspaceAlignment == 0);

std::mutex one_at_a_time;

// Why these are not pieces of a workspace of `bytes` bytes; empty if they are.
std::string refuse(std::vector<Piece*> pieces, std::int64_t bytes) {
  std::erase_if(pieces, [](const Piece* piece) { return piece->bytes == 0; });
  std::sort(pieces.begin(), pieces.end(), [](const Piece* a, const Piece* b) { return a->offset < b->offset; });
  std::int64_t end = 0;
  for (const Piece* piece : pieces) {
    if (piece->bytes < 0 || piece->offset < end) return "pieces of the plan overlap";
    if (piece->offset % sn::cuda::kWorkspaceAlignment != 0) return "a piece of the plan is not aligned";
    end = piece->offset + piece->bytes;
  }
  return end > bytes ? "a piece of the plan lies outside its workspace" : "";
}

// A workspace for the pieces of a plan, moved apart so that a guard lies after each.
class Workspace {
 public:
  explicit Workspace(const std::vector<Piece*>& pieces) {
    for (Piece* piece : pieces) {
      if (piece->bytes == 0) continue;
      piece->offset = bytes_;
      guards_.push_back(bytes_ + piece->bytes);
      bytes_ = (guards_.back() + kGuardBytes + sn::cuda::kWorkspaceAlignment - 1) / sn::cuda::kWorkspaceAlignment *
               sn::cuda::kWorkspaceAlignment;
      next_.push_back(bytes_);
    }
    bytes_ = std::max<std::int64_t>(bytes_, 1);
    void* memory = nullptr;
    if (posix_memalign(&memory, sn::cuda::kWorkspaceAlignment, static_cast<std::size_t>(bytes_)) != 0) {
      throw std::bad_alloc();
    }
    data_.reset(static_cast<char*>(memory));
    std::memset(data_.get(), kPoison, static_cast<std::size_t>(bytes_));
#if defined(__SANITIZE_ADDRESS__)
    for (std::size_t g = 0; g < guards_.size(); ++g) {
      __asan_poison_memory_region(data_.get() + guards_[g], static_cast<std::size_t>(next_[g] - guards_[g]));
    }
#endif
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { lift(); }

  char* data() { return data_.get(); }
  // What is wrong with the guards; empty if nothing is.
  std::string inspect() {
    lift();
    for (std::size_t g = 0; fault_.empty() && g < guards_.size(); ++g) {
      for (std::int64_t at = guards_[g]; at < next_[g]; ++at) {
        if (data_.get()[at] == static_cast<char>(kPoison)) continue;
        fault_ = "a write " + std::to_string(at - guards_[g]) + " bytes behind piece " + std::to_string(g) +
                 " of the workspace";
        break;
      }
    }
    return fault_;
  }

 private:
  void lift() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(data_.get(), static_cast<std::size_t>(bytes_));
#endif
  }
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::vector<std::int64_t> guards_;  // begin of the guard after each piece
  std::vector<std::int64_t> next_;    // its end
  std::int64_t bytes_ = 0;
  std::unique_ptr<char, Free> data_;
  std::string fault_;
};

std::vector<Piece*> pieces_of(sn::cuda::ForwardPlan& plan) {
  return {&plan.control,         &plan.flags,           &plan.records,
          &plan.partials,        &plan.sort_keys,       &plan.mean,
          &plan.anchor_cast,     &plan.candidate_cast,  &plan.anchor_facts,
          &plan.candidate_facts, &plan.positive_leader, &plan.positive_count,
          &plan.positive_list,   &plan.counts,          &plan.buffer,
          &plan.far_buffer,      &plan.queue,           &plan.partial_records,
          &plan.waiting,         &plan.rescreen_tiles};
}
std::vector<Piece*> pieces_of(sn::cuda::BackwardPlan& plan) {
  return {&plan.histogram,      &plan.totals,      &plan.begins,     &plan.placed_targets, &plan.placed_sources,
          &plan.placed_weights, &plan.list_begins, &plan.list_rests, &plan.list_sources,   &plan.list_weights};
}

// Changes a plan as the settings say, with all that depends on it.
void change(sn::cuda::ForwardPlan& plan, const sn::cuda::Problem& problem, const sn_simt_settings& settings) {
  using sn::cuda::ForwardPath;
  if (sn::cuda::takes_slot(plan) || problem.N == 0 || problem.M == 0) return;
  if (settings.strip_rows > 0 && settings.strip_rows < plan.strip_rows) {
    plan.strip_rows = settings.strip_rows;
    plan.strips = (problem.N + plan.strip_rows - 1) / plan.strip_rows;
    if (plan.path == ForwardPath::kDirect) plan.triangular = sn::cuda::direct_triangular(problem, plan.strip_rows);
  }
  if (settings.shared_reduction > 0) plan.shared_reduction = true;
  plan.partial_records.bytes = sn::cuda::partial_record_bytes(plan);
  if (plan.path == ForwardPath::kDirect) {
    if (settings.slice_elements > 0) {
      plan.slice_elements = settings.slice_elements;
      plan.d_slices = sn::cuda::direct_slices(problem.D, plan.slice_elements);
    }
    const auto wanted = static_cast<sn::cuda::Selection>(settings.selection);
    if (wanted != sn::cuda::Selection::kExtracted && sn::cuda::selects(wanted, problem.M, plan.K)) {
      plan.selection = wanted;
    }
    if (settings.select_threads > 0) plan.select_threads = settings.select_threads;
    plan.flags.bytes = sn::cuda::direct_flag_bytes(plan, problem);
    plan.partials.bytes = sn::cuda::direct_partial_bytes(plan, problem);
    plan.sort_keys.bytes = sn::cuda::direct_sort_key_bytes(plan, problem);
    plan.launches = sn::cuda::direct_launches(plan);
    return;
  }
  if (settings.score_tile > 0) {
    plan.score_tile = settings.score_tile;
    plan.sample_tile = std::min(settings.score_tile, 128);
  }
  plan.triangular = sn::cuda::screened_triangular(problem, plan, plan.score_tile);
  if (settings.positive_anchors > 0) plan.positive_anchors = settings.positive_anchors;
  if (settings.positive_segments > 0) plan.positive_segments = settings.positive_segments;
  if (plan.path != ForwardPath::kDense) {
    // A sample must hold K candidates beside the anchor.
    const auto enough = [&](std::int64_t stride) { return stride > 0 && problem.M / stride > plan.K; };
    if (enough(settings.sample_stride)) plan.sample_stride = settings.sample_stride;
    plan.sample_columns = (problem.M + plan.sample_stride - 1) / plan.sample_stride;
    if (settings.sample_group > 0) plan.sample_group = settings.sample_group;
    if (settings.far_capacity > 0) plan.far_capacity = settings.far_capacity;
  }
  if (settings.no_rescreen != 0) plan.rescreen = false;
  if (settings.few_rows > 0) plan.few_rows = settings.few_rows;
  plan.counts.bytes = plan.strip_rows * 2 * 4;
  plan.buffer.bytes = sn::cuda::screened_buffer_bytes(plan);
  plan.far_buffer.bytes = plan.strip_rows * plan.far_capacity * 8;
  plan.queue.bytes = plan.strip_rows * 4;
  if (settings.buffer_capacity > 0 && plan.path != ForwardPath::kDense) {
    plan.buffer_capacity = std::max<std::int64_t>(settings.buffer_capacity, sn::cuda::fallback_entries(plan.K));
    plan.buffer.bytes = sn::cuda::screened_buffer_bytes(plan);
  }
  plan.waiting.bytes = plan.rescreen ? plan.strip_rows * 3 * 4 : 0;
  plan.rescreen_tiles.bytes =
      plan.rescreen ? sn::cuda::rescreen_tile_count(plan.strip_rows) * sn::cuda::kRescreenTileBytes : 0;
  plan.launches = sn::cuda::screened_launches(plan, problem);
}

void change(sn::cuda::BackwardPlan& plan, const sn::cuda::BackwardProblem& problem, const sn_simt_settings& settings) {
  const std::int64_t element = sn::element_bytes(problem.dtype);
  const int target_lanes = settings.target_lanes == 0 ? 32 : settings.target_lanes;
  const int row_lanes = sn::cuda::lanes_of_row(problem.D, problem.dtype);
  if (plan.resident) {
    const int packs = settings.lane_bytes / 16;
    if (sn::cuda::resident_serves(sn::cuda::resident_shape(problem), packs, row_lanes)) {
      plan.row_packs = packs;
      plan.slice_elements = packs * 16 / sn::accumulator_bytes(problem.dtype);
      plan.slices = sn::divide_up(problem.D, plan.slice_elements);
      plan.thread_packs = target_lanes == 32 ? 4 : 2;
      while (!sn::cuda::resident_threads_serve(plan)) plan.thread_packs /= 2;
    }
    return;
  }
  if (plan.slices > 0 && (target_lanes == 32 || row_lanes == 32) &&
      sn::cuda::gather_serves(problem.dtype, settings.lane_bytes, target_lanes, plan.searches)) {
    plan.lane_bytes = settings.lane_bytes;
    plan.target_lanes = target_lanes;
    plan.row_lanes = std::min(row_lanes, target_lanes);
    plan.slice_elements = plan.lane_bytes / element * plan.row_lanes;
    plan.slices = sn::divide_up(problem.D, plan.slice_elements);
  }
  if (settings.bucket_shift > 0 && plan.partitioned) {
    const std::int64_t targets = problem.symmetric ? problem.N : problem.M;
    plan.bucket_shift = settings.bucket_shift;
    plan.buckets = sn::divide_up(targets, std::int64_t{1} << plan.bucket_shift);
    plan.histogram.bytes = plan.buckets * plan.parts * 4;
    plan.totals.bytes = plan.buckets * 4;
    plan.begins.bytes = (plan.buckets + 1) * 4;
  }
}

void poison(void* data, std::int64_t bytes) {
  if (data != nullptr && bytes > 0) std::memset(data, kPoison, static_cast<std::size_t>(bytes));
}

// The memory that a kernel ahead may still write: all of a call, but rows too long to be set aside for every block.
std::vector<sn::simt::Region> global_memory(const sn::BackwardArgs& args, const sn::cuda::BackwardProblem& problem,
                                            std::vector<Piece*> pieces, char* workspace) {
  constexpr std::int64_t kMostBytes = std::int64_t{1} << 20;
  const std::int64_t acc = sn::accumulator_bytes(args.dtype);
  const std::int64_t row = problem.D * sn::element_bytes(args.dtype);
  std::vector<sn::simt::Region> regions;
  const auto add = [&](const void* data, std::int64_t bytes) {
    if (bytes <= kMostBytes) regions.push_back({const_cast<void*>(data), bytes});
  };
  add(args.grad_loss, acc * (args.reduction == sn::Reduction::kNone ? problem.N : 1));
  add(args.indices, problem.N * problem.edges * 4);
  add(args.coefficients, problem.N * problem.edges * acc);
  add(args.stats, sn::kStatsSize * static_cast<std::int64_t>(sizeof(double)));
  add(args.grad_anchors, problem.N * row);
  add(args.grad_candidates, problem.M * row);
  for (const Piece* piece : pieces) add(workspace + piece->offset, piece->bytes);
  for (const sn::FeatureView* view : {&args.anchors, &args.candidates}) {
    if (view->rows * row > kMostBytes || (args.symmetric && view == &args.candidates)) continue;
    for (std::int64_t i = 0; i < view->rows; ++i) {
      add(static_cast<const char*>(view->data) + i * view->row_stride * sn::element_bytes(args.dtype), row);
    }
  }
  return regions;
}

sn::cuda::DeviceFacts facts_of(const sn_simt_settings& settings) {
  return {
      .major = settings.major,
      .minor = settings.minor,
      .multiprocessors = settings.multiprocessors,
      .shared_bytes = settings.shared_bytes,
      .largest_cluster = settings.max_cluster,
      .wide_clusters = settings.max_cluster >= sn::cuda::kSquareCluster ? sn::cuda::DeviceFacts{}.wide_clusters : 0};
}

void prepare(const sn_simt_settings& settings, sn_simt_report& report) {
  report = {};
  sn::simt::reset({.seed = settings.seed,
                   .mma_error = static_cast<sn::simt::MmaError>(settings.mma_error),
                   .mma_seed = settings.mma_seed,
                   .mma_error_scale = settings.mma_error_scale,
                   .mma_model = static_cast<sn::simt::MmaModel>(settings.mma_model),
                   .shared_bytes = settings.shared_bytes,
                   .max_cluster = settings.major >= sn::cuda::kClusterMajor ? std::max(settings.max_cluster, 1) : 1});
}

int finish(cudaError_t error, std::string fault, std::int64_t planned, sn_simt_report& report) {
  report.planned_launches = planned;
  report.launches = sn::simt::statistics().launches;
  report.switches = sn::simt::statistics().switches;
  if (!sn::simt::fault().empty()) fault = sn::simt::fault();
  if (fault.empty() && error != cudaSuccess) fault = std::string("the call returned ") + cudaGetErrorString(error);
  if (fault.empty() && report.launches != planned) {
    fault = "planned " + std::to_string(planned) + " launches, made " + std::to_string(report.launches);
  }
  if (!fault.empty() && error == cudaSuccess) error = cudaErrorLaunchFailure;
  const std::size_t length = std::min(fault.size(), sizeof(report.fault) - 1);
  std::memcpy(report.fault, fault.data(), length);
  report.fault[length] = '\0';
  return error;
}

template <typename F>
int guarded(sn_simt_report& report, F body) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  try {
    return body();
  } catch (const std::exception& error) {
    return finish(cudaErrorUnknown, std::string("exception: ") + error.what(), 0, report);
  }
}

}  // namespace

extern "C" SN_SIMT_EXPORT int sn_simt_forward(const sn::ForwardArgs* args, const sn_simt_settings* settings,
                                              sn_simt_report* report) {
  return guarded(*report, [&] {
    prepare(*settings, *report);
    const sn::cuda::Problem problem = sn::cuda::problem_of(*args);
    const sn::cuda::DeviceFacts facts = facts_of(*settings);
    auto wanted = static_cast<sn::cuda::ForwardPath>(settings->path);
    if (!sn::cuda::serves(wanted, problem, facts)) wanted = sn::cuda::ForwardPath::kAuto;
    sn::cuda::ForwardPlan plan = sn::cuda::plan_forward(problem, facts, wanted);
    report->path = static_cast<std::int32_t>(plan.path);
    report->workspace_bytes = plan.workspace_bytes;

    const std::int64_t N = problem.N;
    const std::int64_t edges = plan.K + sn::kExtraEdges;
    const std::int64_t acc = sn::accumulator_bytes(args->dtype);
    poison(args->loss, acc * (args->options.reduction == sn::Reduction::kNone ? N : 1));
    poison(args->indices, N * edges * 4);
    poison(args->coefficients, N * edges * acc);
    poison(args->nearest_positive, N * 4);
    poison(args->farthest_positive, N * 4);
    poison(args->squared, N * edges * acc);
    poison(args->stats, sn::kStatsSize * static_cast<std::int64_t>(sizeof(double)));

    std::string fault = refuse(pieces_of(plan), plan.workspace_bytes);
    if (!fault.empty()) return finish(cudaErrorInvalidValue, fault, 0, *report);
    change(plan, problem, *settings);
    Workspace workspace(pieces_of(plan));
    const int slot = static_cast<int>(settings->seed % sn::cuda::kSlots);
    const cudaError_t error = sn::cuda::forward(*args, plan, workspace.data(), slot, nullptr);
    fault = workspace.inspect();
    const bool zero = sn::cuda::slots_are_zero() && sn::cuda::square_slots_are_zero();
    if (!zero && fault.empty()) fault = "tickets are not left at zero";
    if (plan.control.bytes >= static_cast<std::int64_t>(sizeof(sn::cuda::Control))) {
      std::memcpy(&report->control, workspace.data() + plan.control.offset, sizeof(sn::cuda::Control));
    }
    return finish(error, fault, plan.launches, *report);
  });
}

extern "C" SN_SIMT_EXPORT int sn_simt_backward(const sn::BackwardArgs* args, const sn_simt_settings* settings,
                                               sn_simt_report* report) {
  return guarded(*report, [&] {
    prepare(*settings, *report);
    sn::cuda::BackwardProblem problem = sn::cuda::problem_of(*args);
    problem.partition = static_cast<sn::cuda::Partition>(settings->partition);
    sn::cuda::BackwardPlan plan = sn::cuda::plan_backward(problem, facts_of(*settings));
    const std::string fault = refuse(pieces_of(plan), plan.workspace_bytes);
    if (!fault.empty()) return finish(cudaErrorInvalidValue, fault, 0, *report);
    change(plan, problem, *settings);
    report->lane_bytes = plan.lane_bytes;
    report->target_lanes = plan.target_lanes;
    report->workspace_bytes = plan.workspace_bytes;
    report->partitioned = plan.partitioned ? 1 : 0;
    report->resident = plan.resident ? plan.row_packs : 0;
    const std::int64_t row = problem.D * sn::element_bytes(args->dtype);
    poison(args->grad_anchors, problem.N * row);
    poison(args->grad_candidates, problem.M * row);

    Workspace workspace(pieces_of(plan));
    sn::simt::set_global(global_memory(*args, problem, pieces_of(plan), workspace.data()));
    const cudaError_t error = sn::cuda::backward(*args, plan, workspace.data(), nullptr);
    return finish(error, workspace.inspect(), plan.launches, *report);
  });
}

extern "C" SN_SIMT_EXPORT int sn_simt_serves(std::int32_t path, const sn::cuda::Problem* problem,
                                             const sn_simt_settings* settings) {
  return sn::cuda::serves(static_cast<sn::cuda::ForwardPath>(path), *problem, facts_of(*settings)) ? 1 : 0;
}
