// Attention backward (FlashAttention-2, Dao, arXiv 2307.08691, section 3.1): P is computed again
// from lse, dS = P * (dP - delta) with delta = rowsum(dout * out) - dlse.
//
// A task owns one key/value head of one sequence: dK, dV and the dQ of its group. It walks the
// keys in blocks, packs K and V once per block, and takes the queries that see the block in blocks
// of kBlockM through five products: S, dP, dV, dK, dQ. With fewer heads than threads the keys are
// split, and the parts of dQ summed in order.
// Cost: 6 * head_dim + 4 * head_dim_v flops per visible score.
#include "cpu/attention.h"

#include <omp.h>

#include <new>

#include "cpu/simd.h"

#include "cpu/target_begin.h"

#include "cpu/attention_backward.h"
#include "cpu/attention_scores.h"
#include "cpu/scratch.h"

namespace {

constexpr int64_t kSmallWork = 1 << 18;  // multiplications per product for one thread

template <class Dot>
class Task {
    typedef typename Dot::Element Element;
    static constexpr int kPair = Dot::kPair, kTileRows = Dot::kRows;

  public:
    Task(const AttentionBwdArgs& args, const Layout<Dot>& layout, bool own_dq)
        : call(args),
          a(args),
          l(layout),
          features(has_features(args)),
          whole_dbias(args.dbias && has_every_score(args)),
          plain(args.softcap == 0 && !args.dropout.threshold && (!args.dbias || whole_dbias)),
          log2_scale(features ? 1.0f : args.softmax_scale * kLog2E) {
        const int64_t rows = l.group * l.blocks_m * kBlockM;
        const auto place = [&](uintptr_t at) {
            const uintptr_t begin = at;
            const auto take = [&](auto*& pointer, int64_t count) {
                pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
                at += round_up(count * sizeof(float), 64);
            };
            take(lse2, rows), take(correction, rows), take(delta, rows);
            take(q_rows, kBlockM * l.stride), take(dout_rows, kBlockM * l.stride_v);
            take(q_panels, kBlockM / kPair * l.width);
            take(dout_panels, kBlockM / kPair * l.width_v);
            take(staging, l.block_n * std::max(l.stride, l.stride_v));
            take(k_transposed, l.block_n * l.depth), take(v_transposed, l.block_n * l.depth_v);
            take(k_panels, l.block_n / kPair * l.width);
            take(dk, l.block_n * l.width), take(dv, l.block_n * l.width_v);
            take(p, kBlockM / kPair * kScoresStride), take(ds, kBlockM / kPair * kScoresStride);
            take(ds_rows, kPair == 1 ? 0 : kBlockM / kPair * kScoresStride);
            take(scores, kTileRows * kScoresStride), take(dp, kTileRows * kScoresStride);
            take(capped, kBlockN), take(factors, kBlockN), take(bias_grad, kBlockN);
            take(own, own_dq ? l.dq_size : 0);
            return int64_t(at - begin);
        };
        place(reinterpret_cast<uintptr_t>(scratch<char>(place(0), 4)));
        if (kPair == 1) ds_rows = ds;
    }

    // Keys [key_begin, key_end) of key/value head (b, head_kv). dQ, unscaled, goes to `part`;
    // without one it is finished and stored.
    void run(int64_t b, int64_t head_kv, int64_t key_begin, int64_t key_end, float* part) {
        if (call.cu_seqlens_q) {
            a = one_sequence(call, b), l = Layout<Dot>(a);
            key_end = std::min(key_end, a.seqlen_k);
        }
        float* dq = part ? part : own;
        for (int64_t block = 0; block < l.group * l.blocks_m; ++block)
            clear_rows(dq + block * l.block_dq, kBlockM, a.seqlen_q - block % l.blocks_m * kBlockM,
                       l.width);
        prepare_rows(b, head_kv, key_begin == 0);
        for (int64_t j = key_begin; j < key_end; j += l.block_n)
            key_block(b, head_kv, j, std::min(l.block_n, key_end - j), dq);
        if (!part)
            for (int64_t block = 0; block < l.group * l.blocks_m; ++block)
                store_dq(a, l, b, head_kv, block, dq + block * l.block_dq);
    }

