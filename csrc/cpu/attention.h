// Arguments of the attention kernels. Strides count elements; the last dim's is 1 except where
// given.
#pragma once

#include <array>
#include <cstdint>
#include <limits>

#include "cpu/dropout.h"
#include "dtype.h"

namespace fastattn {

constexpr int64_t kUnbounded = std::numeric_limits<int64_t>::max() / 4;

// (batch, heads, seqlen, head_dim), the first three dims' strides.
using Strides3 = std::array<int64_t, 3>;
// (batch, heads, seqlen_q, seqlen_k); 0 where the tensor is broadcast.
using Strides4 = std::array<int64_t, 4>;

struct AttentionArgs {
    DType dtype;
    int64_t batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
    const void *q, *k, *v;
    Strides3 q_strides, k_strides, v_strides;

    float softmax_scale;
    float softcap;                      // 0: none
    int64_t window_left, window_right;  // kUnbounded: none
    int64_t offset;
    const int32_t* offsets = nullptr;    // (batch,), in place of offset
    const int32_t* seqlens_k = nullptr;  // (batch,)
    // Packed sequences, one after the other along seqlen: where each begins, (batch + 1,). seqlen_q
    // and seqlen_k are those of the longest.
    const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
    // Paged cache: k and v are (pages, heads_kv, page_size, head_dim); page n of sequence b is
    // block_table[b * block_table_stride + n].
    const int32_t* block_table = nullptr;
    int64_t block_table_stride = 0, page_size = 0;
    const uint8_t* mask = nullptr;
    Strides4 mask_strides{};
    const void* bias = nullptr;
    DType bias_dtype = DType::float32;
    Strides4 bias_strides{};
    const float* alibi_slopes = nullptr;
    std::array<int64_t, 2> alibi_strides{};  // (batch, heads)
    const float* sinks = nullptr;            // (heads,)
    Dropout dropout{0, 1.0f, 0};
    bool deterministic = false;            // also across thread counts
    std::array<int64_t, 2> lse_strides{};  // (batch, heads) of lse, dlse and delta
};

struct AttentionFwdArgs : AttentionArgs {
    void* out;
    Strides3 out_strides;
    float* lse;  // or null
};

struct AttentionBwdArgs : AttentionArgs {
    const void *out, *dout;
    Strides3 out_strides, dout_strides;
    const float* lse;
    const float* dlse = nullptr;
    float* delta;  // written: rowsum(dout * out) - dlse
    void *dq, *dk, *dv;
    Strides3 dq_strides, dk_strides, dv_strides;
    float* dbias = nullptr;  // contiguous in the bias's own shape; on entry zeros, but where each
                             // element belongs to one score, and all are visible
    Strides4 dbias_strides{};
};

}  // namespace fastattn
