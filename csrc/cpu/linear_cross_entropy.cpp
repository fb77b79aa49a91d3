// Cross entropy of the logits x W^T + b, which are never whole in memory: after Liger (Hsu et al.
// 2024) a chunk of rows goes through the forward and the backward while its logits are there, and
// after Wijmans et al. 2024 ("Cut your losses") rows whose target is ignored are left out.
//
// Of a chunk: the product with W leaves exp(logit - panel's maximum) and each panel's maximum and
// sum; they give the row's loss and a factor a panel, which turns the exponentials into the logits'
// gradient; two more products give dx and a summand of dW. Without a gradient only the panels'
// sums are kept. The sums' order depends on the shapes alone.
#include "cpu/linear_cross_entropy.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "cpu/simd.h"

#include "cpu/target_begin.h"

#include "cpu/cross_entropy_rows.h"
#include "cpu/gemm_tiles.h"

namespace {

constexpr int64_t kForwardRows = 768;  // of a chunk without a gradient
constexpr int64_t kPanelStats = 1 << 20;

enum { kSlotX = 0, kSlotStats = 1 };

template <class Dot>
using Stored = std::conditional_t<Dot::kPair == 2, BF16, float>;
template <class Dot>
constexpr DType kStored = Dot::kPair == 2 ? DType::bfloat16 : DType::float32;

struct PanelStats {
    float top, sum;
    float linear;  // sum of logit - top, where labels are smoothed
};

// Rows that take part, by their indices.
struct Chunk {
    const int64_t* rows;
    int64_t count;
    MatrixView x;
};

// The rows of x beside each other: they are, if none is left out.
Chunk chunk_of(const LinearCrossEntropyInputs& in, const int64_t* rows, int64_t count) {
    const int64_t size = itemsize(in.dtype), width = in.d_model * size;
    const auto row = [&](int64_t i) {
        return (const char*)in.x.data + rows[i] * in.x.row_stride * size;
    };
    if (rows[count - 1] - rows[0] == count - 1) return {rows, count, {row(0), in.x.row_stride, 1}};
    char* gathered = scratch<char>(count * width, kSlotX);
    for (int64_t i = 0; i < count; ++i) std::memcpy(gathered + i * width, row(i), width);
    return {rows, count, {gathered, in.d_model, 1}};
}

// Hands the chunk's logits to a sink.
template <class Dot>
void logits_product(const LinearCrossEntropyInputs& in, const Chunk& chunk, GemmSink sink) {
    const GemmTerm term{rows_of(chunk.x, in.dtype), rows_of(in.weight, in.dtype), {}, in.d_model};
    gemm<Dot>(&term, 1, chunk.count, in.vocabulary, sink);
}

// Of `columns` logits, which become exponentials of their distance from the maximum; 0 beyond.
FASTATTN_INLINE PanelStats panel_stats(float* logits, int64_t columns, bool smooth) {
    Vec x[kTileVectors];
    Vec top = splat(-kInfinity);
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) {
        x[j] = load_or(logits + j * kLanes, columns - j * kLanes, -kInfinity);
        top = max(x[j], top);
    }
    PanelStats stats{reduce_max(top), 0.0f, 0.0f};
    const Vec shift = splat(shift_of(stats.top));
    Vec sum = {}, linear = {};
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) {
        const Vec distance = x[j] - shift, e = exp(distance);
        const IntVec exists = lane_index() < (int32_t)(columns - j * kLanes);
        if (smooth) linear += select(exists, distance, Vec{});
        sum += e;
        store(logits + j * kLanes, e);
    }
    stats.sum = reduce_add(sum);
    if (smooth) stats.linear = reduce_add(linear);
    return stats;
}

