// What the gradients of attention for sm_90a share: of blocks that own keys and walk the blocks of
// queries that see them, whose consumers have scores transposed, (keys, queries). A kernel's C says
// kBlockM queries, kBlockN keys, kHeadDim columns, and how many kStages of queries there are.
#pragma once

#include <algorithm>

#include "cuda/attention_dq.cuh"
#include "cuda/attention_sm90.cuh"
#include "cuda/attention_softmax.cuh"
#include "cuda/launch.cuh"

namespace fastattn::cuda {

constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumersBarrier = 1;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// The keys that a block owns, and the queries that see them.
struct Own {
    int batch, head_kv, first_key, rows_k;  // rows_k: from first_key on, of dk and dv
    Sequence sequence;
    Range rows, rows_of_all;  // of the queries that see some key, and each
};

template <class C>
FASTATTN_DEVICE Own own_keys(const AttentionArgs& a, unsigned block) {
    const unsigned blocks = (a.seqlen_k + C::kBlockN - 1) / C::kBlockN;
    Own own;
    own.head_kv = block / blocks % a.heads_kv, own.batch = block / blocks / a.heads_kv;
    own.first_key = block % blocks * C::kBlockN;
    const Sequence s = sequence_of(a, own.batch);
    own.sequence = s;
    // Keys behind a sequence's length get zeros, unless packed.
    own.rows_k = (a.cu_seqlens_k ? s.seqlen_k : a.seqlen_k) - own.first_key;
    const int last_key = min(own.first_key + C::kBlockN, s.seqlen_k) - 1;
    own.rows = queries_seeing(a, s, own.first_key, last_key);
    if (own.first_key > last_key || own.rows.begin >= own.rows.end) own.rows = {0, 0};
    own.rows.begin = own.rows.begin / C::kBlockM * C::kBlockM;
    own.rows_of_all = queries_seeing_all(a, s, own.first_key, last_key);
    if (last_key < own.first_key + C::kBlockN - 1) own.rows_of_all = {0, 0};
    return own;
}

// Calls f(head, first_row, stage, parity) for each block of queries, in the order that all keep;
// parity is that of the stage's phase.
template <class C, class F>
FASTATTN_DEVICE void each_step(const AttentionArgs& a, const Own& own, F f) {
    const int group_size = a.heads / a.heads_kv;
    int stage = 0;
    uint32_t parity = 0;
    for (int head = own.head_kv * group_size; head < (own.head_kv + 1) * group_size; ++head)
#pragma unroll 1
        for (int row = own.rows.begin; row < own.rows.end; row += C::kBlockM) {
            f(head, row, stage, parity);
            if (++stage == C::kStages) stage = 0, parity ^= 1;
        }
}

struct Maps {
    TensorMap q, k, v, dout;
};

// One thread copies the block's keys and values.
template <class C, class Shared>
FASTATTN_DEVICE void copy_keys(const AttentionArgs& a, const Own& own, const Shared& shared,
                               const Maps& maps) {
    const int key = int(own.sequence.start_k) + own.first_key;
    const int batch = a.cu_seqlens_k ? 0 : own.batch;
    copy_tile<C::kBlockN, C::kHeadDim>(shared.k(), &maps.k, shared.kv_full(), key, own.head_kv,
                                       batch);
    copy_tile<C::kBlockN, C::kHeadDim>(shared.v(), &maps.v, shared.kv_full(), key, own.head_kv,
                                       batch);
}

// A warp copies lse and delta. Weights are 0 where lse is +inf: in rows that see no key, and
// outside.
template <class C, class Shared>
FASTATTN_DEVICE void copy_statistics(const AttentionBwdArgs& a, const Own& own,
                                     const Shared& shared) {
    each_step<C>(a, own, [&](int head, int first_row, int stage, uint32_t parity) {
        // Addresses follow from the lane anew each time, or they would take too many registers.
        const int lane = opaque(threadIdx.x % 32);
        const int64_t at = (a.cu_seqlens_q ? 0 : own.batch * a.lse_batch_stride) +
                           head * a.lse_head_stride + own.sequence.start_q + first_row + lane;
        const float *row_lse = a.lse + at, *row_delta = a.delta + at;
        const int rows = own.sequence.seqlen_q - first_row - lane;
        mbarrier_wait(shared.q_empty(stage), parity ^ 1);
        const SharedAddress to = shared.lse(stage) + 4 * lane;
#pragma unroll 1
        for (int i = 0; i < C::kBlockM; i += 32) {
            float lse = INFINITY, delta = 0.0f;
            if (i < rows) {
                lse = ld_readonly(row_lse + i) * kLog2E, delta = ld_readonly(row_delta + i);
                if (lse == -INFINITY) lse = INFINITY;
            }
            st_shared(to + 4 * i, lse);
            st_shared(to + 4 * (C::kBlockM + i), delta);
        }
        warp_sync();
        if (lane == 0) mbarrier_arrive(shared.statistics_full(stage));
    });
}

// This consumer's share of clear_rows, before any of them reads the tile; then all meet.
template <int kRows, int kColumns>
FASTATTN_DEVICE void clear(SharedAddress tile, int row) {
    clear_rows<kRows, kColumns>(tile, row, threadIdx.x - kWarpgroup, kConsumers * kWarpgroup);
}
FASTATTN_DEVICE void consumers_meet() {
    fence_proxy_async();
    barrier_sync(kConsumersBarrier, kConsumers * kWarpgroup);
}

// Products, transposed, to weights; `key` and `row` are those of element 0.
template <int kTiles, bool kBoundary>
FASTATTN_DEVICE void weights(const AttentionArgs& a, const Sequence& s, float (&scores)[kTiles][4],
                             SharedAddress lse, int key, int row) {
    const float factor = a.softmax_scale * kLog2E;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        const float2 row_lse = ld_shared<float2>(lse + 32 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float weight =
                exp2_approx(scores[j][i] * factor - (i % 2 ? row_lse.y : row_lse.x));
            const bool hidden = kBoundary && !visible(a, s, row + 8 * j + i % 2, key + 4 * (i & 2));
            scores[j][i] = hidden ? 0.0f : weight;
        }
    }
}