    // `block` counts the blocks of queries of all heads of the group.
    static void store_dq(const AttentionBwdArgs& a, const Layout<Dot>& l, int64_t b,
                         int64_t head_kv, int64_t block, const float* dq) {
        const int64_t h = head_kv * l.group + block / l.blocks_m;
        const int64_t i = block % l.blocks_m * kBlockM;
        store_rows(a.dtype, dq, kBlockM, std::min(kBlockM, a.seqlen_q - i), a.head_dim,
                   a.softmax_scale, at(a.dq, a.dtype, a.dq_strides, b, h, i), a.dq_strides[2]);
    }

  private:
    // lse in units of log2, +inf (its weights are 0) where a row sees no key or is padding, and
    // delta.
    void prepare_rows(int64_t b, int64_t head_kv, bool first_part) {
        for (int64_t g = 0; g < l.group; ++g) {
            const int64_t h = head_kv * l.group + g;
            const int64_t lse_at = b * a.lse_strides[0] + h * a.lse_strides[1];
            for (int64_t i = 0; i < l.blocks_m * kBlockM; ++i) {
                const int64_t row = g * l.blocks_m * kBlockM + i;
                lse2[row] = INFINITY, correction[row] = 1.0f, delta[row] = 0.0f;
                if (i >= a.seqlen_q) continue;
                if (a.lse[lse_at + i] != -INFINITY) {
                    // What rounding lse2 loses would be an error of the whole row's weights.
                    const double exact = a.lse[lse_at + i] * 1.4426950408889634;
                    lse2[row] = float(exact);
                    correction[row] = float(1.0 - (exact - lse2[row]) * 0.6931471805599453);
                    delta[row] =
                        row_product(a.dtype, at(a.out, a.dtype, a.out_strides, b, h, i),
                                    at(a.dout, a.dtype, a.dout_strides, b, h, i), a.head_dim_v);
                    if (a.dlse) delta[row] -= a.dlse[lse_at + i];
                }
                if (first_part) a.delta[lse_at + i] = delta[row];
            }
        }
    }

    // Keys [j, j + count) against every query that sees one.
    void key_block(int64_t b, int64_t head_kv, int64_t j, int64_t count, float* dq) {
        char* dk_to = at(a.dk, a.dtype, a.dk_strides, b, head_kv, j);
        char* dv_to = at(a.dv, a.dtype, a.dv_strides, b, head_kv, j);
        clear_rows(dk, l.block_n, Dot::kMatrix ? l.block_n : count, l.width);
        clear_rows(dv, l.block_n, Dot::kMatrix ? l.block_n : count, l.width_v);
        const int64_t seqlen_k =
            a.seqlens_k ? std::min<int64_t>(a.seqlens_k[b], a.seqlen_k) : a.seqlen_k;
        const int64_t valid = std::min(count, seqlen_k - j);
        const KeyRange queries = valid > 0 ? seeing(b, j, j + valid) : KeyRange{0, 0};
        if (queries.begin < queries.end) {
            const int64_t padded = round_up(valid, kPanel);
            copy_rows<Dot>(a.dtype, at(a.v, a.dtype, a.v_strides, b, head_kv, j), a.v_strides[2],
                           valid, a.head_dim_v, padded, l.stride_v, staging);
            pack_transposed_panels((const float*)staging, l.stride_v, valid, l.depth_v,
                                   (float*)v_transposed);
            copy_rows<Dot>(a.dtype, at(a.k, a.dtype, a.k_strides, b, head_kv, j), a.k_strides[2],
                           valid, a.head_dim, padded, l.stride, staging);
            pack_transposed_panels((const float*)staging, l.stride, valid, l.depth,
                                   (float*)k_transposed);
            pack_panels<Dot>(staging, l.stride, padded, a.head_dim, l.block_n, k_panels);
            for (int64_t g = 0; g < l.group; ++g)
                for (int64_t block = queries.begin / kBlockM; block * kBlockM < queries.end;
                     ++block)
                    query_block(b, head_kv * l.group + g, block * kBlockM, j, valid,
                                (g * l.blocks_m + block) * kBlockM,
                                dq + (g * l.blocks_m + block) * l.block_dq);
        }
        const auto store = Dot::kMatrix ? store_transposed : store_rows;
        store(a.dtype, dk, l.block_n, count, a.head_dim, a.softmax_scale, dk_to, a.dk_strides[2]);
        store(a.dtype, dv, l.block_n, count, a.head_dim_v, 1.0f, dv_to, a.dv_strides[2]);
    }

