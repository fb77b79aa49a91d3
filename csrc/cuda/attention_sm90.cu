// Scaled dot-product attention, forward, for sm_90a: FlashAttention-3 (Shah et al. 2024, arXiv
// 2407.08608). q (batch, heads, seqlen_q, head_dim), k and v (batch, heads_kv, seqlen_k, .), packed
// or not.
//
// A block stays on its multiprocessor and takes tile after tile of kBlockM queries of one head. A
// thread of its first warpgroup copies blocks of kBlockN keys and of values into a ring of stages;
// each other warpgroup owns 64 of the queries, with scores, weights and results in registers. Its
// softmax runs beside its own last product with v, and beside the products of the others. The floor
// is 2 * (head_dim + head_dim_v) flops and one exponential a visible score.
#include <algorithm>
#include <cmath>

#include "cuda/attention_schedule.cuh"
#include "cuda/attention_sm90.cuh"
#include "cuda/attention_softmax.cuh"
#include "cuda/launch.cuh"

namespace fastattn::cuda {
namespace {

// Numbers of named barriers: one for the turn of each consumer, one for all consumers.
constexpr int kTurnBarrier = 1, kConsumersBarrier = 4;

// A consumer is a warpgroup that multiplies. head_dim and head_dim_v are at least those of the
// call; copies fill what lies in between with zeros.
template <class Element, int head_dim, int head_dim_v, int consumers, int block_n, bool featured>
struct Config {
    using T = Element;
    static constexpr int kHeadDim = head_dim, kHeadDimV = head_dim_v, kConsumers = consumers;
    static constexpr int kBlockM = 64 * consumers, kBlockN = block_n, kStages = 2;
    // Dropout's stream finds no registers beside wide results.
    static constexpr bool kFeatured = featured, kDropout = featured && head_dim <= 128;
    static constexpr int kThreads = kWarpgroup * (1 + consumers);
    // The registers that the kernel starts with, shared out anew.
    static constexpr int kProducerRegisters = consumers == 2 ? 40 : 32;
    static constexpr int kConsumerRegisters = consumers == 2 ? 232 : 160;
    static_assert(kProducerRegisters + consumers * kConsumerRegisters <=
                  65536 / kThreads / 8 * 8 * (1 + consumers));
    // Consumers take turns at starting products, so that one's softmax meets another's products;
    // those of wide heads are long enough without.
    static constexpr bool kTurns = head_dim <= 128;
    // Wide results are rescaled beside the next product with k, not in between.
    static constexpr bool kRescaleLate = head_dim_v > 128;

    static constexpr int kBytesQ = kTileBytes<kBlockM, kHeadDim>;
    static constexpr int kBytesK = kTileBytes<kBlockN, kHeadDim>;
    static constexpr int kBytesV = kTileBytes<kBlockN, kHeadDimV>;
    static constexpr int kBarriersAt = kBytesQ + kStages * (kBytesK + kBytesV);
    static constexpr int kShared = kBarriersAt + 16 * (1 + 2 * kStages);
    static_assert(kBlockN % 16 == 0 && kShared <= 227 * 1024);
};

// A block's tiles in shared memory, in panels of 64 columns, and the barriers of each: `full` when
// the copy has landed, `empty` when all warps of the consumers have read it. `n` counts the blocks
// of keys since the kernel began; they take the stages in turn.
template <class C>
struct Shared {
    SharedAddress base;

    FASTATTN_DEVICE SharedAddress q() const { return base; }  // (kBlockM, kHeadDim)
    FASTATTN_DEVICE SharedAddress k(unsigned n) const {       // (kBlockN, kHeadDim)
        return base + C::kBytesQ + n % C::kStages * C::kBytesK;
    }
    FASTATTN_DEVICE SharedAddress v(unsigned n) const {  // (kBlockN, kHeadDimV)
        return base + C::kBytesQ + C::kStages * C::kBytesK + n % C::kStages * C::kBytesV;
    }
    FASTATTN_DEVICE SharedAddress q_full() const { return base + C::kBarriersAt; }
    FASTATTN_DEVICE SharedAddress k_full(unsigned n) const {
        return q_full() + 16 + 32 * (n % C::kStages);
    }
    FASTATTN_DEVICE SharedAddress v_full(unsigned n) const { return k_full(n) + 16; }
    static FASTATTN_DEVICE SharedAddress empty(SharedAddress full) { return full + 8; }
    // Of the phase in which stages hold block n.
    static FASTATTN_DEVICE uint32_t parity(unsigned n) { return n / C::kStages % 2; }

