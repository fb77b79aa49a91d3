// The forward's operands: rows of Q, K and V as its tiles read them.
// Included inside a target region.
#pragma once

#include "cpu/attention_scores.h"

// How one storage type is multiplied: T is stored, Dot multiplies.
template <class T, class Dot>
struct Operand {
    typedef typename Dot::Element Element;
    static constexpr int kPair = Dot::kPair;  // elements of T in one Element

    // Rows of Q, padded with zeros.
    static void pack_row(const T* from, int64_t count, int64_t padded, Element* to) {
        if constexpr (kPair == 1) {
            for (int64_t n = 0; n < padded; n += kLanes) store(to + n, load(from + n, count - n));
        } else {
            std::memset(to, 0, padded * sizeof(Element));
            std::memcpy(to, from, count * sizeof(T));
        }
    }

    // Panels of K^T: (panel, head_dim / kPair, kPanel).
    static void pack_keys(const T* k, int64_t stride, int64_t keys, int64_t depth,
                          int64_t padded_depth, Element* to) {
        for (int64_t j = 0; j < keys; j += kPanel, to += padded_depth * kPanel) {
            if constexpr (kPair == 1)
                pack_transposed(k + j * stride, stride, keys - j, depth, padded_depth, to, kPanel);
            else
                pack_transposed_pairs(k + j * stride, stride, keys - j, depth, padded_depth,
                                      (float*)to, kPanel);
        }
    }

    // V for products over keys: (keys / kPair, padded_width), zeros beyond.
    static void pack_values(const T* v, int64_t stride, int64_t keys, int64_t width,
                            int64_t padded_width, Element* to) {
        for (int64_t j = 0; j < keys; j += kPair, to += padded_width) {
            for (int64_t n = 0; n < padded_width; n += kLanes) {
                if constexpr (kPair == 1) {
                    store(to + n, load(v + j * stride + n, width - n));
                } else {
                    UintVec low = load_bits(v + j * stride + n, width - n);
                    UintVec high = {};
                    if (j + 1 < keys) high = load_bits(v + (j + 1) * stride + n, width - n);
                    store((float*)to + n, (Vec)(low | (high << 16)));
                }
            }
        }
    }
};
