// Attention forward with an online softmax (Milakov and Gimelshein, arXiv 1805.02867; tiling after
// FlashAttention-2, Dao, arXiv 2307.08691).
//
// A task owns up to kTaskRows rows of one key/value head: queries of all heads of its group, one
// head after the other. It walks the keys that its rows see in blocks of kBlockN, packs K^T once
// per block, and takes kTileRows rows at a time through scores, softmax and the product with V.
// With fewer tasks than threads the keys are split, and the parts combined in order.
// Cost: 2 * (head_dim + head_dim_v) flops per visible score.
#include "cpu/attention.h"

#include <omp.h>

#include <atomic>

#include "cpu/simd.h"

#include "cpu/target_begin.h"

#include "cpu/attention_forward.h"
#include "cpu/scratch.h"

namespace {

// Packing K and V costs a larger share where products are faster.
template <class Dot>
constexpr int kTaskRows = Dot::kMatrix ? 768 : 288;
constexpr int64_t kSplitKeys = 512;  // fewest keys of a part when keys are split

// One row of a task.
struct Row {
    int64_t h, i;
    KeyRange keys;
};

template <class T, class Dot>
class Task {
    typedef Operand<T, Dot> Ops;
    typedef typename Dot::Element Element;
    static constexpr int kPair = Dot::kPair, kTileRows = Dot::kRows;
    static constexpr int kMostRows = kTaskRows<Dot> + kTileRows;

  public:
    explicit Task(const AttentionFwdArgs& args)
        : call(args),
          a(args),
          features(has_features(args)),
          depth(round_up(args.head_dim, kPair * Dot::kDepthStep) / kPair),
          width(round_up(args.head_dim_v, kLanes)),
          log2_scale(features ? 1.0f : args.softmax_scale * kLog2E) {
        const bool in_place = kPair == 1 && sizeof(T) == 4 && width == a.head_dim_v;
        values_packed = !in_place;
        q = scratch<Element>(kMostRows * depth + kLanes, 0);
        keys = scratch<Element>(kBlockN * depth, 1);
        values = values_packed ? scratch<Element>(kBlockN / kPair * width, 2) : nullptr;
        acc = scratch<float>(kMostRows * width, 3);
        if (a.block_table) {
            gathered_k = scratch<T>(kBlockN * a.head_dim, 6);
            gathered_v = scratch<T>(kBlockN * a.head_dim_v + kLanes, 7);
        }
    }

    // Rows [first, first + count) of key/value head (b, head_kv), keys [key_begin, key_end). Where
    // `part` is given, the unnormalised result goes there: (count, width), then maxima and sums.
    void run(int64_t b, int64_t head_kv, int64_t first, int64_t count, int64_t key_begin,
             int64_t key_end, float* part) {
        begin(b, head_kv, first, count, key_begin == 0);
        // How many rows a task has depends on the threads and the batch, and so would the rounding.
        few = (a.deterministic ? a.heads / a.heads_kv * a.seqlen_q : count) <= kFewRows;
        KeyRange all{key_end, key_begin};
        for (int64_t r = 0; r < count; ++r) {
            KeyRange& seen = row[r].keys;
            seen = {std::max(seen.begin, key_begin), std::min(seen.end, key_end)};
            if (seen.begin < seen.end)
                all = {std::min(all.begin, seen.begin), std::max(all.end, seen.end)};
        }
        for (int64_t j = all.begin / kBlockN * kBlockN; j < all.end; j += kBlockN)
            block(b, head_kv, count, j, std::min<int64_t>(kBlockN, all.end - j));
        if (part) {
            std::memcpy(part, acc, count * width * sizeof(float));
            std::memcpy(part + count * width, row_max, count * sizeof(float));
            std::memcpy(part + count * (width + 1), row_sum, count * sizeof(float));
            return;
        }
        for (int64_t r = 0; r < count; ++r) finish(b, r);
    }

