// The gradients of attention for sm_90a, as FlashAttention-3's backward (Shah et al. 2024, arXiv
// 2407.08608): dq, dk, dv from q, k, v, dout, lse, delta, of head_dim 64 and 128; 256 is in
// attention_backward_wide_sm90.cu.
//
// A block owns 128 keys of one head of k and v, and walks the blocks of queries that see them, of
// one after the other of the heads that share it. Its two consumer warpgroups own 64 keys each:
// their scores are transposed, (keys, queries), so that p and ds go from registers into the
// products of dv and dk, which stay in registers. Only dq needs ds of both: it goes through shared
// memory, and what the copy engine adds to a float32 scratch comes from there. Of the producer
// warpgroup one warp copies q and dout, one lse and delta, one hands dq on. 10 * head_dim flops a
// score.
#include "cuda/attention_backward_sm90.cuh"

namespace fastattn::cuda {
namespace {

// head_dim is at least the call's head_dim and head_dim_v; copies fill up with zeros.
template <class Element, int head_dim, int block_m>
struct Config {
    using T = Element;
    static constexpr int kHeadDim = head_dim, kBlockM = block_m, kBlockN = 64 * kConsumers;
    static constexpr int kStages = 2;
    // Of dq, consumers have 64 rows each where there are 128, else 64 columns each.
    static constexpr bool kDqByRows = block_m == 128;
    static_assert(kDqByRows ? head_dim == 64 : head_dim == 128);
};

// A block's tiles in shared memory, in panels of 64 columns, and its barriers. A stage is empty
// when all warps of the consumers have read its queries.
template <class C>
struct Shared {
    using Weights = Tile<C::kBlockN, C::kBlockM>;
    static constexpr int kBytesK = C::kBlockN * C::kHeadDim * 2;
    static constexpr int kBytesQ = C::kBlockM * C::kHeadDim * 2, kBytesDq = 2 * kBytesQ;
    static constexpr int kStatistics = 2 * 4 * C::kBlockM;
    static constexpr int kQAt = 2 * kBytesK, kDsAt = kQAt + C::kStages * 2 * kBytesQ;
    static constexpr int kDqAt = kDsAt + 2 * Weights::kBytes, kStatisticsAt = kDqAt + kBytesDq;
    static constexpr int kBarriersAt = kStatisticsAt + C::kStages * kStatistics;
    static constexpr int kBytes = kBarriersAt + 8 * (3 + 4 * C::kStages);
    static_assert(kBytes <= 227 * 1024);

    SharedAddress base;

    FASTATTN_DEVICE SharedAddress k() const { return base; }            // (kBlockN, kHeadDim)
    FASTATTN_DEVICE SharedAddress v() const { return base + kBytesK; }  // (kBlockN, kHeadDim)
    FASTATTN_DEVICE SharedAddress q(int stage) const {                  // (kBlockM, kHeadDim)
        return base + kQAt + stage * 2 * kBytesQ;
    }
    FASTATTN_DEVICE SharedAddress dout(int stage) const {  // (kBlockM, kHeadDim)
        return q(stage) + kBytesQ;
    }
    // ds of this step and of the one before, transposed: (kBlockN, kBlockM).
    FASTATTN_DEVICE Weights ds(int parity) const {
        return {base + kDsAt + parity * Weights::kBytes};
    }
    // (kBlockM, kHeadDim), float32, as DqSum has it.
    FASTATTN_DEVICE SharedAddress dq() const { return base + kDqAt; }
    // lse in units of log2, then delta: (kBlockM,) each.
    FASTATTN_DEVICE SharedAddress lse(int stage) const {
        return base + kStatisticsAt + stage * kStatistics;
    }
    FASTATTN_DEVICE SharedAddress delta(int stage) const { return lse(stage) + 4 * C::kBlockM; }

    FASTATTN_DEVICE SharedAddress kv_full() const { return base + kBarriersAt; }
    FASTATTN_DEVICE SharedAddress dq_full() const { return kv_full() + 8; }
    FASTATTN_DEVICE SharedAddress dq_empty() const { return kv_full() + 16; }
    FASTATTN_DEVICE SharedAddress q_full(int stage) const { return kv_full() + 24 + 32 * stage; }
    FASTATTN_DEVICE SharedAddress dout_full(int stage) const { return q_full(stage) + 8; }
    FASTATTN_DEVICE SharedAddress statistics_full(int stage) const { return q_full(stage) + 16; }
    FASTATTN_DEVICE SharedAddress q_empty(int stage) const { return q_full(stage) + 24; }

