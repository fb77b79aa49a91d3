// Attention of few queries to many keys, as in decoding.
//
// A block owns up to 16 rows, queries of all heads that share keys (row r is query r / group_size
// of the group's head r % group_size), and one of `splits` parts of the keys they see. Its warps
// take tiles of keys in turn, each through its own cp.async pipeline, so that none waits for
// another, and merge their online softmaxes in the end. A second kernel combines the parts
// (Flash-Decoding, Dao et al. 2023). The floor is one read of keys and values.
#include <algorithm>
#include <stdexcept>

#include "cuda/attention_softmax.cuh"
#include "cuda/launch.cuh"

namespace fastattn::cuda {
namespace {

constexpr int kRows = 16;

// About 8 KiB of keys and values a warp and stage.
template <class T_, int head_dim>
struct Decode {
    using T = T_;
    static constexpr int kHeadDim = head_dim;
    static constexpr int kBlockN = head_dim <= 64 ? 32 : 16;
    static constexpr int kStages = 2;
    static constexpr int kWarps = head_dim <= 128 ? 4 : 2;
    static constexpr int kThreads = 32 * kWarps;
    using KeyTile = Tile<kBlockN, kHeadDim>;

    using QueryTile = Tile<kRows, kHeadDim>;

    // Of each warp, kStages tiles of keys and of values; the queries. In the end, in their place,
    // what each warp found: (kRows, kHeadDim) float32, rows padded to spread over banks, and each
    // row's maximum and sum.
    static constexpr int kWarpTiles = 2 * kStages * KeyTile::kBytes;
    static constexpr int kQueries = kWarps * kWarpTiles;
    static constexpr int kResultRow = 4 * kHeadDim + 32;
    static constexpr int kStatistics = kWarps * kRows * kResultRow;
    static constexpr int kShared =
        std::max(kQueries + QueryTile::kBytes, kStatistics + kWarps * kRows * 8);
};

// Of a row: its query, and its head among all.
struct Row {
    int query, head;
};
FASTATTN_DEVICE Row row_at(unsigned row, int head_kv, unsigned group_size) {
    return {int(row / group_size), int(head_kv * group_size + row % group_size)};
}

// Where a part's result of a row lies in partial_out and partial_lse, in rows.
FASTATTN_DEVICE int64_t partial_row(const AttentionArgs& a, int split, int batch, Row row) {
    return ((int64_t(split) * a.batch + batch) * a.heads + row.head) * a.seqlen_q + row.query;
}

FASTATTN_DEVICE float* lse_of(const AttentionFwdArgs& a, const Sequence& s, int batch, Row row) {
    return a.lse + (a.cu_seqlens_q ? 0 : batch * a.lse_batch_stride) +
           row.head * a.lse_head_stride + s.start_q + row.query;
}

FASTATTN_DEVICE float sink_of(const AttentionArgs& a, int head) {
    return a.sinks ? ld_readonly(a.sinks + head) * kLog2E : -INFINITY;
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 3)
    attention_decode_kernel(const __grid_constant__ AttentionFwdArgs args, unsigned row_tiles,
                            unsigned group_size) {
    using T = typename C::T;
    using KeyTile = typename C::KeyTile;
    constexpr int kHeadDim = C::kHeadDim, kBlockN = C::kBlockN, kStages = C::kStages;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const unsigned heads_kv = args.heads_kv, batch_head = blockIdx.x / row_tiles;
    const int split = blockIdx.y, batch = batch_head / heads_kv, head_kv = batch_head % heads_kv;
    const Sequence s = sequence_of(args, batch);
    const int first_row = blockIdx.x % row_tiles * kRows;
    const int row_count = min(kRows, int(s.seqlen_q * group_size) - first_row);
    if (row_count <= 0) return;

    const int first_query = unsigned(first_row) / group_size;
    const int last_query = unsigned(first_row + row_count - 1) / group_size;
    const Range seen = keys_seen(args, s, first_query, last_query);
    const Range seen_by_all = keys_seen_by_all(args, s, first_query, last_query);
    // In each round every warp takes a tile of keys.
    const int first_tile = seen.begin / kBlockN;
    const int end_tile = max(0, seen.end + kBlockN - 1) / kBlockN;
    const int all_rounds = (max(0, end_tile - first_tile) + C::kWarps - 1) / C::kWarps;
    const int share = (all_rounds + args.splits - 1) / args.splits;
    const int first_round = split * share, end_round = min(all_rounds, first_round + share);

    const typename C::QueryTile queries{dynamic_shared() + C::kQueries};  // (kRows, kHeadDim)
    if (warp == 0) {
        const auto row_of = [&](int local) {
            const Row row = row_at(first_row + min(local, row_count - 1), head_kv, group_size);
            return static_cast<const T*>(args.q) + row_offset(args.q_strides, args.cu_seqlens_q,
                                                              batch, row.head, s.start_q,
                                                              row.query);
        };
        queries.template load_rows<32>(row_of, row_count, args.head_dim, lane);
    }
    cp_async_commit();

    // Of the warp: kStages tiles of keys (kBlockN, kHeadDim) and of values, in turn.
    const SharedAddress tiles = dynamic_shared() + warp * C::kWarpTiles;
    const KeyRows<T> keys(args, args.k, args.k_strides, s, batch, head_kv);
    const KeyRows<T> values(args, args.v, args.v_strides, s, batch, head_kv);
    const auto load = [&](int round) {
        const int key = (first_tile + round * C::kWarps + warp) * kBlockN;
        if (round < end_round && key < seen.end) {
            const SharedAddress to = tiles + round % kStages * 2 * KeyTile::kBytes;
            keys.template load<32>(KeyTile{to}, key, s.seqlen_k, args.head_dim, lane);
            values.template load<32>(KeyTile{to + KeyTile::kBytes}, key, s.seqlen_k,
                                     args.head_dim_v, lane);
        }
        cp_async_commit();
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) load(first_round + stage);

    Row rows[2];
    float slopes[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        rows[half] = row_at(first_row + lane / 4 + 8 * half, head_kv, group_size);
        slopes[half] = alibi_slope(args, batch, rows[half].head);
    }
    cp_async_wait<kStages>();
    barrier();
    float acc[kHeadDim / 8][4] = {};  // (kRows, kHeadDim)
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
    for (int round = first_round; round < end_round; ++round) {
        cp_async_wait<kStages - 1>();
        warp_sync();
        const int tile_key = (first_tile + round * C::kWarps + warp) * kBlockN;
        if (tile_key < seen.end) {
            const SharedAddress from = tiles + round % kStages * 2 * KeyTile::kBytes;
            const KeyTile key_tile{from}, value_tile{from + KeyTile::kBytes};
            float scores[kBlockN / 8][4] = {};  // (kRows, kBlockN)
#pragma unroll
            for (int d = 0; d < kHeadDim / 16; ++d) {
                uint32_t a[4];
                queries.fragment_a(a, 0, 16 * d);
#pragma unroll
                for (int n = 0; n < kBlockN / 16; ++n) {
                    uint32_t b[4];
                    key_tile.fragment_b(b, 16 * n, 16 * d);
                    mma_m16n8k16<T>(scores[2 * n], a, b[0], b[1]);
                    mma_m16n8k16<T>(scores[2 * n + 1], a, b[2], b[3]);
                }
            }

            const int key = tile_key + 2 * (lane % 4);
            const bool whole =
                tile_key >= seen_by_all.begin && tile_key + kBlockN <= seen_by_all.end;
            scale_scores(args, scores);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = rows[half].query;
                if (args.alibi_slopes)
                    add_alibi(scores, half, slopes[half], key - query - s.offset);
                if (!whole) {
                    const Range range = keys_seen(args, s, query, query);
                    hide_scores(scores, half, {range.begin - key, range.end - key});
                }
            }
            softmax_step(scores, acc, row_max, row_sum, 1.0f);
            if (args.seed)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    drop_weights(args, scores, half, rows[half].query, key, rows[half].head, batch);
#pragma unroll
            for (int n = 0; n < kBlockN / 16; ++n) {
                uint32_t p[4];
                weights_fragment<T>(p, scores, n);
#pragma unroll
                for (int d = 0; d < kHeadDim / 16; ++d) {
                    uint32_t b[4];
                    value_tile.fragment_b_trans(b, 16 * n, 16 * d);
                    mma_m16n8k16<T>(acc[2 * d], p, b[0], b[1]);
                    mma_m16n8k16<T>(acc[2 * d + 1], p, b[2], b[3]);
                }
            }
        }
        warp_sync();
        load(round + kStages);
    }

