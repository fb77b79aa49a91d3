// Included inside a target region. Matrix products on AMX's tile registers (Intel Architecture
// Instruction Set Extensions, "Advanced Matrix Extensions"): 16 x 16 float32 sums of products of
// bfloat16 pairs, two by two of them at a time, so that each tile of A and B is loaded for two.
#pragma once

#include "cpu/tile.h"

constexpr int64_t kMatrixRows = 16;  // of one register

#if FASTATTN_AMX
// The calling thread's tile registers, all of 16 rows of 64 bytes, while this lives.
class MatrixRegisters {
  public:
    MatrixRegisters() {
        // Static: the compiler does not know that all of it is read.
        struct Layout {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        };
        alignas(64) static constexpr Layout kLayout{
            1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        _tile_loadconfig(&kLayout);
    }
    ~MatrixRegisters() { _tile_release(); }
    MatrixRegisters(const MatrixRegisters&) = delete;
    MatrixRegisters& operator=(const MatrixRegisters&) = delete;
};

// C = (or +=) A B for 16 rows, 32 where kTall, and 16 columns, 32 where kWide. Strides count
// elements of 4 bytes.
template <bool kTall, bool kWide>
inline void multiply_tiles(const BF16Pair* a, int64_t a_row, const BF16Pair* b, int64_t b_k,
                           int64_t k, float* c, int64_t c_row, bool accumulate) {
    float* below = c + kMatrixRows * c_row;
    const int64_t c_bytes = 4 * c_row, a_bytes = 4 * a_row, b_bytes = 4 * b_k;
    if (accumulate) {
        _tile_loadd(0, c, c_bytes);
        if constexpr (kWide) _tile_loadd(1, c + 16, c_bytes);
        if constexpr (kTall) _tile_loadd(2, below, c_bytes);
        if constexpr (kTall && kWide) _tile_loadd(3, below + 16, c_bytes);
    } else {
        _tile_zero(0);
        if constexpr (kWide) _tile_zero(1);
        if constexpr (kTall) _tile_zero(2);
        if constexpr (kTall && kWide) _tile_zero(3);
    }
    for (int64_t step = 0; step < k; step += 16, a += 16, b += 16 * b_k) {
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kWide) {
            _tile_loadd(7, b + 16, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kTall) {
            _tile_loadd(5, a + kMatrixRows * a_row, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (kWide) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (kWide) _tile_stored(1, c + 16, c_bytes);
    if constexpr (kTall) _tile_stored(2, below, c_bytes);
    if constexpr (kTall && kWide) _tile_stored(3, below + 16, c_bytes);
}
#else
class MatrixRegisters {};
#endif

// What a thread holds while it multiplies with Dot.
struct NoRegisters {};
template <class Dot>
using Registers = std::conditional_t<Dot::kMatrix, MatrixRegisters, NoRegisters>;

// C (rows, columns) = or += A (rows, k) B (k, columns), where Dot::kMatrix; k is a multiple of 16.
// Whole tiles of 16 by 16 are read and written: A, B and C have them.
template <class Dot>
void matrix_product([[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t columns,
                    [[maybe_unused]] const typename Dot::Element* a, [[maybe_unused]] int64_t a_row,
                    [[maybe_unused]] const typename Dot::Element* b, [[maybe_unused]] int64_t b_k,
                    [[maybe_unused]] int64_t k, [[maybe_unused]] float* c,
                    [[maybe_unused]] int64_t c_row, [[maybe_unused]] bool accumulate) {
#if FASTATTN_AMX
    if constexpr (Dot::kMatrix) {
        // The compiler does not know that tile loads read memory.
        asm volatile("" ::: "memory");
        for (int64_t n = 0; n < columns; n += 32) {
            const bool wide = columns - n > 16;
            for (int64_t m = 0; m < rows; m += 32) {
                const bool tall = rows - m > kMatrixRows;
                const auto multiply =
                    tall ? (wide ? multiply_tiles<true, true> : multiply_tiles<true, false>)
                         : (wide ? multiply_tiles<false, true> : multiply_tiles<false, false>);
                multiply(a + m * a_row, a_row, b + n, b_k, k, c + m * c_row + n, c_row, accumulate);
            }
        }
        asm volatile("" ::: "memory");
    }
#endif
}