    // The queries that see one of the keys [begin, end) by the band.
    KeyRange seeing(int64_t b, int64_t begin, int64_t end) const {
        const int64_t offset = a.offsets ? a.offsets[b] : a.offset;
        KeyRange queries{0, a.seqlen_q};
        if (a.window_right < kUnbounded)
            queries.begin = std::max(queries.begin, begin - a.window_right - offset);
        if (a.window_left < kUnbounded)
            queries.end = std::min(queries.end, end + a.window_left - offset);
        return queries;
    }

    // Queries [i, i + kBlockM) of head (b, h) against the packed keys [j, j + count).
    void query_block(int64_t b, int64_t h, int64_t i, int64_t j, int64_t count, int64_t row,
                     float* dq) {
        const int64_t rows = std::min(kBlockM, a.seqlen_q - i);
        const int64_t padded = round_up(rows, kRowStep<Dot>);
        if (a.mask && all_masked(a, b, h, i, rows, j, count)) return;
        copy_rows<Dot>(a.dtype, at(a.q, a.dtype, a.q_strides, b, h, i), a.q_strides[2], rows,
                       a.head_dim, padded, l.stride, q_rows);
        pack_queries(q_rows, l.stride, padded, a.head_dim, q_panels);
        copy_rows<Dot>(a.dtype, at(a.dout, a.dtype, a.dout_strides, b, h, i), a.dout_strides[2],
                       rows, a.head_dim_v, padded, l.stride_v, dout_rows);
        pack_queries(dout_rows, l.stride_v, padded, a.head_dim_v, dout_panels);

        // The next block of queries comes from further away than the second-level cache.
        prefetch_rows(at(a.q, a.dtype, a.q_strides, b, h, i + rows), a.dtype, a.q_strides[2],
                      std::min(kBlockM, a.seqlen_q - i - rows), a.head_dim);
        prefetch_rows(at(a.dout, a.dtype, a.dout_strides, b, h, i + rows), a.dtype,
                      a.dout_strides[2], std::min(kBlockM, a.seqlen_q - i - rows), a.head_dim_v);

        const KeyRange first = visible_keys(a, b, i), last = visible_keys(a, b, i + rows - 1);
        const bool cut = last.begin > j || first.end < j + count;
        if (cut) {
            // The products below read whole rectangles, of which tiles skip what no row sees.
            const int64_t columns = round_up(count, kPanel);
            for (int64_t at = 0; at < padded / kPair * kScoresStride; at += kScoresStride) {
                std::fill_n((float*)p + at, columns, 0.0f);
                std::fill_n((float*)ds + at, columns, 0.0f);
            }
            if (kPair == 2) std::fill_n((float*)ds_rows, padded / kPair * kScoresStride, 0.0f);
        }
        for (int64_t r = 0; r < padded; r += kTileRows) {
            const KeyRange keys =
                tile_keys(b, i + r, std::min(i + rows, i + r + kTileRows), j, count);
            if (keys.begin < keys.end)
                score_rows(b, h, i + r, std::min<int64_t>(kTileRows, padded - r), r, row + r, j,
                           count, keys);
        }
        key_products(b, i, padded, j, count, cut);
        for (int64_t n = 0; n < a.head_dim; n += kPanel) {
            for (int64_t r = 0; r < padded; r += kTileRows) {
                KeyRange keys =
                    tile_keys(b, i + r, std::min(i + rows, i + r + kTileRows), j, count);
                if (keys.begin >= keys.end) continue;
                const int64_t begin = keys.begin / kPair / Dot::kDepthStep * Dot::kDepthStep;
                const int64_t end = round_up(ceil_div(keys.end, kPair), Dot::kDepthStep);
                product<Dot>(std::min<int64_t>(kTileRows, padded - r), a.head_dim - n,
                             ds_rows + r * (kScoresStride / kPair) + begin, kScoresStride / kPair,
                             1, k_panels + l.block_n / kPair * n + begin * kPanel, end - begin,
                             dq + kBlockM * n + r * kPanel, kPanel, true);
            }
        }
    }

