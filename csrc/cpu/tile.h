// The register-tile matrix product that attention and FFN are made of, and the packing it reads.
#pragma once

#include "cpu/vec.h"

// Rows and vectors of a full tile: accumulators, a row of B and a broadcast fill the registers
// (32 of AVX-512 and NEON, 16 of AVX2 and SSE). A near-square tile loads least for each product.
constexpr int kTileRows = FASTATTN_NEON ? 12 : 6;
constexpr int kTileVectors = FASTATTN_AVX512 ? 4 : 2;

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A multiply-accumulate step: what one element of A and one 32-bit lane of B are. Where kMatrix,
// there are registers for whole matrices as well (amx.h), which take kDepthStep steps at a time.
struct DotF32 {
    typedef float Element;
    static constexpr int kPair = 1;
    static constexpr bool kMatrix = false;
    static constexpr int kRows = kTileRows;  // of a product
    static constexpr int kDepthStep = 1;
    FASTATTN_INLINE static Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
    FASTATTN_INLINE static Vec step(const float* a, Vec b, Vec c) { return splat(*a) * b + c; }
    FASTATTN_INLINE static Vec step(Vec a, Vec b, Vec c) { return a * b + c; }
    template <class T>
    FASTATTN_INLINE static Vec load_row(const T* p, int64_t count) {
        return load(p, count);
    }
};

#if FASTATTN_AVX512_BF16
// Pairs of bfloat16: two neighbours along k in each 32-bit lane.
struct BF16Pair {
    uint32_t bits;
};
struct DotBF16 {
    typedef BF16Pair Element;
    static constexpr int kPair = 2;
    static constexpr bool kMatrix = FASTATTN_AMX;
    static constexpr int kRows = kMatrix ? 32 : kTileRows;
    static constexpr int kDepthStep = kMatrix ? 16 : 1;
    FASTATTN_INLINE static Vec multiply_add(Vec a, Vec b, Vec c) {
        return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
    FASTATTN_INLINE static Vec step(const BF16Pair* a, Vec b, Vec c) {
        return multiply_add((Vec)_mm512_set1_epi32((int)a->bits), b, c);
    }
    FASTATTN_INLINE static Vec step(Vec a, Vec b, Vec c) {
        return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
    FASTATTN_INLINE static Vec load_row(const BF16* p, int64_t count) {
        Vec v = {};
        __builtin_memcpy(&v, p, count >= 2 * kLanes ? sizeof v : count * sizeof(BF16));
        return v;
    }
};
#endif

// Calls f(m, n) for each vector of a tile, unrolled: in a loop the compiler keeps the tile in
// memory.
template <int kRows, int kVectors, class F>
FASTATTN_INLINE void for_each_vector(F f) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) f(m, n);
}

// acc[m][n] += sum over k of A[m, k] * B[k, n]. Element (m, k) of A lies at a[m * a_row + k * a_k];
// row k of B begins at b + k * b_k and has kVectors * kLanes elements.
template <class Dot, int kRows, int kVectors>
FASTATTN_INLINE void tile(const typename Dot::Element* a, int64_t a_row, int64_t a_k,
                          const typename Dot::Element* b, int64_t b_k, int64_t k,
                          Vec (&acc)[kRows][kVectors]) {
    for (int64_t step = 0; step < k; ++step, a += a_k, b += b_k) {
        Vec row[kVectors];
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) row[n] = load((const float*)b + n * kLanes);
        for_each_vector<kRows, kVectors>(
            [&](int m, int n) { acc[m][n] = Dot::step(a + m * a_row, row[n], acc[m][n]); });
    }
}

// Lane i of the result is lane index(i) of a, or from kLanes on of b.
template <int (*index)(int), int... i>
FASTATTN_INLINE Vec shuffle(Vec a, Vec b, std::integer_sequence<int, i...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, index(i)...);
#else
    return __builtin_shuffle(a, b, IntVec{index(i)...});
#endif
}
template <int (*index)(int)>
FASTATTN_INLINE Vec shuffle(Vec a, Vec b) {
    return shuffle<index>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Interleaves two vectors: the low, and the high half of a0 b0 a1 b1 ...
constexpr int zipped_low(int i) { return i / 2 + i % 2 * kLanes; }
constexpr int zipped_high(int i) { return zipped_low(i) + kLanes / 2; }
FASTATTN_INLINE void zip(Vec a, Vec b, Vec& low, Vec& high) {
    low = shuffle<zipped_low>(a, b), high = shuffle<zipped_high>(a, b);
}

// The even, and the odd elements of two vectors: undoes zip.
constexpr int even_lane(int i) { return 2 * i; }
constexpr int odd_lane(int i) { return 2 * i + 1; }
FASTATTN_INLINE void unzip(Vec low, Vec high, Vec& even, Vec& odd) {
    even = shuffle<even_lane>(low, high), odd = shuffle<odd_lane>(low, high);
}

// 2 * kLanes elements, those of even and those of odd index.
struct EvenOdd {
    Vec even, odd;
};
template <class T>
FASTATTN_INLINE EvenOdd load_even_odd(const T* p) {
    EvenOdd v;
    unzip(load(p), load(p + kLanes), v.even, v.odd);
    return v;
}
template <class T>
FASTATTN_INLINE void store_even_odd(T* p, EvenOdd v) {
    Vec low, high;
    zip(v.even, v.odd, low, high);
    store(p, low);
    store(p + kLanes, high);
}
// A lane of 32 bits holds two bfloat16, each but for its position the upper half of a float.
FASTATTN_INLINE EvenOdd load_even_odd(const BF16* p) {
    UintVec both;
    __builtin_memcpy(&both, p, sizeof both);
    return {(Vec)(both << 16), (Vec)(both & 0xffff0000u)};
}
FASTATTN_INLINE void store_even_odd(BF16* p, EvenOdd v) {
#if FASTATTN_AVX512_BF16
    const IntVec lane = lane_index();
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.odd, (__m512)v.even);
    const UintVec both =
        (UintVec)_mm512_permutexvar_epi16((__m512i)(lane | ((lane + kLanes) << 16)), halves);
#else
    const UintVec both = bf16_bits(v.even) | (bf16_bits(v.odd) << 16);
#endif
    __builtin_memcpy(p, &both, sizeof both);
}