// Statistics of each row and panel, (rows, panels), the targets' logits, and the exponentials
// (rows, vocabulary) unless null.
template <class Dot>
void chunk_stats(const LinearCrossEntropyInputs& in, const Chunk& chunk, PanelStats* stats,
                 float* target_logits, Stored<Dot>* exponentials) {
    const int64_t panels = ceil_div(in.vocabulary, kPanel);
    const bool smooth = in.targets.smoothing != 0.0f;
    const auto take = [&](float* tile, int64_t m, int64_t rows, int64_t n, int64_t columns) {
        add_bias(in.dtype, in.bias, rows, n, columns, tile);
        for (int64_t row = 0; row < rows; ++row) {
            float* logits = tile + row * kPanel;
            const int64_t target = in.targets.data[chunk.rows[m + row]] - n;
            if (target >= 0 && target < columns) target_logits[m + row] = logits[target];
            stats[(m + row) * panels + n / kPanel] = panel_stats(logits, columns, smooth);
        }
        if (exponentials)
            write_tile(kStored<Dot>, exponentials, in.vocabulary, m, rows, n, columns, tile);
    };
    logits_product<Dot>(in, chunk, GemmSink(take));
}

RowStats join(const PanelStats* stats, int64_t vocabulary) {
    const int64_t panels = ceil_div(vocabulary, kPanel);
    RowStats row;
    for (int64_t p = 0; p < panels; ++p) row.top = std::max(row.top, stats[p].top);
    row.anchor = shift_of(row.top);
    double sum = 0, linear = 0;
    for (int64_t p = 0; p < panels; ++p) {
        const float distance = stats[p].top - row.anchor;
        const int64_t columns = std::min<int64_t>(kPanel, vocabulary - p * kPanel);
        sum += stats[p].sum * exp(distance);
        linear += stats[p].linear + double(distance) * columns;
    }
    row.sum = float(sum), row.linear = float(linear);
    return row;
}

// What a row's gradient is made of: d * (softmax - smoothing / vocabulary), less d * hot at target.
struct RowGradient {
    float factor, uniform, hot;  // factor = d / sum
};

RowGradient row_gradient(const LinearCrossEntropyInputs& in, float d, float sum) {
    const float smoothing = in.targets.smoothing;
    return {d / sum, d * smoothing / float(in.vocabulary), d * (1.0f - smoothing)};
}

// A row's exponentials become its logits' gradient.
template <class T>
void differentiate_row(const LinearCrossEntropyInputs& in, const PanelStats* stats, float top,
                       float sum, float d, int64_t target, T* row) {
    if (no_class_left(top, sum)) return std::fill(row, row + in.vocabulary, T{});
    const RowGradient g = row_gradient(in, d, sum);
    const auto factor = [&](int64_t p) { return exp(stats[p].top - top) * g.factor; };
    const float at_target = to_float(row[target]) * factor(target / kPanel) - g.uniform - g.hot;
    for (int64_t n = 0; n < in.vocabulary; n += kPanel) {
        const Vec by = splat(factor(n / kPanel)), less = splat(g.uniform);
        const int64_t columns = std::min<int64_t>(kPanel, in.vocabulary - n);
        for (int64_t j = n; j < n + columns; j += kLanes)
            store(row + j, load(row + j, n + columns - j) * by - less, n + columns - j);
    }
    store(row + target, splat(at_target), 1);
}

// The logits' gradient of a chunk, from logits computed again and the rows' statistics.
template <class Dot>
void differentiate_again(const LinearCrossEntropyBwdArgs& args, const Chunk& chunk, float scale,
                         Stored<Dot>* dlogits) {
    const LinearCrossEntropyInputs& in = args.inputs;
    const auto take = [&](float* tile, int64_t m, int64_t rows, int64_t n, int64_t columns) {
        add_bias(in.dtype, in.bias, rows, n, columns, tile);
        for (int64_t i = 0; i < rows; ++i) {
            float* values = tile + i * kPanel;
            const int64_t row = chunk.rows[m + i], target = in.targets.data[row] - n;
            const float top = args.stats[2 * row], sum = args.stats[2 * row + 1];
            const float d = args.dloss[in.targets.reduction == Reduction::none ? row : 0];
            const RowGradient g = row_gradient(in, d * scale, sum);
            const bool empty = no_class_left(top, sum);
            for (int64_t j = 0; j < kPanel; j += kLanes) {
                const Vec p = exp(load(values + j) - splat(top)) * splat(g.factor);
                store(values + j, empty ? Vec{} : p - splat(g.uniform));
            }
            if (target >= 0 && target < columns && !empty) values[target] -= g.hot;
        }
        write_tile(kStored<Dot>, dlogits, in.vocabulary, m, rows, n, columns, tile);
    };
    logits_product<Dot>(in, chunk, GemmSink(take));
}

