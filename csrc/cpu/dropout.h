#pragma once

#include <cmath>
#include <cstdint>

namespace fastattn {

// An element is kept, and multiplied by `scale`, if its word of the Philox stream is at least
// `threshold`; 0 means no dropout.
struct Dropout {
    uint32_t threshold;
    float scale;
    uint64_t seed;
};

inline Dropout make_dropout(double dropout_p, uint64_t seed) {
    if (dropout_p <= 0) return {0, 1.0f, 0};
    const double words = std::nearbyint(dropout_p * 4294967296.0);
    return {uint32_t(std::fmin(words, 4294967295.0)), float(1.0 / (1.0 - dropout_p)), seed};
}

}  // namespace fastattn