    // Rows of Q or dout for the products over the queries.
    static void pack_queries(const Element* rows, int64_t stride, int64_t padded, int64_t columns,
                             Element* to) {
        if constexpr (Dot::kMatrix)
            transpose_pairs((const BF16*)rows, 2 * stride, padded, columns, kBlockM, (float*)to);
        else
            pack_panels<Dot>(rows, stride, padded, columns, kBlockM, to);
    }

    // The keys of the block that one of the queries [begin, end) sees, relative to j.
    KeyRange tile_keys(int64_t b, int64_t begin, int64_t end, int64_t j, int64_t count) const {
        if (begin >= end) return {0, 0};
        return {std::max<int64_t>(visible_keys(a, b, begin).begin - j, 0),
                std::min(visible_keys(a, b, end - 1).end - j, count)};
    }

    // P and dS of a tile's rows: r counts in the block, row in the task.
    void score_rows(int64_t b, int64_t h, int64_t i, int64_t rows, int64_t r, int64_t row,
                    int64_t j, int64_t count, KeyRange keys) {
        const int64_t left = keys.begin / kPanel * kPanel;
        const int64_t right = round_up(keys.end, kKeyStep<Dot>);
        for (int64_t m = 0; a.bias && m < std::min(rows, a.seqlen_q - i); ++m)
            prefetch_bias(a, b, h, i + m, j + left, std::min(right, count) - left);
        for (int64_t n = left; n < right; n += kPanel) {
            product<Dot>(rows, right - n, q_rows + r * l.stride, l.stride, 1,
                         k_transposed + n * l.depth, l.depth, scores + n, kScoresStride, false);
            product<Dot>(rows, right - n, dout_rows + r * l.stride_v, l.stride_v, 1,
                         v_transposed + n * l.depth_v, l.depth_v, dp + n, kScoresStride, false);
        }
        for (int64_t m = 0; m < rows; m += 2) {
            bool with_features = false;
            for (int64_t two = m; two < m + 2; ++two) {
                dbias_rows[two - m] =
                    whole_dbias && i + two < a.seqlen_q ? dbias_row(b, h, i + two) + j : nullptr;
                float *one_scores = scores + two * kScoresStride,
                      *one_dp = dp + two * kScoresStride;
                if (i + two >= a.seqlen_q) {
                    // Of padding, lse2 is +inf.
                    std::fill(one_scores + left, one_scores + right, 0.0f);
                    std::fill(one_dp + left, one_dp + right, 0.0f);
                    continue;
                }
                prepare_scores(b, h, i + two, j, count, left, right, one_scores, one_dp);
                if (plain) continue;
                apply_slopes(b, h, i + two, row + two, j, left, right, one_scores, one_dp);
                with_features = true;
            }
            if (with_features)
                finish_rows<false>(r + m, row + m, m, left, right, 0);
            else
                finish_rows<true>(r + m, row + m, m, left, right, a.seqlen_k - j);
        }
    }

