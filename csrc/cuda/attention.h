// Arguments of the CUDA attention kernels, which take them by value. Strides count elements; the
// last dim's is 1. All pointers are to the device's memory.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// Beyond any sequence; sums of a position, an offset and a bound stay below 2^31.
constexpr int kUnbounded = 1 << 28;

// (batch, heads, seqlen, head_dim), the first three dims' strides.
struct Strides {
    int64_t batch, head, row;
};

struct AttentionArgs {
    bool bfloat16;  // else float16
    int batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
    const void *q, *k, *v;
    Strides q_strides, k_strides, v_strides;

    float softmax_scale;
    float softcap;                  // 0: none
    int window_left, window_right;  // kUnbounded: none
    int offset;
    const int32_t* offsets;    // (batch,), in place of offset; or null, as all below
    const int32_t* seqlens_k;  // (batch,)
    // Packed sequences, one after the other along seqlen: where each begins, (batch + 1,). seqlen_q
    // and seqlen_k are those of the longest.
    const int32_t *cu_seqlens_q, *cu_seqlens_k;
    int total_q, total_k;  // rows of all packed sequences
    // Paged cache: k and v are (pages, heads_kv, page_size, head_dim) by their strides; page n of
    // sequence b is block_table[b * block_table_stride + n].
    const int32_t* block_table;
    int64_t block_table_stride;
    int page_size;
    const float* alibi_slopes;
    int64_t alibi_batch_stride, alibi_head_stride;
    const float* sinks;  // (heads,)
    // Dropout: kept where the word of the Philox stream is at least `threshold`, times keep_scale.
    const uint64_t* seed;
    uint32_t threshold;
    float keep_scale;
    int64_t lse_batch_stride, lse_head_stride;  // of lse, dlse and delta
    void* stream;
};

struct AttentionFwdArgs : AttentionArgs {
    void* out;
    Strides out_strides;
    float* lse;  // or null
    // What attention_splits gives, and with more than one the scratch for it: float32, contiguous,
    // (splits, batch, heads, seqlen_q, head_dim_v) and (splits, batch, heads, seqlen_q), seqlen_q
    // that of the longest sequence. Else null.
    int splits;
    float *partial_out, *partial_lse;
};

struct AttentionBwdArgs : AttentionArgs {
    const void *out, *dout;
    Strides out_strides, dout_strides;
    const float *lse, *dlse;  // dlse or null
    float* delta;             // written: rowsum(dout * out) - dlse
    void *dq, *dk, *dv;
    Strides dq_strides, dk_strides, dv_strides;
    // Scratch, float32: where dq is summed before it is rounded, zeros on entry; of as many floats
    // as attention_dq_sum says. Null where the kernel needs none.
    float* dq_sum;
    bool deterministic;
};

// On the current device. q, k, v, out and their gradients begin at multiples of 16 bytes, their
// strides are multiples of 8 elements, as are head_dim and head_dim_v, up to 256; softmax_scale is
// positive. Rows of packed tensors that belong to no sequence are left as they are.
void attention_fwd(const AttentionFwdArgs& args);
void attention_bwd(const AttentionBwdArgs& args);

// Into how many parts the forward splits the keys, lest processors of the current device idle; 1 is
// always allowed, and sums in an order that depends on neither the device nor the batch.
int attention_splits(const AttentionArgs& args);

// Floats of dq_sum that attention_bwd wants.
int64_t attention_dq_sum(const AttentionArgs& args, bool deterministic);

// The kernels for one architecture; the functions above choose.
void attention_fwd_sm80(const AttentionFwdArgs& args);
void attention_decode_sm80(const AttentionFwdArgs& args);
void attention_bwd_sm80(const AttentionBwdArgs& args);
bool attention_fwd_sm90_takes(const AttentionFwdArgs& args);
void attention_fwd_sm90(const AttentionFwdArgs& args);
bool attention_bwd_sm90_takes(const AttentionBwdArgs& args);
void attention_bwd_sm90(const AttentionBwdArgs& args);

}  // namespace fastattn::cuda
