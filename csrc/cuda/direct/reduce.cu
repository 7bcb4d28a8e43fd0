// The sum over many anchors behind the last strip of the direct path: a block a partial (loss.cuh), and the one that
// finishes last joins them. Of few anchors the selection (select.cu) sums by itself. Where an input value was not
// finite the blocks share out what becomes NaN instead.
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kReduceThreads = PartialMemory::kThreads;

struct ReduceArgs {
  ForwardArgs forward;
  Control* gControl;
  const AnchorRecord* gRecords;  // [N]
  PartialRecord* gPartials;      // [kPartials]
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <class A>
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const __grid_constant__ ReduceArgs args) {
  SharedArena arena;
  const ReductionMemory memory(arena);
  const PartialMemory stage(arena);
  const Shared<std::uint32_t> sLast = arena.take<std::uint32_t>(1);
  if (atomic_load(&args.gControl->nonfinite) != 0) {
    poison_outputs<A>(args.forward, block_id(), block_count());
    return;
  }
  sum_partial(args.gRecords, args.forward.anchors.rows, static_cast<int>(block_id()), stage, memory, args.gPartials);
  fence_device();
  sync_block();
  if (thread_id() == 0) {
    // The selection left the ticket at 0.
    sLast.set(0, atomic_add(&args.gControl->ticket, 1u) == static_cast<std::uint32_t>(block_count() - 1) ? 1u : 0u);
  }
  sync_block();
  if (sLast.get(0) == 0) return;
  fence_device();
  join_partials<A>(args.forward, args.gPartials, memory);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class A>
cudaError_t launch_reduce(const ReduceArgs& args, cudaStream_t stream) {
  const LaunchShape shape{reduction_blocks(args.forward.anchors.rows), kReduceThreads,
                          ReductionMemory::kBytes + PartialMemory::kBytes + shared_bytes<std::uint32_t>(1)};
  return launch(reduce_kernel<A>, shape, stream, args);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_reduce(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  const ReduceArgs reduce_args{.forward = args,
                               .gControl = piece<Control>(workspace, plan.control),
                               .gRecords = piece<AnchorRecord>(workspace, plan.records),
                               .gPartials = piece<PartialRecord>(workspace, plan.partial_records)};
  return args.dtype == DType::kFloat64 ? launch_reduce<double>(reduce_args, stream)
                                       : launch_reduce<float>(reduce_args, stream);
}

}  // namespace sn::cuda