    // Scores in units of log2 (before log2_scale without features), -inf where hidden.
    void prepare_scores(int64_t b, int64_t h, int64_t i, int64_t j, int64_t count, int64_t left,
                        int64_t right, float* one_scores, float* one_dp) {
        if (features)
            apply_features(a, b, h, i, j + left, std::min(right, count) - left, one_scores + left,
                           capped + left);
        const KeyRange seen = visible_keys(a, b, i);
        const int64_t begin = std::clamp(seen.begin - j, left, right);
        const int64_t end = std::clamp(std::min(seen.end - j, count), begin, right);
        // Of hidden keys nothing may stay that is not finite.
        std::fill(one_scores + left, one_scores + begin, -INFINITY);
        std::fill(one_dp + left, one_dp + begin, 0.0f);
        std::fill(one_scores + end, one_scores + right, -INFINITY);
        std::fill(one_dp + end, one_dp + right, 0.0f);
    }

    // Rows m and m + 1 of the tile into P and dS, in their products' layouts: from scores and dp,
    // or (not kFromScores) from weights and slopes that are finished in their place.
    template <bool kFromScores>
    void finish_rows(int64_t r, int64_t row, int64_t m, int64_t left, int64_t right, int64_t keys) {
        const Vec scale = splat(log2_scale);
        const Vec shift[2] = {splat(-lse2[row]), splat(-lse2[row + 1])};
        const Vec mean[2] = {splat(delta[row]), splat(delta[row + 1])};
        for (int64_t n = left; n < right; n += kLanes) {
            Vec weight[2], slope[2];
#pragma GCC unroll 2
            for (int two = 0; two < 2; ++two) {
                weight[two] = load(scores + (m + two) * kScoresStride + n);
                slope[two] = load(dp + (m + two) * kScoresStride + n);
                if (!kFromScores) continue;
                weight[two] = exp2(weight[two] * scale + shift[two]) * correction[row + two];
                slope[two] = weight[two] * (slope[two] - mean[two]);
                if (dbias_rows[two]) store(dbias_rows[two] + n, slope[two], keys - n);
            }
            if constexpr (kPair == 1) {
#pragma GCC unroll 2
                for (int two = 0; two < 2; ++two) {
                    store(p + (r + two) * kScoresStride + n, weight[two]);
                    store(ds + (r + two) * kScoresStride + n, slope[two]);
                }
            } else {
                const int64_t zipped_at = r / 2 * kScoresStride + n;
                HalfVec even, odd;
                store((float*)p + zipped_at, zip_narrow(weight[0], weight[1], even, odd));
                store((float*)ds + zipped_at, zip_narrow(slope[0], slope[1], even, odd));
                uint16_t* to = (uint16_t*)ds_rows + r * kScoresStride + n;
                __builtin_memcpy(to, &even, sizeof even);
                __builtin_memcpy(to + kScoresStride, &odd, sizeof odd);
            }
        }
    }

    // Weights and slopes of one row in the place of its scores and dp, with dropout, softcap and
    // the gradient of the bias.
    void apply_slopes(int64_t b, int64_t h, int64_t i, int64_t row, int64_t j, int64_t left,
                      int64_t right, float* one_scores, float* one_dp) {
        if (a.dropout.threshold) {
            std::fill(factors + left, factors + right, 1.0f);
            apply_dropout(a, b, h, i, j + left, right - left, factors + left);
        }
        const Vec scale = splat(log2_scale), shift = splat(-lse2[row]), mean = splat(delta[row]);
        const bool dropout = a.dropout.threshold != 0, softcap = a.softcap != 0;
        for (int64_t n = left; n < right; n += kLanes) {
            Vec weight = exp2(load(one_scores + n) * scale + shift) * correction[row];
            const Vec factor = dropout ? load(factors + n) : splat(1.0f);
            Vec slope = weight * (load(one_dp + n) * factor - mean);
            store(bias_grad + n, slope);
            if (softcap) {
                const Vec t = load(capped + n);
                // A hidden key's tanh may be that of garbage.
                slope = select(slope == Vec{}, slope, slope * (1.0f - t * t));
            }
            store(one_scores + n, weight * factor);
            store(one_dp + n, slope);
        }
        if (a.dbias) add_bias_gradient(dbias_row(b, h, i), j, left, right);
    }

