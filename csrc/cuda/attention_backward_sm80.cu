// The gradients of attention on mma.sync and cp.async: dq, dk, dv from q, k, v, dout, lse, delta.
// Weights p = exp(score - lse) are computed again, and ds = p * (dp - delta) (FlashAttention-2, Dao
// 2023, arXiv 2307.08691). A block owns kBlockN keys of one head of k and v, and walks the blocks
// of kBlockM queries that see them, of one after the other of the heads that share it: so dk and dv
// stay in registers and are written once, without atomics; there are the fewer blocks the more
// heads share one. What a block has for dq it adds to a scratch in float32, with `deterministic` in
// the order of the keys. 10 * head_dim flops a visible score, in 5 products.
#include "cuda/attention_dq.cuh"
#include "cuda/attention_gradient.cuh"
#include "cuda/launch.cuh"

namespace fastattn::cuda {
namespace {

// A tiling. Of the warps, so many lie along the first dim of a product's result (queries of the
// scores and of dq, keys of dk and dv), the others along the second. Shared memory holds kStages
// blocks of queries at once.
template <int head_dim, int block_m, int block_n, int warps, int stages, int scores_warps,
          int dkdv_warps, int dq_warps>
struct Config {
    static constexpr int kHeadDim = head_dim, kBlockM = block_m, kBlockN = block_n;
    static constexpr int kThreads = 32 * warps, kStages = stages;
    static constexpr int kBlocks = head_dim > 32 ? 1 : 2;  // of a processor, registers allow

    using Queries = Tile<block_m, head_dim>;
    using Keys = Tile<block_n, head_dim>;
    using Weights = Tile<block_m, block_n>;
    static constexpr int kStatistics = 2 * 4 * block_m;  // bytes of lse and delta
    static constexpr int kShared =
        2 * Keys::kBytes + stages * (2 * Queries::kBytes + kStatistics) + 2 * Weights::kBytes;

    // A warp's part of a result (rows, columns) as mma_m16n8k16 has it: (16 * kM, 8 * kN).
    template <int rows, int columns, int warps_m>
    struct Part {
        static constexpr int kWarpsN = warps / warps_m;
        static constexpr int kM = rows / warps_m / 16, kN = columns / kWarpsN / 8;
        static_assert(kM * 16 * warps_m == rows && kN * 8 * kWarpsN == columns && kN % 2 == 0);
        using Acc = float[kM][kN][4];
        static FASTATTN_DEVICE unsigned row() { return threadIdx.x / 32 / kWarpsN * (16 * kM); }
        static FASTATTN_DEVICE unsigned column() { return threadIdx.x / 32 % kWarpsN * (8 * kN); }
    };
    using Dkdv = Part<block_n, head_dim, dkdv_warps>;
    using Dq = Part<block_m, head_dim, dq_warps>;
    // dq is made in parts where registers are short.
    static constexpr int kDqParts = head_dim > 192 ? 2 : 1;

