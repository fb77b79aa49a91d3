// Fibers: stacks that are switched by hand.
#pragma once

#include <cstddef>
#include <vector>

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
    void enter(int to);
    void switch_to(int from, int to);
    void leave(int from);

  private:
    void allocate(int count);

    std::vector<std::byte*> stacks_;  // the pool
    std::vector<void*> suspended_;    // of each fiber, its stack pointer
    void* outside_ = nullptr;
};

}  // namespace fastattn::emulation