    FASTATTN_DEVICE void init_barriers() const {
        for (int tile = 0; tile < 1 + 2 * C::kStages; ++tile) {
            const SharedAddress full = q_full() + 16 * tile;
            mbarrier_init(full, 1);
            mbarrier_init(empty(full), 4 * C::kConsumers);
        }
        fence_mbarrier_init();
    }
};

// One thread copies what the consumers read, in their order: the keys of a block before the values
// of the one that precedes it.
template <class C>
FASTATTN_DEVICE void produce(const AttentionArgs& args, const Schedule& schedule, Shared<C> shared,
                             const TensorMap* q_map, const TensorMap* k_map,
                             const TensorMap* v_map) {
    unsigned n = 0, tiles = 0;
    for (int step = 0;; ++step) {
        const Place place = place_of(schedule, step);
        if (place.head < 0) return;
        const Work w = work_at<C::kBlockM, C::kBlockN>(args, place);
        if (w.blocks.begin == w.blocks.end) continue;
        const int head_kv = w.head / (args.heads / args.heads_kv);
        const int batch_kv = args.cu_seqlens_k ? 0 : w.batch, first_key = int(w.sequence.start_k);
        const auto copy_keys = [&](int block, unsigned n) {
            const SharedAddress full = shared.k_full(n);
            mbarrier_wait(shared.empty(full), shared.parity(n) ^ 1);
            copy_tile<C::kBlockN, C::kHeadDim>(shared.k(n), k_map, full,
                                               first_key + block * C::kBlockN, head_kv, batch_kv);
        };
        const auto copy_values = [&](int block, unsigned n) {
            const SharedAddress full = shared.v_full(n);
            mbarrier_wait(shared.empty(full), shared.parity(n) ^ 1);
            copy_tile<C::kBlockN, C::kHeadDimV>(shared.v(n), v_map, full,
                                                first_key + block * C::kBlockN, head_kv, batch_kv);
        };

        int block = w.blocks.end - 1;
        copy_keys(block, n);
        mbarrier_wait(shared.empty(shared.q_full()), tiles++ % 2 ^ 1);
        copy_tile<C::kBlockM, C::kHeadDim>(shared.q(), q_map, shared.q_full(),
                                           int(w.sequence.start_q) + w.first_row, w.head,
                                           args.cu_seqlens_q ? 0 : w.batch);
#pragma unroll 1
        for (; block > w.blocks.begin; --block, ++n) {
            copy_keys(block - 1, n + 1);
            copy_values(block, n);
        }
        copy_values(block, n++);
    }
}

// A thread's two rows: the maximum of their scores, the sum of the thread's weights, and what
// results have to be multiplied with since the maximum changed.
struct Rows {
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, rescale[2];
};

// All consumers write zeros over the values of a tile from `row` on, before any of them reads it.
template <class C>
FASTATTN_DEVICE void clear_values(SharedAddress v, int row) {
    constexpr int kThreads = C::kConsumers * kWarpgroup;
    clear_rows<C::kBlockN, C::kHeadDimV>(v, row, threadIdx.x - kWarpgroup, kThreads);
    fence_proxy_async();
    barrier_sync(kConsumersBarrier, kThreads);
}

// Writes acc (64, kHeadDimV) over the sums of weights, and the log-sum-exps, of this thread's rows.
template <class C>
FASTATTN_DEVICE void write_rows(const AttentionFwdArgs& args, const Work& w,
                                float (&acc)[C::kHeadDimV / 8][4], Rows& rows, int row,
                                float factor) {
    using T = typename C::T;
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float row_max = rows.max[half] * factor, row_sum = rows.sum[half];
        row_sum += shuffle_xor(row_sum, 1);
        row_sum += shuffle_xor(row_sum, 2);
        float rescale = 1.0f;
        if (args.sinks)
            rescale = add_sink(row_max, row_sum, ld_readonly(args.sinks + w.head) * kLog2E);
        rows.rescale[half] = row_sum == 0.0f ? 0.0f : rescale / row_sum;
        if (C::kDropout && args.seed) rows.rescale[half] *= args.keep_scale;
        const int i = row + 8 * half;
        if (args.lse && lane == 0 && i < w.sequence.seqlen_q)
            st_global(args.lse + (args.cu_seqlens_q ? 0 : w.batch * args.lse_batch_stride) +
                          w.head * args.lse_head_stride + w.sequence.start_q + i,
                      row_sum == 0.0f ? -INFINITY : (row_max + log2_approx(row_sum)) * kLn2);
    }
    multiply_rows(acc, rows.rescale);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int i = row + 8 * half;
        T* const out =
            static_cast<T*>(args.out) +
            row_offset(args.out_strides, args.cu_seqlens_q, w.batch, w.head, w.sequence.start_q, i);
        write_row(acc, half, out, i < w.sequence.seqlen_q, args.head_dim_v);
    }
}