// dq (64, 64) = ds^T (64, kBlockN) k (kBlockN, 64), each from the panel on, asynchronously.
template <class C>
FASTATTN_DEVICE void multiply_keys(float (&dq)[8][4], SharedAddress ds, SharedAddress k) {
    const uint64_t a = wgmma_operand(ds), b = wgmma_operand(k);
#pragma unroll
    for (int step = 0; step < C::kBlockN / 16; ++step)
        wgmma<typename C::T, 64, true, true>(flat(dq), advanced(a, step * 2048),
                                             advanced(b, step * 2048), step > 0);
    wgmma_commit();
}
// A warp's 16 rows of dq, to (row, column) of a tile of kColumns, float32, as DqSum has it.
template <int kColumns>
FASTATTN_DEVICE void store_dq(SharedAddress tile, const float (&dq)[8][4], int row, int column,
                              int lane) {
    const SharedAddress to = tile + 4 * (DqSum::tile<kColumns>(row, column) + lane);
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            st_shared(to + 4 * (DqSum::tile<kColumns>(4 * (i & 2), 8 * j) + i % 2 * 32), dq[j][i]);
}

// Writes a consumer's accumulators of dk or dv, of keys from `key` on (this lane's first) and of
// columns from `column` on.
template <class T, int kTiles>
FASTATTN_DEVICE void write_keys(const AttentionArgs& a, const Own& own,
                                const float (&acc)[kTiles][4], void* to, const Strides& strides,
                                int key, int column, int columns) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = key + 8 * half;
        T* const to_row =
            static_cast<T*>(to) +
            row_offset(strides, a.cu_seqlens_k, own.batch, own.head_kv, own.sequence.start_k, row) +
            column;
        write_row(acc, half, to_row, row < own.first_key + own.rows_k, columns - column);
    }
}

// Host.
template <class C, class Kernel>
void launch_bwd(const AttentionBwdArgs& a, Kernel kernel, int shared_bytes) {
    using T = typename C::T;
    const DqSum dq_sum = dq_sum_of(a, C::kHeadDim);
    const int64_t blocks =
        int64_t((a.seqlen_k + C::kBlockN - 1) / C::kBlockN) * a.heads_kv * a.batch;
    const auto of_queries = [&](const void* tensor, const Strides& strides, int head_dim) {
        return map_of<T>(tensor, strides, a.batch, a.heads, a.seqlen_q, head_dim, a.cu_seqlens_q,
                         a.total_q, C::kBlockM);
    };
    const auto of_keys = [&](const void* tensor, const Strides& strides, int head_dim) {
        return map_of<T>(tensor, strides, a.batch, a.heads_kv, a.seqlen_k, head_dim, a.cu_seqlens_k,
                         a.total_k, C::kBlockN);
    };
    const Maps maps{of_queries(a.q, a.q_strides, a.head_dim), of_keys(a.k, a.k_strides, a.head_dim),
                    of_keys(a.v, a.v_strides, a.head_dim_v),
                    of_queries(a.dout, a.dout_strides, a.head_dim_v)};
    if (blocks) launch(kernel, grid_of(blocks), kThreads, shared_bytes, a.stream, a, dq_sum, maps);
    attention_dq(a, dq_sum);
}

// The kernel for head_dim 256.
void attention_bwd_wide_sm90(const AttentionBwdArgs& args);

}  // namespace fastattn::cuda
