// What attention's kernels for sm_90a share: tiles copied from its tensors, accumulators of wgmma.
#pragma once

#include "cuda/attention_scores.cuh"
#include "cuda/wgmma.cuh"

namespace fastattn::cuda {

constexpr int kWarpgroup = 128;  // threads

// Tiles lie in panels of 64 columns, one after the other, whose rows are 128 bytes.
constexpr int kPanel = 64;
template <int kColumns>
constexpr int kPanels = (kColumns + kPanel - 1) / kPanel;
template <int kRows, int kColumns>
constexpr int kTileBytes = kPanels<kColumns> * kRows * 128;

// One thread copies kColumns columns of kRows rows, from `row` on, of a head.
template <int kRows, int kColumns>
FASTATTN_DEVICE void copy_tile(SharedAddress to, const TensorMap* map, SharedAddress full, int row,
                               int head, int batch) {
    mbarrier_arrive_expect(full, kTileBytes<kRows, kColumns>);
#pragma unroll
    for (int panel = 0; panel < kPanels<kColumns>; ++panel)
        tma_load_4d(to + panel * kRows * 128, map, full, panel * kPanel, row, head, batch);
}

// Accumulators, 8 columns a tile, as wgmma takes them.
template <int kTiles>
FASTATTN_DEVICE float (&flat(float (&tiles)[kTiles][4]))[4 * kTiles] {
    return reinterpret_cast<float (&)[4 * kTiles]>(tiles);
}

// products (64, n) = a (64, kDepth) b^T, asynchronously: `a` is the first of 64 rows of a tile of
// kRowsA rows, `b` the first of n rows of a tile of kTileB rows, 0: of these. After wgmma_fence.
template <class T, int kRowsA, int kDepth, int kTileB = 0, int kTiles>
FASTATTN_DEVICE void multiply_rows_of(float (&products)[kTiles][4], SharedAddress a,
                                      SharedAddress b) {
    constexpr int kRowsB = kTileB ? kTileB : 8 * kTiles;
    const uint64_t rows_a = wgmma_operand(a), rows_b = wgmma_operand(b);
#pragma unroll
    for (int d = 0; d < kDepth; d += 16) {
        const int panel = d / kPanel, bytes = d % kPanel * 2;
        wgmma<T, 8 * kTiles>(flat(products), advanced(rows_a, panel * (kRowsA * 128) + bytes),
                             advanced(rows_b, panel * (kRowsB * 128) + bytes), d > 0);
    }
    wgmma_commit();
}

// acc (64, n) += weights (64, 16 * kSteps) rows, asynchronously: `rows` (16 * kSteps, n) is a tile.
// After wgmma_fence.
template <class T, int kTiles, int kSteps>
FASTATTN_DEVICE void add_weighted_rows(float (&acc)[kTiles][4],
                                       const uint32_t (&weights)[kSteps][4], SharedAddress rows) {
    const uint64_t b = wgmma_operand(rows, 16 * kSteps * 128);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
        wgmma<T, 8 * kTiles, true>(flat(acc), weights[step], advanced(b, step * 2048), true);
    wgmma_commit();
}

// Writes zeros over rows [row, kRows) of a tile; this is one of `threads` threads that do. What
// lies beyond a sequence may be NaN, which weights of 0 would not hide.
template <int kRows, int kColumns>
FASTATTN_DEVICE void clear_rows(SharedAddress tile, int row, int thread, int threads) {
    const int chunks = (kRows - row) * 8;  // of 16 bytes, in a panel
    for (int panel = 0; panel < kPanels<kColumns>; ++panel)
#pragma unroll 1
        for (int i = thread; i < chunks; i += threads)
            st_shared(tile + (panel * kRows + row) * 128 + i * 16, uint4{0, 0, 0, 0});
}

// Writes this lane's row of a half of acc (16, 8 * kTiles), if it is one of the tensor's, up to
// column `columns`.
template <class T, int kTiles>
FASTATTN_DEVICE void write_row(const float (&acc)[kTiles][4], int half, T* to, bool inside,
                               int columns) {
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 4) {
        // Of four tiles of 8 columns each lane has two columns; each writes one tile's.
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* pair = &acc[tile + i][2 * half];
            x[i] = pack<T>(pair[0], pair[1]);
        }
        transpose_quad(x);
        const int column = 8 * (tile + threadIdx.x % 4);
        if (inside && column < columns)
            st_global(reinterpret_cast<uint4*>(to + column), uint4{x[0], x[1], x[2], x[3]});
    }
}

// Host. A tensor (batch, heads, seqlen, head_dim), of which a copy moves `rows` rows of a panel.
// Packed sequences are one, of `total` rows.
template <class T>
TensorMap map_of(const void* tensor, const Strides& strides, int batch, int heads, int seqlen,
                 int head_dim, bool packed, int total, int rows) {
    if (packed) batch = 1, seqlen = total;
    // The stride of a dim of size 1 may be anything.
    const auto stride_of = [](int64_t stride, int size) { return size == 1 ? 8 : stride; };
    return make_tensor_map({same<T, bfloat16> ? Element::bfloat16 : Element::float16,
                            tensor,
                            {head_dim, seqlen, heads, batch},
                            {1, stride_of(strides.row, seqlen), stride_of(strides.head, heads),
                             stride_of(strides.batch, batch)},
                            {kPanel, rows, 1, 1},
                            true});
}

// Host. Whether copies take it: it has rows, and none twice (stride 0).
inline bool mappable(const Strides& strides, int batch, int heads, int seqlen, bool packed,
                     int total) {
    if (packed) batch = 1, seqlen = total;
    return seqlen > 0 && (batch == 1 || strides.batch) && (heads == 1 || strides.head) &&
           (seqlen == 1 || strides.row);
}

}  // namespace fastattn::cuda
