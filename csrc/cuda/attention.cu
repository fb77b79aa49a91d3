// Scaled dot-product attention, forward, and which kernel runs a call.
//
// q (batch, heads, seqlen_q, head_dim), k and v (batch, heads_kv, seqlen_k, .), packed or paged. A
// block owns kBlockM rows of one head, each warp 16 or 32 of them, and walks over the keys that
// they see, kBlockN at a time, with an online softmax (FlashAttention-2, Dao 2023, arXiv
// 2307.08691): blocks that no row sees are skipped, only those on the edge of band and lengths are
// masked. Keys and values come by cp.async while the ones before are multiplied; scores and results
// stay in registers. The floor is 4 * head_dim flops a visible score.
#include "cuda/attention.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/attention_softmax.cuh"
#include "cuda/launch.cuh"

namespace fastattn::cuda {
namespace {

template <class T_, int head_dim, int block_m, int block_n, int warps, int stages, bool featured>
struct FwdConfig {
    using T = T_;
    static constexpr int kHeadDim = head_dim, kBlockM = block_m, kBlockN = block_n;
    static constexpr int kWarps = warps, kThreads = 32 * warps;
    static constexpr int kStages = stages;  // tiles of keys, and of values, that are under way
    static constexpr bool kFeatured = featured;
    static constexpr bool kQueriesInRegisters = head_dim <= 64;
    // Steps of 16 columns at once; more of them want more registers than there are.
    static constexpr int kUnroll = kQueriesInRegisters ? head_dim / 16 : 2;
    using QueryTile = Tile<block_m, head_dim>;
    using KeyTile = Tile<block_n, head_dim>;
    // Behind the tiles, what only the end needs.
    static constexpr int kForEnd = QueryTile::kBytes + 2 * stages * KeyTile::kBytes;
    static constexpr int kShared = kForEnd + 16;
};

// Bytes of keys and values that blocks running at a time should read, to find them in L2.
constexpr int64_t kL2Bytes = 32 << 20;

// Which rows a block owns. Heads go by sections whose keys fit in L2; in it, under a causal band,
// the longest blocks of rows first.
struct Share {
    int batch, head, first_row;
};

FASTATTN_DEVICE Share share_of(const AttentionArgs& a, unsigned blocks, unsigned section,
                               unsigned block_m) {
    const unsigned in_section = section * blocks, heads = a.heads;
    const unsigned first_head = blockIdx.x / in_section * section;
    const unsigned heads_here = min(section, a.batch * heads - first_head);
    const unsigned index = blockIdx.x % in_section, head = first_head + index % heads_here;
    const unsigned rank = index / heads_here;
    const unsigned block = a.window_right == kUnbounded ? rank : blocks - 1 - rank;
    return {int(head / heads), int(head % heads), int(block * block_m)};
}

template <class C>
__global__ void __launch_bounds__(C::kThreads)
    attention_fwd_kernel(const __grid_constant__ AttentionFwdArgs args, int blocks, int section) {
    using T = typename C::T;
    using KeyTile = typename C::KeyTile;
    constexpr int kHeadDim = C::kHeadDim, kBlockM = C::kBlockM, kBlockN = C::kBlockN;
    constexpr int kWarpM = kBlockM / C::kWarps, kRowTiles = kWarpM / 16;
    constexpr bool kFeatured = C::kFeatured, kQueriesInRegisters = C::kQueriesInRegisters;

    const int thread = threadIdx.x, lane = thread % 32;
    const auto [batch, head, first_row] = share_of(args, blocks, section, kBlockM);
    const int head_kv = head / (args.heads / args.heads_kv);
    const Sequence s = sequence_of(args, batch);
    if (first_row >= s.seqlen_q) return;
    const int last_row = min(first_row + kBlockM, s.seqlen_q) - 1;

    const Range seen = keys_seen(args, s, first_row, last_row);
    const int first_block = seen.begin / kBlockN;
    const int end_block = max(0, seen.end + kBlockN - 1) / kBlockN;

    const typename C::QueryTile queries{dynamic_shared()};  // (kBlockM, kHeadDim)
    // Tiles of keys (kBlockN, kHeadDim) and of values, in turn.
    const auto tile_of = [&](int block, int is_value) {
        return KeyTile{queries.base + C::QueryTile::kBytes +
                       (block % C::kStages * 2 + is_value) * KeyTile::kBytes};
    };
    // What only the end needs waits in shared memory: the loop is short of registers.
    if (thread == 0)
        st_shared(queries.base + C::kForEnd,
                  int4{batch, head, int(s.start_q) + first_row, s.seqlen_q - first_row});

    const KeyRows<T> keys(args, args.k, args.k_strides, s, batch, head_kv);
    const KeyRows<T> values(args, args.v, args.v_strides, s, batch, head_kv);
    // One group of copies each, though of nothing beyond the last block.
    const auto load_keys = [&](int block) {
        if (block < end_block)
            keys.template load<C::kThreads>(tile_of(block, 0), block * kBlockN, s.seqlen_k,
                                            args.head_dim, opaque(thread));
        cp_async_commit();
    };
    const auto load_values = [&](int block) {
        if (block < end_block)
            values.template load<C::kThreads>(tile_of(block, 1), block * kBlockN, s.seqlen_k,
                                              args.head_dim_v, opaque(thread));
        cp_async_commit();
    };

    const int64_t q_offset =
        row_offset(args.q_strides, args.cu_seqlens_q, batch, head, s.start_q, first_row);
    queries.template load<C::kThreads>(static_cast<const T*>(args.q) + q_offset, args.q_strides.row,
                                       s.seqlen_q - first_row, args.head_dim, thread);
    load_keys(first_block);
#pragma unroll
    for (int stage = 1; stage < C::kStages; ++stage) {
        load_values(first_block + stage - 1);
        load_keys(first_block + stage);
    }

    const int warp_row = thread / 32 * kWarpM;
    uint32_t q[kQueriesInRegisters ? kRowTiles : 1][kQueriesInRegisters ? kHeadDim / 16 : 1][4];
    float acc[kRowTiles][kHeadDim / 8][4] = {};  // (kWarpM, kHeadDim) of the warp
    float row_max[kRowTiles][2], row_sum[kRowTiles][2] = {};
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) row_max[m][0] = row_max[m][1] = -INFINITY;
    const float factor = kFeatured ? 1.0f : args.softmax_scale * kLog2E;
    const float slope = kFeatured ? alibi_slope(args, batch, head) : 0.0f;

