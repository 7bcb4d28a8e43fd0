// The harness at work: fibers, the scheduler, meetings and barriers, the records of shared memory, copies, mma.
#include "simt.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <new>
#include <utility>

// This file itself need not be instrumented, and runs several times faster when it is not (-fno-sanitize=all behind the
// other flags); SN_SIMT_ASAN then tells that the program is.
#if defined(__SANITIZE_ADDRESS__) && !defined(SN_SIMT_ASAN)
#define SN_SIMT_ASAN 1
#endif
#if defined(SN_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#define SN_SIMT_UCONTEXT 1
#endif

namespace sn::simt {

Lane* current = nullptr;
Grid grid;

namespace {

constexpr int kLanes = 32;
constexpr std::uint32_t kAllLanes = 0xffffffffu;
constexpr int kMaxThreads = 1024;
static_assert(kMaxThreads - 1 == static_cast<int>(kThreadMask));
// Blocks of small grids run together as long as so many threads suffice.
constexpr int kResidentThreads = 2048;
// Where the time of records starts over; a launch has the rest of 2^32 barriers to itself.
constexpr std::uint32_t kLastStart = 0x80000000u;

#if defined(SN_SIMT_ASAN)
constexpr std::size_t kStackBytes = 256 * 1024;
#else
constexpr std::size_t kStackBytes = 128 * 1024;
#endif

// ---- state ----------------------------------------------------------------------------------------------------------

enum class Outcome { kBlockDone, kStuck, kFault };

// Thrown where a fault is found, caught where the fiber began: what its frames hold is given back.
struct Fault {
  std::string what;
};

struct Runtime {
  Options options;
  Statistics statistics;
  std::string fault;
  std::uint64_t random = 1;
  std::uint64_t launches_since_reset = 0;

  // The launch that runs.
  void (*call)(void*) = nullptr;
  void* context = nullptr;
  Lane main;  // the fiber of the caller of run()
  const void* main_stack = nullptr;
  std::size_t main_stack_bytes = 0;
  Outcome outcome = Outcome::kBlockDone;
  std::int64_t switches = 0;
  std::uint32_t stay = 0;  // of 256: how often the same warp goes on
  bool stale_stacks = false;

