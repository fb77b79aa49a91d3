// The scratch in which blocks of keys sum dq, in float32.
#pragma once

#include "cuda/attention_scores.cuh"

namespace fastattn::cuda {

// For each head, the rows of each sequence, filled up to a multiple of kRows, of kHeadDim columns,
// in tiles of (8, 8): first the even columns of 8 rows, then the odd ones. So what one instruction
// of a warp adds, one element of mma_m16n8k16's result for each lane, is 128 consecutive bytes, and
// 8 whole rows are consecutive, too.
// With `deterministic`, integers follow: for kTurnRows rows each how many blocks have added to
// them, and at last how many blocks have begun.
struct DqSum {
    static constexpr int kRows = 128, kTurnRows = 32;

    float* sum;
    int64_t rows;  // of one head
    int head_dim;  // of the scratch: padded
    int *turns, *begun;

    // A sequence's first row. Packed ones take up to kRows - 1 more rows than they have, each.
    FASTATTN_DEVICE int64_t first_row(const AttentionArgs& a, const Sequence& s, int batch,
                                      int head) const {
        const int64_t block = a.cu_seqlens_q ? s.start_q / kRows + batch
                                             : int64_t(batch) * ((a.seqlen_q + kRows - 1) / kRows);
        return head * rows + block * kRows;
    }

    // From the begin of a head_dim of kHeadDim to the tile of an element.
    template <int kHeadDim>
    static FASTATTN_DEVICE int tile(int row, int column) {
        return (row / 8 * (kHeadDim / 8) + column / 8) * 64;
    }
};

// Host. What kernels pad head_dim and head_dim_v to.
inline int padded_head_dim(const AttentionArgs& a) {
    for (int padded : {32, 64, 96, 128, 192})
        if (a.head_dim <= padded && a.head_dim_v <= padded) return padded;
    return 256;
}

inline int64_t dq_rows(const AttentionArgs& a) {
    const int64_t blocks =
        a.cu_seqlens_q ? int64_t(a.total_q) / DqSum::kRows + a.batch
                       : int64_t(a.batch) * ((a.seqlen_q + DqSum::kRows - 1) / DqSum::kRows);
    return blocks * DqSum::kRows;
}
inline int64_t dq_sum_floats(const AttentionArgs& a, int head_dim, bool deterministic) {
    const int64_t rows = a.heads * dq_rows(a);
    return rows * head_dim + (deterministic ? rows / DqSum::kTurnRows + 1 : 0);
}
inline DqSum dq_sum_of(const AttentionBwdArgs& a, int head_dim) {
    const int64_t rows = a.heads * dq_rows(a);
    int* const turns = reinterpret_cast<int*>(a.dq_sum + rows * head_dim);
    return {a.dq_sum, dq_rows(a), head_dim, turns, turns + rows / DqSum::kTurnRows};
}

// delta, before the gradients; dq from its sum, after them.
void attention_delta(const AttentionBwdArgs& a);
void attention_dq(const AttentionBwdArgs& a, const DqSum& dq_sum);

}  // namespace fastattn::cuda