// What consumer number `index` does: its 64 rows of every tile.
template <class C>
FASTATTN_DEVICE void consume(const AttentionFwdArgs& args, const Schedule& schedule,
                             Shared<C> shared, int index) {
    const float factor = C::kFeatured ? 1.0f : args.softmax_scale * kLog2E;
    const SharedAddress q_rows = shared.q() + index * 64 * 128;
    unsigned n = 0, tiles = 0;
    const auto release = [&](SharedAddress full) {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(shared.empty(full));
    };
    const auto await_turn = [&] {
        if (C::kTurns) barrier_sync(kTurnBarrier + index, 2 * kWarpgroup);
    };
    const auto end_turn = [&] {
        const int next = index + 1 < C::kConsumers ? index + 1 : 0;
        if (C::kTurns) barrier_arrive(kTurnBarrier + next, 2 * kWarpgroup);
    };
    if (index == C::kConsumers - 1) end_turn();

    Place place = place_of(schedule, 0);
    for (int step = 1; place.head >= 0; ++step) {
        const Work w = work_at<C::kBlockM, C::kBlockN>(args, place);
        const int first_row = w.first_row + 64 * index;
        const int row = first_row + threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
        const Range all_see = keys_seen_by_all(args, w.sequence, first_row, first_row + 63);
        const float slope = C::kFeatured ? alibi_slope(args, w.batch, w.head) : 0.0f;
        Rows rows;
        float scores[C::kBlockN / 8][4];      // (64, kBlockN)
        uint32_t p[C::kBlockN / 16][4];       // (64, kBlockN)
        float acc[C::kHeadDimV / 8][4] = {};  // (64, kHeadDimV)
        const auto weigh = [&](int block) {
            const int block_key = block * C::kBlockN, key = block_key + 2 * (threadIdx.x % 4);
            const bool whole = block_key >= all_see.begin && block_key + C::kBlockN <= all_see.end;
            if (C::kFeatured) scale_scores(args, scores);
            if (C::kFeatured && args.alibi_slopes)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    add_alibi(scores, half, slope, key - row - 8 * half - w.sequence.offset);
            if (!whole)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int i = row + 8 * half;
                    const Range seen = keys_seen(args, w.sequence, i, i);
                    hide_scores(scores, half, {seen.begin - key, seen.end - key});
                }
            softmax_step(scores, rows.max, rows.sum, rows.rescale, factor);
            if (C::kDropout && args.seed)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    drop_weights(args, scores, half, row + 8 * half, key, w.head, w.batch);
        };

        if (w.blocks.begin < w.blocks.end) {
            int block = w.blocks.end - 1;
            mbarrier_wait(shared.q_full(), tiles++ % 2);
            mbarrier_wait(shared.k_full(n), shared.parity(n));
            wgmma_fence();
            multiply_rows_of<typename C::T, C::kBlockM, C::kHeadDim>(scores, q_rows, shared.k(n));
            wgmma_wait<0>();
            wgmma_landed(flat(scores));
            release(shared.k_full(n));
            weigh(block);
            const int keys_left = w.sequence.seqlen_k - block * C::kBlockN;
            if ((args.cu_seqlens_k || args.seqlens_k) && keys_left < C::kBlockN) {
                mbarrier_wait(shared.v_full(n), shared.parity(n));
                clear_values<C>(shared.v(n), keys_left);
            }
            // The scores of a block beside the results of the one before. The wait for the results
            // begins the loop because within a basic block ptxas moves it above the softmax.
            for (bool first = true;; first = false) {
                wgmma_wait<0>();
                wgmma_landed(flat(acc));
                if (!first) release(shared.v_full(n++));
#pragma unroll
                for (int i = 0; i < C::kBlockN / 16; ++i)
                    weights_fragment<typename C::T>(p[i], scores, i);
                if (!C::kRescaleLate) multiply_rows(acc, rows.rescale);
                if (block == w.blocks.begin) break;
                --block;
                mbarrier_wait(shared.k_full(n + 1), shared.parity(n + 1));
                await_turn();
                wgmma_fence();
                multiply_rows_of<typename C::T, C::kBlockM, C::kHeadDim>(scores, q_rows,
                                                                         shared.k(n + 1));
                if (C::kRescaleLate) multiply_rows(acc, rows.rescale);
                mbarrier_wait(shared.v_full(n), shared.parity(n));
                wgmma_fence();
                add_weighted_rows<typename C::T>(acc, p, shared.v(n));
                end_turn();
                wgmma_wait<1>();
                wgmma_landed(flat(scores));
                release(shared.k_full(n + 1));
                weigh(block);
            }
            release(shared.q_full());
            if (C::kRescaleLate) multiply_rows(acc, rows.rescale);
            mbarrier_wait(shared.v_full(n), shared.parity(n));
            wgmma_fence();
            add_weighted_rows<typename C::T>(acc, p, shared.v(n));
            place = place_of(schedule, step);
            wgmma_wait<0>();
            wgmma_landed(flat(acc));
            release(shared.v_full(n++));
        } else {
            place = place_of(schedule, step);
        }
        write_rows<C>(args, w, acc, rows, row, factor);
    }
    if (index == 0) await_turn();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_fwd_kernel(const __grid_constant__ AttentionFwdArgs args,
                         const __grid_constant__ Schedule schedule,
                         const __grid_constant__ TensorMap q_map,
                         const __grid_constant__ TensorMap k_map,
                         const __grid_constant__ TensorMap v_map) {
    const Shared<C> shared{dynamic_shared()};
    if (threadIdx.x == 0) {
        prefetch_tensor_map(&q_map);
        prefetch_tensor_map(&k_map);
        prefetch_tensor_map(&v_map);
        shared.init_barriers();
    }
    barrier();
    // The same in a warp, which the compiler does not know of threadIdx.
    const int warpgroup = shuffle(int(threadIdx.x / kWarpgroup), 0);
    if (warpgroup == 0) {
        registers_down<C::kProducerRegisters>();
        if (threadIdx.x == 0) produce<C>(args, schedule, shared, &q_map, &k_map, &v_map);
    } else {
        registers_up<C::kConsumerRegisters>();
        consume<C>(args, schedule, shared, warpgroup - 1);
    }
}

