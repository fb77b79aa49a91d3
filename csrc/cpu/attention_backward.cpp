// Attention backward (FlashAttention-2, Dao, arXiv 2307.08691, section 3.1.2).
//
// A task owns the gradients of one key/value head, or of a chunk of its keys if there are fewer
// heads than threads. For each block of kBlockN keys it visits the blocks of kBlockM queries that
// see them, recomputes the weights P from lse, and accumulates in float32
//     dV += P^T dO,  dS = P * (dO V^T - delta),  dK += scale dS^T Q,  dQ += scale dS K
// with delta = rowsum(dO * O) - dlse. No two tasks write to one place, so that the order of every
// sum is fixed. Cost: 6 * head_dim + 4 * head_dim_v flops per visible score.
#include "cpu/attention.h"

#include <omp.h>

#include <utility>

#include <vector>

#include "cpu/simd.h"

#include "cpu/target_begin.h"

#include "cpu/attention_scores.h"
#include "cpu/scratch.h"

namespace {

constexpr int kBlockM = 96;
constexpr int kBlockN = 96;
constexpr int64_t kBiasWorkspace = int64_t(1) << 28;  // bytes of partial gradients of a bias
static_assert(kBlockM % kTileRows == 0 && kBlockN % kTileRows == 0 && kBlockN % kPanel == 0);

// out[m] = or += A B for one panel of columns; see `tile` for A and B.
template <class Dot, int kVectors, bool kAdd>
void product_tile(const typename Dot::Element* a, int64_t a_row, int64_t a_k,
                  const typename Dot::Element* b, int64_t b_k, int64_t k, float* out,
                  int64_t out_stride) {
    Vec acc[kTileRows][kVectors];
    for (int m = 0; m < kTileRows; ++m)
        for (int n = 0; n < kVectors; ++n)
            acc[m][n] = kAdd ? load(out + m * out_stride + n * kLanes) : Vec{};
    tile<Dot, kTileRows, kVectors>(a, a_row, a_k, b, b_k, k, acc);
    for (int m = 0; m < kTileRows; ++m)
        for (int n = 0; n < kVectors; ++n) store(out + m * out_stride + n * kLanes, acc[m][n]);
}

// kTileRows rows of out += A B, over all `width` columns.
template <class Dot>
void add_product(const typename Dot::Element* a, int64_t a_row, int64_t a_k,
                 const typename Dot::Element* b, int64_t width, int64_t k, float* out) {
    int64_t n = 0;
    for (; n + kPanel <= width; n += kPanel)
        product_tile<Dot, kTileVectors, true>(a, a_row, a_k, b + n, width, k, out + n, width);
    for (; n < width; n += kLanes)
        product_tile<Dot, 1, true>(a, a_row, a_k, b + n, width, k, out + n, width);
}

template <class T, class Dot>
class Task {
    typedef Operand<T, Dot> Ops;
    typedef typename Dot::Element Element;
    static constexpr int kPair = Dot::kPair;

  public:
    explicit Task(const AttentionBwdArgs& args)
        : a(args),
          features(has_features(args)),
          group(args.heads / args.heads_kv),
          depth(round_up(args.head_dim, kPair) / kPair),
          depth_v(round_up(args.head_dim_v, kPair) / kPair),
          width(round_up(args.head_dim, kLanes)),
          width_v(round_up(args.head_dim_v, kLanes)) {
        int64_t at = 0;
        const auto take = [&at](int64_t count) {
            return std::exchange(at, at + round_up(count, 64));
        };
        const int64_t tiles[] = {take(kBlockN * depth),          take(kBlockN * depth_v),
                                 take(kBlockN / kPair * width),  take(kBlockM * depth + kLanes),
                                 take(kBlockM / kPair * width),  take(kBlockM * depth_v + kLanes),
                                 take(kBlockM / kPair * width_v)};
        Element* elements = scratch<Element>(at, 0);
        k_panels = elements + tiles[0], v_panels = elements + tiles[1],
        k_rows = elements + tiles[2];
        q_left = elements + tiles[3], q_right = elements + tiles[4];
        dout_left = elements + tiles[5], dout_right = elements + tiles[6];
        dk = scratch<float>(kBlockN * (width + width_v), 1);
        dv = dk + kBlockN * width;
        p = scratch<float>(2 * kBlockM * kBlockN, 2);
        ds = p + kBlockM * kBlockN;
        if constexpr (kPair == 2) {
            p_pairs = scratch<Element>(3 * kBlockM * kBlockN / 2, 4);
            ds_pairs = p_pairs + kBlockM * kBlockN / 2;
            ds_rows = ds_pairs + kBlockM * kBlockN / 2;
        }
    }

