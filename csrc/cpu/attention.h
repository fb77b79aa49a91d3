// Arguments of the attention kernels. Strides count elements; the last dim's is 1 except where
// given.
#pragma once

#include <array>
#include <cstdint>
#include <limits>

#include "cpu/dropout.h"
#include "cpu/dtype.h"

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
    const uint8_t* mask = nullptr;
    Strides4 mask_strides{};
    const void* bias = nullptr;
    DType bias_dtype = DType::float32;
    Strides4 bias_strides{};
    const float* alibi_slopes = nullptr;
    std::array<int64_t, 2> alibi_strides{};  // (batch, heads)
    const float* sinks = nullptr;            // (heads,)
    Dropout dropout{0, 1.0f, 0};
    bool deterministic = false;  // also across thread counts
};

struct AttentionFwdArgs : AttentionArgs {
    void* out;
    Strides3 out_strides;
    float* lse;  // (batch, heads, seqlen_q), contiguous
};

struct AttentionBwdArgs : AttentionArgs {
    const void *out, *dout;
    Strides3 out_strides, dout_strides;
    const float* lse;             // (batch, heads, seqlen_q), contiguous, as delta
    const float* dlse = nullptr;  // likewise
    float* delta;                 // written: rowsum(dout * out) - dlse
    void *dq, *dk, *dv;
    Strides3 dq_strides, dk_strides, dv_strides;
    float* dbias = nullptr;  // contiguous in the bias's own shape, zeros on entry
    Strides4 dbias_strides{};
    int64_t dbias_size = 0;
};

}  // namespace fastattn
