// The gradients of attention for sm_90a, of head_dim 256: as attention_backward_sm90.cu, but for
// how its two consumer warpgroups share the work. Gradients of 64 keys, (64, 256) in float32, fill
// the registers of both, so a block owns no more keys than that, and each consumer has 128 columns
// of dk, dv and dq. Of the scores of a block of queries each works out those of half of the
// queries; all of p and ds go through shared memory. Dq is handed on 64 columns at a time. The
// gradients of results have no second stage, for which there is no room: they come while dq and dk
// are worked out. The sizes are about those of FlashAttention-3 (Shah et al. 2024, arXiv
// 2407.08608).
#include "cuda/attention_backward_sm90.cuh"

namespace fastattn::cuda {
namespace {

template <class Element>
struct Config {
    using T = Element;
    static constexpr int kHeadDim = 256, kBlockM = 64, kBlockN = 64, kStages = 2;
    static constexpr int kColumns = kHeadDim / kConsumers, kQueries = kBlockM / kConsumers;
};

// A block's tiles in shared memory, in panels of 64 columns, and its barriers. Tiles are empty when
// all warps of the consumers have read them.
template <class C>
struct Shared {
    using Weights = Tile<C::kBlockN, C::kBlockM>;
    static constexpr int kBytesK = C::kBlockN * C::kHeadDim * 2;
    static constexpr int kBytesQ = C::kBlockM * C::kHeadDim * 2, kBytesDq = 4 * C::kBlockM * kPanel;
    static constexpr int kStatistics = 2 * 4 * C::kBlockM;
    static constexpr int kQAt = 2 * kBytesK, kDoutAt = kQAt + C::kStages * kBytesQ;
    static constexpr int kWeightsAt = kDoutAt + kBytesQ, kDqAt = kWeightsAt + 4 * Weights::kBytes;
    static constexpr int kStatisticsAt = kDqAt + kConsumers * kBytesDq;
    static constexpr int kBarriersAt = kStatisticsAt + C::kStages * kStatistics;
    static constexpr int kBytes = kBarriersAt + 8 * (3 + 2 * kConsumers + 3 * C::kStages);
    static_assert(kBytes <= 227 * 1024);

    SharedAddress base;

    FASTATTN_DEVICE SharedAddress k() const { return base; }            // (kBlockN, kHeadDim)
    FASTATTN_DEVICE SharedAddress v() const { return base + kBytesK; }  // (kBlockN, kHeadDim)
    FASTATTN_DEVICE SharedAddress q(int stage) const {                  // (kBlockM, kHeadDim)
        return base + kQAt + stage * kBytesQ;
    }
    FASTATTN_DEVICE SharedAddress dout() const { return base + kDoutAt; }  // (kBlockM, kHeadDim)
    // Of this step and of the one before, transposed: (kBlockN, kBlockM).
    FASTATTN_DEVICE Weights p(int parity) const {
        return {base + kWeightsAt + parity * 2 * Weights::kBytes};
    }
    FASTATTN_DEVICE Weights ds(int parity) const { return {p(parity).base + Weights::kBytes}; }
    // 64 columns of a consumer's: (kBlockM, 64), float32, as DqSum has it.
    FASTATTN_DEVICE SharedAddress dq(int consumer) const {
        return base + kDqAt + consumer * kBytesDq;
    }
    // lse in units of log2, then delta: (kBlockM,) each.
    FASTATTN_DEVICE SharedAddress lse(int stage) const {
        return base + kStatisticsAt + stage * kStatistics;
    }
    FASTATTN_DEVICE SharedAddress delta(int stage) const { return lse(stage) + 4 * C::kBlockM; }

    FASTATTN_DEVICE SharedAddress kv_full() const { return base + kBarriersAt; }
    FASTATTN_DEVICE SharedAddress dout_full() const { return kv_full() + 8; }
    FASTATTN_DEVICE SharedAddress dout_empty() const { return kv_full() + 16; }
    FASTATTN_DEVICE SharedAddress dq_full(int consumer) const {
        return kv_full() + 24 + 16 * consumer;
    }
    FASTATTN_DEVICE SharedAddress dq_empty(int consumer) const { return dq_full(consumer) + 8; }
    FASTATTN_DEVICE SharedAddress q_full(int stage) const {
        return kv_full() + 24 + 16 * kConsumers + 24 * stage;
    }
    FASTATTN_DEVICE SharedAddress statistics_full(int stage) const { return q_full(stage) + 8; }
    FASTATTN_DEVICE SharedAddress q_empty(int stage) const { return q_full(stage) + 16; }