    FASTATTN_DEVICE void init_barriers() const {
        mbarrier_init(kv_full(), 2);
        mbarrier_init(dq_full(), 4 * kConsumers);
        mbarrier_init(dq_empty(), 1);
        for (int stage = 0; stage < C::kStages; ++stage) {
            mbarrier_init(q_full(stage), 1);
            mbarrier_init(dout_full(stage), 1);
            mbarrier_init(statistics_full(stage), 1);
            mbarrier_init(q_empty(stage), 4 * kConsumers);
        }
        fence_mbarrier_init();
    }
};

// One thread copies the keys and values, then queries and the gradients of their results.
template <class C>
FASTATTN_DEVICE void copy_operands(const AttentionArgs& a, const Own& own, Shared<C> shared,
                                   const Maps& maps) {
    if (own.rows.begin >= own.rows.end) return;
    copy_keys<C>(a, own, shared, maps);
    const int batch_q = a.cu_seqlens_q ? 0 : own.batch;
    each_step<C>(a, own, [&](int head, int first_row, int stage, uint32_t parity) {
        const int row = int(own.sequence.start_q) + first_row;
        mbarrier_wait(shared.q_empty(stage), parity ^ 1);
        copy_tile<C::kBlockM, C::kHeadDim>(shared.q(stage), &maps.q, shared.q_full(stage), row,
                                           head, batch_q);
        copy_tile<C::kBlockM, C::kHeadDim>(shared.dout(stage), &maps.dout, shared.dout_full(stage),
                                           row, head, batch_q);
    });
}

// One thread has the copy engine add each block of dq to the scratch.
template <class C>
FASTATTN_DEVICE void add_dq(const AttentionBwdArgs& a, const Own& own, Shared<C> shared,
                            const DqSum& dq_sum) {
    uint32_t parity = 0;
    each_step<C>(a, own, [&](int head, int first_row, int, uint32_t) {
        const int64_t row = dq_sum.first_row(a, own.sequence, own.batch, head) + first_row;
        mbarrier_wait(shared.dq_full(), parity);
        bulk_reduce_add(dq_sum.sum + row * C::kHeadDim, shared.dq(), Shared<C>::kBytesDq);
        bulk_commit();
        bulk_wait_read<0>();
        mbarrier_arrive(shared.dq_empty());
        parity ^= 1;
    });
    bulk_wait<0>();
}

// What a consumer does: its 64 keys with every block of queries.
template <class C>
FASTATTN_DEVICE void consume(const AttentionBwdArgs& a, const Own& own, Shared<C> shared,
                             int consumer) {
    using T = typename C::T;
    constexpr int kBlockM = C::kBlockM, kHeadDim = C::kHeadDim;
    const Sequence& s = own.sequence;
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const int key = own.first_key + 64 * consumer + 16 * warp + lane / 4;
    const SharedAddress k_rows = shared.k() + consumer * 64 * 128;
    const SharedAddress v_rows = shared.v() + consumer * 64 * 128;

    float dk[kHeadDim / 8][4] = {}, dv[kHeadDim / 8][4] = {};  // (64, kHeadDim)
    const int keys = s.seqlen_k - own.first_key;
    if (own.rows.begin < own.rows.end) {
        mbarrier_wait(shared.kv_full(), 0);
        if ((a.cu_seqlens_k || a.seqlens_k) && keys < C::kBlockN) {
            clear<C::kBlockN, kHeadDim>(shared.k(), keys);
            clear<C::kBlockN, kHeadDim>(shared.v(), keys);
            consumers_meet();
        }
    }
    uint32_t step = 0;
    each_step<C>(a, own, [&](int, int first_row, int stage, uint32_t parity) {
        const SharedAddress q = shared.q(stage), dout = shared.dout(stage);
        float scores[kBlockM / 8][4], dp[kBlockM / 8][4];  // (64, kBlockM)
        uint32_t p[kBlockM / 16][4], ds[kBlockM / 16][4];  // (64, kBlockM)
        mbarrier_wait(shared.q_full(stage), parity);
        if (a.cu_seqlens_q && s.seqlen_q - first_row < kBlockM) {
            mbarrier_wait(shared.dout_full(stage), parity);
            clear<kBlockM, kHeadDim>(q, s.seqlen_q - first_row);
            clear<kBlockM, kHeadDim>(dout, s.seqlen_q - first_row);
            consumers_meet();
        }
        wgmma_fence();
        multiply_rows_of<T, C::kBlockN, kHeadDim>(scores, k_rows, q);
        mbarrier_wait(shared.dout_full(stage), parity);
        wgmma_fence();
        multiply_rows_of<T, C::kBlockN, kHeadDim>(dp, v_rows, dout);
        mbarrier_wait(shared.statistics_full(stage), parity);
        wgmma_wait<1>();
        wgmma_landed(flat(scores));
        const SharedAddress lse = shared.lse(stage) + lane % 4 * 8;
        const int row = first_row + lane % 4 * 2;
        if (first_row >= own.rows_of_all.begin && first_row + kBlockM <= own.rows_of_all.end)
            weights<kBlockM / 8, false>(a, s, scores, lse, key, row);
        else
            weights<kBlockM / 8, true>(a, s, scores, lse, key, row);
#pragma unroll
        for (int i = 0; i < kBlockM / 16; ++i) weights_fragment<T>(p[i], scores, i);
        wgmma_fence();
        add_weighted_rows<T>(dv, p, dout);

        wgmma_wait<1>();
        wgmma_landed(flat(dp));
#pragma unroll
        for (int j = 0; j < kBlockM / 8; ++j) {
            const float2 delta = ld_shared<float2>(shared.delta(stage) + lane % 4 * 8 + 32 * j);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                dp[j][i] = scores[j][i] * (dp[j][i] - (i % 2 ? delta.y : delta.x));
        }
        const auto ds_tile = shared.ds(step % 2);
#pragma unroll
        for (int i = 0; i < kBlockM / 16; ++i) {
            weights_fragment<T>(ds[i], dp, i);
            stmatrix_x4(ds_tile.lane_at(lane % 16, lane / 16, 64 * consumer + 16 * warp, 2 * i),
                        ds[i]);
        }
        consumers_meet();
        float dq[8][4];
        wgmma_fence();
        const int own_part = consumer * (C::kBlockN * 128);  // rows or columns of this consumer
        multiply_keys<C>(dq, ds_tile.base + (C::kDqByRows ? own_part : 0),
                         shared.k() + (C::kDqByRows ? 0 : own_part));
        wgmma_fence();
        add_weighted_rows<T>(dk, ds, q);

        mbarrier_wait(shared.dq_empty(), step % 2 ^ 1);
        wgmma_wait<1>();
        wgmma_landed(flat(dq));
        const int dq_row = (C::kDqByRows ? 64 * consumer : 0) + 16 * warp;
        const int dq_column = C::kDqByRows ? 0 : 64 * consumer;
        store_dq<kHeadDim>(shared.dq(), dq, dq_row, dq_column, lane);
        fence_proxy_async();
        warp_sync();
        if (lane == 0) mbarrier_arrive(shared.dq_full());
        wgmma_wait<0>();
        wgmma_landed(flat(dv));
        wgmma_landed(flat(dk));
        if (lane == 0) mbarrier_arrive(shared.q_empty(stage));
        ++step;
    });

    multiply_rows(dk, {a.softmax_scale, a.softmax_scale});
    write_keys<T>(a, own, dk, a.dk, a.dk_strides, key, 0, a.head_dim);
    write_keys<T>(a, own, dv, a.dv, a.dv_strides, key, 0, a.head_dim_v);
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    attention_bwd_kernel(const __grid_constant__ AttentionBwdArgs a, const DqSum dq_sum,
                         const __grid_constant__ Maps maps) {
    const Shared<C> shared{dynamic_shared()};
    const Own own = own_keys<C>(a, blockIdx.x);
    if (own.rows_k <= 0) return;
    if (threadIdx.x == 0) shared.init_barriers();
    barrier();
    // The same in a warp, which the compiler does not know of threadIdx.
    const int warpgroup = shuffle(int(threadIdx.x / kWarpgroup), 0);
    if (warpgroup == 0) {
        registers_down<kProducerRegisters>();
        const int warp = shuffle(int(threadIdx.x / 32), 0);
        // Worked out anew, or its registers would be those that consumers keep it in.
        const Own own = own_keys<C>(a, opaque(blockIdx.x));
        if (threadIdx.x == 0) copy_operands<C>(a, own, shared, maps);
        if (warp == 1) copy_statistics<C>(a, own, shared);
        if (threadIdx.x == 64) add_dq<C>(a, own, shared, dq_sum);
    } else {
        registers_up<kConsumerRegisters>();
        consume<C>(a, own, shared, warpgroup - 1);
    }
}

template <class C>
void launch_head_dim(const AttentionBwdArgs& a) {
    launch_bwd<C>(a, attention_bwd_kernel<C>, Shared<C>::kBytes);
}

template <class T>
void launch_dtype(const AttentionBwdArgs& a) {
    if (padded_head_dim(a) == 64) return launch_head_dim<Config<T, 64, 128>>(a);
    launch_head_dim<Config<T, 128, 64>>(a);
}

}  // namespace

bool attention_bwd_sm90_takes(const AttentionBwdArgs& a) {
    const int head_dim = padded_head_dim(a);
    const auto of_queries = [&](const Strides& strides) {
        return mappable(strides, a.batch, a.heads, a.seqlen_q, a.cu_seqlens_q, a.total_q);
    };
    const auto of_keys = [&](const Strides& strides) {
        return mappable(strides, a.batch, a.heads_kv, a.seqlen_k, a.cu_seqlens_k, a.total_k);
    };
    return current_device().capability == 90 &&
           (head_dim == 64 || head_dim == 128 || head_dim == 256) && a.softcap == 0.0f &&
           !a.alibi_slopes && !a.seed && !a.deterministic && of_queries(a.q_strides) &&
           of_queries(a.dout_strides) && of_keys(a.k_strides) && of_keys(a.v_strides);
}

void attention_bwd_sm90(const AttentionBwdArgs& a) {
    if (padded_head_dim(a) == 256) return attention_bwd_wide_sm90(a);
    a.bfloat16 ? launch_dtype<bfloat16>(a) : launch_dtype<float16>(a);
}

}  // namespace fastattn::cuda
