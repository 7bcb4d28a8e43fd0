// Work on the framework's thread pool, in the floating-point mode the results are defined in.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "../sn_types.h"

namespace sn::cpu {

// Round to nearest, subnormals kept. A program may have asked one of its threads to flush them, and results
// must not depend on which thread runs what.
class DefaultFloatingPoint {
 public:
#if defined(__SSE2__)
  DefaultFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(kDefault); }
  ~DefaultFloatingPoint() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kDefault = 0x1f80;  // exceptions masked, nearest, no flushing
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatingPoint() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(std::uint64_t{0}));
  }
  ~DefaultFloatingPoint() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  std::uint64_t saved_;
#else
  DefaultFloatingPoint() {}
#endif
};

// body(item) for every item, items handed out as workers get free. Nothing a body computes may depend on the
// order.
template <class Body>
void for_each(const ThreadPool& pool, int workers, std::int64_t items, const Body& body) {
  struct Context {
    const Body& body;
    std::int64_t items;
    std::atomic<std::int64_t> next{0};
  } context{body, items};
  const auto run = [](std::int64_t begin, std::int64_t end, void* opaque) {
    Context& shared = *static_cast<Context*>(opaque);
    const DefaultFloatingPoint mode;
    for (std::int64_t worker = begin; worker < end; ++worker) {
      for (std::int64_t item; (item = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.items;) {
        if constexpr (std::is_invocable_v<Body, std::int64_t, std::int64_t>) {
          shared.body(item, worker);
        } else {
          shared.body(item);
        }
      }
    }
  };
  if (workers > items) workers = static_cast<int>(items);
  if (workers <= 1) {
    run(0, 1, &context);
  } else {
    pool.parallel_for(0, workers, 1, run, &context);
  }
}

// body(begin, end) over [0, count) in blocks of `block`.
template <class Body>
void for_blocks(const ThreadPool& pool, int workers, std::int64_t count, std::int64_t block, const Body& body) {
  for_each(pool, workers, (count + block - 1) / block, [&](std::int64_t item) {
    const std::int64_t begin = item * block;
    body(begin, begin + block < count ? begin + block : count);
  });
}

// A gather-and-use pipeline over two buffers, in one parallel region: gather(stage, item) fills buffer stage % 2 and
// use(stage, item) reads it; with `in_order`, uses of a stage start when those of the stage before are done, so that
// they may add to what those left. Items are handed out in an order in which each waits only for items before it, so
// that whoever runs the first unfinished item never waits: no number of workers can block.
template <class Gather, class Use>
void gather_and_use(const ThreadPool& pool, int workers, std::int64_t stages, std::int64_t gathers, std::int64_t uses,
                    bool in_order, const Gather& gather, const Use& use) {
  struct Stage {
    std::atomic<std::int64_t> gathered{0};
    std::atomic<std::int64_t> used{0};
  };
  std::vector<Stage> done(static_cast<std::size_t>(stages));
  const auto wait_for = [](const std::atomic<std::int64_t>& count, std::int64_t all) {
    constexpr int kSpins = 2000;
    for (int spins = 0; count.load(std::memory_order_acquire) < all; ++spins) {
      if (spins >= kSpins) std::this_thread::yield();
    }
  };
  // Step t: the gathers of stage t, into the buffer that stage t - 2 has been used from, and the uses of stage t - 1.
  const std::int64_t step_items = gathers + uses;
  for_each(pool, workers, (stages + 1) * step_items, [&](std::int64_t item) {
    const std::int64_t step = item / step_items;
    const std::int64_t at = item % step_items;
    if (at < gathers) {
      if (step == stages) return;
      if (step >= 2) wait_for(done[step - 2].used, uses);
      gather(step, at);
      done[step].gathered.fetch_add(1, std::memory_order_release);
    } else if (step > 0) {
      wait_for(done[step - 1].gathered, gathers);
      if (in_order && step >= 2) wait_for(done[step - 2].used, uses);
      use(step - 1, at - gathers);
      done[step - 1].used.fetch_add(1, std::memory_order_release);
    }
  });
}

// Waking a pool costs some microseconds: work below this many elementary operations stays on the calling
// thread.
inline constexpr double kWorthAThread = 4e5;
inline int workers_for(const ThreadPool& pool, double operations) {
  const double useful = operations / kWorthAThread;
  return useful < 2.0 ? 1 : (useful < pool.threads ? static_cast<int>(useful) : pool.threads);
}

}  // namespace sn::cpu