    float* dbias_row(int64_t b, int64_t h, int64_t i) const {
        const Strides4& strides = a.dbias_strides;
        return a.dbias + b * strides[0] + h * strides[1] + i * strides[2];
    }

    void add_bias_gradient(float* to, int64_t j, int64_t left, int64_t right) {
        right = std::min(right, a.seqlen_k - j);
        if (a.dbias_strides[3] == 0) {
            Vec sum = {};
            for (int64_t n = left; n < right; n += kLanes)
                sum = sum + load(bias_grad + n, right - n);
            *to += reduce_add(sum);
            return;
        }
        to += j;
        for (int64_t n = left; n < right; n += kLanes)
            store(to + n,
                  whole_dbias ? load(bias_grad + n) : load(to + n, right - n) + load(bias_grad + n),
                  right - n);
    }

    // dV += P^T dout and dK += dS^T Q, each tile of keys over the queries that see it.
    void key_products(int64_t b, int64_t i, int64_t padded, int64_t j, int64_t count, bool cut) {
        const auto multiply = [&](const Element* weights, const Element* panels, int64_t columns,
                                  float* to) {
            for (int64_t n = 0; n < columns; n += Dot::kMatrix ? columns : kPanel) {
                for (int64_t m = 0; m < count; m += kTileRows) {
                    KeyRange seen{0, padded};
                    if (cut) {
                        seen = seeing(b, j + m, j + std::min<int64_t>(m + kTileRows, count));
                        seen = {std::max<int64_t>(seen.begin - i, 0),
                                std::min(seen.end - i, padded)};
                        if (seen.begin >= seen.end) continue;
                    }
                    const int64_t begin = seen.begin / kPair / Dot::kDepthStep * Dot::kDepthStep;
                    const int64_t end = round_up(ceil_div(seen.end, kPair), Dot::kDepthStep);
                    if constexpr (Dot::kMatrix) {
                        // Weights lie as B of a product wants it: the transpose of dK or dV.
                        matrix_product<Dot>(columns, std::min<int64_t>(kTileRows, count - m),
                                            panels + begin, kBlockM / kPair,
                                            weights + begin * kScoresStride + m, kScoresStride,
                                            end - begin, to + m, l.block_n, true);
                        continue;
                    }
                    product<Dot>(count - m, columns - n, weights + begin * kScoresStride + m, 1,
                                 kScoresStride, panels + kBlockM / kPair * n + begin * kPanel,
                                 end - begin, to + l.block_n * n + m * kPanel, kPanel, true);
                }
            }
        };
        multiply(p, dout_panels, a.head_dim_v, dv);
        multiply(ds, q_panels, a.head_dim, dk);
    }