    // Keys [begin, end) of key/value head (b, head_kv); dq (group * seqlen_q, width) is added to.
    void run(int64_t b, int64_t head_kv, int64_t begin, int64_t end, float* dq, float* dbias) {
        const T* k = (const T*)a.k + b * a.k_strides[0] + head_kv * a.k_strides[1];
        const T* v = (const T*)a.v + b * a.v_strides[0] + head_kv * a.v_strides[1];
        for (int64_t j = begin; j < end; j += kBlockN) {
            const int64_t size = std::min<int64_t>(kBlockN, end - j);
            const T *k_block = k + j * a.k_strides[2], *v_block = v + j * a.v_strides[2];
            Ops::pack_keys(k_block, a.k_strides[2], size, a.head_dim, depth, k_panels);
            Ops::pack_keys(v_block, a.v_strides[2], size, a.head_dim_v, depth_v, v_panels);
            Ops::pack_values(k_block, a.k_strides[2], size, a.head_dim, width, k_rows);
            const int64_t padded = round_up(size, kPair) / kPair;
            std::memset((void*)(k_rows + padded * width), 0,
                        (kBlockN / kPair - padded) * width * sizeof(Element));
            std::memset(dk, 0, kBlockN * (width + width_v) * sizeof(float));
            for (int64_t g = 0; g < group; ++g)
                for (int64_t i = 0; i < a.seqlen_q; i += kBlockM)
                    query_block(b, head_kv * group + g, i, j, size,
                                dq + (g * a.seqlen_q + i) * width, dbias);
            write_rows(dk, width, size, a.head_dim, a.dk, a.dk_strides, b, head_kv, j);
            write_rows(dv, width_v, size, a.head_dim_v, a.dv, a.dv_strides, b, head_kv, j);
        }
    }

    void write_dq(int64_t b, int64_t head_kv, const float* dq) {
        for (int64_t g = 0; g < group; ++g)
            write_rows(dq + g * a.seqlen_q * width, width, a.seqlen_q, a.head_dim, a.dq,
                       a.dq_strides, b, head_kv * group + g, 0);
    }

  private:
    // Rounds rows of float32 into the gradient (b, h, first row) in the caller's dtype.
    static void write_rows(const float* from, int64_t stride, int64_t rows, int64_t columns,
                           void* to, const Strides3& strides, int64_t b, int64_t h, int64_t first) {
        T* base = (T*)to + b * strides[0] + h * strides[1] + first * strides[2];
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t n = 0; n < columns; n += kLanes)
                store(base + r * strides[2] + n, load(from + r * stride + n), columns - n);
    }