    // The results of all warps, where their tiles were.
    cp_async_wait<0>();
    barrier();
    const SharedAddress results = dynamic_shared(), statistics = results + C::kStatistics;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = row_sum[half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const int row = warp * kRows + 8 * half + lane / 4;
        if (lane % 4 == 0) st_shared(statistics + row * 8, float2{row_max[half], sum});
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d)
            st_shared(results + row * C::kResultRow + (8 * d + lane % 4 * 2) * 4,
                      float2{acc[d][2 * half], acc[d][2 * half + 1]});
    }
    barrier();
    // Four columns a thread.
    constexpr int kQuads = kHeadDim / 4;
    for (int i = thread; i < row_count * kQuads; i += C::kThreads) {
        const int local = i / kQuads, column = i % kQuads * 4;
        const Row row = row_at(first_row + local, head_kv, group_size);
        float2 found[C::kWarps];  // maximum and sum
        float top = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < C::kWarps; ++w) {
            found[w] = ld_shared<float2>(statistics + (w * kRows + local) * 8);
            top = fmaxf(top, found[w].x);
        }
        const float shift = top == -INFINITY ? 0.0f : top;
        float4 out{};
#pragma unroll
        for (int w = 0; w < C::kWarps; ++w) {
            const float weight = exp2_approx(found[w].x - shift);
            const float4 part =
                ld_shared<float4>(results + (w * kRows + local) * C::kResultRow + column * 4);
            sum += weight * found[w].y;
            out.x += weight * part.x, out.y += weight * part.y;
            out.z += weight * part.z, out.w += weight * part.w;
        }
        float rescale = args.splits == 1 ? add_sink(top, sum, sink_of(args, row.head)) : 1.0f;
        rescale = sum == 0.0f ? 0.0f : rescale * reciprocal_approx(sum);
        if (args.seed) rescale *= args.keep_scale;
        out.x *= rescale, out.y *= rescale, out.z *= rescale, out.w *= rescale;
        const float lse = sum == 0.0f ? -INFINITY : top + log2_approx(sum);
        if (args.splits > 1) {
            const int64_t to = partial_row(args, split, batch, row);
            if (column == 0) st_global(args.partial_lse + to, lse);
            if (column < args.head_dim_v)
                st_global(
                    reinterpret_cast<float4*>(args.partial_out + to * args.head_dim_v + column),
                    out);
            continue;
        }
        if (args.lse && column == 0) st_global(lse_of(args, s, batch, row), lse * kLn2);
        T* const to = static_cast<T*>(args.out) + row_offset(args.out_strides, args.cu_seqlens_q,
                                                             batch, row.head, s.start_q, row.query);
        if (column < args.head_dim_v)
            st_global(reinterpret_cast<uint2*>(to + column),
                      uint2{pack<T>(out.x, out.y), pack<T>(out.z, out.w)});
    }
}

