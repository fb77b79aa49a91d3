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
    static constexpr int kHeight = kRows, kBytes = kRows * kColumns * 2;

    // Lanes that copy chunks of a row next to each other, 128 bytes where there are so many.
    static constexpr int kLanes = kColumns % 64 ? 4 : 8;

    SharedAddress base;

    // Where columns [8 * chunk, 8 * chunk + 8) of a row lie.
    FASTATTN_DEVICE SharedAddress at(int row, int chunk) const {
        return base + within(row, chunk) + panel(chunk);
    }

    // Copies, asynchronously, rows [0, kRows) from `from`, the element (0, 0) of a matrix whose
    // rows are row_stride apart, 16-byte aligned; zeros in rows from `rows` and columns from
    // `columns` on, columns a multiple of 8. By kThreads threads, of which this is number `thread`.
    template <int kThreads, class T>
    FASTATTN_DEVICE void load(const T* from, int64_t row_stride, int rows, int columns,
                              unsigned thread) const {
        const char* row =
            reinterpret_cast<const char*>(from) + int64_t(thread / kLanes) * (2 * row_stride);
        load_rows<kThreads>(
            [&](int) {
                const char* this_row = row;
                row += kThreads / kLanes * (2 * row_stride);
                return this_row;
            },
            rows, columns, thread);
    }

    // The same from rows that lie anywhere: `row_of(row)` is the address of a row, which from
    // `rows` on is not read. It is asked for in rising order.
    template <int kThreads, class RowOf>
    FASTATTN_DEVICE void load_rows(RowOf row_of, int rows, int columns, unsigned thread) const {
        constexpr int kRowsAtOnce = kThreads / kLanes;
        static_assert(kThreads % kLanes == 0 && kRows % kRowsAtOnce == 0);
        const unsigned lane_row = thread / kLanes, lane_chunk = thread % kLanes;
#pragma unroll
        for (int i = 0; i < kRows; i += kRowsAtOnce) {
            const char* from =
                reinterpret_cast<const char*>(row_of(i + lane_row)) + lane_chunk * 16;
#pragma unroll
            for (int j = 0; j < kColumns / 8; j += kLanes)
                cp_async_16(
                    lane_at(lane_row, lane_chunk, i, j), from + 16 * j,
                    int(lane_row) < rows - i && int(16 * lane_chunk) < 2 * columns - 16 * j);
        }
    }

    // Stores rows [first_row, first_row + kCount) to where `load` would have read the tile. By one
    // warp.
    template <int kCount, class T>
    FASTATTN_DEVICE void store(T* to, int64_t row_stride, int rows, int columns, int first_row,
                               int lane) const {
#pragma unroll
        for (int i = 0; i < kCount; i += 32 / kLanes) {
            const int row = first_row + i + lane / kLanes;
#pragma unroll
            for (int j = 0; j < kColumns / 8; j += kLanes) {
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
    FASTATTN_DEVICE void fragment_a(uint32_t (&a)[4], int row, int column,
                                    unsigned lane = threadIdx.x % 32) const {
        ldmatrix_x4(a, lane_at(lane % 16, lane / 16, row, column / 8));
    }
    FASTATTN_DEVICE void fragment_a_trans(uint32_t (&a)[4], int row, int column,
                                          unsigned lane = threadIdx.x % 32) const {
        ldmatrix_x4_trans(a, lane_at(lane / 16 * 8 + lane % 8, lane / 8 % 2, row, column / 8));
    }
    FASTATTN_DEVICE void fragment_b(uint32_t (&b)[4], int row, int column,
                                    unsigned lane = threadIdx.x % 32) const {
        ldmatrix_x4(b, lane_at(lane / 16 * 8 + lane % 8, lane / 8 % 2, row, column / 8));
    }
    FASTATTN_DEVICE void fragment_b_trans(uint32_t (&b)[4], int row, int column,
                                          unsigned lane = threadIdx.x % 32) const {
        ldmatrix_x4_trans(b, lane_at(lane % 16, lane / 16, row, column / 8));
    }

    // at(row + lane_row, chunk + lane_chunk), no bit set in both of either pair. What depends on
    // the lane is the same for all rows and chunks that are multiples of kGroup.
    FASTATTN_DEVICE SharedAddress lane_at(unsigned lane_row, unsigned lane_chunk, unsigned row,
                                          unsigned chunk) const {
        const unsigned lane = within(lane_row, lane_chunk) ^ swizzled(row, chunk);
        return base + lane + row * kRowBytes + panel(chunk);
    }

  private:
    // Chunks that swizzling permutes among themselves; rows of 64 columns or of all.
    static constexpr int kGroup = kColumns % 64 ? 4 : 8;
    static constexpr int kRowBytes = kColumns % 64 ? 2 * kColumns : 128;

    // Of a row's panel.
    static FASTATTN_DEVICE unsigned within(unsigned row, unsigned chunk) {
        return row * kRowBytes + swizzled(row, chunk);
    }
    static FASTATTN_DEVICE unsigned swizzled(unsigned row, unsigned chunk) {
        return ((kColumns % 64 ? row / 2 : row) ^ chunk) % kGroup * 16;
    }
    static FASTATTN_DEVICE unsigned panel(unsigned chunk) {
        return chunk / kGroup * (kColumns % 64 ? 64 : kRows * 128);
    }
};

// Transposes the (4, 4) words of a quad, four lanes with four words each: of two that change
// places, each lies in one of two lanes whose numbers differ in one bit, as theirs do.
FASTATTN_DEVICE void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            uint32_t &low = words[i], &high = words[i + bit];
            const uint32_t got = shuffle_xor(upper ? low : high, bit);
            low = upper ? got : low, high = upper ? high : got;
        }
    }
}

}  // namespace fastattn::cuda