  std::vector<Warp*> runnable;  // warps with a runnable lane
  Warp* last = nullptr;
  std::vector<Cluster*> resident;
  std::vector<std::unique_ptr<Block>> slots;
  std::vector<Block*> free_slots;
};

Runtime& runtime() {
  static Runtime* const instance = new Runtime;  // never destroyed: stacks and slots are kept
  return *instance;
}
Runtime& rt = runtime();

std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
std::uint64_t draw() {
  std::uint64_t x = rt.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  rt.random = x;
  return x * 0x2545f4914f6cdd1du;
}
// Below `count`, from the upper bits of `word`.
std::uint32_t below(std::uint64_t word, std::uint32_t count) {
  return static_cast<std::uint32_t>(((word >> 32) * count) >> 32);
}

std::uint64_t clock_high = 0;  // time << 32

std::uint32_t now() {
  return static_cast<std::uint32_t>(clock_high >> 32);
}
std::uint32_t tick() {
  if (now() == 0xffffffffu) {
    std::fprintf(stderr, "sn::simt: more than 2^31 barriers in a launch\n");
    std::abort();
  }
  clock_high += std::uint64_t{1} << 32;
  return now();
}

// ---- fibers ---------------------------------------------------------------------------------------------------------

#if defined(SN_SIMT_UCONTEXT)

void change_stack(void** from, void* to) {
  ucontext_t* mine = static_cast<ucontext_t*>(*from);
  if (mine == nullptr) *from = mine = new ucontext_t;
  swapcontext(mine, static_cast<ucontext_t*>(to));
}
void prepare_stack(Lane& lane, void (*entry)()) {
  auto* context = static_cast<ucontext_t*>(lane.stack_pointer);
  if (context == nullptr) lane.stack_pointer = context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = lane.stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

#else

// Saves the registers that a call preserves on this stack, the stack pointer in *from, and goes on where `to` was saved.
extern "C" void sn_simt_change_stack(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.hidden sn_simt_change_stack
.globl sn_simt_change_stack
.type sn_simt_change_stack, @function
sn_simt_change_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sn_simt_change_stack, . - sn_simt_change_stack
)");

void prepare_stack(Lane& lane, void (*entry)()) {
  // As if `entry` had been called from nowhere: the stack pointer is 8 below a multiple of 16 when it starts.
  auto* top = reinterpret_cast<void**>(lane.stack + kStackBytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int saved = 3; saved <= 8; ++saved) top[-saved] = nullptr;
  lane.stack_pointer = top - 8;
}

#else

asm(R"(
.text
.p2align 4
.hidden sn_simt_change_stack
.globl sn_simt_change_stack
.type sn_simt_change_stack, %function
sn_simt_change_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size sn_simt_change_stack, . - sn_simt_change_stack
)");

void prepare_stack(Lane& lane, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(lane.stack + kStackBytes);
  for (int saved = 1; saved <= 20; ++saved) top[-saved] = nullptr;
  top[-20 + 11] = reinterpret_cast<void*>(entry);  // x30
  lane.stack_pointer = top - 20;
}

#endif

void change_stack(void** from, void* to) {
  sn_simt_change_stack(from, to);
}

#endif

void switched() {
#if defined(SN_SIMT_ASAN)
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(current->fake_stack, &bottom, &bytes);
  if (rt.main_stack == nullptr) {
    rt.main_stack = bottom;
    rt.main_stack_bytes = bytes;
  }
#endif
}

// `ends`: the fiber that runs does not come back.
void switch_to(Lane& next, [[maybe_unused]] bool ends = false) {
  Lane& from = *current;
  if (&next == &from) return;
#if defined(SN_SIMT_ASAN)
  const bool home = &next == &rt.main;
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, home ? rt.main_stack : next.stack,
                                 home ? rt.main_stack_bytes : kStackBytes);
#endif
  ++rt.switches;
  current = &next;
  change_stack(&from.stack_pointer, next.stack_pointer);
  switched();
}

char* new_stack() {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);  // an overflow ends here
  return static_cast<char*>(memory) + page;
}

// ---- the scheduler --------------------------------------------------------------------------------------------------

void make_runnable(Warp& warp, std::uint32_t lanes) {
  if (warp.runnable == 0 && lanes != 0) {
    warp.place = static_cast<int>(rt.runnable.size());
    rt.runnable.push_back(&warp);
  }
  warp.runnable |= lanes;
}

void make_waiting(Lane& lane) {
  Warp& warp = *lane.warp;
  warp.runnable &= ~(1u << lane.lane);
  if (warp.runnable != 0) return;
  Warp* moved = rt.runnable.back();
  rt.runnable[static_cast<std::size_t>(warp.place)] = moved;
  moved->place = warp.place;
  rt.runnable.pop_back();
  warp.place = -1;
}

Lane* pick() {
  if (rt.runnable.empty()) return nullptr;
  const std::uint64_t word = draw();
  Warp* warp = rt.last;
  if (warp == nullptr || warp->runnable == 0 || (word & 255) >= rt.stay) {
    warp = rt.runnable[below(word, static_cast<std::uint32_t>(rt.runnable.size()))];
    rt.last = warp;
  }
  const int turn = static_cast<int>(word >> 8 & 31);
  const int lane = (std::countr_zero(std::rotr(warp->runnable, turn)) + turn) % kLanes;
  return &warp->lanes[lane];
}

[[noreturn]] void leave(Outcome outcome) {
  rt.outcome = outcome;
  switch_to(rt.main, true);
  std::abort();
}

std::string kernel_text();

// A kernel that waits for what never comes, with something else always able to go on.
void expect_progress() {
  if (rt.switches > rt.options.max_switches) {
    throw Fault{kernel_text() + ": more than " + std::to_string(rt.options.max_switches) + " changes of threads"};
  }
}

// The fiber that runs waits; it is not runnable any more.
void wait() {
  expect_progress();
  Lane* next = pick();
  if (next == nullptr) leave(Outcome::kStuck);
  switch_to(*next);
}

// ---- faults ---------------------------------------------------------------------------------------------------------

const char* name_of(Op op) {
  switch (op) {
    case Op::kNothing:
      return "nothing";
    case Op::kShuffle:
      return "a shuffle";
    case Op::kVote:
      return "a vote";
    case Op::kMatch:
      return "match_any";
    case Op::kReduce:
      return "a reduction";
    case Op::kSyncWarp:
      return "sync_warp";
    case Op::kLoadMatrix:
      return "load_matrix_x4";
    case Op::kLoadMatrixTransposed:
      return "load_matrix_x4_transposed";
    case Op::kMma:
      return "mma_m16n8k16";
    case Op::kSyncBlock:
      return "sync_block";
    case Op::kSyncCluster:
      return "sync_cluster";
  }
  return "?";
}

std::string text_of(Site site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name != nullptr ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

// The demangled name of a function from the symbol table of the file it was loaded from: kernels are not exported, so
// dladdr alone does not know them.
std::string symbol_of(const void* address) {
  Dl_info info{};
  const bool found = dladdr(address, &info) != 0 && info.dli_fname != nullptr;
  std::ifstream file;
  if (found) file.open(info.dli_fname, std::ios::binary);
  if (!file.is_open()) file.open("/proc/self/exe", std::ios::binary);  // the program itself, or one linked statically
  const auto read_at = [&](std::uint64_t offset, void* out, std::size_t bytes) {
    file.seekg(static_cast<std::streamoff>(offset));
    return static_cast<bool>(file.read(static_cast<char*>(out), static_cast<std::streamsize>(bytes)));
  };
  ElfW(Ehdr) header{};
  if (!read_at(0, &header, sizeof(header)) || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return "?";
  std::vector<ElfW(Shdr)> sections(header.e_shnum);
  if (!read_at(header.e_shoff, sections.data(), sections.size() * sizeof(sections[0]))) return "?";
  const std::uint64_t base = header.e_type == ET_EXEC || !found ? 0 : reinterpret_cast<std::uint64_t>(info.dli_fbase);
  const std::uint64_t wanted = reinterpret_cast<std::uint64_t>(address) - base;
  for (const ElfW(Shdr) & section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    std::vector<ElfW(Sym)> symbols(section.sh_size / sizeof(ElfW(Sym)));
    if (!read_at(section.sh_offset, symbols.data(), symbols.size() * sizeof(symbols[0]))) return "?";
    for (const ElfW(Sym) & symbol : symbols) {
      if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || symbol.st_value != wanted) continue;
      std::string mangled(1024, '\0');
      file.clear();
      file.seekg(static_cast<std::streamoff>(sections[section.sh_link].sh_offset + symbol.st_name));
      file.read(mangled.data(), static_cast<std::streamsize>(mangled.size()));
      int status = 0;
      char* plain = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
      std::string name = status == 0 ? plain : mangled.c_str();
      std::free(plain);
      return name;
    }
  }
  return "?";
}

std::string kernel_text() {
  return symbol_of(grid.kernel) + ", launched at " + text_of(site_of(grid.where));
}

std::string hex(std::uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

// Where the lanes of a warp are, for a fault that concerns all of them.
std::string state_of(const Warp& warp) {
  std::string text;
  std::uint32_t told = 0;
  for (int l = 0; l < kLanes; ++l) {
    if ((told >> l & 1u) != 0) continue;
    const Lane& one = warp.lanes[l];
    std::uint32_t same = 0;
    for (int m = l; m < kLanes; ++m) {
      const Lane& other = warp.lanes[m];
      if (other.returned == one.returned && other.waits_for == one.waits_for &&
          (one.waits_for == Op::kNothing || other.site.line == one.site.line)) {
        same |= 1u << m;
      }
    }
    told |= same;
    text += text.empty() ? "" : "; ";
    text += "lanes " + hex(same);
    if (one.returned) {
      text += " have returned";
    } else if (one.waits_for == Op::kNothing) {
      text += " run";
    } else {
      text += std::string(" wait at ") + name_of(one.waits_for) + " (" + text_of(one.site) + ")";
    }
  }
  return text;
}

std::string stuck_text() {
  std::string text = kernel_text() + ": nothing can go on:";
  int told = 0;
  for (const Cluster* cluster : rt.resident) {
    for (const Block* block : cluster->blocks) {
      for (int w = 0; w < block->warp_count; ++w) {
        const Warp& warp = block->warps[static_cast<std::size_t>(w)];
        if (warp.returned == kAllLanes || ++told > 8) continue;
        text += "\n  block " + std::to_string(block->id) + ", warp " + std::to_string(w) + ": " + state_of(warp);
      }
    }
  }
  return text;
}

}  // namespace

void report(const std::string& what, Site site) {
  const Lane& lane = *current;
  throw Fault{kernel_text() + ": block " + std::to_string(lane.block->id) + ", thread " + std::to_string(lane.thread) +
              ", " + text_of(site) + ": " + what};
}

// ---- meetings and barriers ------------------------------------------------------------------------------------------

namespace {

Meeting& arrive(Op op, Site site) {
  Lane& lane = *current;
  Warp& warp = *lane.warp;
  Meeting& meeting = warp.meetings[lane.phase];
  if (meeting.arrived == 0) {
    meeting.op = op;
    meeting.site = site;
  } else if (meeting.op != op || meeting.site.line != site.line) {
    lane.waits_for = op;
    lane.site = site;
    report("divergent warp collective: lane " + std::to_string(lane.lane) + " is at " + name_of(op) + ", others at " +
               name_of(meeting.op) + " (" + text_of(meeting.site) + ")",
           site);
  }
  if (warp.returned != 0) {
    report(std::string("divergent warp collective: ") + name_of(op) + " with lanes " + hex(warp.returned) +
               " of the warp returned",
           site);
  }
  meeting.arrived |= 1u << lane.lane;
  return meeting;
}

// After what this lane brings is in place. True for the last lane to come, which then calls release.
bool await_others(Meeting& meeting) {
  Lane& lane = *current;
  lane.phase ^= 1;
  if (meeting.arrived == kAllLanes) return true;
  lane.waits_for = meeting.op;
  lane.site = meeting.site;
  make_waiting(lane);
  wait();
  return false;
}

void release(Meeting& meeting) {
  Warp& warp = *current->warp;
  meeting.arrived = 0;
  for (int l = 0; l < kLanes; ++l) warp.lanes[l].waits_for = Op::kNothing;
  make_runnable(warp, kAllLanes);
}

// Lanes that wait at a collective of the warp while this one waits for more than the warp: neither can go on.
void expect_no_meeting(const Warp& warp, Op op, Site site) {
  for (const Meeting& meeting : warp.meetings) {
    if (meeting.arrived == 0) continue;
    report(std::string("divergent barrier: ") + name_of(op) + " while lanes " + hex(meeting.arrived) +
               " of the warp wait at " + name_of(meeting.op) + " (" + text_of(meeting.site) + ")",
           site);
  }
}

void expect_together(Op op, int waiting, int returned, Site first, Site site) {
  if (returned > 0) {
    report(std::string("divergent barrier: ") + name_of(op) + " after " + std::to_string(returned) +
               " threads have returned",
           site);
  }
  if (waiting > 0 && (first.line != site.line || std::strcmp(first.file, site.file) != 0)) {
    report(std::string("divergent barrier: others wait at the ") + name_of(op) + " of " + text_of(first), site);
  }
}

}  // namespace

Meeting& meet(Op op, std::uint64_t value, Site site) {
  Meeting& meeting = arrive(op, site);
  meeting.values[current->lane] = value;
  if (await_others(meeting)) release(meeting);
  return meeting;
}

void sync_warp(Site site) {
  Meeting& meeting = arrive(Op::kSyncWarp, site);
  if (await_others(meeting)) {
    current->warp->sync[kOneWarp] = tick();
    release(meeting);
  }
}

namespace {

void open_block(Block& block, std::uint32_t time, int scope) {
  for (int w = 0; w < block.warp_count; ++w) {
    Warp& warp = block.warps[static_cast<std::size_t>(w)];
    for (int s = kOneWarp; s <= scope; ++s) warp.sync[s] = time;
    for (int l = 0; l < kLanes; ++l) warp.lanes[l].waits_for = Op::kNothing;
    make_runnable(warp, kAllLanes);
  }
}

}  // namespace

void sync_block(Site site) {
  Lane& lane = *current;
  Block& block = *lane.block;
  lane.waits_for = Op::kSyncBlock;
  lane.site = site;
  expect_no_meeting(*lane.warp, Op::kSyncBlock, site);
  expect_together(Op::kSyncBlock, block.waiting, block.returned, block.barrier, site);
  block.barrier = site;
  if (++block.waiting == grid.threads) {
    block.waiting = 0;
    open_block(block, tick(), kOneBlock);
    return;
  }
  make_waiting(lane);
  wait();
}

void sync_cluster(Site site) {
  Lane& lane = *current;
  Cluster& cluster = *lane.block->cluster;
  lane.waits_for = Op::kSyncCluster;
  lane.site = site;
  expect_no_meeting(*lane.warp, Op::kSyncCluster, site);
  expect_together(Op::kSyncCluster, cluster.waiting, cluster.returned, cluster.barrier, site);
  if (lane.block->waiting > 0) {
    report("divergent barrier: sync_cluster while others of the block wait at sync_block (" +
               text_of(lane.block->barrier) + ")",
           site);
  }
  cluster.barrier = site;
  if (++cluster.waiting == grid.threads * grid.cluster) {
    cluster.waiting = 0;
    const std::uint32_t time = tick();
    for (Block* block : cluster.blocks) open_block(*block, time, kOneCluster);
    return;
  }
  make_waiting(lane);
  wait();
}

void maybe_switch() {
  if ((draw() >> 40 & 7) != 0) return;
  expect_progress();
  Lane* next = pick();
  if (next != nullptr) switch_to(*next);
}

// ---- records of shared memory ---------------------------------------------------------------------------------------

namespace {

constexpr std::uint32_t kWordBytes = 4;

std::uint32_t time_of(Record record) {
  return static_cast<std::uint32_t>(record >> 32);
}
int scope_of(Record record) {
  return static_cast<int>(record >> kScopeShift) & 3;
}
Record tag(int scope, unsigned line) {
  return clock_high | static_cast<Record>(line & 0xffff) << kLineShift | static_cast<Record>(scope) << kScopeShift |
         static_cast<Record>(current->thread);
}

// How far this lane and those in `record` are spread together.
int spread(Record record, const Lane& me, bool remote) {
  if (remote) return kOneCluster;
  const Record apart = (record ^ static_cast<Record>(me.thread)) & kThreadMask;
  const int distance = apart == 0 ? kOneThread : (apart < kLanes ? kOneWarp : kOneBlock);
  return std::max(distance, scope_of(record));
}
// Whether a barrier stands between them and this lane, or this lane did it itself.
bool before(Record record, int scope, const Lane& me) {
  return time_of(record) < me.warp->sync[scope];
}

std::string who(Record record) {
  std::string text;
  switch (scope_of(record)) {
    case kOneThread:
      text = "thread " + std::to_string(record & kThreadMask);
      break;
    case kOneWarp:
      text = "lanes of warp " + std::to_string((record & kThreadMask) / kLanes);
      break;
    case kOneBlock:
      text = "several warps";
      break;
    default:
      text = "several blocks";
  }
  return text + " at line " + std::to_string(record >> kLineShift & 0xffff);
}

std::string place(std::uint32_t byte) {
  return "byte " + std::to_string(byte) + " of shared memory";
}

[[noreturn]] void race(const char* mine, const char* theirs, Record record, std::uint32_t byte, Site site) {
  report(std::string("race: ") + mine + " of " + place(byte) + ", " + theirs + " by " + who(record) +
             " with no barrier between that orders the two",
         site);
}

void expect_written(const Block& block, Record write, std::uint32_t byte, const char* access, Site site) {
  if (time_of(write) < block.start) {
    report(std::string(access) + " of " + place(byte) + ", which nothing has written", site);
  }
  if ((write & kInFlight) != 0) {
    report(std::string(access) + " of " + place(byte) + " before the wait for its copy, issued by " + who(write), site);
  }
}

// ---- one record of each kind: a word's, or a byte's of a split word

void read_record(const Block& block, Record write, Record& read, int least, bool remote, std::uint32_t byte,
                 const char* access, Site site) {
  const Lane& me = *current;
  expect_written(block, write, byte, access, site);
  if (!before(write, std::max(least, spread(write, me, remote)), me)) race(access, "written", write, byte, site);
  // Reads that are ordered before this one need no memory: whoever must not race with them must not with this one.
  int scope = std::max<int>(least, remote ? kOneCluster : kOneThread);
  if (time_of(read) >= block.start) {
    const int together = std::max(least, spread(read, me, remote));
    if (!before(read, together, me)) {
      if (scope_of(read) == together) return;
      scope = together;
    }
  }
  read = tag(scope, site.line);
}

void write_record(const Block& block, Record& write, Record read, std::uint32_t byte, Site site) {
  const Lane& me = *current;
  if (time_of(write) >= block.start) {
    if ((write & kInFlight) != 0) {
      report("write of " + place(byte) + " before the wait for its copy, issued by " + who(write), site);
    }
    if (!before(write, spread(write, me, false), me)) race("write", "written", write, byte, site);
  }
  if (time_of(read) >= block.start && !before(read, spread(read, me, false), me)) {
    race("write", "read", read, byte, site);
  }
  write = tag(kOneThread, site.line);
}

void atomic_record(const Block& block, Record& write, Record& read, std::uint32_t byte, Site site) {
  const Lane& me = *current;
  expect_written(block, write, byte, "atomic", site);
  const int scope = spread(write, me, false);
  const bool known = before(write, scope, me);
  if (!known && (write & kAtomic) == 0) race("atomic", "written", write, byte, site);
  const bool was_read = time_of(read) >= block.start;
  if (was_read && !before(read, spread(read, me, false), me)) race("atomic", "accessed", read, byte, site);
  // A plain write that only part of the block is ordered with must stay on record, for others' atomics to race with:
  // among the reads, which atomics race with too.
  if ((write & kAtomic) == 0 && !before(write, kOneBlock, me)) {
    int together = scope_of(write);
    if (was_read && !before(read, kOneBlock, me)) {
      const Record apart = (read ^ write) & kThreadMask;
      together = std::max({together, scope_of(read),
                           static_cast<int>(apart == 0 ? kOneThread : (apart < kLanes ? kOneWarp : kOneBlock))});
    }
    read = (std::max(time_of(read), time_of(write)) == time_of(write) ? write
                                                                      : (read & ~kThreadMask) | (write & kThreadMask));
    read = (read & ~(Record{3} << kScopeShift)) | static_cast<Record>(together) << kScopeShift;
  }
  write = tag(known ? static_cast<int>(kOneThread) : scope, site.line) | kAtomic;
}

// ---- words, whole or in parts

// What is done to the records of `bytes` bytes: whole words at once, the bytes of others one by one.
template <typename F>
void for_records(Block& block, std::uint32_t position, int bytes, F each) {
  const std::uint32_t end = position + static_cast<std::uint32_t>(bytes);
  for (std::uint32_t word = position / kWordBytes; word * kWordBytes < end; ++word) {
    Record& write = block.writes[word];
    Record& read = block.reads[word];
    const std::uint32_t first = std::max(position, word * kWordBytes);
    const std::uint32_t last = std::min(end, (word + 1) * kWordBytes);
    const bool split = time_of(write) >= block.start && (write & kSplit) != 0;
    if (last - first == kWordBytes && !split) {
      each(write, read, first);
      continue;
    }
    Record* writes = block.byte_writes + word * kWordBytes;
    Record* reads = block.byte_reads + word * kWordBytes;
    if (!split) {
      std::fill_n(writes, kWordBytes, write);
      std::fill_n(reads, kWordBytes, read);
    }
    for (std::uint32_t byte = first; byte < last; ++byte) {
      each(writes[byte % kWordBytes], reads[byte % kWordBytes], byte);
    }
    bool same = true;
    for (std::uint32_t b = 1; b < kWordBytes; ++b) same = same && writes[b] == writes[0] && reads[b] == reads[0];
    write = same ? writes[0] : (clock_high | kSplit);
    read = same ? reads[0] : 0;
  }
}

}  // namespace

const unsigned char* note_read(std::uint32_t position, int bytes, Site site) {
  Block& block = *current->block;
  for_records(block, position, bytes, [&](Record& write, Record& read, std::uint32_t byte) {
    read_record(block, write, read, kOneThread, false, byte, "read", site);
  });
  return block.shared + position;
}

unsigned char* note_write(std::uint32_t position, int bytes, Site site) {
  Block& block = *current->block;
  for_records(block, position, bytes,
              [&](Record& write, Record& read, std::uint32_t byte) { write_record(block, write, read, byte, site); });
  return block.shared + position;
}

unsigned char* note_atomic(std::uint32_t position, int bytes, Site site) {
  Block& block = *current->block;
  for_records(block, position, bytes,
              [&](Record& write, Record& read, std::uint32_t byte) { atomic_record(block, write, read, byte, site); });
  return block.shared + position;
}

const unsigned char* note_remote_read(int rank, std::uint32_t position, int bytes, Site site) {
  const Lane& me = *current;
  Cluster& cluster = *me.block->cluster;
  if (rank < 0 || rank >= grid.cluster) {
    report("block " + std::to_string(rank) + " of a cluster of " + std::to_string(grid.cluster), site);
  }
  Block& block = *cluster.blocks[static_cast<std::size_t>(rank)];
  if (block.returned > 0) report("read of shared memory of a block of the cluster that has left", site);
  const bool remote = &block != me.block;
  for_records(block, position, bytes, [&](Record& write, Record& read, std::uint32_t byte) {
    read_record(block, write, read, kOneThread, remote, byte, "read", site);
  });
  return block.shared + position;
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

namespace {

constexpr std::uint32_t kCopyBytes = 16;
constexpr unsigned char kPoison = 0xfb;  // as float and half large and negative

void deliver(Block& block, Copy& copy) {
  if (copy.delivered) return;
  copy.delivered = true;
  if (copy.source == nullptr) {
    std::memset(block.shared + copy.position, 0, kCopyBytes);
  } else {
    std::memcpy(block.shared + copy.position, copy.source, kCopyBytes);
  }
}

}  // namespace

void async_copy(std::uint32_t position, const void* source, bool valid, Site site) {
  Lane& lane = *current;
  Block& block = *lane.block;
  note_write(position, kCopyBytes, site);
  for (std::uint32_t word = 0; word < kCopyBytes / kWordBytes; ++word) {
    block.writes[position / kWordBytes + word] |= kInFlight;
  }
  std::memset(block.shared + position, kPoison, kCopyBytes);
  lane.copies.push_back({position, valid ? source : nullptr, false, site.line});
  ++lane.open_copies;
  const std::uint64_t word = draw();
  if ((word >> 60) < 6) deliver(block, lane.copies.back());
  if ((word >> 56 & 15) < 2) deliver(block, lane.copies[below(word, static_cast<std::uint32_t>(lane.copies.size()))]);
}

void async_commit() {
  Lane& lane = *current;
  lane.groups.push_back(lane.open_copies);
  lane.open_copies = 0;
}

void async_wait(int pending) {
  Lane& lane = *current;
  Block& block = *lane.block;
  if (lane.groups.size() <= static_cast<std::size_t>(pending)) return;
  const std::size_t done = lane.groups.size() - static_cast<std::size_t>(pending);
  std::size_t copies = 0;
  for (std::size_t g = 0; g < done; ++g) copies += lane.groups[g];
  for (std::size_t c = 0; c < copies; ++c) {
    Copy& copy = lane.copies[c];
    deliver(block, copy);
    for (std::uint32_t word = 0; word < kCopyBytes / kWordBytes; ++word) {
      block.writes[copy.position / kWordBytes + word] = tag(kOneThread, copy.line);
    }
  }
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<std::ptrdiff_t>(copies));
  lane.groups.erase(lane.groups.begin(), lane.groups.begin() + static_cast<std::ptrdiff_t>(done));
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

// The rows are read by the warp as a whole: what a lane wrote itself must be behind sync_warp too.
void load_matrix(std::uint32_t (&r)[4], std::uint32_t position, bool transposed, Site site) {
  Meeting& meeting = arrive(transposed ? Op::kLoadMatrixTransposed : Op::kLoadMatrix, site);
  meeting.words[current->lane][0] = position;
  if (await_others(meeting)) {
    Block& block = *current->block;
    std::uint16_t matrices[4][8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::uint32_t row = meeting.words[lane][0];
      for_records(block, row, kCopyBytes, [&](Record& write, Record& read, std::uint32_t byte) {
        read_record(block, write, read, kOneWarp, false, byte, "load_matrix", site);
      });
      std::memcpy(matrices[lane / 8][lane % 8], block.shared + row, kCopyBytes);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int major = lane / 4;
      const int minor = lane % 4 * 2;
      for (int m = 0; m < 4; ++m) {
        const std::uint32_t low = transposed ? matrices[m][minor][major] : matrices[m][major][minor];
        const std::uint32_t high = transposed ? matrices[m][minor + 1][major] : matrices[m][major][minor + 1];
        meeting.results[lane][m] = low | high << 16;
      }
    }
    release(meeting);
  }
  std::memcpy(r, meeting.results[current->lane], sizeof(r));
}

namespace {

double widened(std::uint32_t bits, bool bfloat) {
  const std::uint32_t half = bits & 0xffffu;
  if (bfloat) return std::bit_cast<float>(half << 16);
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent is 112 less than float's; multiplying repairs it for subnormal numbers too.
  return std::bit_cast<float>(sign | magnitude << 13) * 0x1p112f;
}

// What the unit is off by, in units of the bound: between -1 and 1.
double drawn_error(double exact, int element) {
  const std::uint64_t word = mix(rt.options.mma_seed * 0x9e3779b97f4a7c15u ^ std::bit_cast<std::uint64_t>(exact) ^
                                 static_cast<std::uint64_t>(element));
  switch (rt.options.mma_error) {
    case MmaError::kNone:
      break;
    case MmaError::kRandom:
      return static_cast<double>(static_cast<std::int64_t>(word)) * 0x1p-63;
    case MmaError::kExtreme:
      return (word & 1) != 0 ? 1.0 : -1.0;
    case MmaError::kPlus:
      return 1.0;
    case MmaError::kMinus:
      return -1.0;
  }
  return 0.0;
}

// An element of an operand: the exponent it is aligned by, and whether it is normal (neither zero nor subnormal).
struct Factor {
  double value;
  int exponent;
  bool normal;
};

Factor factor_of(std::uint32_t bits, bool bfloat) {
  const int least = bfloat ? -126 : -14;
  const int field = static_cast<int>(bfloat ? bits >> 7 & 0xffu : bits >> 10 & 0x1fu);
  return {widened(bits, bfloat), least + std::max(field - 1, 0), field != 0};
}

struct Operands {
  Factor a[16][16];
  Factor b[16][8];
  float sums[16][8];
};

Operands gather(const Meeting& meeting, bool bfloat) {
  Operands all;
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::uint32_t* words = meeting.words[lane];
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int word = 0; word < 4; ++word) {
        all.a[group + 8 * (word & 1)][pair + half + 8 * (word >> 1)] = factor_of(words[word] >> 16 * half, bfloat);
      }
      for (int word = 0; word < 2; ++word) {
        all.b[pair + half + 8 * word][group] = factor_of(words[4 + word] >> 16 * half, bfloat);
      }
    }
    for (int word = 0; word < 4; ++word) {
      all.sums[group + 8 * (word >> 1)][pair + (word & 1)] = std::bit_cast<float>(words[6 + word]);
    }
  }
  return all;
}

// An integer times 2^exponent as a float, towards zero.
float cut_to_float(std::int64_t number, int exponent) {
  constexpr int kSignificand = 24;
  constexpr int kLeast = -149;
  const std::uint64_t size = static_cast<std::uint64_t>(number < 0 ? -number : number);
  const int length = static_cast<int>(std::bit_width(size));
  const int drop = std::max({length - kSignificand, kLeast - exponent, 0});
  const double kept = drop >= length ? 0.0 : std::ldexp(static_cast<double>(size >> drop), exponent + drop);
  return static_cast<float>(number < 0 ? -kept : kept);
}

// Element (row, column) as MmaModel has it; everything is finite. A product is exact in double, and below 4 in units of
// its exponent, so a group of 16 and the accumulator stay below 2^32 in units of the last bit that is kept.
float modelled(const Operands& all, int row, int column, MmaModelFacts model) {
  float sum = all.sums[row][column];
  for (int first = 0; first < 16; first += model.group) {
    constexpr int kLeastFloat = -126;
    int largest = sum == 0.0f ? kLeastFloat : std::max(std::ilogb(sum), kLeastFloat);
    double products[16];
    for (int k = 0; k < model.group; ++k) {
      const Factor& left = all.a[row][first + k];
      const Factor& right = all.b[first + k][column];
      products[k] = left.value * right.value;
      if (products[k] != 0.0) largest = std::max(largest, left.exponent + right.exponent);
    }
    const int shift = model.bits - largest;
    auto total = static_cast<std::int64_t>(std::ldexp(static_cast<double>(sum), shift));
    for (int k = 0; k < model.group; ++k) total += static_cast<std::int64_t>(std::ldexp(products[k], shift));
    sum = cut_to_float(total, -shift);
    if (!std::isfinite(sum)) break;
  }
  return sum;
}

void multiply(Meeting& meeting, bool bfloat) {
  const Operands all = gather(meeting, bfloat);
  double sums[16][8];
  double sizes[16][8];
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      sums[row][column] = static_cast<double>(all.sums[row][column]);
      sizes[row][column] = std::fabs(sums[row][column]);
    }
  }
  // Products of two halves and their sums over 16 terms are exact in double, or as good as: the bound is 2^29 times the
  // rounding of these.
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      const double left = all.a[row][k].value;
      for (int column = 0; column < 8; ++column) {
        const double product = left * all.b[k][column].value;
        sums[row][column] += product;
        sizes[row][column] += std::fabs(product);
      }
    }
  }
  // What products with one factor that is not normal are aligned by (mma_error_bound). Few columns have any.
  for (int k = 0; k < 16; ++k) {
    bool normal = true;
    for (int row = 0; row < 16; ++row) normal = normal && all.a[row][k].normal;
    for (int column = 0; column < 8; ++column) normal = normal && all.b[k][column].normal;
    for (int row = 0; row < 16 && !normal; ++row) {
      const Factor& left = all.a[row][k];
      for (int column = 0; column < 8; ++column) {
        const Factor& right = all.b[k][column];
        if (left.normal == right.normal) continue;
        sizes[row][column] = std::max(sizes[row][column], std::ldexp(0.5, left.exponent + right.exponent));
      }
    }
  }
  const MmaModelFacts model = kMmaModels[static_cast<int>(rt.options.mma_model)];
  // Rounding to float takes 2^-24 of the bound, 2.5e-2 of it; the rest is the error's.
  const double bound = (mma_error_bound - 0x1.01p-24) * rt.options.mma_error_scale;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int word = 0; word < 4; ++word) {
      const int row = lane / 4 + 8 * (word >> 1);
      const int column = lane % 4 * 2 + (word & 1);
      double value = sums[row][column];
      if (std::isfinite(sizes[row][column])) {
        if (model.group > 0) {
          meeting.results[lane][word] = std::bit_cast<std::uint32_t>(modelled(all, row, column, model));
          continue;
        }
        value += drawn_error(value, row * 8 + column) * bound * sizes[row][column];
      }
      meeting.results[lane][word] = std::bit_cast<std::uint32_t>(static_cast<float>(value));
    }
  }
}

}  // namespace