// Transposes kLanes x kLanes elements in place: log2(kLanes) rounds of zipping row i with row
// i + kLanes / 2.
FASTATTN_INLINE void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
    for (int round = 1; round < kLanes; round *= 2) {
        Vec next[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes / 2; ++i)
            zip(rows[i], rows[i + kLanes / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
    }
}

// The sum, or the maximum, of each of kLanes vectors, in the lane of its index: transpose,
// combining on the way.
template <bool kSum>
FASTATTN_INLINE Vec reductions(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) {
            Vec low, high;
            zip(rows[i], rows[i + half], low, high);
            rows[i] = kSum ? low + high : max(low, high);
        }
    }
    return rows[0];
}
FASTATTN_INLINE Vec sums(Vec (&rows)[kLanes]) { return reductions<true>(rows); }
FASTATTN_INLINE Vec maxima(Vec (&rows)[kLanes]) { return reductions<false>(rows); }

// Packs the transpose of a row-major matrix for `tile`: element (row, column) goes to
// packed[column * width + row]; the rows from `rows` up to `width` (a multiple of kLanes) are 0,
// and so are the columns from `columns` up to `padded_columns`.
template <class T>
FASTATTN_INLINE void pack_transposed(const T* source, int64_t source_row, int64_t rows,
                                     int64_t columns, int64_t padded_columns, float* packed,
                                     int64_t width) {
    for (int64_t row = 0; row < width; row += kLanes) {
        for (int64_t column = 0; column < padded_columns; column += kLanes) {
            Vec block[kLanes];
            int64_t wide = columns - column;
            if (row + kLanes <= rows && wide >= kLanes) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i)
                    block[i] = load(source + (row + i) * source_row + column);
            } else {
                for (int i = 0; i < kLanes; ++i) {
                    block[i] = Vec{};
                    if (row + i < rows && wide > 0)
                        block[i] = load(source + (row + i) * source_row + column, wide);
                }
            }
            transpose(block);
            const int64_t high = padded_columns - column;
            if (high >= kLanes) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i)
                    store(packed + (column + i) * width + row, block[i]);
            } else {
                for (int i = 0; i < high; ++i) store(packed + (column + i) * width + row, block[i]);
            }
        }
    }
}

// kLanes bfloat16 as 32-bit lanes, 0 beyond `count`.
FASTATTN_INLINE UintVec load_bits(const BF16* p, int64_t count) {
    HalfVec h = {};
    if (count >= kLanes) {
        __builtin_memcpy(&h, p, sizeof h);
    } else {
        for (int64_t lane = 0; lane < count; ++lane) h[lane] = p[lane].bits;
    }
    return __builtin_convertvector(h, UintVec);
}

// As pack_transposed, of pairs along a row: 32-bit element (row, pair) goes to
// packed[pair * width + row]; an odd last column is paired with 0.
FASTATTN_INLINE void pack_transposed_pairs(const BF16* source, int64_t source_row, int64_t rows,
                                           int64_t columns, int64_t pairs, float* packed,
                                           int64_t width) {
    for (int64_t row = 0; row < width; row += kLanes) {
        for (int64_t pair = 0; pair < pairs; pair += kLanes) {
            Vec block[kLanes];
            const int64_t wide = std::min<int64_t>(columns - 2 * pair, 2 * kLanes);
            const BF16* from = source + row * source_row + 2 * pair;
            if (row + kLanes <= rows && wide == 2 * kLanes) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i)
                    __builtin_memcpy(&block[i], from + i * source_row, sizeof(Vec));
            } else {
                for (int i = 0; i < kLanes; ++i) {
                    block[i] = Vec{};
                    if (row + i < rows)
                        __builtin_memcpy(&block[i], from + i * source_row, wide * sizeof(BF16));
                }
            }
            transpose(block);
            if (pairs - pair >= kLanes) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) store(packed + (pair + i) * width + row, block[i]);
            } else {
                for (int i = 0; i < pairs - pair; ++i)
                    store(packed + (pair + i) * width + row, block[i]);
            }
        }
    }
}