    for (int block = first_block; block < end_block; ++block) {
        cp_async_wait<2 * C::kStages - 2>();
        barrier();
        load_values(block + C::kStages - 1);
        if constexpr (kQueriesInRegisters) {
            if (block == first_block)
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                    for (int d = 0; d < kHeadDim / 16; ++d)
                        queries.fragment_a(q[m][d], warp_row + 16 * m, 16 * d);
        }

        // What follows from the lane is computed anew, or it would take too many registers.
        const unsigned lane_here = opaque(lane);
        float scores[kRowTiles][kBlockN / 8][4] = {};  // (kWarpM, kBlockN) of the warp
        const KeyTile key_tile = tile_of(block, 0);
#pragma unroll C::kUnroll
        for (int d = 0; d < kHeadDim / 16; ++d) {
            uint32_t a[kRowTiles][4];
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m)
                if constexpr (!kQueriesInRegisters)
                    queries.fragment_a(a[m], warp_row + 16 * m, 16 * d, lane_here);
#pragma unroll
            for (int n = 0; n < kBlockN / 16; ++n) {
                uint32_t b[4];
                key_tile.fragment_b(b, 16 * n, 16 * d, lane_here);
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m) {
                    const auto& of_q = kQueriesInRegisters ? q[m][d] : a[m];
                    mma_m16n8k16<T>(scores[m][2 * n], of_q, b[0], b[1]);
                    mma_m16n8k16<T>(scores[m][2 * n + 1], of_q, b[2], b[3]);
                }
            }
        }