// Adds a chunk's share, given its logits' gradient.
template <class Dot>
void add_gradients(const LinearCrossEntropyInputs& in, const LinearCrossEntropyGradients& to,
                   const Chunk& chunk, bool first) {
    const auto* stored = static_cast<const Stored<Dot>*>(to.workspace);
    const MatrixView dlogits = contiguous(stored, in.vocabulary, kStored<Dot>);
    if (to.dx) {
        const auto take = [&](float* tile, int64_t m, int64_t rows, int64_t n, int64_t columns) {
            for (int64_t row = 0; row < rows; ++row)
                write_tile(DType::float32, to.dx, in.d_model, chunk.rows[m + row], 1, n, columns,
                           tile + row * kPanel);
        };
        const GemmTerm term{
            rows_of(dlogits, kStored<Dot>), columns_of(in.weight, in.dtype), {}, in.vocabulary};
        gemm<Dot>(&term, 1, chunk.count, in.d_model, GemmSink(take));
    }
    if (to.dweight) {
        const auto take = [&](float* tile, int64_t m, int64_t rows, int64_t n, int64_t columns) {
            for (int64_t row = 0; row < rows; ++row) {
                float* at = to.dweight + (m + row) * in.d_model + n;
                for (int64_t j = 0; j < columns; j += kLanes) {
                    const Vec value = load(tile + row * kPanel + j);
                    store(at + j, first ? value : value + load(at + j, columns - j), columns - j);
                }
            }
        };
        const GemmTerm term{
            columns_of(dlogits, kStored<Dot>), columns_of(chunk.x, in.dtype), {}, chunk.count};
        gemm<Dot>(&term, 1, in.vocabulary, in.d_model, GemmSink(take));
    }
    if (to.dbias)
        sum_columns(kStored<Dot>, dlogits, chunk.count, in.vocabulary, DType::float32, to.dbias,
                    !first);
}

std::vector<int64_t> rows_that_take_part(const LinearCrossEntropyInputs& in) {
    std::vector<int64_t> rows;
    rows.reserve(in.rows);
    for (int64_t row = 0; row < in.rows; ++row)
        if (takes_part(in.targets, row)) rows.push_back(row);
    return rows;
}

// What no chunk writes.
void clear(const LinearCrossEntropyInputs& in, const LinearCrossEntropyGradients& to,
           int64_t count) {
    if (to.dx && count < in.rows) {
        for (int64_t row = 0; row < in.rows; ++row)
            if (!takes_part(in.targets, row)) std::fill_n(to.dx + row * in.d_model, in.d_model, 0);
    }
    if (count) return;
    if (to.dweight) std::fill_n(to.dweight, in.vocabulary * in.d_model, 0);
    if (to.dbias) std::fill_n(to.dbias, in.vocabulary, 0);
}

// Calls f(chunk, first) for chunks of about equal size.
template <class Dot, class F>
void for_each_chunk(const LinearCrossEntropyInputs& in, const LinearCrossEntropyGradients& to,
                    F f) {
    const std::vector<int64_t> rows = rows_that_take_part(in);
    const int64_t count = rows.size(), panels = ceil_div(in.vocabulary, kPanel);
    clear(in, to, count);
    if (!count) return;
    const int64_t row_bytes = in.vocabulary * int64_t(sizeof(Stored<Dot>));
    const int64_t most =
        to.workspace ? std::max<int64_t>(1, to.workspace_bytes / row_bytes)
                     : std::clamp<int64_t>(kPanelStats / panels, 8 * kTileRows, kForwardRows);
    const int64_t even = ceil_div(count, ceil_div(count, most));
    const int64_t step = std::min(most, ceil_div(even, kTileRows) * kTileRows);
    for (int64_t start = 0; start < count; start += step)
        f(chunk_of(in, &rows[start], std::min(step, count - start)), start == 0);
}