template <class C>
void launch_fwd(const AttentionFwdArgs& args) {
    const Schedule schedule = schedule_of(args, C::kBlockM, current_device().processors);
    if (schedule.grid == 0) return;
    const auto keys_map = [&](const void* tensor, const Strides& strides, int head_dim) {
        return map_of<typename C::T>(tensor, strides, args.batch, args.heads_kv, args.seqlen_k,
                                     head_dim, args.cu_seqlens_k, args.total_k, C::kBlockN);
    };
    launch(attention_fwd_kernel<C>, dim3(schedule.grid), C::kThreads, C::kShared, args.stream, args,
           schedule,
           map_of<typename C::T>(args.q, args.q_strides, args.batch, args.heads, args.seqlen_q,
                                 args.head_dim, args.cu_seqlens_q, args.total_q, C::kBlockM),
           keys_map(args.k, args.k_strides, args.head_dim),
           keys_map(args.v, args.v_strides, args.head_dim_v));
}

// Tiles close to FlashAttention-3's: the widest that registers and shared memory hold.
template <class T>
void launch_fwd_of(const AttentionFwdArgs& args) {
    const int head_dim = std::max(args.head_dim, args.head_dim_v);
    const bool banded = args.window_left != kUnbounded || args.window_right != kUnbounded;
    if (args.softcap != 0.0f || args.alibi_slopes || args.seed) {
        if (head_dim <= 64) return launch_fwd<Config<T, 64, 64, 2, 128, true>>(args);
        if (head_dim <= 128) return launch_fwd<Config<T, 128, 128, 2, 128, true>>(args);
        return launch_fwd<Config<T, 256, 256, 2, 64, true>>(args);
    }
    if (head_dim <= 64) return launch_fwd<Config<T, 64, 64, 3, 128, false>>(args);
    if (head_dim <= 96) return launch_fwd<Config<T, 96, 96, 2, 128, false>>(args);
    if (head_dim <= 128) {
        // Wide blocks waste more at the edges, of the band and of few keys.
        if (banded || args.seqlen_k < 1024)
            return launch_fwd<Config<T, 128, 128, 2, 128, false>>(args);
        return launch_fwd<Config<T, 128, 128, 2, 176, false>>(args);
    }
    if (head_dim <= 192 && args.head_dim_v <= 128)
        return launch_fwd<Config<T, 192, 128, 2, 128, false>>(args);
    if (head_dim <= 192) return launch_fwd<Config<T, 192, 192, 2, 96, false>>(args);
    launch_fwd<Config<T, 256, 256, 2, 80, false>>(args);
}

}  // namespace

bool attention_fwd_sm90_takes(const AttentionFwdArgs& args) {
    const auto keys_mappable = [&](const Strides& strides) {
        return mappable(strides, args.batch, args.heads_kv, args.seqlen_k, args.cu_seqlens_k,
                        args.total_k);
    };
    return current_device().capability == 90 && args.splits <= 1 && !args.block_table &&
           (!args.seed || std::max(args.head_dim, args.head_dim_v) <= 128) &&
           mappable(args.q_strides, args.batch, args.heads, args.seqlen_q, args.cu_seqlens_q,
                    args.total_q) &&
           keys_mappable(args.k_strides) && keys_mappable(args.v_strides);
}

void attention_fwd_sm90(const AttentionFwdArgs& args) {
    args.bfloat16 ? launch_fwd_of<bfloat16>(args) : launch_fwd_of<float16>(args);
}

}  // namespace fastattn::cuda
