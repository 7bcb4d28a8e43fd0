// The host harness: runs the very sources of the CUDA kernels on a CPU and reports what they do wrong.
//
// csrc/cuda/ptx.cuh, compiled with SN_SIMT, takes its device side from simt_device.h, which calls the functions
// declared here. A thread of a kernel is a fiber with its own stack. All fibers run in the calling thread, one at a
// time, and change only inside the wrappers: where a lane waits for its warp, its block or its cluster, and now and
// then at global atomics and fences. A seeded generator draws the next one from lanes, warps and the blocks that are
// resident together, so that a seed is a schedule and repeats exactly. Blocks start in random order.
//
// A fault ends the launch and names the kernel's launch site, block, thread and source line. Faults are
//   - a warp collective that not all 32 lanes reach (some have returned, wait elsewhere, or are at another collective),
//     and a block or cluster barrier that not all threads reach, or that they reach in different places;
//   - accesses to shared memory outside the array, misaligned, or of bytes that nothing has written;
//   - races in shared memory: two accesses of different threads, one of them a write, with no barrier between them that
//     orders both: sync_warp within a warp, sync_block within a block, sync_cluster across blocks. Shuffles, votes and
//     mma order nothing, as CUDA says. What was ordered decides, not the schedule that happened: one run finds a race
//     that any schedule with the same accesses could show. Atomics race with plain accesses only;
//   - reads and overwriting of bytes that cp.async is still copying. Before its wait these hold poison or, at random,
//     already the data;
//   - more shared memory, threads or clusters than the device has;
//   - a block that leaves while another of its cluster may still read it: with no barrier of the cluster, relaxed or
//     not, at which the reader arrived after its read and for which the block waited;
//   - of a dependent launch, a thread that reads or writes global memory, or returns, before it has waited for the
//     kernel ahead. Until all threads that run together wait, the memory that the test has named (set_global) holds
//     poison, so that plain reads and writes do not escape either.
// With AddressSanitizer global memory is covered too: buffers of the tests have their exact size, and the pieces of a
// workspace have guards between them, which capi.cpp also checks without it.
//
// mma multiplies exactly and then errs, up to the bound that the kernels rely on (mma_error_bound), in a direction that
// the options choose. The error is a function of the operands and the seed alone, so that schedules compare bit for
// bit. Or mma is one of the published models of a tensor core, to the bit (MmaModel).
//
// It cannot show
//   - a missing fence or a weak ordering in global memory, where every store is seen at once here;
//   - races in global memory, except as results that change with the schedule;
//   - missing proxy fences, and the asynchronous side of anything but cp.async;
//   - forward progress and deadlock between blocks: a kernel that spins hangs here too;
//   - speed, registers and spills;
//   - what nvcc makes of the source: contraction, a miscompilation, a missing __launch_bounds__;
//   - wrappers whose device side differs from their host side.
// GPU tests and compute-sanitizer are for these.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "simt_platform.h"