        // Rows counted from the block's first.
        const Sequence here{0, 0, 0, s.seqlen_k, opaque(first_row + s.offset)};
        const Range seen_by_all = keys_seen_by_all(args, here, 0, kBlockM - 1);
        const int key = block * kBlockN + 2 * (lane_here % 4);
        const bool whole =
            block * kBlockN >= seen_by_all.begin && block * kBlockN + kBlockN <= seen_by_all.end;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            if constexpr (kFeatured) scale_scores(args, scores[m]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = warp_row + 16 * m + 8 * half + lane_here / 4;
                if (kFeatured && args.alibi_slopes)
                    add_alibi(scores[m], half, slope, key - row - here.offset);
                if (!whole) {
                    const Range range = keys_seen(args, here, row, row);
                    hide_scores(scores[m], half, {range.begin - key, range.end - key});
                }
            }
            softmax_step(scores[m], acc[m], row_max[m], row_sum[m], factor);
            if (kFeatured && args.seed)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    drop_weights(args, scores[m], half,
                                 first_row + warp_row + 16 * m + 8 * half + lane_here / 4, key,
                                 head, batch);
        }

        uint32_t p[kRowTiles][kBlockN / 16][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int n = 0; n < kBlockN / 16; ++n) weights_fragment<T>(p[m][n], scores[m], n);

        cp_async_wait<2 * C::kStages - 2>();
        barrier();
        load_keys(block + C::kStages);
        const KeyTile value_tile = tile_of(block, 1);
#pragma unroll
        for (int n = 0; n < kBlockN / 16; ++n) {
#pragma unroll
            for (int d = 0; d < kHeadDim / 16; ++d) {
                uint32_t b[4];
                value_tile.fragment_b_trans(b, 16 * n, 16 * d, lane_here);
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m) {
                    mma_m16n8k16<T>(acc[m][2 * d], p[m][n], b[0], b[1]);
                    mma_m16n8k16<T>(acc[m][2 * d + 1], p[m][n], b[2], b[3]);
                }
            }
        }
    }

    cp_async_wait<0>();
    barrier();
    // Rows become whole by way of the warp's own rows of the queries' tile.
    const auto [out_batch, out_head, out_row, rows] = ld_shared<int4>(queries.base + C::kForEnd);
    const bool packed = args.cu_seqlens_q;
    const float sink = args.sinks ? ld_readonly(args.sinks + out_head) * kLog2E : -INFINITY;
    float* const lse = args.lse + (packed ? 0 : out_batch * args.lse_batch_stride) +
                       out_head * args.lse_head_stride + out_row;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + 16 * m + 8 * half + lane / 4;
            float top = row_max[m][half] * factor, sum = row_sum[m][half];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            float rescale = add_sink(top, sum, sink);
            rescale = sum == 0.0f ? 0.0f : rescale * reciprocal_approx(sum);
            if (kFeatured && args.seed) rescale *= args.keep_scale;
            if (args.lse && lane % 4 == 0 && row < rows)
                st_global(lse + row, sum == 0.0f ? -INFINITY : (top + log2_approx(sum)) * kLn2);
#pragma unroll
            for (int d = 0; d < kHeadDim / 8; ++d)
                st_shared(
                    queries.at(row, d) + 4 * (lane % 4),
                    pack<T>(acc[m][d][2 * half] * rescale, acc[m][d][2 * half + 1] * rescale));
        }
    warp_sync();
    T* const out = static_cast<T*>(args.out) +
                   row_offset(args.out_strides, packed, out_batch, out_head, out_row, 0);
    queries.template store<kWarpM>(out, args.out_strides.row, rows, args.head_dim_v, warp_row,
                                   lane);
}

template <class C>
void launch_fwd(const AttentionFwdArgs& args) {
    const int64_t blocks = (args.seqlen_q + C::kBlockM - 1) / C::kBlockM;
    const int64_t batches_heads = int64_t(args.batch) * args.heads;
    if (blocks * batches_heads > INT32_MAX)
        throw std::invalid_argument("attention: more than 2^31 blocks of queries");
    if (blocks * batches_heads == 0) return;
    int64_t section = 1;
    if (args.window_right != kUnbounded) {
        const int64_t head_bytes = int64_t(args.seqlen_k) * (args.head_dim + args.head_dim_v) * 2;
        const int64_t group_size = args.heads / args.heads_kv;
        section = std::clamp<int64_t>(kL2Bytes * group_size / std::max<int64_t>(head_bytes, 1), 1,
                                      batches_heads);
    }
    launch(attention_fwd_kernel<C>, dim3(unsigned(blocks * batches_heads)), C::kThreads, C::kShared,
           args.stream, args, int(blocks), int(section));
}

