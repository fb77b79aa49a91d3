#include "emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

// The registers that a call preserves lie on the stack that is left. A new fiber's stack lets
// fastattn_emulation_switch return to fastattn_emulation_begin, which calls main(i).
#if defined(__x86_64__)
__asm__(R"(
.text
.hidden fastattn_emulation_switch
.globl fastattn_emulation_switch
.type fastattn_emulation_switch, @function
fastattn_emulation_switch:
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
.hidden fastattn_emulation_begin
.globl fastattn_emulation_begin
.type fastattn_emulation_begin, @function
fastattn_emulation_begin:
    andq $-16, %rsp
    movq %r13, %rdi
    call *%r12
    ud2
)");
#elif defined(__aarch64__)
__asm__(R"(
.text
.hidden fastattn_emulation_switch
.globl fastattn_emulation_switch
.type fastattn_emulation_switch, %function
fastattn_emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
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
    ldp x19, x20, [sp]
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
.hidden fastattn_emulation_begin
.globl fastattn_emulation_begin
.type fastattn_emulation_begin, %function
fastattn_emulation_begin:
    mov x0, x20
    blr x19
    brk #0
)");
#else
#error "The emulation switches stacks on x86-64 and AArch64 only."
#endif

extern "C" void fastattn_emulation_begin();

namespace fastattn::emulation {

namespace {

constexpr size_t kStack = 256 << 10, kGuard = 64 << 10;

// What a new fiber's stack holds for its first switch.
struct FirstFrame {
#if defined(__x86_64__)
    uintptr_t r15, r14, argument, main, rbx, rbp, begin, padding;
#else
    uintptr_t main, argument, x21_to_x29[9], begin, d8_to_d15[8];
#endif
};
static_assert(sizeof(FirstFrame) % 16 == 0);

}  // namespace

Fibers::~Fibers() {
    for (std::byte* stack : stacks_) munmap(stack, kStack);
}

void Fibers::allocate(int count) {
    while (stacks_.size() < size_t(count)) {
        void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) throw std::bad_alloc();
        // Running out of stack ends in a fault, not in a neighbour's stack.
        mprotect(stack, kGuard, PROT_NONE);
        stacks_.push_back(static_cast<std::byte*>(stack));
    }
}

void Fibers::start(int count, void (*main)(int)) {
    allocate(count);
    suspended_.resize(count);
    for (int i = 0; i < count; ++i) {
        // Stacks begin at different lines of the cache, which could not hold a block's otherwise.
        std::byte* top = stacks_[i] + kStack - 64 - i % 32 * 448;
        FirstFrame* frame = new (top - sizeof(FirstFrame)) FirstFrame{};
        frame->main = reinterpret_cast<uintptr_t>(main);
        frame->argument = uintptr_t(i);
        frame->begin = reinterpret_cast<uintptr_t>(&fastattn_emulation_begin);
        suspended_[i] = frame;
    }
}

}  // namespace fastattn::emulation
