// Where an instruction stands in the kernels' source, for reports.
#pragma once

#include <string>

namespace fastattn::emulation {

struct Site {
    const char* file;
    int line;

    // As a default argument: the place of the call.
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator==(const Site&) const = default;

    // "csrc/cuda/tile.cuh:46", without the folders above.
    std::string str() const;
};

}  // namespace fastattn::emulation