template <class Dot>
void linear_cross_entropy_fwd_of(const LinearCrossEntropyFwdArgs& args) {
    const LinearCrossEntropyInputs& in = args.inputs;
    const bool reduced = in.targets.reduction != Reduction::none;
    std::vector<float> own(reduced ? in.rows : 0);
    float* losses = reduced ? own.data() : args.loss;
    std::fill(losses, losses + in.rows, 0.0f);
    std::fill(args.stats, args.stats + 2 * in.rows, 0.0f);
    const float scale = reduction_scale(in.targets, in.rows);
    const int64_t panels = ceil_div(in.vocabulary, kPanel);
    auto* exponentials = static_cast<Stored<Dot>*>(args.gradients.workspace);
    for_each_chunk<Dot>(in, args.gradients, [&](const Chunk& chunk, bool first) {
        std::vector<float> target_logits(chunk.count);
        auto* stats = scratch<PanelStats>(chunk.count * panels, kSlotStats);
        chunk_stats<Dot>(in, chunk, stats, target_logits.data(), exponentials);
        const auto finish_row = [&](int64_t i) {
            const int64_t row = chunk.rows[i];
            const RowStats joined = join(stats + i * panels, in.vocabulary);
            args.stats[2 * row] = joined.top, args.stats[2 * row + 1] = joined.sum;
            losses[row] = row_loss(joined, target_logits[i], in.targets.smoothing, in.vocabulary);
            if (exponentials)
                differentiate_row(in, stats + i * panels, joined.top, joined.sum, scale,
                                  in.targets.data[row], exponentials + i * in.vocabulary);
        };
#pragma omp parallel for if (chunk.count * in.vocabulary > 65536)
        for (int64_t i = 0; i < chunk.count; ++i) finish_row(i);
        if (exponentials) add_gradients<Dot>(in, args.gradients, chunk, first);
    });
    if (reduced) reduce_losses(in.targets, losses, in.rows, args.loss);
}

template <class Dot>
void linear_cross_entropy_bwd_of(const LinearCrossEntropyBwdArgs& args) {
    const LinearCrossEntropyInputs& in = args.inputs;
    const float scale = reduction_scale(in.targets, in.rows);
    auto* dlogits = static_cast<Stored<Dot>*>(args.gradients.workspace);
    for_each_chunk<Dot>(in, args.gradients, [&](const Chunk& chunk, bool first) {
        differentiate_again<Dot>(args, chunk, scale, dlogits);
        add_gradients<Dot>(in, args.gradients, chunk, first);
    });
}

}  // namespace

int64_t linear_cross_entropy_fwd(const LinearCrossEntropyFwdArgs& args) {
    const LinearCrossEntropyInputs& in = args.inputs;
    const int64_t invalid = first_invalid(in.targets, in.rows, in.vocabulary);
    if (invalid >= 0) return invalid;
#if FASTATTN_AVX512_BF16
    if (in.dtype == DType::bfloat16) {
        linear_cross_entropy_fwd_of<DotBF16>(args);
        return -1;
    }
#endif
    linear_cross_entropy_fwd_of<DotF32>(args);
    return -1;
}

void linear_cross_entropy_bwd(const LinearCrossEntropyBwdArgs& args) {
#if FASTATTN_AVX512_BF16
    if (args.inputs.dtype == DType::bfloat16) return linear_cross_entropy_bwd_of<DotBF16>(args);
#endif
    linear_cross_entropy_bwd_of<DotF32>(args);
}

#include "cpu/target_end.h"