void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], bool bfloat, Site site) {
  Meeting& meeting = arrive(Op::kMma, site);
  std::uint32_t* mine = meeting.words[current->lane];
  std::memcpy(mine, a, sizeof(a));
  std::memcpy(mine + 4, b, sizeof(b));
  std::memcpy(mine + 6, d, sizeof(d));
  if (await_others(meeting)) {
    ++rt.statistics.mmas;
    multiply(meeting, bfloat);
    release(meeting);
  }
  std::memcpy(d, meeting.results[current->lane], sizeof(d));
}

// ---- launches -------------------------------------------------------------------------------------------------------

namespace {

// A thread that returns is one that no barrier and no collective will see.
void expect_none_wait() {
  const Lane& lane = *current;
  for (const Meeting& meeting : lane.warp->meetings) {
    if (meeting.arrived != 0) {
      report("divergent warp collective: returns while lanes " + hex(meeting.arrived) + " of the warp wait at " +
                 name_of(meeting.op),
             meeting.site);
    }
  }
  const Block& block = *lane.block;
  if (block.waiting > 0) {
    report("divergent barrier: returns while " + std::to_string(block.waiting) + " threads wait at sync_block",
           block.barrier);
  }
  if (block.cluster->waiting > 0) {
    report(
        "divergent barrier: returns while " + std::to_string(block.cluster->waiting) + " threads wait at sync_cluster",
        block.cluster->barrier);
  }
}

[[noreturn]] void lane_returns() {
  Lane& lane = *current;
  Warp& warp = *lane.warp;
  Block& block = *lane.block;
  lane.returned = true;
  warp.returned |= 1u << lane.lane;
  ++block.returned;
  ++block.cluster->returned;
  make_waiting(lane);
  if (block.returned == grid.threads) leave(Outcome::kBlockDone);
  Lane* next = pick();
  if (next == nullptr) leave(Outcome::kStuck);
  switch_to(*next, true);
  std::abort();
}

void lane_main() {
  switched();
  try {
    rt.call(rt.context);
    expect_none_wait();
  } catch (const Fault& fault) {
    rt.fault = fault.what;
    rt.outcome = Outcome::kFault;
  }
  if (rt.outcome == Outcome::kFault) leave(Outcome::kFault);
  lane_returns();
}

Block* new_slot() {
  if (rt.free_slots.empty()) {
    rt.slots.push_back(std::make_unique<Block>());
    return rt.slots.back().get();
  }
  Block* slot = rt.free_slots.back();
  rt.free_slots.pop_back();
  return slot;
}

void release_shared(Block& block) {
  std::free(block.shared);
  delete[] block.writes;
  delete[] block.reads;
  delete[] block.byte_writes;
  delete[] block.byte_reads;
  block.shared = nullptr;
  block.writes = block.reads = block.byte_writes = block.byte_reads = nullptr;
  block.capacity = 0;
}

void start_block(Block& block, Cluster& cluster, std::int64_t id, int rank) {
  block.id = id;
  block.rank = rank;
  block.cluster = &cluster;
  block.shared_bytes = grid.shared_bytes;
  block.waiting = 0;
  block.returned = 0;
  if (block.capacity < grid.shared_bytes) {
    release_shared(block);
    const auto bytes = (static_cast<std::size_t>(grid.shared_bytes) + 127) / 128 * 128;
    block.shared = static_cast<unsigned char*>(std::aligned_alloc(128, bytes));
    if (block.shared == nullptr) throw std::bad_alloc();
    block.writes = new Record[bytes / kWordBytes]();
    block.reads = new Record[bytes / kWordBytes]();
    block.byte_writes = new Record[bytes]();
    block.byte_reads = new Record[bytes]();
    block.capacity = static_cast<int>(bytes);
  }
  if (grid.shared_bytes > 0) {
    const std::uint64_t word = draw();
    std::memset(block.shared, (word >> 62) == 0 ? 0xff : static_cast<int>(word >> 40 & 0xff),
                static_cast<std::size_t>(grid.shared_bytes));
  }
  block.start = tick();

  const int warps = grid.threads / kLanes;
  block.warp_count = warps;
  if (block.warps.size() < static_cast<std::size_t>(warps)) block.warps.resize(static_cast<std::size_t>(warps));
  if (block.lanes.size() < static_cast<std::size_t>(grid.threads)) {
    block.lanes.resize(static_cast<std::size_t>(grid.threads));
  }
  for (int w = 0; w < warps; ++w) {
    Warp& warp = block.warps[static_cast<std::size_t>(w)];
    warp.block = &block;
    warp.lanes = &block.lanes[static_cast<std::size_t>(w * kLanes)];
    warp.runnable = 0;
    warp.returned = 0;
    warp.place = -1;
    warp.sync[kOneThread] = 0xffffffffu;
    for (int s = kOneWarp; s <= kOneCluster; ++s) warp.sync[s] = block.start;
    for (Meeting& meeting : warp.meetings) meeting.arrived = 0;
  }
  for (int t = 0; t < grid.threads; ++t) {
    Lane& lane = block.lanes[static_cast<std::size_t>(t)];
    lane.warp = &block.warps[static_cast<std::size_t>(t / kLanes)];
    lane.block = &block;
    lane.lane = t % kLanes;
    lane.thread = t;
    lane.phase = 0;
    lane.waits_for = Op::kNothing;
    lane.returned = false;
    lane.copies.clear();
    lane.groups.clear();
    lane.open_copies = 0;
    lane.fake_stack = nullptr;
    if (lane.stack == nullptr) lane.stack = new_stack();
#if defined(SN_SIMT_ASAN)
    // Frames that were never left have their red zones still.
    const std::size_t stale = rt.stale_stacks ? kStackBytes : 4096;
    __asan_unpoison_memory_region(lane.stack + kStackBytes - stale, stale);
#endif
    prepare_stack(lane, lane_main);
  }
  for (int w = 0; w < warps; ++w) make_runnable(block.warps[static_cast<std::size_t>(w)], kAllLanes);
}

void start_cluster(std::int64_t id) {
  auto* cluster = new Cluster;
  cluster->id = id;
  for (int rank = 0; rank < grid.cluster; ++rank) cluster->blocks.push_back(new_slot());
  for (int rank = 0; rank < grid.cluster; ++rank) {
    start_block(*cluster->blocks[static_cast<std::size_t>(rank)], *cluster, id * grid.cluster + rank, rank);
  }
  rt.resident.push_back(cluster);
}

void end_cluster(Cluster* cluster) {
  for (Block* block : cluster->blocks) rt.free_slots.push_back(block);
  rt.resident.erase(std::find(rt.resident.begin(), rt.resident.end(), cluster));
  delete cluster;
}

// What was launched, for SN_SIMT_LAUNCH_LOG. A kernel may be launched with several numbers of threads.
struct LaunchLog {
  struct Most {
    int shared_bytes = 0;
    int cluster = 1;
  };
  std::map<std::pair<const void*, int>, Most> kernels;

