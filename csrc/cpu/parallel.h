// Work on the framework's thread pool, in the floating-point mode that defines the results.
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

// Rounds to nearest and keeps subnormals. A program may have told one of its threads to flush them, and results must
// not depend on the thread.
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

// Calls body(item), or body(item, worker), for every item. Idle workers take the next item, so no result may depend on
// the order.
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

// Calls body(begin, end) over [0, count) in blocks of `block`.
template <class Body>
void for_blocks(const ThreadPool& pool, int workers, std::int64_t count, std::int64_t block, const Body& body) {
  for_each(pool, workers, (count + block - 1) / block, [&](std::int64_t item) {
    const std::int64_t begin = item * block;
    body(begin, begin + block < count ? begin + block : count);
  });
}

// The items of one stage. A worker gets the same items in every stage, which its cache may still hold, and helps the
// others when its own are done.
class Shares {
 public:
  // Splits `items` into `shares` parts.
  void reset(int shares, std::int64_t items) {
    next_ = std::vector<std::atomic<std::int64_t>>(static_cast<std::size_t>(shares));
    items_ = items;
    for (int s = 0; s < shares; ++s) next_[s].store(begin(s), std::memory_order_relaxed);
  }
  // Calls body(item) for items that nobody has taken yet, those of share `own` first.
  template <class Body>
  void take(int own, const Body& body) {
    const int shares = static_cast<int>(next_.size());
    for (int turn = 0; turn < shares; ++turn) {
      const int share = (own + turn) % shares;
      const std::int64_t end = begin(share + 1);
      for (std::int64_t item; (item = next_[share].fetch_add(1, std::memory_order_relaxed)) < end;) {
        body(item);
        done_.fetch_add(1, std::memory_order_release);
      }
    }
  }
  // Waits until every item is done. Those that are not are with workers that are running.
  void wait() const {
    constexpr int kSpins = 2000;
    for (int spins = 0; done_.load(std::memory_order_acquire) < items_; ++spins) {
      if (spins >= kSpins) std::this_thread::yield();
    }
  }

 private:
  std::int64_t begin(int share) const { return share * items_ / static_cast<std::int64_t>(next_.size()); }

  std::vector<std::atomic<std::int64_t>> next_;
  std::atomic<std::int64_t> done_{0};
  std::int64_t items_ = 0;
};

// Runs stages that gather into one of two buffers and use it: gather(stage, item, buffer), use(stage, item, buffer).
// With `in_order` the uses of a stage start after those of the stage before, and may add to their results.
//
// Up to two workers gather everything for themselves, each into its own buffer, and never wait: reading lines that
// another core has just written costs more than gathering twice. More workers share the gathering in a pipeline over
// the two buffers, in one parallel region. A worker takes every item that is left before it waits, and waits only for
// items that running workers have taken: nothing blocks, however few of the workers really run.
template <class Gather, class Use>
void gather_and_use(const ThreadPool& pool, int workers, std::int64_t stages, std::int64_t gathers, std::int64_t uses,
                    bool in_order, const Gather& gather, const Use& use) {
  constexpr int kBuffers = 2;
  if (workers <= kBuffers) {
    for_each(pool, workers, workers, [&](std::int64_t worker) {
      for (std::int64_t stage = 0; stage < stages; ++stage) {
        for (std::int64_t item = 0; item < gathers; ++item) gather(stage, item, worker);
        for (std::int64_t item = worker * uses / workers; item < (worker + 1) * uses / workers; ++item) {
          use(stage, item, worker);
        }
      }
    });
    return;
  }
  std::vector<Shares> gathered(static_cast<std::size_t>(stages));
  std::vector<Shares> used(static_cast<std::size_t>(stages));
  for (std::int64_t stage = 0; stage < stages; ++stage) {
    gathered[stage].reset(workers, gathers);
    used[stage].reset(workers, uses);
  }
  for_each(pool, workers, workers, [&](std::int64_t worker) {
    const int own = static_cast<int>(worker);
    for (std::int64_t step = 0; step <= stages; ++step) {
      if (step < stages) {
        if (step >= kBuffers) used[step - kBuffers].wait();
        gathered[step].take(own, [&](std::int64_t item) { gather(step, item, step % kBuffers); });
      }
      if (step == 0) continue;
      gathered[step - 1].wait();
      if (in_order && step >= 2) used[step - 2].wait();
      used[step - 1].take(own, [&](std::int64_t item) { use(step - 1, item, (step - 1) % kBuffers); });
    }
  });
}

// Waking the pool costs some microseconds: less work than this, in elementary operations, stays on the calling thread.
inline constexpr double kWorthAThread = 4e5;
inline int workers_for(const ThreadPool& pool, double operations) {
  const double useful = operations / kWorthAThread;
  return useful < 2.0 ? 1 : (useful < pool.threads ? static_cast<int>(useful) : pool.threads);
}

}  // namespace sn::cpu