constexpr int kCombineWarps = 4;

// A warp a row (batch, head, query): the parts' results, each weighted by its share of the sum.
template <class T>
__global__ void __launch_bounds__(32 * kCombineWarps, 8)
    attention_combine_kernel(const __grid_constant__ AttentionFwdArgs args) {
    const int lane = threadIdx.x % 32;
    const int64_t index = int64_t(blockIdx.x) * kCombineWarps + threadIdx.x / 32;
    const int64_t batch_head = index / args.seqlen_q;
    if (batch_head >= int64_t(args.batch) * args.heads) return;
    const int batch = batch_head / args.heads;
    const Row row{int(index % args.seqlen_q), int(batch_head % args.heads)};
    const Sequence s = sequence_of(args, batch);
    if (row.query >= s.seqlen_q) return;
    const int64_t first = partial_row(args, 0, batch, row);
    const int64_t stride = partial_row(args, 1, 0, {0, 0});

    float top = -INFINITY, sum = 0.0f;
    for (int split = lane; split < args.splits; split += 32)
        top = fmaxf(top, ld_readonly(args.partial_lse + first + split * stride));
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) top = fmaxf(top, shuffle_xor(top, lanes));
    const float shift = top == -INFINITY ? 0.0f : top;
    for (int split = lane; split < args.splits; split += 32)
        sum += exp2_approx(ld_readonly(args.partial_lse + first + split * stride) - shift);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) sum += shuffle_xor(sum, lanes);
    float rescale = add_sink(top, sum, sink_of(args, row.head));
    rescale = sum == 0.0f ? 0.0f : rescale * reciprocal_approx(sum);
    if (args.lse && lane == 0)
        st_global(lse_of(args, s, batch, row),
                  sum == 0.0f ? -INFINITY : (top + log2_approx(sum)) * kLn2);

    T* const to = static_cast<T*>(args.out) + row_offset(args.out_strides, args.cu_seqlens_q, batch,
                                                         row.head, s.start_q, row.query);
    for (int column = 4 * lane; column < args.head_dim_v; column += 128) {
        float4 out{};
#pragma unroll 4
        for (int split = 0; split < args.splits; ++split) {
            const int64_t from = first + split * stride;
            const float weight = exp2_approx(ld_readonly(args.partial_lse + from) - shift);
            const float4 part = ld_readonly(reinterpret_cast<const float4*>(
                args.partial_out + from * args.head_dim_v + column));
            out.x += weight * part.x, out.y += weight * part.y;
            out.z += weight * part.z, out.w += weight * part.w;
        }
        st_global(reinterpret_cast<uint2*>(to + column),
                  uint2{pack<T>(out.x * rescale, out.y * rescale),
                        pack<T>(out.z * rescale, out.w * rescale)});
    }
}