    // Sums the parts of rows [first, first + count), in order, and writes the result.
    void combine(int64_t b, int64_t head_kv, int64_t first, int64_t count, int64_t parts,
                 const float* part, int64_t part_size) {
        begin(b, head_kv, first, count, true);
        for (int64_t r = 0; r < count; ++r) {
            float largest = -INFINITY;
            for (int64_t p = 0; p < parts; ++p)
                largest = std::max(largest, part[p * part_size + count * width + r]);
            const float safe = largest == -INFINITY ? 0.0f : largest;
            float* to = acc + r * width;
            float sum = 0.0f;
            std::memset(to, 0, width * sizeof(float));
            for (int64_t p = 0; p < parts; ++p) {
                const float* from = part + p * part_size;
                const float factor = exp2(splat(from[count * width + r] - safe))[0];
                sum += from[count * (width + 1) + r] * factor;
                for (int64_t n = 0; n < width; n += kLanes)
                    store(to + n, load(to + n) + load(from + r * width + n) * factor);
            }
            row_max[r] = largest;
            row_sum[r] = sum;
            finish(b, r);
        }
    }

  private:
    void begin(int64_t b, int64_t head_kv, int64_t first, int64_t count, bool with_sink) {
        if (call.cu_seqlens_q) a = one_sequence(call, b);
        const int64_t group = a.heads / a.heads_kv;
        const int64_t padded = round_up(count, kTileRows);
        for (int64_t r = 0; r < count; ++r) {
            const int64_t h = head_kv * group + (first + r) / a.seqlen_q;
            const int64_t i = (first + r) % a.seqlen_q;
            row[r] = {h, i, visible_keys(a, b, i)};
            const T* from =
                (const T*)a.q + b * a.q_strides[0] + h * a.q_strides[1] + i * a.q_strides[2];
            Ops::pack_row(from, a.head_dim, depth, q + r * depth);
            const bool sink = a.sinks && with_sink;
            row_max[r] = sink ? a.sinks[h] * kLog2E : -INFINITY;
            row_sum[r] = sink ? 1.0f : 0.0f;
        }
        std::fill(row_max + count, row_max + padded + kLanes, -INFINITY);
        std::fill(row_sum + count, row_sum + padded + kLanes, 0.0f);
        for (int64_t r = count; r < padded; ++r) {
            row[r] = {0, 0, {0, 0}};
            std::memset((void*)(q + r * depth), 0, depth * sizeof(Element));
        }
        std::memset(acc, 0, padded * width * sizeof(float));
    }

    // All rows against keys [j, j + size).
    void block(int64_t b, int64_t head_kv, int64_t count, int64_t j, int64_t size) {
        k_rows = rows_of(a.k, a.k_strides, b, head_kv, j, size, a.head_dim, gathered_k);
        if (!few) Ops::pack_keys(k_rows.at, k_rows.stride, size, a.head_dim, depth, keys);
        const Rows v = rows_of(a.v, a.v_strides, b, head_kv, j, size, a.head_dim_v, gathered_v);
        const Element* v_rows = values;
        int64_t v_stride = width;
        if (values_packed)
            Ops::pack_values(v.at, v.stride, size, a.head_dim_v, width, values);
        else
            v_rows = (const Element*)v.at, v_stride = v.stride;
        for (int64_t r = 0; r < count; r += kTileRows) {
            const int64_t rows = std::min<int64_t>(kTileRows, count - r);
            KeyRange seen{size, 0};
            for (int64_t m = 0; m < rows; ++m) {
                const KeyRange keys_of_row = row[r + m].keys;
                if (keys_of_row.begin >= std::min(keys_of_row.end, j + size) ||
                    keys_of_row.end <= j)
                    continue;
                seen.begin = std::min(seen.begin, std::max<int64_t>(keys_of_row.begin - j, 0));
                seen.end = std::max(seen.end, std::min(keys_of_row.end - j, size));
            }
            if (seen.begin >= seen.end) continue;
            with_rows<Dot>(rows, few, [&](auto tile_rows) {
                tile_of_rows<decltype(tile_rows)::value>(b, r, rows, j, seen, v_rows, v_stride);
            });
        }
    }

    struct Rows {
        const T* at;
        int64_t stride;
    };

