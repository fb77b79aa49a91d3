// The backward's operands: copied, packed and stored, and the products over them.
// Included inside a target region.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention_scores.h"

namespace {

constexpr int64_t kBlockM = 96;                  // queries
constexpr int64_t kBlockN = 192;                 // keys
constexpr int64_t kScoresStride = kBlockN + 16;  // not a power of two: its rows share cache sets
static_assert(kBlockM % kTileRows == 0 && kBlockM % 32 == 0 && kBlockN % kPanel == 0);

const char* at(const void* base, DType dtype, const Strides3& strides, int64_t b, int64_t h,
               int64_t i) {
    return (const char*)base + (b * strides[0] + h * strides[1] + i * strides[2]) * itemsize(dtype);
}
char* at(void* base, DType dtype, const Strides3& strides, int64_t b, int64_t h, int64_t i) {
    return const_cast<char*>(at((const void*)base, dtype, strides, b, h, i));
}

// Sizes that all tasks share.
template <class Dot>
struct Layout {
    int64_t group, blocks_m, block_n;
    int64_t depth, depth_v;    // Elements of a row of Q and K, of V and dout
    int64_t stride, stride_v;  // the same, padded
    int64_t width, width_v;    // columns of the accumulators, padded to panels
    int64_t block_dq;          // floats of the dQ of one block of queries
    int64_t dq_size;           // floats of the dQ of one task

