// Fibers: their stacks, and the change from one to another.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#include "runtime.h"

#if defined(SN_SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#define SN_SIMT_UCONTEXT 1
#endif

namespace sn::simt {

#if defined(SN_SIMT_UCONTEXT)

namespace {

void change_stack(void** from, void* to) {
  ucontext_t* mine = static_cast<ucontext_t*>(*from);
  if (mine == nullptr) *from = mine = new ucontext_t;
  swapcontext(mine, static_cast<ucontext_t*>(to));
}

}  // namespace

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

// Saves the registers that a call preserves on this stack and the stack pointer in *from; goes on where `to` was saved.
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
  // The stack is as if `entry` had been called: the stack pointer is 8 below a multiple of 16 when it starts.
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

namespace {

void change_stack(void** from, void* to) {
  sn_simt_change_stack(from, to);
}

}  // namespace

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

void switch_to(Lane& next, [[maybe_unused]] bool ends) {
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

}  // namespace sn::simt