    // Rows [j, j + count) of K or V; copied where they lie in several pages.
    Rows rows_of(const void* base, const Strides3& strides, int64_t b, int64_t head_kv, int64_t j,
                 int64_t count, int64_t columns, T* gathered) const {
        const T* head = (const T*)base + head_kv * strides[1];
        if (!a.block_table) return {head + b * strides[0] + j * strides[2], strides[2]};
        const int32_t* pages = a.block_table + b * a.block_table_stride;
        const auto row = [&](int64_t n) {
            return head + pages[n / a.page_size] * strides[0] + n % a.page_size * strides[2];
        };
        if (j / a.page_size == (j + count - 1) / a.page_size) return {row(j), strides[2]};
        for (int64_t n = 0; n < count; ++n)
            std::memcpy(gathered + n * columns, row(j + n), columns * sizeof(T));
        return {gathered, columns};
    }

    template <int kRows>
    void tile_of_rows(int64_t b, int64_t r, int64_t rows, int64_t j, KeyRange seen,
                      const Element* v_rows, int64_t v_stride) {
        alignas(64) float scores[kRows * kBlockN];  // (rows, keys), of the block
        alignas(64) float correction[round_up(kRows, kLanes)];
        const int64_t left = seen.begin / kPanel * kPanel;
        const int64_t right = round_up(seen.end, kKeyStep<Dot>);
        for (int64_t m = 0; a.bias && m < rows; ++m)
            prefetch_bias(a, b, row[r + m].h, row[r + m].i, j + left, seen.end - left);
        if constexpr (kRows <= kFewRows) {
            if (few) {
                score_rows<Dot, kRows>(q, k_rows.at + left * k_rows.stride, k_rows.stride,
                                       a.head_dim, depth, seen.end - left, scores + left);
            }
        }
        const bool matrix = Dot::kMatrix && !few;
        for (int64_t n = left; n < right && !few; n += kPanel) {
            const int64_t columns = std::min<int64_t>(kPanel, right - n);
            if (matrix)
                matrix_product<Dot>(kRows, columns, q + r * depth, depth, keys + n * depth, kPanel,
                                    depth, scores + n, kBlockN, false);
            else
                with_vectors(columns / kLanes, [&](auto vectors) {
                    score_tile<Dot, kRows, decltype(vectors)::value>(
                        q + r * depth, keys + n * depth, depth, scores + n);
                });
        }
        softmax_rows<kRows>(b, r, rows, j, left, right, scores, correction);
        const auto* weights = (const Element*)scores;
        if (!matrix) {
            const int64_t from = seen.begin / kPair, to = (seen.end + kPair - 1) / kPair;
            multiply_values<kRows>(weights + from, kBlockN, v_rows + from * v_stride, v_stride,
                                   to - from, correction, r);
            return;
        }
        for (int64_t m = 0; m < rows; ++m) {
            if (correction[m] == 1.0f) continue;
            float* to = acc + (r + m) * width;
            for (int64_t n = 0; n < width; n += kLanes) store(to + n, load(to + n) * correction[m]);
        }
        const int64_t from = left / kPair, to = round_up(seen.end, kPair * Dot::kDepthStep) / kPair;
        matrix_product<Dot>(kRows, width, weights + from, kBlockN, v_rows + from * v_stride,
                            v_stride, to - from, acc + r * width, width, true);
    }

    template <int kRows>
    void multiply_values(const Element* p, int64_t p_stride, const Element* v, int64_t v_stride,
                         int64_t count, const float* correction, int64_t r) {
        for (int64_t n = 0; n < width;)
            with_vectors((width - n) / kLanes, [&](auto vectors) {
                value_tile<Dot, kRows, decltype(vectors)::value>(
                    p, p_stride, v + n, v_stride, count, correction, acc + r * width + n, width);
                n += decltype(vectors)::value * kLanes;
            });
    }