    explicit Layout(const AttentionBwdArgs& a)
        : group(a.heads / a.heads_kv),
          blocks_m((a.seqlen_q + kBlockM - 1) / kBlockM),
          // Half a block keeps a wide head's operands in the second-level cache.
          block_n(std::min(
              round_up(std::max(a.head_dim, a.head_dim_v) > 128 ? kBlockN / 2 : kBlockN, kPanel),
              round_up(std::max<int64_t>(a.seqlen_k, 1), kPanel))),
          depth(round_up(ceil_div(a.head_dim, Dot::kPair), Dot::kDepthStep)),
          depth_v(round_up(ceil_div(a.head_dim_v, Dot::kPair), Dot::kDepthStep)),
          stride(round_up(depth, kLanes)),
          stride_v(round_up(depth_v, kLanes)),
          width(round_up(a.head_dim, kPanel)),
          width_v(round_up(a.head_dim_v, kPanel)),
          block_dq(kBlockM * width),
          dq_size(group * blocks_m * block_dq) {}
};

// Tiles have one, two or three steps of rows; queries are padded to one step.
template <class Dot>
constexpr int kRowStep = Dot::kMatrix ? 2 * Dot::kDepthStep : kTileRows / 3;

// c[m][n] += (or =) sum over k of A[m, k] * B[k, n] for one tile, B a packed panel.
template <class Dot, int kRows, int kVectors>
__attribute__((noinline)) void product_tile(const typename Dot::Element* a, int64_t a_row,
                                            int64_t a_k, const typename Dot::Element* b, int64_t k,
                                            float* c, int64_t c_row, bool accumulate) {
    Vec acc[kRows][kVectors];
    for_each_vector<kRows, kVectors>([&](int m, int n) { acc[m][n] = Vec{}; });
    tile<Dot, kRows, kVectors>(a, a_row, a_k, b, kPanel, k, acc);
    // Added at the end: a block's sum rounds less than a chain through all blocks.
    for_each_vector<kRows, kVectors>([&](int m, int n) {
        float* to = c + m * c_row + n * kLanes;
        store(to, accumulate ? load(to) + acc[m][n] : acc[m][n]);
    });
}

// As product_tile, for a multiple of kRowStep rows up to Dot::kRows, and up to kPanel columns.
template <class Dot>
void product(int64_t rows, int64_t columns, const typename Dot::Element* a, int64_t a_row,
             int64_t a_k, const typename Dot::Element* b, int64_t k, float* c, int64_t c_row,
             bool accumulate) {
    if constexpr (Dot::kMatrix) {
        columns = std::min<int64_t>(columns, kPanel);
        return matrix_product<Dot>(rows, columns, a, a_row, b, kPanel, k, c, c_row, accumulate);
    }
    constexpr int kStep = kRowStep<Dot>;
    const auto run = [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        if (rows > 2 * kStep)
            product_tile<Dot, kTileRows, kVectors>(a, a_row, a_k, b, k, c, c_row, accumulate);
        else if (rows > kStep)
            product_tile<Dot, 2 * kStep, kVectors>(a, a_row, a_k, b, k, c, c_row, accumulate);
        else
            product_tile<Dot, kStep, kVectors>(a, a_row, a_k, b, k, c, c_row, accumulate);
    };
    if (columns > 2 * kLanes && kTileVectors > 2)
        run(std::integral_constant<int, kTileVectors>{});
    else if (columns > kLanes)
        run(std::integral_constant<int, 2>{});
    else
        run(std::integral_constant<int, 1>{});
}

template <class F>
auto with_type(DType dtype, F f) {
    if (dtype == DType::float16) return f(F16{});
    if (dtype == DType::bfloat16) return f(BF16{});
    return f(float{});
}

// Rows of a caller's tensor (rows, columns) into (padded_rows, stride), zeros beyond.
template <class Dot>
void copy_rows(DType dtype, const void* from, int64_t from_row, int64_t rows, int64_t columns,
               int64_t padded_rows, int64_t stride, typename Dot::Element* to) {
    if constexpr (Dot::kPair == 1) {
        with_type(dtype, [&](auto element) {
            typedef decltype(element) T;
            for (int64_t row = 0; row < rows; ++row) {
                const T* source = (const T*)from + row * from_row;
                for (int64_t n = 0; n < stride; n += kLanes)
                    store(to + row * stride + n, load(source + n, columns - n));
            }
        });
    } else {
        for (int64_t row = 0; row < rows; ++row) {
            const BF16* source = (const BF16*)from + row * from_row;
            for (int64_t n = 0; n < stride; n += kLanes) {
                Vec pairs = {};
                if (columns - 2 * n >= 2 * kLanes)
                    __builtin_memcpy(&pairs, source + 2 * n, sizeof pairs);
                else if (columns > 2 * n)
                    std::memcpy(&pairs, source + 2 * n, (columns - 2 * n) * 2);
                store((float*)(to + row * stride + n), pairs);
            }
        }
    }
    std::memset((void*)(to + rows * stride), 0, (padded_rows - rows) * stride * 4);
}

// (rows, stride) into panels (panel, panel_rows / kPair, kPanel) for products over the rows.
template <class Dot>
void pack_panels(const typename Dot::Element* from, int64_t stride, int64_t rows, int64_t columns,
                 int64_t panel_rows, typename Dot::Element* to) {
    for (int64_t panel = 0; panel < columns;
         panel += kPanel, to += panel_rows / Dot::kPair * kPanel) {
        const int64_t width = std::min<int64_t>(kPanel, columns - panel);
        for (int64_t row = 0; row < rows; row += Dot::kPair) {
            for (int64_t n = 0; n < width; n += kLanes) {
                if constexpr (Dot::kPair == 1) {
                    store(to + row * kPanel + n, load(from + row * stride + panel + n));
                } else {
                    const BF16* source = (const BF16*)(from + row * stride) + panel + n;
                    UintVec even = load_bits(source, kLanes);
                    UintVec odd = load_bits(source + 2 * stride, kLanes);
                    store((float*)to + row / 2 * kPanel + n, (Vec)(even | (odd << 16)));
                }
            }
        }
    }
}

// (rows, stride) of pairs along a row into (columns, panel_rows / 2) of pairs along a column.
void transpose_pairs(const BF16* from, int64_t stride, int64_t rows, int64_t columns,
                     int64_t panel_rows, float* to) {
    for (int64_t n = 0; n < columns; n += kLanes) {
        for (int64_t row = 0; row < rows; row += 2 * kLanes) {
            Vec block[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                const BF16* source = from + (row + 2 * i) * stride + n;
                block[i] =
                    (Vec)(load_bits(source, kLanes) | (load_bits(source + stride, kLanes) << 16));
            }
            transpose(block);
            for (int i = 0; i < kLanes; ++i)
                store(to + (n + i) * (panel_rows / 2) + row / 2, block[i]);
        }
    }
}

// (rows, stride) into transposed panels (panel, depth, kPanel); the rows are padded to kPanel.
__attribute__((noinline)) void pack_transposed_panels(const float* from, int64_t stride,
                                                      int64_t rows, int64_t depth, float* to) {
    for (int64_t row = 0; row < rows; row += kPanel, to += depth * kPanel)
        pack_transposed(from + row * stride, stride, kPanel, stride, depth, to, kPanel);
}

// The first `rows` rows of accumulated panels (panel, panel_rows, kPanel), and a tile beyond.
inline void clear_rows(float* panels, int64_t panel_rows, int64_t rows, int64_t width) {
    const int64_t padded = std::min(panel_rows, round_up(std::max<int64_t>(rows, 0), 32));
    for (int64_t n = 0; n < width; n += kPanel, panels += panel_rows * kPanel)
        std::fill_n(panels, padded * kPanel, 0.0f);
}

// Accumulated panels (panel, panel_rows, kPanel), scaled, into rows of a caller's tensor.
void store_rows(DType dtype, const float* from, int64_t panel_rows, int64_t rows, int64_t columns,
                float scale, void* to, int64_t to_row) {
    with_type(dtype, [&](auto element) {
        typedef decltype(element) T;
        for (int64_t row = 0; row < rows; ++row) {
            T* target = (T*)to + row * to_row;
            for (int64_t n = 0; n < columns; n += kLanes) {
                const float* source = from + (n / kPanel * panel_rows + row) * kPanel + n % kPanel;
                store(target + n, load(source) * scale, columns - n);
            }
        }
    });
}

// The same from the transpose (columns, from_row).
void store_transposed(DType dtype, const float* from, int64_t from_row, int64_t rows,
                      int64_t columns, float scale, void* to, int64_t to_row) {
    with_type(dtype, [&](auto element) {
        typedef decltype(element) T;
        for (int64_t row = 0; row < rows; row += kLanes) {
            for (int64_t n = 0; n < columns; n += kLanes) {
                Vec block[kLanes];
                for (int i = 0; i < kLanes; ++i) block[i] = load(from + (n + i) * from_row + row);
                transpose(block);
                for (int64_t i = 0; i < kLanes && row + i < rows; ++i)
                    store((T*)to + (row + i) * to_row + n, block[i] * scale, columns - n);
            }
        }
    });
}

inline void prefetch_rows(const char* from, DType dtype, int64_t from_row, int64_t rows,
                          int64_t columns) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t byte = 0; byte < columns * itemsize(dtype); byte += 64)
            __builtin_prefetch(from + row * from_row * itemsize(dtype) + byte, 0, 2);
}

