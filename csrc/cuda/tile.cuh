// Tiles of 16-bit elements in shared memory, and the fragments of mma_m16n8k16 read from them.
#pragma once

#include "cuda/ptx.cuh"

namespace fastattn::cuda {

// kRows rows of kColumns elements. 16-byte chunks are swizzled, so that the 8 rows that a warp
// reads or writes at once lie in different banks: within panels of 64 columns, one after the other,
// chunk c of row r lies at c ^ (r % 8), as TMA and wgmma have it. Where columns are an odd multiple
// of 32, every other row begins in the middle of the banks, and c ^ (r / 2 % 4) is enough.
template <int kRows, int kColumns>
struct Tile {
    static_assert(kColumns % 32 == 0);
    static constexpr int kBytes = kRows * kColumns * 2;

    SharedAddress base;

    // Where columns [8 * chunk, 8 * chunk + 8) of a row lie.
    FASTATTN_DEVICE SharedAddress at(int row, int chunk) const {
        if constexpr (kColumns % 64 != 0)
            return base + row * (kColumns * 2) + ((chunk ^ (row / 2 % 4)) * 16);
        else
            return base + (chunk / 8) * (kRows * 128) + row * 128 + (((chunk ^ row) % 8) * 16);
    }

    // Copies, asynchronously, rows [0, kRows) from `from`, the element (0, 0) of a matrix whose
    // rows are row_stride apart, 16-byte aligned; zeros in rows from `rows` and columns from
    // `columns` on, columns a multiple of 8. By kThreads threads, of which this is number `thread`.
    template <int kThreads, class T>
    FASTATTN_DEVICE void load(const T* from, int64_t row_stride, int rows, int columns,
                              int thread) const {
        load_rows<kThreads>([&](int row) { return from + row * row_stride; }, rows, columns,
                            thread);
    }

    // The same from rows that lie anywhere: `row_of(row)` is the address of a row below `rows`, and
    // of row 0 in any case.
    template <int kThreads, class RowOf>
    FASTATTN_DEVICE void load_rows(RowOf row_of, int rows, int columns, int thread) const {
        // Lanes of a row copy chunks next to each other, 128 bytes where there are so many.
        constexpr int kChunks = kColumns / 8, kLanes = kChunks % 8 ? 4 : 8;
        constexpr int kRowsAtOnce = kThreads / kLanes;
        static_assert(kThreads % kLanes == 0 && kRows % kRowsAtOnce == 0);
#pragma unroll
        for (int i = 0; i < kRows; i += kRowsAtOnce) {
            const int row = i + thread / kLanes;
            const auto* from = row_of(row < rows ? row : 0);
#pragma unroll
            for (int j = 0; j < kChunks; j += kLanes) {
                const int chunk = j + thread % kLanes;
                const bool valid = row < rows && 8 * chunk < columns;
                cp_async_16(at(row, chunk), from + (valid ? 8 * chunk : 0), valid);
            }
        }
    }

    // Stores rows [first_row, first_row + kCount) to where `load` would have read the tile. By one
    // warp.
    template <int kCount, class T>
    FASTATTN_DEVICE void store(T* to, int64_t row_stride, int rows, int columns, int first_row,
                               int lane) const {
        constexpr int kChunks = kColumns / 8, kLanes = kChunks % 8 ? 4 : 8;
#pragma unroll
        for (int i = 0; i < kCount; i += 32 / kLanes) {
            const int row = first_row + i + lane / kLanes;
#pragma unroll
            for (int j = 0; j < kChunks; j += kLanes) {
                const int chunk = j + lane % kLanes;
                if (row < rows && 8 * chunk < columns)
                    st_global(reinterpret_cast<uint4*>(to + row * row_stride + 8 * chunk),
                              ld_shared<uint4>(at(row, chunk)));
            }
        }
    }

    // Fragments of a (16, 16) and of two b's (16, 8), b[0] and b[1] of the first, from a tile
    // stored
    //   row by row as the operand is (rows: m of a; n of b, which is to say b transposed),
    //   or `_trans`, with k along the rows: (rows: k; columns: m of a, n of b).
    // `row`, `column`: of the tile, multiples of 16.
    FASTATTN_DEVICE void fragment_a(uint32_t (&a)[4], int row, int column) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4(a, at(row + lane % 16, column / 8 + lane / 16));
    }
    FASTATTN_DEVICE void fragment_a_trans(uint32_t (&a)[4], int row, int column) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4_trans(a, at(row + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2));
    }
    FASTATTN_DEVICE void fragment_b(uint32_t (&b)[4], int row, int column) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4(b, at(row + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2));
    }
    FASTATTN_DEVICE void fragment_b_trans(uint32_t (&b)[4], int row, int column) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4_trans(b, at(row + lane % 16, column / 8 + lane / 16));
    }
};

}  // namespace fastattn::cuda