    // Scores of keys [j + left, j + right) become weights relative to the new row maxima, in T
    // where Dot multiplies that, and `correction` the factors that bring earlier results to them.
    // All rows take a step before any takes the next: what a row waits for, the others hide.
    template <int kRows>
    void softmax_rows(int64_t b, int64_t r, int64_t rows, int64_t j, int64_t left, int64_t right,
                      float* scores, float* correction) {
        constexpr int kPadded = round_up(kRows, kLanes);
        alignas(64) float shift[kPadded];
        Vec row_wise[kPadded / kLanes][kLanes] = {};  // of each row, lane by lane
        for (int m = 0; m < kRows && m < rows; ++m)
            row_wise[m / kLanes][m % kLanes] =
                visible_maximum(b, r + m, j, left, right, scores + m * kBlockN);
        // Lanes beyond the tile's rows keep what is theirs.
        for (int m = 0; m < kPadded; m += kLanes) {
            const Vec old = load(row_max + r + m);
            const Vec in_tile = (Vec)(lane_index() < int32_t(rows - m));
            const Vec largest =
                select((IntVec)in_tile, maxima(row_wise[m / kLanes]) * log2_scale, old);
            const Vec fresh = max(largest, old);
            const Vec safe = select(fresh == splat(-INFINITY), Vec{}, fresh);
            const Vec factor = exp2(old - safe);
            store(row_max + r + m, fresh);
            store(row_sum + r + m, load(row_sum + r + m) * factor);
            store(shift + m, -safe);
            store(correction + m, factor);
        }
        for (auto& group : row_wise) std::fill(group, group + kLanes, Vec{});
        for (int m = 0; m < kRows && m < rows; ++m) {
            float* weights = scores + m * kBlockN;
            const Vec by = splat(shift[m]);
            Vec sum = {};
            for (int64_t n = left; n < right; n += kLanes) {
                const Vec p = exp2(load(weights + n) * log2_scale + by);
                sum = sum + p;
                if (kPair == 1 || a.dropout.threshold)
                    store(weights + n, p);
                else
                    store((T*)weights + n, p);
            }
            row_wise[m / kLanes][m % kLanes] = sum;
            if (!a.dropout.threshold) continue;
            apply_dropout(a, b, row[r + m].h, row[r + m].i, j + left, right - left, weights + left);
            for (int64_t n = left; kPair == 2 && n < right; n += kLanes)
                store((T*)weights + n, load(weights + n));
        }
        for (int m = 0; m < kPadded; m += kLanes)
            store(row_sum + r + m, load(row_sum + r + m) + sums(row_wise[m / kLanes]));
        for (int m = rows; m < kRows; ++m) std::memset(scores + m * kBlockN, 0, right * 4);
    }

    // Applies the features to one row's scores, hides what the row does not see, and returns the
    // largest of the rest, lane by lane.
    Vec visible_maximum(int64_t b, int64_t r, int64_t j, int64_t left, int64_t right,
                        float* scores) {
        const Row& one = row[r];
        if (features)
            apply_features(a, b, one.h, one.i, j + left,
                           std::min(right - left, a.seqlen_k - j - left), scores + left, nullptr);
        const int64_t begin = std::clamp(one.keys.begin - j, left, right);
        const int64_t end = std::clamp(one.keys.end - j, begin, right);
        if (begin > left) std::fill(scores + left, scores + begin, -INFINITY);
        if (end < right) std::fill(scores + end, scores + right, -INFINITY);
        Vec even = splat(-INFINITY), odd = even;
        int64_t n = left;
        for (; n + 2 * kLanes <= right; n += 2 * kLanes) {
            even = max(load(scores + n), even);
            odd = max(load(scores + n + kLanes), odd);
        }
        if (n < right) even = max(load(scores + n), even);
        return max(even, odd);
    }

    void finish(int64_t b, int64_t r) {
        const Row& one = row[r];
        const float sum = row_sum[r];
        const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
        T* out =
            (T*)a.out + b * a.out_strides[0] + one.h * a.out_strides[1] + one.i * a.out_strides[2];
        for (int64_t n = 0; n < a.head_dim_v; n += kLanes)
            store(out + n, load(acc + r * width + n) * factor, a.head_dim_v - n);
        if (a.lse)
            a.lse[b * a.lse_strides[0] + one.h * a.lse_strides[1] + one.i] =
                sum == 0.0f ? -INFINITY : row_max[r] * kLn2 + std::log(sum);
    }

