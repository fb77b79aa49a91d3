// Conversions of 16-bit floats, as cvt.rn does them: to nearest even, NaN to 0x7fff.
#pragma once

#include <bit>
#include <cstdint>

namespace fastattn::emulation {

inline float widen_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

inline float widen_float16(uint16_t bits) {
    // The exponent's bias changes by 112; infinity and NaN, then at least 2^16, keep theirs at the
    // top.
    const float magnitude = std::bit_cast<float>(uint32_t(bits & 0x7fff) << 13) * 0x1p112f;
    const uint32_t top = magnitude >= 0x1p16f ? 0x7f800000u : 0u;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | top |
                                uint32_t(bits & 0x8000) << 16);
}

inline uint16_t round_to_bfloat16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t round_to_float16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (x != x) return 0x7fff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    // Below 2^-14 the result is subnormal: adding 1/2 leaves its bits, rounded, at the bottom.
    if (magnitude < 0x38800000) {
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        return sign | uint16_t(std::bit_cast<uint32_t>(shifted) - 0x3f000000u);
    }
    return sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace fastattn::emulation
