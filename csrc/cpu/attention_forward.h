// The forward's operands, rows of Q, K and V as its tiles read them, and its products.
// Included inside a target region.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention_scores.h"

constexpr int kBlockN = 256;   // keys
constexpr int kFewRows = 4;    // up to these, K is read as it lies: packing it would cost more
constexpr int64_t kAhead = 8;  // keys that are fetched ahead of their use

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
        const int64_t padded_keys = round_up(keys, kPair * Dot::kDepthStep);
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
        const int64_t beyond = padded_keys / kPair - ceil_div(keys, kPair);
        std::memset((void*)to, 0, beyond * padded_width * sizeof(Element));
    }
};

// scores[m][panel] = Q[m] . K^T for the tile's rows.
template <class Dot, int kRows, int kVectors>
void score_tile(const typename Dot::Element* q, const typename Dot::Element* k, int64_t depth,
                float* scores) {
    Vec acc[kRows][kVectors];
    for_each_vector<kRows, kVectors>([&](int m, int n) { acc[m][n] = Vec{}; });
    tile<Dot, kRows, kVectors>(q, depth, 1, k, kPanel, depth, acc);
    for_each_vector<kRows, kVectors>(
        [&](int m, int n) { store(scores + m * kBlockN + n * kLanes, acc[m][n]); });
}

// scores[m][j] = Q[m] . K[j] without packing K: sums along head_dim, kLanes keys at a time.
template <class Dot, int kRows, class T>
void score_rows(const typename Dot::Element* q, const T* k, int64_t stride, int64_t head_dim,
                int64_t depth, int64_t keys, float* scores) {
    const int64_t whole = head_dim / Dot::kPair / kLanes * kLanes;
    for (int64_t j = 0; j < keys; j += kLanes) {
        Vec partial[kRows][kLanes];
        for (int i = 0; i < kLanes; ++i) {
            const T* row = k + std::min(j + i, keys - 1) * stride;
            Vec acc[kRows];
            for_each_vector<kRows, 1>([&](int m, int) { acc[m] = Vec{}; });
            for (int64_t n = 0; n < whole; n += kLanes) {
                __builtin_prefetch(row + n * Dot::kPair + kAhead * stride);
                const Vec x = Dot::load_row(row + n * Dot::kPair, kLanes * Dot::kPair);
                for_each_vector<kRows, 1>([&](int m, int) {
                    acc[m] = Dot::step(load((const float*)(q + m * depth + n)), x, acc[m]);
                });
            }
            if (whole < depth) {
                const Vec x =
                    Dot::load_row(row + whole * Dot::kPair, head_dim - whole * Dot::kPair);
                for_each_vector<kRows, 1>([&](int m, int) {
                    const Vec tail = load((const float*)(q + m * depth + whole), depth - whole);
                    acc[m] = Dot::step(tail, x, acc[m]);
                });
            }
            for_each_vector<kRows, 1>([&](int m, int) { partial[m][i] = acc[m]; });
        }
        for (int m = 0; m < kRows; ++m) store(scores + m * kBlockN + j, sums(partial[m]));
    }
}

// acc[m] = acc[m] * correction[m] + P[m] V for one panel of columns.
template <class Dot, int kRows, int kVectors>
void value_tile(const typename Dot::Element* p, int64_t p_stride, const typename Dot::Element* v,
                int64_t v_stride, int64_t keys, const float* correction, float* out,
                int64_t out_stride) {
    Vec acc[kRows][kVectors];
    for_each_vector<kRows, kVectors>([&](int m, int n) { acc[m][n] = Vec{}; });
    tile<Dot, kRows, kVectors>(p, p_stride, 1, v, v_stride, keys, acc);
    // Added at the end: a block's sum rounds less than a chain through all blocks.
    for_each_vector<kRows, kVectors>([&](int m, int n) {
        float* to = out + m * out_stride + n * kLanes;
        store(to, load(to) * correction[m] + acc[m][n]);
    });
}

// Calls f with the smallest row count of a tile that holds `rows`.
template <class Dot, class F>
void with_rows(int64_t rows, [[maybe_unused]] bool few, F f) {
    if constexpr (Dot::kMatrix) {
        if (!few) {
            if (rows > kMatrixRows) return f(std::integral_constant<int, Dot::kRows>{});
            return f(std::integral_constant<int, kMatrixRows>{});
        }
    }
    if (rows > 6 && kTileRows > 6) return f(std::integral_constant<int, kTileRows>{});
    if (rows > 4) return f(std::integral_constant<int, 6>{});
    if (rows > 2) return f(std::integral_constant<int, 4>{});
    if (rows > 1) return f(std::integral_constant<int, 2>{});
    f(std::integral_constant<int, 1>{});
}

// Calls f with the number of vectors of the next tile of columns, so that none is much narrower
// than the others.
template <class F>
void with_vectors(int64_t vectors, F f) {
    if constexpr (kTileVectors == 4) {
        if (vectors == 4 || vectors > 6) return f(std::integral_constant<int, 4>{});
        if (vectors > 2) return f(std::integral_constant<int, 3>{});
    }
    if (vectors > 1) return f(std::integral_constant<int, 2>{});
    f(std::integral_constant<int, 1>{});
}