  ~LaunchLog() {
    const char* path = std::getenv("SN_SIMT_LAUNCH_LOG");
    if (path == nullptr || kernels.empty()) return;
    std::ofstream out(path, std::ios::app);
    for (const auto& [which, most] : kernels) {
      out << symbol_of(which.first) << '\t' << which.second << '\t' << most.shared_bytes << '\t' << most.cluster
          << '\n';
    }
  }
};

void log_launch(const Grid& shape) {
  static LaunchLog log;
  LaunchLog::Most& most = log.kernels[{shape.kernel, shape.threads}];
  most.shared_bytes = std::max(most.shared_bytes, shape.shared_bytes);
  most.cluster = std::max(most.cluster, shape.cluster);
}

std::string refusal(const Grid& shape) {
  if (shape.blocks <= 0 || shape.blocks > 0x7fffffff)
    return "expected 1 to 2^31 - 1 blocks, got " + std::to_string(shape.blocks);
  if (shape.threads <= 0 || shape.threads > kMaxThreads || shape.threads % kLanes != 0) {
    return "expected whole warps of at most 1024 threads, got " + std::to_string(shape.threads);
  }
  if (shape.shared_bytes < 0 || shape.shared_bytes > rt.options.shared_bytes) {
    return "expected at most " + std::to_string(rt.options.shared_bytes) + " bytes of shared memory, got " +
           std::to_string(shape.shared_bytes);
  }
  if (shape.cluster < 1 || shape.cluster > rt.options.max_cluster || shape.blocks % shape.cluster != 0) {
    return "expected a cluster of at most " + std::to_string(rt.options.max_cluster) + " blocks that divides " +
           std::to_string(shape.blocks) + ", got " + std::to_string(shape.cluster);
  }
  return "";
}

}  // namespace