    // Of the scores, a warp has 8 keys every kStep. A block of the dropout's stream serves keys 16
    // apart, up to 64 of them: warps of 32 keys take turns by 8, so that they use all they draw.
    struct Scores : Part<block_m, block_n, scores_warps> {
        using Base = Part<block_m, block_n, scores_warps>;
        static constexpr int kStep = Base::kN == 4 && block_n % 64 == 0 ? 16 : 8;
        static FASTATTN_DEVICE unsigned column(int n) {
            const unsigned warp = threadIdx.x / 32 % Base::kWarpsN;
            return (kStep == 16 ? warp / 2 * 64 + warp % 2 * 8 : warp * 8 * Base::kN) + kStep * n;
        }
    };
};

// For devices whose blocks may have 163 KiB of shared memory, and for those that give them 99.
template <class RoomyConfig, class TightConfig = RoomyConfig>
struct Pair {
    using Roomy = RoomyConfig;
    using Tight = TightConfig;
};
template <int kHeadDim>
struct Configs;
template <>
struct Configs<32> : Pair<Config<32, 64, 128, 8, 2, 2, 4, 4>> {};
template <>
struct Configs<64> : Pair<Config<64, 64, 128, 8, 2, 2, 4, 4>> {};
template <>
struct Configs<96> : Pair<Config<96, 64, 128, 8, 2, 2, 4, 4>, Config<96, 64, 64, 8, 2, 4, 4, 4>> {};
template <>
struct Configs<128>
    : Pair<Config<128, 64, 128, 8, 2, 2, 4, 2>, Config<128, 64, 64, 8, 1, 4, 2, 2>> {};
template <>
struct Configs<192> : Pair<Config<192, 64, 64, 8, 2, 4, 2, 2>, Config<192, 32, 64, 8, 1, 2, 2, 2>> {
};
template <>
struct Configs<256> : Pair<Config<256, 64, 64, 8, 1, 4, 2, 2>, Config<256, 32, 32, 4, 1, 2, 2, 2>> {
};

template <int kM, int kN>
FASTATTN_DEVICE void clear(float (&acc)[kM][kN][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
}

// acc (16 * kM, 8 * kN) += a b over kDepth. load_a(fragment, m, k) and load_b(fragment, n, k) give
// the fragments of a's rows 16 * m and of b's columns 8 * n and 8 * (n + 1), from depth k on.
template <class T, int kDepth, int kUnroll = 16, int kM, int kN, class LoadA, class LoadB>
FASTATTN_DEVICE void multiply(float (&acc)[kM][kN][4], LoadA load_a, LoadB load_b) {
#pragma unroll kUnroll
    for (int k = 0; k < kDepth; k += 16) {
        uint32_t a[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) load_a(a[m], m, k);
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
            uint32_t b[4];
            load_b(b, n, k);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                mma_m16n8k16<T>(acc[m][n], a[m], b[0], b[1]);
                mma_m16n8k16<T>(acc[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// What `multiply` loads from tiles: a from rows, or transposed from columns; b transposed from a
// warp's keys, or down columns. Each from `first` on.
template <class From>
FASTATTN_DEVICE auto rows_of(From tile, int first, unsigned lane) {
    return [=](uint32_t (&a)[4], int m, int depth) {
        tile.fragment_a(a, first + 16 * m, depth, lane);
    };
}
template <class From>
FASTATTN_DEVICE auto columns_of(From tile, int first, unsigned lane) {
    return [=](uint32_t (&a)[4], int m, int depth) {
        tile.fragment_a_trans(a, depth, first + 16 * m, lane);
    };
}
template <class C>
FASTATTN_DEVICE auto keys_of(typename C::Keys tile, unsigned lane) {
    return [=](uint32_t (&b)[4], int n, int depth) {
        ldmatrix_x4(b, tile.lane_at(lane / 16 * C::Scores::kStep + lane % 8, lane / 8 % 2,
                                    C::Scores::column(n), depth / 8));
    };
}
template <class From>
FASTATTN_DEVICE auto down_columns_of(From tile, int first, unsigned lane) {
    return [=](uint32_t (&b)[4], int n, int depth) {
        tile.fragment_b_trans(b, depth, first + 8 * n, lane);
    };
}

// dk or dv, times `factor`, by way of `tile` to `to`.
template <class T, class C>
FASTATTN_DEVICE void store(typename C::Keys tile, const typename C::Dkdv::Acc& acc, float factor,
                           T* to, int64_t row_stride, int rows, int columns) {
    using Dkdv = typename C::Dkdv;
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < Dkdv::kM; ++m)
#pragma unroll
        for (int n = 0; n < Dkdv::kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const int row = Dkdv::row() + 16 * m + 4 * i + lane / 4;
                st_shared(tile.at(row, Dkdv::column() / 8 + n) + 4 * (lane % 4),
                          pack<T>(acc[m][n][i] * factor, acc[m][n][i + 1] * factor));
            }
    barrier();
    constexpr int kRows = C::kBlockN / (C::kThreads / 32);
    tile.template store<kRows>(to, row_stride, rows, columns, threadIdx.x / 32 * kRows, lane);
}

// The number of this block in the order of beginning: whoever waits for blocks of lower numbers
// waits for blocks that run.
FASTATTN_DEVICE int ticket(int* begun, SharedAddress scratch) {
    if (threadIdx.x == 0) st_shared(scratch, atomic_add(begun, 1));
    barrier();
    const int number = ld_shared<int>(scratch);
    barrier();
    return number;
}

// What a block owns: kBlockN keys of one head of k and v.
struct Own {
    int batch, head_kv, first_key;
    Sequence s;
};

template <class C>
FASTATTN_DEVICE Own own_of(const AttentionArgs& a, int block) {
    const int blocks = (a.seqlen_k + C::kBlockN - 1) / C::kBlockN;
    const int batch = block / blocks / a.heads_kv, head_kv = block / blocks % a.heads_kv;
    return {batch, head_kv, block % blocks * C::kBlockN, sequence_of(a, batch)};
}

template <class T>
FASTATTN_DEVICE T* own_rows(const AttentionArgs& a, const Own& own, T* tensor,
                            const Strides& strides) {
    return tensor + row_offset(strides, a.cu_seqlens_k, own.batch, own.head_kv, own.s.start_k,
                               own.first_key);
}

// The queries from `begin` to before `end` see some of a block's keys, those from `all_begin` to
// before `all_end` each of them. `begin` is a multiple of kBlockM.
struct Walk {
    int begin, end, all_begin, all_end;
};

template <class C>
FASTATTN_DEVICE Walk walk_of(const AttentionArgs& a, const Sequence& s, int first_key) {
    const int last_key = min(first_key + C::kBlockN, s.seqlen_k) - 1;
    const Range some = queries_seeing(a, s, first_key, last_key);
    const Range all = queries_seeing_all(a, s, first_key, last_key);
    const int begin = some.begin / C::kBlockM * C::kBlockM;
    const bool whole = first_key + C::kBlockN <= s.seqlen_k;
    return {begin, first_key <= last_key && some.begin < some.end ? some.end : begin, all.begin,
            whole ? all.end : 0};
}

// Copies a block of queries and their dout.
template <class T, class C>
FASTATTN_DEVICE void load_queries(const AttentionBwdArgs& a, const Own& own, int head, int row,
                                  typename C::Queries q, typename C::Queries dout) {
    const auto load = [&](auto tile, const void* from, const Strides& strides, int columns) {
        const int64_t at = row_offset(strides, a.cu_seqlens_q, own.batch, head, own.s.start_q, row);
        tile.template load<C::kThreads>(static_cast<const T*>(from) + at, strides.row,
                                        own.s.seqlen_q - row, columns, threadIdx.x);
    };
    load(q, a.q, a.q_strides, a.head_dim);
    load(dout, a.dout, a.dout_strides, a.head_dim_v);
    cp_async_commit();
}

// One row's lse in units of log2, and delta. Weights are 0 where lse is +inf: in rows that see no
// key, and outside.
template <class C>
FASTATTN_DEVICE float2 load_statistics(const AttentionBwdArgs& a, const Own& own, int head,
                                       int row) {
    row += threadIdx.x;
    if (threadIdx.x >= C::kBlockM || row >= own.s.seqlen_q) return {INFINITY, 0.0f};
    const int64_t at = (a.cu_seqlens_q ? 0 : own.batch * a.lse_batch_stride) +
                       head * a.lse_head_stride + own.s.start_q + row;
    const float lse = ld_readonly(a.lse + at);
    return {lse == -INFINITY ? INFINITY : lse * kLog2E, ld_readonly(a.delta + at)};
}

template <class C>
FASTATTN_DEVICE void store_statistics(SharedAddress to, float2 statistics) {
    if (threadIdx.x >= C::kBlockM) return;
    st_shared(to + 4 * threadIdx.x, statistics.x);
    st_shared(to + 4 * (C::kBlockM + threadIdx.x), statistics.y);
}

// Adds ds k to the sum of dq; with `deterministic`, after the blocks of the keys before it.
template <class T, class C>
FASTATTN_DEVICE void add_dq(const AttentionBwdArgs& a, const Own& own, const Step& step,
                            const DqSum& dq_sum, typename C::Weights ds, typename C::Keys k,
                            unsigned lane) {
    const int64_t row = dq_sum.first_row(a, own.s, step.batch, step.head) + step.first_row;
    int* const turn = dq_sum.turns + row / DqSum::kTurnRows;
#pragma unroll 1
    for (int part = 0; part < C::kDqParts; ++part) {
        constexpr int kN = C::Dq::kN / C::kDqParts;
        const int column = C::Dq::column() + part * 8 * kN;
        float dq[C::Dq::kM][kN][4];
        clear(dq);
        multiply<T, C::kBlockN>(dq, rows_of(ds, C::Dq::row(), lane),
                                down_columns_of(k, column, lane));
        if (a.deterministic && part == 0) {
            const int last_row = min(step.first_row + C::kBlockM, own.s.seqlen_q) - 1;
            const Range seen = keys_seen(a, own.s, step.first_row, last_row);
            const int before = own.first_key / C::kBlockN - seen.begin / C::kBlockN;
            if (threadIdx.x == 0)
                while (ld_acquire(turn) != before) {
                }
            barrier();
        }
        float* const to =
            dq_sum.sum + row * C::kHeadDim + DqSum::tile<C::kHeadDim>(C::Dq::row(), column) + lane;
#pragma unroll
        for (int m = 0; m < C::Dq::kM; ++m)
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    atomic_add(
                        to + DqSum::tile<C::kHeadDim>(16 * m + 4 * (i & 2), 8 * n) + i % 2 * 32,
                        dq[m][n][i]);
    }
    if (a.deterministic) {
        barrier();
        if (threadIdx.x == 0) add_release(turn, 1);
    }
}

template <class T, class C, bool kFeatured>
__global__ __launch_bounds__(C::kThreads, kFeatured ? 1 : C::kBlocks) void attention_bwd_kernel(
    const __grid_constant__ AttentionBwdArgs a, const DqSum dq_sum) {
    constexpr int kBlockM = C::kBlockM, kHeadDim = C::kHeadDim;
    constexpr int kStages = C::kStages;
    using Queries = typename C::Queries;
    using Scores = typename C::Scores;

    const typename C::Keys k{dynamic_shared()}, v{k.base + k.kBytes};
    const typename C::Weights p{v.base + v.kBytes}, ds{p.base + p.kBytes};
    const SharedAddress stages = ds.base + ds.kBytes;
    const auto q_of = [&](int stage) { return Queries{stages + stage * 2 * Queries::kBytes}; };
    const auto dout_of = [&](int stage) { return Queries{q_of(stage).base + Queries::kBytes}; };
    const auto statistics_of = [&](int stage) {
        return q_of(kStages).base + stage * C::kStatistics;
    };

    const int block = a.deterministic ? ticket(dq_sum.begun, statistics_of(0)) : blockIdx.x;
    const Own own = own_of<C>(a, block);
    const Sequence& s = own.s;
    // Keys behind a sequence's length get zeros, unless packed.
    if (own.first_key >= (a.cu_seqlens_k ? s.seqlen_k : a.seqlen_k)) return;

    const int group_size = a.heads / a.heads_kv;
    const Walk walk = walk_of<C>(a, s, own.first_key);
    Step step{own.batch, own.head_kv * group_size, walk.begin, own.first_key};
    int remaining = (walk.end - walk.begin + kBlockM - 1) / kBlockM * group_size;
    if (remaining) {
        const auto load_keys = [&](auto tile, const void* from, const Strides& strides,
                                   int columns) {
            tile.template load<C::kThreads>(own_rows(a, own, static_cast<const T*>(from), strides),
                                            strides.row, s.seqlen_k - own.first_key, columns,
                                            threadIdx.x);
        };
        load_keys(k, a.k, a.k_strides, a.head_dim);
        load_keys(v, a.v, a.v_strides, a.head_dim_v);
        load_queries<T, C>(a, own, step.head, step.first_row, q_of(0), dout_of(0));
        store_statistics<C>(statistics_of(0),
                            load_statistics<C>(a, own, step.head, step.first_row));
    }

    typename C::Dkdv::Acc dk, dv;  // of (kBlockN, kHeadDim)
    clear(dk);
    clear(dv);
    for (int stage = 0; remaining > 0; --remaining) {
        const Queries q = q_of(stage), dout = dout_of(stage);
        const SharedAddress row_lse = statistics_of(stage), row_delta = row_lse + 4 * kBlockM;
        const Walk walk = walk_of<C>(a, s, opaque(own.first_key));
        const bool wraps = step.first_row + kBlockM >= walk.end;
        const int next_head = step.head + wraps;
        const int next_row = wraps ? walk.begin : step.first_row + kBlockM;
        const int next_stage = kStages == 1 ? 0 : stage ^ 1;

        // Addresses follow from the lane anew each time, or they would take too many registers.
        const unsigned lane = opaque(threadIdx.x % 32);
        cp_async_wait<0>();
        barrier();
        if (kStages > 1 && remaining > 1)
            load_queries<T, C>(a, own, next_head, next_row, q_of(next_stage), dout_of(next_stage));
        {
            typename C::Scores::Acc scores, dp;  // of (kBlockM, kBlockN)
            clear(scores);
            multiply<T, kHeadDim>(scores, rows_of(q, Scores::row(), lane), keys_of<C>(k, lane));
            const int last_row = min(step.first_row + kBlockM, s.seqlen_q);
            // Compares cost little next to features.
            if (!kFeatured && step.first_row >= walk.all_begin && last_row <= walk.all_end)
                weights<T, C, kFeatured, false>(a, s, step, scores, row_lse, p, lane);
            else
                weights<T, C, kFeatured, true>(a, s, step, scores, row_lse, p, lane);
            clear(dp);
            // Not unrolled whole: here registers are shortest.
            multiply<T, kHeadDim, (kHeadDim < 96 ? 4 : kHeadDim / 32)>(
                dp, rows_of(dout, Scores::row(), lane), keys_of<C>(v, lane));
            score_gradients<T, C, kFeatured>(a, scores, dp, row_delta, ds, lane);
        }
        float2 next_statistics{};
        if (remaining > 1) next_statistics = load_statistics<C>(a, own, next_head, next_row);
        barrier();

        multiply<T, kBlockM>(dv, columns_of(p, C::Dkdv::row(), lane),
                             down_columns_of(dout, C::Dkdv::column(), lane));
        multiply<T, kBlockM>(dk, columns_of(ds, C::Dkdv::row(), lane),
                             down_columns_of(q, C::Dkdv::column(), lane));
        if (kStages == 1 && remaining > 1) {
            barrier();
            load_queries<T, C>(a, own, next_head, next_row, q_of(0), dout_of(0));
        }
        if (remaining > 1) store_statistics<C>(statistics_of(next_stage), next_statistics);

        add_dq<T, C>(a, own, step, dq_sum, ds, k, lane);
        stage = next_stage, step.head = next_head, step.first_row = next_row;
    }

    // Found again, rather than kept in registers all along.
    const Own at = own_of<C>(a, opaque(block));
    const int rows = (a.cu_seqlens_k ? at.s.seqlen_k : a.seqlen_k) - at.first_key;
    barrier();
    store<T, C>(k, dk, a.softmax_scale, own_rows(a, at, static_cast<T*>(a.dk), a.dk_strides),
                a.dk_strides.row, rows, a.head_dim);
    store<T, C>(v, dv, a.seed ? a.keep_scale : 1.0f,
                own_rows(a, at, static_cast<T*>(a.dv), a.dv_strides), a.dv_strides.row, rows,
                a.head_dim_v);
}

template <class T, class C, bool kFeatured>
void launch_kernel(const AttentionBwdArgs& a) {
    const DqSum dq_sum = dq_sum_of(a, C::kHeadDim);
    const int64_t blocks =
        int64_t((a.seqlen_k + C::kBlockN - 1) / C::kBlockN) * a.heads_kv * a.batch;
    if (blocks)
        launch(attention_bwd_kernel<T, C, kFeatured>, grid_of(blocks), C::kThreads, C::kShared,
               a.stream, a, dq_sum);
    attention_dq(a, dq_sum);
}

template <class T, int kHeadDim>
void launch_head_dim(const AttentionBwdArgs& a) {
    using Roomy = typename Configs<kHeadDim>::Roomy;
    using Tight = typename Configs<kHeadDim>::Tight;
    const bool featured = a.softcap != 0.0f || a.alibi_slopes || a.seed;
    if (current_device().shared >= Roomy::kShared)
        featured ? launch_kernel<T, Roomy, true>(a) : launch_kernel<T, Roomy, false>(a);
    else
        featured ? launch_kernel<T, Tight, true>(a) : launch_kernel<T, Tight, false>(a);
}

template <class T>
void launch_dtype(const AttentionBwdArgs& a) {
    switch (padded_head_dim(a)) {
        case 32:
            return launch_head_dim<T, 32>(a);
        case 64:
            return launch_head_dim<T, 64>(a);
        case 96:
            return launch_head_dim<T, 96>(a);
        case 128:
            return launch_head_dim<T, 128>(a);
        case 192:
            return launch_head_dim<T, 192>(a);
        default:
            return launch_head_dim<T, 256>(a);
    }
}

}  // namespace

void attention_bwd_sm80(const AttentionBwdArgs& a) {
    a.bfloat16 ? launch_dtype<bfloat16>(a) : launch_dtype<float16>(a);
}

}  // namespace fastattn::cuda
