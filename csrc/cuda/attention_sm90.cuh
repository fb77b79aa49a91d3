// What attention's kernels for sm_90a share: tiles copied from its tensors, accumulators of wgmma.
#pragma once

#include "cuda/attention_scores.cuh"
#include "cuda/wgmma.cuh"

namespace fastattn::cuda {

constexpr int kWarpgroup = 128;  // threads
constexpr int kPanel = 64;       // columns of a tile's panels, whose rows are 128 bytes

// One thread copies kColumns columns of kRows rows, from `row` on, of a head.
template <int kRows, int kColumns>
FASTATTN_DEVICE void copy_tile(SharedAddress to, const TensorMap* map, SharedAddress full, int row,
                               int head, int batch) {
    mbarrier_arrive_expect(full, kRows * kColumns * 2);
#pragma unroll
    for (int panel = 0; panel < kColumns / kPanel; ++panel)
        tma_load_4d(to + panel * kRows * 128, map, full, panel * kPanel, row, head, batch);
}

// Accumulators, 8 columns a tile, as wgmma takes them.
template <int kTiles>
FASTATTN_DEVICE float (&flat(float (&tiles)[kTiles][4]))[4 * kTiles] {
    return reinterpret_cast<float (&)[4 * kTiles]>(tiles);
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