void reset(const Options& options) {
  rt.options = options;
  rt.statistics = {};
  rt.fault.clear();
  rt.launches_since_reset = 0;
}
const Options& options() {
  return rt.options;
}
const std::string& fault() {
  return rt.fault;
}
const Statistics& statistics() {
  return rt.statistics;
}

cudaError_t run(const Grid& shape, void (*call)(void*), void* context) {
  if (!rt.fault.empty()) return cudaErrorLaunchFailure;
  grid = shape;
  if (const std::string why = refusal(shape); !why.empty()) {
    rt.fault = kernel_text() + ": " + why;
    return cudaErrorInvalidConfiguration;
  }
  if (now() >= kLastStart) {
    clock_high = 0;
    for (const std::unique_ptr<Block>& slot : rt.slots) release_shared(*slot);
  }
  rt.random = mix(rt.options.seed * 0x2545f4914f6cdd1du + ++rt.launches_since_reset) | 1u;
  rt.call = call;
  rt.context = context;
  rt.main_stack = nullptr;
  rt.switches = 0;
  rt.runnable.clear();
  rt.last = nullptr;
  current = &rt.main;
  log_launch(shape);
  ++rt.statistics.launches;
  rt.statistics.blocks += shape.blocks;

  // Warp by warp, lanes one after the other, or anything between.
  constexpr std::uint32_t kStay[3] = {248, 128, 0};
  rt.stay = kStay[below(draw(), 3)];
  const std::int64_t clusters = shape.blocks / shape.cluster;
  const int fit = std::max(1, kResidentThreads / (shape.threads * shape.cluster));
  const std::size_t together = 1 + below(draw(), static_cast<std::uint32_t>(std::min(fit, 4)));
  std::vector<std::int32_t> order(static_cast<std::size_t>(clusters));
  for (std::size_t c = 0; c < order.size(); ++c) order[c] = static_cast<std::int32_t>(c);
  for (std::size_t c = order.size(); c > 1; --c) {
    std::swap(order[c - 1], order[below(draw(), static_cast<std::uint32_t>(c))]);
  }

  std::size_t next = 0;
  cudaError_t error = cudaSuccess;
  while (true) {
    while (next < order.size() && rt.resident.size() < together) start_cluster(order[next++]);
    if (rt.resident.empty()) break;
    if (Lane* lane = pick(); lane != nullptr) {
      rt.outcome = Outcome::kBlockDone;
      switch_to(*lane);
    } else {
      rt.outcome = Outcome::kStuck;
    }
    if (rt.outcome == Outcome::kBlockDone) {
      for (std::size_t c = 0; c < rt.resident.size(); ++c) {
        if (rt.resident[c]->returned == shape.threads * shape.cluster) end_cluster(rt.resident[c--]);
      }
      continue;
    }
    if (rt.outcome == Outcome::kStuck) rt.fault = stuck_text();
    error = cudaErrorLaunchFailure;
    break;
  }
  rt.stale_stacks = rt.stale_stacks || error != cudaSuccess;
  while (!rt.resident.empty()) end_cluster(rt.resident.back());
  rt.statistics.switches += rt.switches;
  current = nullptr;
  return error;
}

}  // namespace sn::simt