// Registers and shared memory bound the tiles; they leave room for two blocks a multiprocessor up
// to a head_dim of 128. Warps have 32 rows where they can, and so read keys and values half as
// often as with 16. All but the roomy fit in the 99 KiB of a block on sm_86.
template <class T>
void launch_fwd_of(const AttentionFwdArgs& args) {
    const int head_dim = std::max(args.head_dim, args.head_dim_v);
    const bool roomy = current_device().shared >= 128 << 10;
    if (args.softcap != 0.0f || args.alibi_slopes || args.seed) {
        if (head_dim <= 32) return launch_fwd<FwdConfig<T, 32, 128, 64, 4, 2, true>>(args);
        if (head_dim <= 64) return launch_fwd<FwdConfig<T, 64, 128, 64, 4, 2, true>>(args);
        if (head_dim <= 96) return launch_fwd<FwdConfig<T, 96, 64, 64, 4, 1, true>>(args);
        if (head_dim <= 128) return launch_fwd<FwdConfig<T, 128, 64, 64, 4, 1, true>>(args);
        if (head_dim <= 192) return launch_fwd<FwdConfig<T, 192, 128, 64, 8, 1, true>>(args);
        return launch_fwd<FwdConfig<T, 256, 64, 64, 4, 1, true>>(args);
    }
    if (head_dim <= 32) return launch_fwd<FwdConfig<T, 32, 128, 64, 4, 2, false>>(args);
    if (head_dim <= 64) return launch_fwd<FwdConfig<T, 64, 128, 64, 4, 2, false>>(args);
    if (head_dim <= 96) return launch_fwd<FwdConfig<T, 96, 128, 64, 4, 1, false>>(args);
    if (head_dim <= 128) {
        if (roomy) return launch_fwd<FwdConfig<T, 128, 128, 64, 4, 1, false>>(args);
        return launch_fwd<FwdConfig<T, 128, 128, 32, 4, 1, false>>(args);
    }
    if (head_dim <= 192) return launch_fwd<FwdConfig<T, 192, 128, 64, 8, 1, false>>(args);
    if (roomy) return launch_fwd<FwdConfig<T, 256, 128, 64, 8, 1, false>>(args);
    launch_fwd<FwdConfig<T, 256, 128, 32, 8, 1, false>>(args);
}

// Rows (queries of all heads that share keys) are few enough for the kernel of attention_decode.cu,
// where each tile of 16 reads keys and values anew, if only from L2.
bool few_rows(const AttentionArgs& args) {
    const int64_t rows = int64_t(args.seqlen_q) * (args.heads / std::max(args.heads_kv, 1));
    return rows <= 64 && 16 * rows <= std::max(256, args.seqlen_k);
}

}  // namespace

void attention_fwd(const AttentionFwdArgs& args) {
    if (few_rows(args)) return attention_decode_sm80(args);
    if (attention_fwd_sm90_takes(args)) return attention_fwd_sm90(args);
    attention_fwd_sm80(args);
}

void attention_fwd_sm80(const AttentionFwdArgs& args) {
    args.bfloat16 ? launch_fwd_of<bfloat16>(args) : launch_fwd_of<float16>(args);
}

int attention_splits(const AttentionArgs& args) {
    if (!few_rows(args)) return 1;
    const int64_t rows = int64_t(args.seqlen_q) * args.heads / std::max(args.heads_kv, 1);
    const int64_t blocks = int64_t(args.batch) * args.heads_kv * ((rows + 15) / 16);
    const int64_t seen = int64_t(args.window_left) + args.window_right + args.seqlen_q;
    const int64_t keys = std::min<int64_t>(args.seqlen_k, seen);
    // Two blocks a multiprocessor run at a time, for a time that grows with their keys. What a
    // block costs beside them, and what combining costs, in keys: estimates.
    constexpr int64_t kStart = 64, kCombine = 128, kLeast = 256, kMost = 128;
    const int64_t at_a_time = 2 * current_device().processors;
    const auto time_of = [&](int64_t splits) {
        const int64_t waves = (blocks * splits + at_a_time - 1) / at_a_time;
        return waves * ((keys + splits - 1) / splits + kStart) + (splits > 1 ? kCombine : 0);
    };
    int64_t best = 1;
    for (int64_t splits = 2; splits <= std::min(kMost, keys / kLeast); ++splits)
        if (time_of(splits) < time_of(best)) best = splits;
    return int(best);
}

}  // namespace fastattn::cuda