    [[no_unique_address]] Registers<Dot> registers;
    const AttentionFwdArgs& call;
    AttentionFwdArgs a;  // of the task's sequence
    const bool features;
    const int64_t depth, width;  // of a row of Q in Elements, of a row of the result
    const float log2_scale;      // of the scores in their buffer
    Rows k_rows;                 // of the block of keys, as they lie
    T *gathered_k = nullptr, *gathered_v = nullptr;
    bool few = false, values_packed;
    Element *q, *keys, *values;
    float* acc;  // (kMostRows, width)
    Row row[kMostRows];
    float row_max[kMostRows + kLanes], row_sum[kMostRows + kLanes];
};

// Rows of one key/value head of sequence b: its queries in each head of the group.
int64_t rows_of_group(const AttentionFwdArgs& a, int64_t b) {
    const int64_t seqlen_q =
        a.cu_seqlens_q ? a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b] : a.seqlen_q;
    return a.heads / a.heads_kv * seqlen_q;
}

template <class T, class Dot>
void forward(const AttentionFwdArgs& a) {
    const int64_t group_rows = a.heads / a.heads_kv * a.seqlen_q;
    const int64_t heads = a.batch * a.heads_kv;
    const int threads = omp_get_max_threads();
    // Smaller tasks where there would be too few for balance, but no smaller than two tiles.
    constexpr int64_t kStep = Dot::kMatrix ? Dot::kRows : 2 * kTileRows;
    int64_t task_rows = kTaskRows<Dot>;
    while (task_rows > 2 * kStep &&
           heads * ((group_rows + task_rows - 1) / task_rows) < 4 * threads)
        task_rows -= kStep;
    const int64_t blocks = (group_rows + task_rows - 1) / task_rows;
    const int64_t tasks = heads * blocks;
    int64_t parts = 1;
    if (tasks < threads && !a.deterministic)
        parts = std::clamp<int64_t>(a.seqlen_k / kSplitKeys, 1, (2 * threads + tasks - 1) / tasks);
    const int64_t part_keys = round_up((a.seqlen_k + parts - 1) / parts, kBlockN);
    const int64_t width = round_up(a.head_dim_v, kLanes);
    const int64_t part_size = std::min(task_rows, group_rows) * (width + 2);
    float* part = parts > 1 ? scratch<float>(tasks * parts * part_size, 5) : nullptr;
    const double flops = 4.0 * heads * group_rows * a.seqlen_k * (a.head_dim + a.head_dim_v) / 2;
    const bool parallel = threads > 1 && tasks * parts > 1 && flops > 2e5;
    std::atomic<int64_t> next = 0;
    const auto work = [&] {
        Task<T, Dot> task(a);
        for (int64_t at; (at = next++) < tasks * parts;) {
            // Last blocks first: under a causal band they have the most keys.
            const int64_t index = at / parts, p = at % parts;
            const int64_t head = index % heads, first = (blocks - 1 - index / heads) * task_rows;
            const int64_t b = head / a.heads_kv;
            const int64_t count = std::min(task_rows, rows_of_group(a, b) - first);
            const int64_t begin = p * part_keys, end = parts > 1 ? begin + part_keys : a.seqlen_k;
            if (count > 0)
                task.run(b, head % a.heads_kv, first, count, begin, std::min(end, a.seqlen_k),
                         part ? part + at * part_size : nullptr);
        }
    };
    const auto combine = [&](int64_t index) {
        const int64_t head = index % heads, b = head / a.heads_kv;
        const int64_t first = (blocks - 1 - index / heads) * task_rows;
        const int64_t count = std::min(task_rows, rows_of_group(a, b) - first);
        if (count > 0)
            Task<T, Dot>(a).combine(b, head % a.heads_kv, first, count, parts,
                                    part + index * parts * part_size, part_size);
    };
    if (!parallel) {
        work();
    } else {
#pragma omp parallel
        work();
    }
    if (!part) return;
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t index = 0; index < tasks; ++index) combine(index);
}

}  // namespace

void attention_fwd(const AttentionFwdArgs& a) {
    switch (a.dtype) {
        case DType::float32:
            return forward<float, DotF32>(a);
        case DType::float16:
            return forward<F16, DotF32>(a);
        case DType::bfloat16:
            break;
    }
#if FASTATTN_AVX512_BF16
    return forward<BF16, DotBF16>(a);
#else
    return forward<BF16, DotF32>(a);
#endif
}

#include "cpu/target_end.h"