// Two rows in bfloat16, and zipped: the lanes' pairs.
FASTATTN_INLINE Vec zip_narrow(Vec a, Vec b, HalfVec& even, HalfVec& odd) {
#if FASTATTN_AVX512_BF16
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    even = (HalfVec)_mm512_castsi512_si256(both);
    odd = (HalfVec)_mm512_extracti64x4_epi64(both, 1);
    const UintVec lane = (UintVec)lane_index();
    return (Vec)_mm512_permutexvar_epi16((__m512i)(lane | ((lane + kLanes) << 16)), both);
#else
    even = narrow(BF16{}, a), odd = narrow(BF16{}, b);
    return (Vec)(__builtin_convertvector(even, UintVec) |
                 (__builtin_convertvector(odd, UintVec) << 16));
#endif
}

// Whether the bias has an element for each score.
bool has_every_score(const AttentionBwdArgs& a) {
    const int64_t sizes[] = {a.batch, a.heads, a.seqlen_q, a.seqlen_k};
    for (int dim = 0; dim < 4; ++dim)
        if (sizes[dim] > 1 && a.dbias_strides[dim] == 0) return false;
    return true;
}

// Whether the mask hides keys [j, j + count) from queries [i, i + rows).
bool all_masked(const AttentionArgs& a, int64_t b, int64_t h, int64_t i, int64_t rows, int64_t j,
                int64_t count) {
    const Strides4& strides = a.mask_strides;
    const uint8_t* mask = a.mask + b * strides[0] + h * strides[1];
    if (strides[2] == 0) rows = 1;
    if (strides[3] == 0) count = 1;
    for (int64_t row = i; row < i + rows; ++row) {
        const uint8_t* keys = mask + row * strides[2] + j * strides[3];
        uint8_t any = 0;
        for (int64_t n = 0; n < count; ++n) any |= keys[n * strides[3]];
        if (any) return false;
    }
    return true;
}

float row_product(DType dtype, const void* x, const void* y, int64_t count) {
    return with_type(dtype, [&](auto element) {
        typedef decltype(element) T;
        Vec sum = {};
        for (int64_t n = 0; n < count; n += kLanes)
            sum = load((const T*)x + n, count - n) * load((const T*)y + n, count - n) + sum;
        return reduce_add(sum);
    });
}

}  // namespace
