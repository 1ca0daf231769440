// Fibers: a context to leave and a context to enter. Hand-written on x86-64 (no system call, a few
// nanoseconds); ucontext elsewhere, or with -DSIMT_UCONTEXT.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)

namespace simt {

struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void simt_switch(void** save, void* load);

// The callee-saved registers go to the old stack and come from the new one.
asm(R"(
  .text
  .globl simt_switch
  .hidden simt_switch
  .type simt_switch, @function
simt_switch:
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
  .size simt_switch, . - simt_switch
)");

inline void switch_context(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }

// Entering `context` for the first time calls `entry`, which must never return.
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  auto frame = reinterpret_cast<uintptr_t*>(top) - 8;  // six registers, the entry, no return address
  for (int i = 0; i < 8; ++i) frame[i] = 0;
  frame[6] = reinterpret_cast<uintptr_t>(entry);
  context.stack_pointer = frame;
}

}  // namespace simt

#else

#include <ucontext.h>

namespace simt {

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

}  // namespace simt

#endif
