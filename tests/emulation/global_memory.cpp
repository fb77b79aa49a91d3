#include "emulation/global_memory.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <string>

#include "emulation/engine.h"

namespace fastattn::emulation {

namespace {

struct Buffer {
    uintptr_t begin = 0, end = 0;
    bool holds(uintptr_t address, size_t bytes) const {
        return begin <= address && address + bytes <= end;
    }
};

std::map<uintptr_t, uintptr_t> buffers;  // from begin to end
Buffer last;                             // that an access lay in

// The one that begins at `address` or next before it.
Buffer nearest(uintptr_t address) {
    auto after = buffers.upper_bound(address);
    if (after == buffers.begin()) return {};
    --after;
    return {after->first, after->second};
}

}  // namespace

void register_global(const void* pointer, size_t bytes) {
    if (bytes == 0) return;
    uintptr_t begin = reinterpret_cast<uintptr_t>(pointer), end = begin + bytes;
    auto next = buffers.upper_bound(begin);
    if (next != buffers.begin() && std::prev(next)->second > begin) --next;
    while (next != buffers.end() && next->first < end) {
        begin = std::min(begin, next->first), end = std::max(end, next->second);
        next = buffers.erase(next);
    }
    buffers[begin] = end;
}

void clear_global() {
    buffers.clear();
    last = {};
}

void check_global(const void* pointer, size_t bytes, size_t alignment, const char* instruction,
                  Site site) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    if (address % alignment != 0) {
        char shown[32];
        std::snprintf(shown, sizeof shown, "%#zx", size_t(address));
        block().fail(std::string(instruction) + " of " + std::to_string(bytes) +
                         " bytes of global memory at " + shown +
                         " is misaligned: it wants a multiple of " + std::to_string(alignment),
                     site);
    }
    if (last.holds(address, bytes) || buffers.empty()) return;
    const Buffer buffer = nearest(address);
    if (buffer.holds(address, bytes)) {
        last = buffer;
        return;
    }
    std::string where = "lies in no buffer";
    if (buffer.end != 0)
        where = "is out of bounds: it begins " + std::to_string(address - buffer.begin) +
                " bytes into a buffer of " + std::to_string(buffer.end - buffer.begin);
    block().fail(std::string(instruction) + " of " + std::to_string(bytes) +
                     " bytes of global memory " + where,
                 site);
}

}  // namespace fastattn::emulation