    void query_block(int64_t b, int64_t h, int64_t i, int64_t j, int64_t size, float* dq,
                     float* dbias) {
        const int64_t count = std::min<int64_t>(kBlockM, a.seqlen_q - i);
        const int64_t padded = round_up(count, kTileRows);
        const float* lse = a.lse + (b * a.heads + h) * a.seqlen_q + i;
        KeyRange seen[kBlockM];  // of each row, within the block
        bool any = false;
        for (int64_t r = 0; r < padded; ++r) {
            seen[r] = {0, 0};
            if (r >= count || lse[r] == -INFINITY) continue;
            const KeyRange keys = visible_keys(a, b, i + r);
            seen[r] = {std::clamp<int64_t>(keys.begin - j, 0, size),
                       std::clamp<int64_t>(keys.end - j, 0, size)};
            any |= seen[r].begin < seen[r].end;
        }
        if (!any) return;
        pack_rows((const T*)a.q + b * a.q_strides[0] + h * a.q_strides[1] + i * a.q_strides[2],
                  a.q_strides[2], count, padded, a.head_dim, depth, width, q_left, q_right);
        pack_rows((const T*)a.dout + b * a.dout_strides[0] + h * a.dout_strides[1] +
                      i * a.dout_strides[2],
                  a.dout_strides[2], count, padded, a.head_dim_v, depth_v, width_v, dout_left,
                  dout_right);
        int64_t first_row[kBlockN / kTileRows], end_row[kBlockN / kTileRows];
        std::fill_n(first_row, kBlockN / kTileRows, padded);
        std::fill_n(end_row, kBlockN / kTileRows, 0);
        for (int64_t r = 0; r < padded; r += kTileRows) {
            KeyRange keys{size, 0};
            for (int m = 0; m < kTileRows; ++m)
                if (seen[r + m].begin < seen[r + m].end)
                    keys = {std::min(keys.begin, seen[r + m].begin),
                            std::max(keys.end, seen[r + m].end)};
            if (keys.begin >= keys.end) {
                std::memset(p + r * kBlockN, 0, kTileRows * kBlockN * sizeof(float));
                std::memset(ds + r * kBlockN, 0, kTileRows * kBlockN * sizeof(float));
            } else {
                const int64_t left = keys.begin / kPanel * kPanel;
                const int64_t right = round_up(keys.end, kPanel);
                weights_and_slopes(b, h, i, j, r, left, right, seen, dbias);
                for (int64_t n = keys.begin / kTileRows; n * kTileRows < keys.end; ++n) {
                    first_row[n] = std::min(first_row[n], r);
                    end_row[n] = r + kTileRows;
                }
                if constexpr (kPair == 1)
                    add_product<Dot>(ds + r * kBlockN + left, kBlockN, 1, k_rows + left * width,
                                     width, right - left, dq_of(dq, r, count));
            }
            if constexpr (kPair == 2) {
                pair_rows(r);
                if (keys.begin < keys.end)
                    add_product<Dot>(ds_rows + r * kBlockN / 2, kBlockN / 2, 1, k_rows, width,
                                     kBlockN / 2, dq_of(dq, r, count));
            }
            flush_dq(dq, r, count);
        }
        for (int64_t n = 0; n * kTileRows < size; ++n) {
            if (first_row[n] >= end_row[n]) continue;
            const int64_t from = first_row[n] / kPair, rows = end_row[n] / kPair - from;
            const Element *p_left, *ds_left;
            if constexpr (kPair == 1)
                p_left = p, ds_left = ds;
            else
                p_left = p_pairs, ds_left = ds_pairs;
            const int64_t at = from * kBlockN + n * kTileRows;
            add_product<Dot>(p_left + at, 1, kBlockN, dout_right + from * width_v, width_v, rows,
                             dv + n * kTileRows * width_v);
            add_product<Dot>(ds_left + at, 1, kBlockN, q_right + from * width, width, rows,
                             dk + n * kTileRows * width);
        }
    }

    // Where the tile at row r adds to dq: in place, or in a buffer if it has rows beyond the last.
    float* dq_of(float* dq, int64_t r, int64_t count) {
        if (r + kTileRows <= count) return dq + r * width;
        std::memset(dq_tail, 0, sizeof(dq_tail));
        tail_used = true;
        return dq_tail;
    }
    void flush_dq(float* dq, int64_t r, int64_t count) {
        if (!std::exchange(tail_used, false)) return;
        for (int64_t n = 0; n < (count - r) * width; n += kLanes)
            store(dq + r * width + n, load(dq + r * width + n) + load(dq_tail + n));
    }

