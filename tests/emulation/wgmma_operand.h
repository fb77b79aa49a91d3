// Where the elements of a wgmma operand lie in shared memory, and in the registers of a warpgroup.
// From the PTX ISA manual alone ("Asynchronous Warpgroup Level Matrix Instructions": "Register
// Fragments", "Shared Memory Matrix Layout", "Strides", "Canonical Layouts", "Matrix Descriptor
// Format"), whatever the kernels believe.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/tensor_map.h"

namespace fastattn::emulation {

struct InvalidOperand : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An operand of 16-bit elements, k = 16, with the 128-byte swizzle. In units of T = 8 elements, the
// canonical layouts before swizzling are
//   K-major:  ((8, m), (T, 2)) : ((8 T, stride), (1, T))
//   MN-major: ((T, 8, m), (8, 2)) : ((1, T, leading), (8 T, stride))
// and swizzling works on the address that results.
struct WgmmaOperand {
    uint32_t start, leading, stride;  // bytes
    bool mn_major;

    // Where the 16 bytes lie that hold, K-major, elements (mn, 8 * half ...) along k of the row mn;
    // MN-major, elements (mn ..., k) along mn, a multiple of 8, of the column k.
    uint32_t chunk_of_row(int mn, int half) const {
        return swizzled(start + mn % 8 * 128 + mn / 8 * stride + half * 16);
    }
    uint32_t chunk_of_column(int mn, int k) const {
        return swizzled(start + mn / 8 % 8 * 16 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride);
    }
};

// Decodes a descriptor of an operand with `extent` elements along m or n. Throws where the bits
// mean what is not emulated, or an operand that leaves its swizzle pattern.
inline WgmmaOperand decode_wgmma_operand(uint64_t descriptor, bool mn_major, int extent) {
    const auto field = [&](int bit, int bits) {
        return uint32_t(descriptor >> bit & ((uint64_t(1) << bits) - 1));
    };
    const auto require = [&](bool met, const char* rule) {
        if (!met)
            throw InvalidOperand("wgmma: descriptor of " + std::to_string(field(0, 14) << 4) +
                                 ": " + rule);
    };
    require(!field(14, 2) && !field(30, 2) && !field(46, 3) && !field(52, 10),
            "a reserved bit is set");
    require(field(62, 2) == 1, "a swizzle mode other than 128 bytes is not emulated");
    require(field(49, 3) == 0, "a base offset other than 0 is not emulated");
    const WgmmaOperand o{field(0, 14) << 4, field(16, 14) << 4, field(32, 14) << 4, mn_major};

    // Base offset 0 says that patterns of 8 rows by 128 bytes begin at multiples of 1024.
    require((o.start >> 7 & 7) == 0, "it begins within the rows of a swizzle pattern");
    const bool strides_matter = mn_major || extent > 8;
    require(!strides_matter || (o.stride != 0 && o.stride % 1024 == 0),
            "the stride must be a multiple of 1024");
    const uint32_t along_row = o.start % 128, reach = mn_major ? 2 * extent : 32;
    require(along_row == 0 || along_row + reach <= 128,
            "it begins within a row of 128 bytes and leaves it");
    require(!mn_major || extent <= 64 || (o.leading != 0 && o.leading % 1024 == 0),
            "the leading dimension's offset must be a multiple of 1024");
    return o;
}

// The element of the accumulator (64, n), or of A (64, 16) in registers, that is number i of thread
// `thread` of the warpgroup; A has two in a register. "Matrix Fragments for
// wgmma.mma_async.m64nNk16".
struct Position {
    int row, column;
};
constexpr Position wgmma_fragment(int thread, int i) {
    const int warp = thread / 32, lane = thread % 32;
    return {16 * warp + lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2};
}

}  // namespace fastattn::emulation
