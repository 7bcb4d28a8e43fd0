// State that the parts of the harness share (the launch that runs, random numbers, a clock), and what each part does
// for the others. Only the parts include it: fibers.cpp, scheduler.cpp, faults.cpp, shared_memory.cpp,
// tensor_cores.cpp, launch.cpp. Wrappers and tests call simt.h.
//
// The parts need no sanitizer and run several times faster without one (-fno-sanitize=all after the other flags).
// SN_SIMT_ASAN then tells them that the program has one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "simt.h"

#if defined(__SANITIZE_ADDRESS__) && !defined(SN_SIMT_ASAN)
#define SN_SIMT_ASAN 1
#endif

namespace sn::simt {

inline constexpr int kLanes = 32;
inline constexpr std::uint32_t kAllLanes = 0xffffffffu;
inline constexpr std::uint32_t kWordBytes = 4;  // of shared memory under one record

#if defined(SN_SIMT_ASAN)
inline constexpr std::size_t kStackBytes = 256 * 1024;
#else
inline constexpr std::size_t kStackBytes = 128 * 1024;
#endif

// ---- state ----------------------------------------------------------------------------------------------------------

enum class Outcome { kBlockDone, kStuck, kFault };

// Thrown where a fault is found, caught where the fiber began, so that its frames release what they hold.
struct Fault {
  std::string what;
};

struct Runtime {
  Options options;
  Statistics statistics;
  std::string fault;
  std::uint64_t random = 1;
  std::uint64_t launches_since_reset = 0;
  std::vector<Region> regions;           // set_global
  std::vector<std::vector<char>> saved;  // what they hold while the kernel ahead is taken to run

  // The launch that runs.
  void (*call)(void*) = nullptr;
  void* context = nullptr;
  Lane main;  // the fiber of the caller of run()
  const void* main_stack = nullptr;
  std::size_t main_stack_bytes = 0;
  Outcome outcome = Outcome::kBlockDone;
  std::int64_t switches = 0;
  std::uint32_t stay = 0;  // of 256 times: how often the same warp goes on
  bool stale_stacks = false;
  bool primary_runs = false;  // the kernel ahead of a dependent launch: threads stop at wait_for_primary

  std::vector<Warp*> runnable;  // warps with a runnable lane
  Warp* last = nullptr;
  std::vector<Cluster*> resident;
  std::vector<std::unique_ptr<Block>> slots;
  std::vector<Block*> free_slots;
};

extern Runtime& rt;

inline std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
inline std::uint64_t draw() {
  std::uint64_t x = rt.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  rt.random = x;
  return x * 0x2545f4914f6cdd1du;
}
// Below `count`, from the upper bits of `word`.
inline std::uint32_t below(std::uint64_t word, std::uint32_t count) {
  return static_cast<std::uint32_t>(((word >> 32) * count) >> 32);
}

extern std::uint64_t clock_high;  // time << 32

inline std::uint32_t now() {
  return static_cast<std::uint32_t>(clock_high >> 32);
}
inline std::uint32_t tick() {
  if (now() == 0xffffffffu) {
    std::fprintf(stderr, "sn::simt: more than 2^31 barriers in a launch\n");
    std::abort();
  }
  clock_high += std::uint64_t{1} << 32;
  return now();
}

// ---- fibers.cpp -----------------------------------------------------------------------------------------------------

char* new_stack();
void prepare_stack(Lane& lane, void (*entry)());
void switched();  // a fiber calls it first when it starts
// `ends`: the running fiber does not come back.
void switch_to(Lane& next, bool ends = false);

// ---- scheduler.cpp --------------------------------------------------------------------------------------------------

void make_runnable(Warp& warp, std::uint32_t lanes);
void make_waiting(Lane& lane);
Lane* pick();  // null: no lane can go on
[[noreturn]] void leave(Outcome outcome);

Meeting& arrive(Op op, Site site);
// To be called when this lane's values are in place. True for the last lane to arrive, which then calls release.
bool await_others(Meeting& meeting);
void release(Meeting& meeting);

// ---- faults.cpp -----------------------------------------------------------------------------------------------------

const char* name_of(Op op);
std::string text_of(Site site);
std::string symbol_of(const void* address);
std::string kernel_text();
std::string hex(std::uint32_t mask);
std::string stuck_text();

// ---- shared_memory.cpp ----------------------------------------------------------------------------------------------

// Checks and records a read of 16 bytes, a row of ldmatrix, by the warp as a whole.
const unsigned char* note_matrix_read(std::uint32_t position, Site site);

}  // namespace sn::simt