    // A matrix's rows as the left factor (rows, depth) and as the right one (rows / kPair, width).
    void pack_rows(const T* from, int64_t stride, int64_t count, int64_t padded, int64_t columns,
                   int64_t left_width, int64_t right_width, Element* left, Element* right) {
        for (int64_t r = 0; r < count; ++r)
            Ops::pack_row(from + r * stride, columns, left_width, left + r * left_width);
        std::memset((void*)(left + count * left_width), 0,
                    (padded - count) * left_width * sizeof(Element));
        Ops::pack_values(from, stride, count, columns, right_width, right);
        const int64_t packed = round_up(count, kPair) / kPair;
        std::memset((void*)(right + packed * right_width), 0,
                    (padded / kPair - packed) * right_width * sizeof(Element));
    }

    // P (with dropout) and scale * dS of kTileRows rows, 0 outside of what each row sees.
    void weights_and_slopes(int64_t b, int64_t h, int64_t i, int64_t j, int64_t r, int64_t left,
                            int64_t right, const KeyRange* seen, float* dbias) {
        float *p_tile = p + r * kBlockN, *ds_tile = ds + r * kBlockN;
        for (int64_t n = left; n < right; n += kPanel) {
            product_tile<Dot, kTileVectors, false>(q_left + r * depth, depth, 1,
                                                   k_panels + n * depth, kPanel, depth, p_tile + n,
                                                   kBlockN);
            product_tile<Dot, kTileVectors, false>(dout_left + r * depth_v, depth_v, 1,
                                                   v_panels + n * depth_v, kPanel, depth_v,
                                                   ds_tile + n, kBlockN);
        }
        for (int64_t m = 0; m < kTileRows; ++m) {
            float *p_row = p_tile + m * kBlockN, *ds_row = ds_tile + m * kBlockN;
            const KeyRange keys = seen[r + m];
            if (keys.begin >= keys.end) {
                std::memset(p_row, 0, kBlockN * sizeof(float));
                std::memset(ds_row, 0, kBlockN * sizeof(float));
                continue;
            }
            slope_row(b, h, i + r + m, j, left, right, keys, p_row, ds_row, dbias);
            std::fill(p_row, p_row + left, 0.0f), std::fill(p_row + right, p_row + kBlockN, 0.0f);
            std::fill(ds_row, ds_row + left, 0.0f),
                std::fill(ds_row + right, ds_row + kBlockN, 0.0f);
        }
    }

    void slope_row(int64_t b, int64_t h, int64_t i, int64_t j, int64_t left, int64_t right,
                   KeyRange keys, float* p_row, float* ds_row, float* dbias) {
        const int64_t row = (b * a.heads + h) * a.seqlen_q + i;
        const Vec delta = splat(a.delta[row]), shift = splat(-a.lse[row] * kLog2E);
        const Vec scale = splat(features ? 1.0f : a.softmax_scale * kLog2E);
        alignas(64) float capped[kBlockN];
        if (features)
            apply_features(a, b, h, i, j + left, std::min(right - left, a.seqlen_k - j - left),
                           p_row + left, a.softcap != 0 ? capped + left : nullptr);
        for (int64_t n = left; n < right; n += kLanes)
            store(p_row + n, exp2(load(p_row + n) * scale + shift));
        std::fill(p_row + left, p_row + keys.begin, 0.0f);
        std::fill(p_row + keys.end, p_row + right, 0.0f);
        if (a.dropout.threshold) {
            apply_dropout(a, b, h, i, j + left, right - left, ds_row + left);
        }
        for (int64_t n = left; n < right; n += kLanes) {
            Vec weight = load(p_row + n);
            // A hidden key's product may be anything, NaN included.
            Vec slope = select(weight != Vec{}, weight * (load(ds_row + n) - delta), Vec{});
            store(ds_row + n, slope);
        }
        if (dbias) add_to_bias(b, h, i, j, keys, ds_row, dbias);
        for (int64_t n = left; n < right; n += kLanes) {
            Vec slope = load(ds_row + n) * a.softmax_scale;
            if (a.softcap != 0) {
                Vec t = load(capped + n);
                slope = slope * (1.0f - t * t);
            }
            store(ds_row + n, slope);
        }
        if (a.dropout.threshold) apply_dropout(a, b, h, i, j + left, right - left, p_row + left);
    }

