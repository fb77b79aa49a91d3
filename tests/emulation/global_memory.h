// Global memory is the host's own. Tests register the buffers that kernels may touch; as long as
// any is registered, every access must lie in one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulation/site.h"

namespace fastattn::emulation {

// Buffers that overlap become one.
void register_global(const void* pointer, size_t bytes);
void clear_global();

// Throws unless `bytes` bytes from `address`, aligned to `alignment`, may be accessed.
void check_global(const void* address, size_t bytes, size_t alignment, const char* instruction,
                  Site site);

// Buffers registered for a scope.
class GlobalBuffers {
  public:
    GlobalBuffers() = default;
    GlobalBuffers(const GlobalBuffers&) = delete;
    ~GlobalBuffers() { clear_global(); }
    void add(const void* pointer, size_t bytes) { register_global(pointer, bytes); }
};

}  // namespace fastattn::emulation