    [[no_unique_address]] Registers<Dot> registers;
    const AttentionBwdArgs& call;
    AttentionBwdArgs a;  // of the task's sequence
    Layout<Dot> l;
    const bool features;
    const bool whole_dbias;  // each of its elements belongs to one score: stored, not added to
    const bool plain;
    float* dbias_rows[2];  // of the rows in finish_rows, from key j on; or null
    const float log2_scale;
    float *lse2, *correction, *delta;      // (group, blocks_m * kBlockM)
    Element *q_rows, *dout_rows;           // (kBlockM, stride)
    Element *q_panels, *dout_panels;       // (panel, kBlockM / kPair, kPanel), or the transpose
    Element* staging;                      // (block_n, stride)
    Element *k_transposed, *v_transposed;  // (panel, depth, kPanel)
    Element* k_panels;                     // (panel, block_n / kPair, kPanel)
    float *dk, *dv;                        // (panel, block_n, kPanel), or the transpose
    Element *p, *ds;                       // (kBlockM / kPair, kScoresStride)
    Element* ds_rows;                      // (kBlockM, kScoresStride / kPair)
    float *scores, *dp;                    // (kTileRows, kScoresStride)
    float *capped, *factors, *bias_grad;   // (block_n,)
    float* own;                            // (group, blocks_m, panel, kBlockM, kPanel)
};

template <class Dot>
void backward(const AttentionBwdArgs& a) {
    const Layout<Dot> layout(a);
    const int threads = omp_get_max_threads();
    // What shares a bias gradient runs in one task, one after the other.
    const int64_t batches = a.dbias && a.dbias_strides[0] == 0 ? 1 : a.batch;
    const int64_t heads = a.dbias && a.dbias_strides[1] == 0 ? 1 : a.heads_kv;
    const int64_t blocks = (a.seqlen_k + layout.block_n - 1) / layout.block_n;
    int64_t parts = 1;
    const bool divisible = !a.deterministic && !(a.dbias && a.dbias_strides[3] == 0);
    if (threads > 1 && divisible && batches * heads < 2 * threads)
        parts = std::clamp<int64_t>((2 * threads + batches * heads - 1) / (batches * heads), 1,
                                    std::max<int64_t>(blocks, 1));
    const int64_t part_keys = (blocks + parts - 1) / parts * layout.block_n;
    const bool small = a.batch * a.heads * a.seqlen_q * a.seqlen_k * a.head_dim < kSmallWork;
    if (small) parts = 1;
    float* partial = nullptr;
    if (parts > 1) partial = scratch<float>(a.batch * a.heads_kv * parts * layout.dq_size, 5);

    // A function, because clang compiles a parallel region itself for the baseline.
    const auto add = [](float* sum, const float* term, int64_t size) {
        for (int64_t n = 0; n < size; n += kLanes) store(sum + n, load(sum + n) + load(term + n));
    };

#pragma omp parallel num_threads(small ? 1 : threads)
    {
        Task<Dot> task(a, layout, parts == 1);
#pragma omp for schedule(dynamic, 1)
        for (int64_t index = 0; index < batches * heads * parts; ++index) {
            const int64_t part = index % parts, outer = index / parts;
            const int64_t begin = parts == 1 ? 0 : part * part_keys;
            const int64_t end = parts == 1 ? a.seqlen_k : std::min(a.seqlen_k, begin + part_keys);
            for (int64_t b = outer / heads; b < a.batch; b += batches)
                for (int64_t h = outer % heads; h < a.heads_kv; h += heads)
                    task.run(b, h, begin, end,
                             partial
                                 ? partial + ((b * a.heads_kv + h) * parts + part) * layout.dq_size
                                 : nullptr);
        }
        if (partial) {
            const int64_t blocks_q = layout.group * layout.blocks_m;
#pragma omp for schedule(static)
            for (int64_t index = 0; index < a.batch * a.heads_kv * blocks_q; ++index) {
                const int64_t head = index / blocks_q, block = index % blocks_q;
                const int64_t b = head / a.heads_kv;
                const AttentionBwdArgs one = a.cu_seqlens_q ? one_sequence(a, b) : a;
                const Layout<Dot> of_one(one);
                if (block >= of_one.group * of_one.blocks_m) continue;
                float* sum = partial + head * parts * layout.dq_size + block * layout.block_dq;
                for (int64_t part = 1; part < parts; ++part)
                    add(sum, sum + part * layout.dq_size, layout.block_dq);
                Task<Dot>::store_dq(one, of_one, b, head % a.heads_kv, block, sum);
            }
        }
    }
}

}  // namespace

void attention_bwd(const AttentionBwdArgs& a) {
#if FASTATTN_AVX512_BF16
    if (a.dtype == DType::bfloat16) return backward<DotBF16>(a);
#endif
    backward<DotF32>(a);
}

#include "cpu/target_end.h"