    void add_to_bias(int64_t b, int64_t h, int64_t i, int64_t j, KeyRange keys, const float* ds_row,
                     float* dbias) {
        const Strides4& s = a.dbias_strides;
        float* to = dbias + b * s[0] + h * s[1] + i * s[2] + j * s[3];
        if (s[3] == 0) {
            float sum = 0.0f;
            for (int64_t n = keys.begin; n < keys.end; ++n) sum += ds_row[n];
            *to += sum;
            return;
        }
        for (int64_t n = keys.begin; n < keys.end; ++n) to[n] += ds_row[n];
    }

    // bfloat16 forms of P and dS of kTileRows rows: pairs of rows, and dS in pairs of keys.
    void pair_rows(int64_t r) {
        if constexpr (kPair == 2) {
            for (int64_t m = r; m < r + kTileRows; m += 2) {
                for (int64_t n = 0; n < kBlockN; n += kLanes) {
                    pair_two(p, m, n, p_pairs);
                    pair_two(ds, m, n, ds_pairs);
                }
                for (int64_t n = 0; n < 2 * kBlockN; n += kLanes)
                    store((T*)ds_rows + m * kBlockN + n, load(ds + m * kBlockN + n));
            }
        }
    }
    static void pair_two(const float* matrix, int64_t m, int64_t n, Element* to) {
        HalfVec low = narrow(T{}, load(matrix + m * kBlockN + n));
        HalfVec high = narrow(T{}, load(matrix + (m + 1) * kBlockN + n));
        UintVec both =
            __builtin_convertvector(low, UintVec) | (__builtin_convertvector(high, UintVec) << 16);
        store((float*)(to + m / 2 * kBlockN + n), (Vec)both);
    }

    const AttentionBwdArgs& a;
    const bool features;
    const int64_t group, depth, depth_v, width, width_v;
    Element *k_panels, *v_panels, *k_rows;               // of the block of keys
    Element *q_left, *q_right, *dout_left, *dout_right;  // of the block of queries
    float *dk, *dv;                                      // (kBlockN, width), (kBlockN, width_v)
    float *p, *ds;                                       // (kBlockM, kBlockN)
    Element *p_pairs = nullptr, *ds_pairs = nullptr, *ds_rows = nullptr;
    bool tail_used = false;
    alignas(64) float dq_tail[kTileRows * 256];
};

template <class T>
void compute_delta(const AttentionBwdArgs& a, int64_t row) {
    const int64_t i = row % a.seqlen_q, h = row / a.seqlen_q % a.heads;
    const int64_t b = row / a.seqlen_q / a.heads;
    const T* out =
        (const T*)a.out + b * a.out_strides[0] + h * a.out_strides[1] + i * a.out_strides[2];
    const T* dout =
        (const T*)a.dout + b * a.dout_strides[0] + h * a.dout_strides[1] + i * a.dout_strides[2];
    Vec sum = {};
    for (int64_t n = 0; n < a.head_dim_v; n += kLanes)
        sum = sum + load(out + n, a.head_dim_v - n) * load(dout + n, a.head_dim_v - n);
    a.delta[row] = reduce_add(sum) - (a.dlse ? a.dlse[row] : 0.0f);
}