    FASTATTN_DEVICE void init_barriers() const {
        mbarrier_init(kv_full(), 2);
        mbarrier_init(dout_full(), 1);
        mbarrier_init(dout_empty(), 4 * kConsumers);
        for (int consumer = 0; consumer < kConsumers; ++consumer) {
            mbarrier_init(dq_full(consumer), 4);
            mbarrier_init(dq_empty(consumer), 1);
        }
        for (int stage = 0; stage < C::kStages; ++stage) {
            mbarrier_init(q_full(stage), 1);
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
    uint32_t dout_parity = 1;
    each_step<C>(a, own, [&](int head, int first_row, int stage, uint32_t parity) {
        const int row = int(own.sequence.start_q) + first_row;
        mbarrier_wait(shared.q_empty(stage), parity ^ 1);
        copy_tile<C::kBlockM, C::kHeadDim>(shared.q(stage), &maps.q, shared.q_full(stage), row,
                                           head, batch_q);
        mbarrier_wait(shared.dout_empty(), dout_parity);
        copy_tile<C::kBlockM, C::kHeadDim>(shared.dout(), &maps.dout, shared.dout_full(), row, head,
                                           batch_q);
        dout_parity ^= 1;
    });
}

// One thread has the copy engine add a consumer's columns of each block of dq to the scratch, where
// 8 rows of them are consecutive.
template <class C>
FASTATTN_DEVICE void add_dq(const AttentionBwdArgs& a, const Own& own, Shared<C> shared,
                            const DqSum& dq_sum, int consumer) {
    constexpr int kBytes = 4 * 8 * kPanel;
    each_step<C>(a, own, [&](int head, int first_row, int, uint32_t) {
        const int64_t row = dq_sum.first_row(a, own.sequence, own.batch, head) + first_row;
        float* to = dq_sum.sum + row * C::kHeadDim + 8 * C::kColumns * consumer;
#pragma unroll 1
        for (int half = 0; half < 2; ++half, to += 8 * kPanel) {
            mbarrier_wait(shared.dq_full(consumer), half);
#pragma unroll 1
            for (int i = 0; i < C::kBlockM / 8; ++i)
                bulk_reduce_add(to + 8 * C::kHeadDim * i, shared.dq(consumer) + kBytes * i, kBytes);
            bulk_commit();
            bulk_wait_read<0>();
            mbarrier_arrive(shared.dq_empty(consumer));
        }
    });
    bulk_wait<0>();
}

// acc (64, kColumns) += weights (64 keys, kBlockM) rows (kBlockM, .), from the panel of `rows` on,
// asynchronously.
template <class C>
FASTATTN_DEVICE void add_weighted(float (&acc)[C::kColumns / 8][4], SharedAddress weights,
                                  SharedAddress rows) {
    const uint64_t a = wgmma_operand(weights), b = wgmma_operand(rows, C::kBlockM * 128);
#pragma unroll
    for (int step = 0; step < C::kBlockM / 16; ++step)
        wgmma<typename C::T, C::kColumns, false, true>(flat(acc), advanced(a, step * 32),
                                                       advanced(b, step * 2048), true);
    wgmma_commit();
}

// A warp's 16 rows of transposed weights, of 16 * kSteps queries, to the tile.
template <class T, class Weights, int kTiles>
FASTATTN_DEVICE void store_weights(Weights tile, const float (&weights)[kTiles][4], int row,
                                   int query, int lane) {
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) {
        uint32_t fragment[4];
        weights_fragment<T>(fragment, weights, i);
        stmatrix_x4(tile.lane_at(lane % 16, lane / 16, row, query / 8 + 2 * i), fragment);
    }
}

// Hands 64 columns of dq to add_dq; `half` is the parity of how many came before.
template <class C>
FASTATTN_DEVICE void hand_on(const float (&dq)[8][4], Shared<C> shared, int consumer, int warp,
                             int lane, uint32_t half) {
    mbarrier_wait(shared.dq_empty(consumer), half ^ 1);
    store_dq<kPanel>(shared.dq(consumer), dq, 16 * warp, 0, lane);
    fence_proxy_async();
    warp_sync();
    if (lane == 0) mbarrier_arrive(shared.dq_full(consumer));
}

// What a consumer does with every block of queries.
template <class C>
FASTATTN_DEVICE void consume(const AttentionBwdArgs& a, const Own& own, Shared<C> shared,
                             int consumer) {
    using T = typename C::T;
    constexpr int kBlockM = C::kBlockM, kBlockN = C::kBlockN, kHeadDim = C::kHeadDim;
    const Sequence& s = own.sequence;
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const int key = own.first_key + 16 * warp + lane / 4;
    const int query = C::kQueries * consumer, column = C::kColumns * consumer;
    const int panel = column / kPanel;

    float dk[C::kColumns / 8][4] = {}, dv[C::kColumns / 8][4] = {};  // (64, kColumns)
    const int keys = s.seqlen_k - own.first_key;
    if (own.rows.begin < own.rows.end) {
        mbarrier_wait(shared.kv_full(), 0);
        if ((a.cu_seqlens_k || a.seqlens_k) && keys < kBlockN) {
            clear<kBlockN, kHeadDim>(shared.k(), keys);
            clear<kBlockN, kHeadDim>(shared.v(), keys);
            consumers_meet();
        }
    }
    uint32_t step = 0;
    each_step<C>(a, own, [&](int, int first_row, int stage, uint32_t parity) {
        const SharedAddress q = shared.q(stage), dout = shared.dout();
        float scores[C::kQueries / 8][4], dp[C::kQueries / 8][4];  // (64, kQueries)
        mbarrier_wait(shared.q_full(stage), parity);
        if (a.cu_seqlens_q && s.seqlen_q - first_row < kBlockM) {
            mbarrier_wait(shared.dout_full(), step % 2);
            clear<kBlockM, kHeadDim>(q, s.seqlen_q - first_row);
            clear<kBlockM, kHeadDim>(dout, s.seqlen_q - first_row);
            consumers_meet();
        }
        wgmma_fence();
        multiply_rows_of<T, kBlockN, kHeadDim, kBlockM>(scores, shared.k(), q + query * 128);
        mbarrier_wait(shared.dout_full(), step % 2);
        wgmma_fence();
        multiply_rows_of<T, kBlockN, kHeadDim, kBlockM>(dp, shared.v(), dout + query * 128);
        mbarrier_wait(shared.statistics_full(stage), parity);
        wgmma_wait<1>();
        wgmma_landed(flat(scores));
        const int lane_query = query + lane % 4 * 2, row = first_row + lane_query;
        const SharedAddress lse = shared.lse(stage) + 4 * lane_query;
        if (first_row >= own.rows_of_all.begin && first_row + kBlockM <= own.rows_of_all.end)
            weights<C::kQueries / 8, false>(a, s, scores, lse, key, row);
        else
            weights<C::kQueries / 8, true>(a, s, scores, lse, key, row);
        const auto p = shared.p(step % 2), ds = shared.ds(step % 2);
        store_weights<T>(p, scores, 16 * warp, query, lane);

        wgmma_wait<0>();
        wgmma_landed(flat(dp));
#pragma unroll
        for (int j = 0; j < C::kQueries / 8; ++j) {
            const float2 delta = ld_shared<float2>(shared.delta(stage) + 4 * lane_query + 32 * j);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                dp[j][i] = scores[j][i] * (dp[j][i] - (i % 2 ? delta.y : delta.x));
        }
        store_weights<T>(ds, dp, 16 * warp, query, lane);
        consumers_meet();

        const SharedAddress k = shared.k() + panel * (kBlockN * 128);
        float dq[8][4];  // (kBlockM, 64)
        wgmma_fence();
        add_weighted<C>(dv, p.base, dout + panel * (kBlockM * 128));
        wgmma_fence();
        multiply_keys<C>(dq, ds.base, k);
        wgmma_fence();
        add_weighted<C>(dk, ds.base, q + panel * (kBlockM * 128));
        wgmma_wait<2>();
        wgmma_landed(flat(dv));
        if (lane == 0) mbarrier_arrive(shared.dout_empty());
        wgmma_wait<1>();
        wgmma_landed(flat(dq));
        hand_on<C>(dq, shared, consumer, warp, lane, 0);
        wgmma_fence();
        multiply_keys<C>(dq, ds.base, k + kBlockN * 128);
        wgmma_wait<1>();
        wgmma_landed(flat(dk));
        if (lane == 0) mbarrier_arrive(shared.q_empty(stage));
        wgmma_wait<0>();
        wgmma_landed(flat(dq));
        hand_on<C>(dq, shared, consumer, warp, lane, 1);
        ++step;
    });

    multiply_rows(dk, {a.softmax_scale, a.softmax_scale});
    write_keys<T>(a, own, dk, a.dk, a.dk_strides, key, column, a.head_dim);
    write_keys<T>(a, own, dv, a.dv, a.dv_strides, key, column, a.head_dim_v);
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
        if (warp >= 2 && threadIdx.x % 32 == 0) add_dq<C>(a, own, shared, dq_sum, warp - 2);
    } else {
        registers_up<kConsumerRegisters>();
        consume<C>(a, own, shared, warpgroup - 1);
    }
}

template <class C>
void launch_dtype(const AttentionBwdArgs& a) {
    launch_bwd<C>(a, attention_bwd_kernel<C>, Shared<C>::kBytes);
}

}  // namespace

void attention_bwd_wide_sm90(const AttentionBwdArgs& a) {
    a.bfloat16 ? launch_dtype<Config<bfloat16>>(a) : launch_dtype<Config<float16>>(a);
}

}  // namespace fastattn::cuda