namespace sn::simt {

// ---- control --------------------------------------------------------------------------------------------------------

enum class MmaError : std::int32_t {
  kNone = 0,     // rounded once
  kRandom = 1,   // uniform within the bound
  kExtreme = 2,  // the bound, sign at random
  kPlus = 3,     // the bound, upwards
  kMinus = 4     // the bound, downwards
};

// Real tensor cores, as far as is known (arXiv 2511.10909, arXiv 2512.07004): the products of a group of columns and
// the accumulator are aligned to the largest exponent among them, each is cut off (towards zero) below `bits` fraction
// bits of it, and they are added exactly. The sum is cut off to a float. Groups follow one another. The exponent of a
// product is the sum of its factors' before it is normalised; that of a subnormal is the format's least (-14 of Half,
// -126 of BFloat16 and float). A product that is zero aligns nothing. Subnormal results are kept.
enum class MmaModel : std::int32_t {
  kNone = 0,           // exact products and MmaError
  kGroup16Bits25 = 1,  // H100, H200, B200, RTX Blackwell
  kGroup8Bits24 = 2,   // A100, A30, Ada
  kGroup4Bits23 = 3,   // V100
  kGroup4Bits22 = 4    // no device: cuts off more than the kernels' bound allows, which tests must notice
};
struct MmaModelFacts {
  int group;
  int bits;
};
inline constexpr MmaModelFacts kMmaModels[] = {{0, 0}, {16, 25}, {8, 24}, {4, 23}, {4, 22}};

struct Options {
  std::uint64_t seed = 1;  // of the schedule, the order of blocks and the moments of copies
  MmaError mma_error = MmaError::kRandom;
  std::uint64_t mma_seed = 1;
  double mma_error_scale = 1.0;                       // of the injected error: above 1 it breaks the bound
  MmaModel mma_model = MmaModel::kNone;               // any other: no injected error
  int shared_bytes = 232448;                          // of a block, at most
  int max_cluster = 16;                               // blocks; 1: a device without clusters
  int cluster_multiprocessors = 16;                   // that a cluster may be spread over, each with
  int multiprocessor_shared_bytes = 233472;           // so much shared memory, 1024 bytes of it for each block
  std::int64_t max_switches = std::int64_t{1} << 31;  // of a launch; more is taken for a hang
};

struct Statistics {
  std::int64_t launches = 0;
  std::int64_t blocks = 0;
  std::int64_t switches = 0;
  std::int64_t mmas = 0;
};

// One thread at a time uses the harness. `reset` sets the options, forgets faults and statistics, and restarts the
// sequence of schedules. After a fault every launch fails until the next reset.
//
// If SN_SIMT_LAUNCH_LOG names a file, the process appends a line for each kernel that it launched when it ends: name,
// threads, most shared memory in bytes, largest cluster, separated by tabs.
void reset(const Options& options);
const Options& options();
const std::string& fault();  // empty: none

// Memory that the kernel ahead of a dependent launch may still write or read. Until the next reset.
struct Region {
  void* data;
  std::int64_t bytes;
};
void set_global(std::vector<Region> regions);

// Clusters that the device of the options holds at once: of so many blocks, threads and bytes of shared memory each.
int active_clusters(int blocks, int threads, int shared_bytes);

const Statistics& statistics();

// |error| of one mma.m16n8k16 is at most this times
//   max(|accumulator| + sum |products|, max 2^e / 2).
// The second maximum is over products with exactly one factor that is subnormal or zero, e the exponent that the
// product is aligned by. Hardware cuts terms off by such exponents (MmaModel; the bound also covers alignment by
// zeros), which may lie far above the products themselves: 2 groups x 9 terms x 2^-24 2^e = 9 2^-23 2^e with groups of
// 8 and 24 bits, 4.25 2^-23 2^e with 16 and 25; the half is 10 2^-23 2^e. Products of two subnormals are harmless: the
// cut at 2^(-28 - 23) keeps those of Half, multiples of 2^-48, and those of BFloat16 lie below every float.
//
// The kernels rely on (n_i + n_j) / 2 in place of that maximum, n = |h|^2 of the rows. It is never smaller: the sums
// are at most |h_i||h_j|, and with x subnormal and z normal 2^e = 2^(least + exponent of z) <= z^2 <= n_j.
inline constexpr double mma_error_bound = 1.25 * 16 / 8388608.0;

// ---- records of shared memory ---------------------------------------------------------------------------------------

// Each 4-byte word of shared memory has a record of its last write and one of its reads since:
//   time << 32 | source line << 16 | split << 14 | in flight << 13 | atomic << 12 | scope << 10 | thread
// Time counts completed barriers. `scope` tells how far the threads of the record are spread: one thread, several lanes
// of the thread's warp, several warps, several blocks. Bytes of a word used in parts (split) have their own records.
using Record = std::uint64_t;
inline constexpr Record kThreadMask = 0x3ff;
inline constexpr int kScopeShift = 10;
inline constexpr Record kAtomic = 1u << 12;
inline constexpr Record kInFlight = 1u << 13;
inline constexpr Record kSplit = 1u << 14;
inline constexpr int kLineShift = 16;
enum Scope : int { kOneThread = 0, kOneWarp = 1, kOneBlock = 2, kOneCluster = 3 };

// ---- threads --------------------------------------------------------------------------------------------------------

struct Block;
struct Warp;

struct Site {
  const char* file = "";
  unsigned line = 0;
};
inline Site site_of(std::source_location where) {
  return {where.file_name(), static_cast<unsigned>(where.line())};
}

// What a lane waits for.
enum class Op : std::uint8_t {
  kNothing,
  kShuffle,
  kVote,
  kMatch,
  kReduce,
  kSyncWarp,
  kLoadMatrix,
  kLoadMatrixTransposed,
  kMma,
  kSyncBlock,
  kSyncCluster,
  kWaitCluster,
  kWaitForPrimary
};

struct Copy {
  std::uint32_t position;
  const void* source;  // null: zeros
  bool delivered;
  unsigned line;
};

struct Lane {
  void* stack_pointer = nullptr;
  Warp* warp = nullptr;
  Block* block = nullptr;
  int lane = 0;
  int thread = 0;
  int phase = 0;  // which of the warp's two meeting places is next
  Op waits_for = Op::kNothing;
  bool returned = false;
  bool released = false;  // it has waited for the kernel ahead
  int arrivals = 0;       // at barriers of the cluster
  int waits = 0;          // for them
  Site site;
  std::vector<Copy> copies;         // of groups that are not waited for yet, and of the open one
  std::vector<std::size_t> groups;  // copies in each closed group
  std::size_t open_copies = 0;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// A meeting place of the lanes of a warp. A warp has two and uses them in turn: no lane can reach the next meeting but
// one before all have left this one.
struct Meeting {
  Op op = Op::kNothing;
  Site site;
  std::uint32_t arrived = 0;
  alignas(16) std::uint64_t values[32] = {};
  alignas(16) std::uint32_t words[32][10] = {};  // operands of mma, rows and results of ldmatrix
  alignas(16) std::uint32_t results[32][4] = {};
};

struct Warp {
  Block* block = nullptr;
  Lane* lanes = nullptr;
  std::uint32_t runnable = 0;
  std::uint32_t returned = 0;
  int place = -1;  // in the list of warps with a runnable lane
  // Times of the last barriers that order this warp with itself, its block, its cluster. [kOneThread] is forever.
  std::uint32_t sync[4] = {};
  Meeting meetings[2];
};

struct Cluster;

struct Block {
  std::int64_t id = 0;
  int rank = 0;
  Cluster* cluster = nullptr;
  std::uint32_t start = 0;  // older records belong to other blocks
  int shared_bytes = 0;
  unsigned char* shared = nullptr;
  Record* writes = nullptr;  // of words
  Record* reads = nullptr;
  Record* byte_writes = nullptr;  // of split words
  Record* byte_reads = nullptr;
  int capacity = 0;
  int waiting = 0;  // threads at the barrier
  int returned = 0;
  Site barrier;
  // The last read by another block: the reader's arrivals at barriers of the cluster before it, -1: none was.
  int remote_read = -1;
  Site remote_reader;
  int warp_count = 0;
  std::vector<Warp> warps;  // never shrinks: lanes own stacks
  std::vector<Lane> lanes;
};

struct Cluster {
  std::vector<Block*> blocks;
  std::vector<Block*> slots;  // owns them
  int waiting = 0;            // threads that have arrived at the barrier
  int opened = 0;             // barriers at which all have arrived
  bool relaxed = false;       // one of them in a way that orders no memory
  int returned = 0;
  Site barrier;
  std::int64_t id = 0;
};

struct Grid {
  std::int64_t blocks = 0;
  int threads = 0;
  int shared_bytes = 0;
  int cluster = 1;
  bool dependent = false;
  std::source_location where;
  const void* kernel = nullptr;  // names it
};

// The fiber that runs now.
extern Lane* current;
extern Grid grid;

[[noreturn]] void report(const std::string& what, Site site);

// Runs `call(context)` once for each thread of the grid.
cudaError_t run(const Grid& shape, void (*call)(void*), void* context);

// ---- what the wrappers call -----------------------------------------------------------------------------------------

// Meets the other lanes. Returns the meeting with their values, valid until this lane's next meeting but one.
Meeting& meet(Op op, std::uint64_t value, Site site);
void sync_warp(Site site);
void sync_block(Site site);
void sync_cluster(Site site);
void arrive_cluster_relaxed(Site site);
void wait_cluster(Site site);
void wait_for_primary(Site site);
void maybe_switch();

// Called where a thread reads or writes global memory.
inline void note_global(Site site) {
  if (!grid.dependent || current->released) return;
  report("global memory is used before wait_for_primary, while the kernel ahead may run", site);
}

void load_matrix(std::uint32_t (&r)[4], std::uint32_t position, bool transposed, Site site);
void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], bool bfloat, Site site);

void async_copy(std::uint32_t position, const void* source, bool valid, Site site);
void async_commit();
void async_wait(int pending);

// Check and record an access of this lane's block, or a read of another block of the cluster. `position` and `bytes`
// are in range and aligned. They return the bytes' address.
const unsigned char* note_read(std::uint32_t position, int bytes, Site site);
const unsigned char* note_remote_read(int rank, std::uint32_t position, int bytes, Site site);
unsigned char* note_write(std::uint32_t position, int bytes, Site site);
unsigned char* note_atomic(std::uint32_t position, int bytes, Site site);

}  // namespace sn::simt