template <class T, class Dot>
void backward(const AttentionBwdArgs& a) {
    const int64_t heads = a.batch * a.heads_kv, group_rows = a.heads / a.heads_kv * a.seqlen_q;
    const int64_t width = round_up(a.head_dim, kLanes), dq_size = group_rows * width;
    const int64_t blocks = (a.seqlen_k + kBlockN - 1) / kBlockN;
    const double flops = 10.0 * heads * group_rows * a.seqlen_k * a.head_dim;
    const int threads = flops > 2e5 ? omp_get_max_threads() : 1;
    int64_t chunks = 1;
    if (heads < threads && !a.deterministic)
        chunks = std::clamp<int64_t>((2 * threads + heads - 1) / heads, 1, blocks);
    const int64_t chunk_keys = (blocks + chunks - 1) / chunks * kBlockN;
    const int64_t tasks = heads * chunks;
    // Tasks that share a bias's gradient get a copy for each thread, summed in order at the end.
    int64_t slots = 1;
    bool shared_bias = false;
    if (a.dbias) {
        const Strides4& s = a.dbias_strides;
        shared_bias =
            (s[0] == 0 && a.batch > 1) || (s[1] == 0 && a.heads > 1) || (s[3] == 0 && chunks > 1);
        if (shared_bias)
            slots = std::clamp<int64_t>(kBiasWorkspace / (4 * a.dbias_size), 1,
                                        std::min<int64_t>(a.deterministic ? 1 : threads, tasks));
    }
    std::vector<float> partial_bias((slots - 1) * a.dbias_size);
    float* all_dq = chunks > 1 ? scratch<float>(tasks * dq_size, 5) : nullptr;
    const int used = shared_bias ? int(slots) : int(std::min<int64_t>(threads, tasks));
#pragma omp parallel num_threads(used) if (used > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.batch * a.heads * a.seqlen_q; ++row) compute_delta<T>(a, row);
        Task<T, Dot> task(a);
        const int slot = omp_get_thread_num();
        float* dbias = a.dbias;
        if (shared_bias && slot > 0) dbias = partial_bias.data() + (slot - 1) * a.dbias_size;
        const auto one = [&](int64_t at) {
            const int64_t head = at / chunks, chunk = at % chunks;
            const int64_t b = head / a.heads_kv, head_kv = head % a.heads_kv;
            float* dq = all_dq ? all_dq + at * dq_size : scratch<float>(dq_size, 3);
            std::memset(dq, 0, dq_size * sizeof(float));
            task.run(b, head_kv, chunk * chunk_keys, std::min(a.seqlen_k, (chunk + 1) * chunk_keys),
                     dq, dbias);
            if (!all_dq) task.write_dq(b, head_kv, dq);
        };
        if (shared_bias) {
#pragma omp for schedule(static)
            for (int64_t at = 0; at < tasks; ++at) one(at);
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t at = 0; at < tasks; ++at) one(at);
        }
        if (all_dq) {
#pragma omp for schedule(static)
            for (int64_t head = 0; head < heads; ++head) {
                float* dq = all_dq + head * chunks * dq_size;
                for (int64_t c = 1; c < chunks; ++c)
                    for (int64_t n = 0; n < dq_size; n += kLanes)
                        store(dq + n, load(dq + n) + load(dq + c * dq_size + n));
                task.write_dq(head / a.heads_kv, head % a.heads_kv, dq);
            }
        }
    }
    for (int64_t slot = 1; slot < slots; ++slot)
        for (int64_t n = 0; n < a.dbias_size; ++n)
            a.dbias[n] += partial_bias[(slot - 1) * a.dbias_size + n];
}

}  // namespace

void attention_bwd(const AttentionBwdArgs& a) {
    switch (a.dtype) {
        case DType::float32:
            return backward<float, DotF32>(a);
        case DType::float16:
            return backward<F16, DotF32>(a);
        case DType::bfloat16:
            break;
    }
#if FASTATTN_AVX512_BF16
    return backward<BF16, DotBF16>(a);
#else
    return backward<BF16, DotF32>(a);
#endif
}

#include "cpu/target_end.h"
