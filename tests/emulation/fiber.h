// Fibers: stacks that are switched by hand.
#pragma once

#include <cstddef>
#include <vector>

// Keeps the stack's pointer in *from and goes on with the stack `to`.
extern "C" void fastattn_emulation_switch(void** from, void* to);

namespace fastattn::emulation {

class Fibers {
  public:
    Fibers() = default;
    Fibers(const Fibers&) = delete;
    ~Fibers();

    // Fibers 0 to count - 1 begin anew: the first switch to number i calls main(i), which must not
    // return. What lay on their stacks is dropped.
    void start(int count, void (*main)(int));
    // From the caller, which is not a fiber, to fiber `to`; back by leave().
    void enter(int to) { fastattn_emulation_switch(&outside_, suspended_[to]); }
    void switch_to(int from, int to) {
        fastattn_emulation_switch(&suspended_[from], suspended_[to]);
    }
    void leave(int from) { fastattn_emulation_switch(&suspended_[from], outside_); }

  private:
    void allocate(int count);

    std::vector<std::byte*> stacks_;  // the pool
    std::vector<void*> suspended_;    // of each fiber, its stack pointer
    void* outside_ = nullptr;
};

}  // namespace fastattn::emulation