// A grid's first dim takes so many blocks.
unsigned grid_of(int64_t blocks) {
    if (blocks > INT32_MAX) throw std::invalid_argument("attention: more than 2^31 blocks");
    return unsigned(blocks);
}

template <class C>
void launch_decode(const AttentionFwdArgs& args) {
    const int group_size = args.heads / args.heads_kv;
    const int row_tiles = (args.seqlen_q * group_size + kRows - 1) / kRows;
    const int64_t blocks = int64_t(args.batch) * args.heads_kv * row_tiles;
    launch(attention_decode_kernel<C>, dim3(grid_of(blocks), unsigned(args.splits)), C::kThreads,
           C::kShared, args.stream, args, unsigned(row_tiles), unsigned(group_size));
    if (args.splits == 1) return;
    const int64_t rows = int64_t(args.batch) * args.heads * args.seqlen_q;
    launch(attention_combine_kernel<typename C::T>,
           dim3(grid_of((rows + kCombineWarps - 1) / kCombineWarps)), 32 * kCombineWarps, 0,
           args.stream, args);
}

template <class T>
void launch_decode_of(const AttentionFwdArgs& args) {
    const int head_dim = std::max(args.head_dim, args.head_dim_v);
    if (head_dim <= 32) return launch_decode<Decode<T, 32>>(args);
    if (head_dim <= 64) return launch_decode<Decode<T, 64>>(args);
    if (head_dim <= 96) return launch_decode<Decode<T, 96>>(args);
    if (head_dim <= 128) return launch_decode<Decode<T, 128>>(args);
    if (head_dim <= 192) return launch_decode<Decode<T, 192>>(args);
    launch_decode<Decode<T, 256>>(args);
}

}  // namespace

void attention_decode_sm80(const AttentionFwdArgs& args) {
    if (!args.batch || !args.heads || !args.seqlen_q) return;
    args.bfloat16 ? launch_decode_of<bfloat16>(args) : launch_decode_of<float16>(args);
}

}  // namespace fastattn::cuda
