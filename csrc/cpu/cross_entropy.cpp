// Cross entropy of rows of logits with class indices, and its gradient.
//
// A task owns a block of rows. The forward reads a row once, in blocks that stay in the first cache
// between their maximum and their sum of exponentials; the sum is rescaled where the maximum grows
// (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). The backward reads it
// once and writes the gradient. A row's result does not depend on the number of threads.
#include "cpu/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/simd.h"

#include "cpu/target_begin.h"

#include "cpu/cross_entropy_rows.h"

namespace {

// Elements that one task handles, enough to hide the cost of scheduling it.
constexpr int64_t kTaskElements = 16384;
// Elements whose maximum is taken before their exponentials are added up; also the length of a run
// of additions.
constexpr int64_t kBlock = 2048;

template <class T>
FASTATTN_INLINE Vec max_of(const T* x, int64_t n) {
    Vec top[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
    int64_t j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) top[i] = max(load(x + j + i * kLanes), top[i]);
    }
    for (; j < n; j += kLanes) top[0] = max(load_or(x + j, n - j, -kInfinity), top[0]);
    return max(max(top[0], top[1]), max(top[2], top[3]));
}

// The sum over whole and partial vectors of `value(vector of x)`.
template <class T, class Value>
FASTATTN_INLINE Vec sum_of(const T* x, int64_t n, float beyond, Value value) {
    Vec sums[4] = {};
    int64_t j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] += value(load(x + j + i * kLanes));
    }
    for (; j < n; j += kLanes) sums[0] += value(load_or(x + j, n - j, beyond));
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <bool kSmooth, class T>
RowStats row_stats(const T* x, int64_t columns) {
    RowStats row;
    Vec sum = {}, linear = {};
    for (int64_t start = 0; start < columns; start += kBlock) {
        const int64_t n = std::min(kBlock, columns - start);
        const float top = reduce_max(max_of(x + start, n));
        if (top > row.top) {
            if (start) sum *= splat(exp(row.top - top));
            row.top = top;
        }
        const Vec shift = splat(shift_of(row.top));
        sum += sum_of(x + start, n, -kInfinity, [=](Vec v) { return exp(v - shift); });
        if constexpr (kSmooth) {
            if (start == 0) row.anchor = shift_of(top);
            const Vec anchor = splat(row.anchor);
            linear += sum_of(x + start, n, row.anchor, [=](Vec v) { return v - anchor; });
        }
    }
    row.sum = reduce_add(sum);
    row.linear = reduce_add(linear);
    return row;
}

int64_t row_offset(const LogitsView& view, int64_t row) {
    return row / view.inner * view.outer_stride + row % view.inner * view.inner_stride;
}

template <class T>
void loss_rows(const CrossEntropyFwdArgs& args, int64_t begin, int64_t end, float* losses) {
    const LogitsView& view = args.logits;
    const float smoothing = args.targets.smoothing;
    for (int64_t row = begin; row < end; ++row) {
        RowStats stats{0.0f};
        losses[row] = 0.0f;
        if (takes_part(args.targets, row)) {
            const T* x = static_cast<const T*>(view.data) + row_offset(view, row);
            stats = smoothing == 0.0f ? row_stats<false>(x, view.columns)
                                      : row_stats<true>(x, view.columns);
            const float target = to_float(x[args.targets.data[row]]);
            losses[row] = row_loss(stats, target, smoothing, view.columns);
        }
        args.stats[2 * row] = stats.top;
        args.stats[2 * row + 1] = stats.sum;
    }
}

template <class Rows>
void for_each_block(const LogitsView& view, Rows rows_of) {
    const int64_t rows = view.outer * view.inner;
    const int64_t step = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, view.columns));
    const int64_t tasks = (rows + step - 1) / step;
#pragma omp parallel for schedule(dynamic) if (tasks > 1)
    for (int64_t task = 0; task < tasks; ++task)
        rows_of(task * step, std::min((task + 1) * step, rows));
}

template <class T>
void cross_entropy_fwd_of(const CrossEntropyFwdArgs& args) {
    const int64_t rows = args.logits.outer * args.logits.inner;
    if (args.targets.reduction == Reduction::none)
        return for_each_block(args.logits, [&](int64_t begin, int64_t end) {
            loss_rows<T>(args, begin, end, args.loss);
        });
    std::vector<float> losses(rows);
    for_each_block(args.logits, [&](int64_t begin, int64_t end) {
        loss_rows<T>(args, begin, end, losses.data());
    });
    reduce_losses(args.targets, losses.data(), rows, args.loss);
}

// dx = factor * exp(x - top) - uniform, of one row.
template <class T>
FASTATTN_INLINE void row_gradient(const T* x, int64_t n, float top, float factor, float uniform,
                                  T* dx) {
    const Vec shift = splat(top), by = splat(factor), less = splat(uniform);
    int64_t j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i)
            store(dx + j + i * kLanes, exp(load(x + j + i * kLanes) - shift) * by - less);
    }
    for (; j < n; j += kLanes) store(dx + j, exp(load(x + j, n - j) - shift) * by - less, n - j);
}

template <class T>
void gradient_rows(const CrossEntropyBwdArgs& args, float scale, int64_t begin, int64_t end) {
    const LogitsView& view = args.logits;
    const CrossEntropyTargets& targets = args.targets;
    const int64_t columns = view.columns;
    for (int64_t row = begin; row < end; ++row) {
        T* dx = static_cast<T*>(args.dlogits) + row * columns;
        const float top = args.stats[2 * row], sum = args.stats[2 * row + 1];
        const int64_t target = targets.data[row];
        if (!takes_part(targets, row) || no_class_left(top, sum) || target < 0 ||
            target >= columns) {
            std::fill(dx, dx + columns, T{});
            continue;
        }
        const T* x = static_cast<const T*>(view.data) + row_offset(view, row);
        const float d = scale * args.dloss[targets.reduction == Reduction::none ? row : 0];
        const float factor = d / sum, uniform = d * targets.smoothing / float(columns);
        const float value = exp(to_float(x[target]) - top) * factor - uniform;
        row_gradient(x, columns, top, factor, uniform, dx);
        store(dx + target, splat(value - d * (1.0f - targets.smoothing)), 1);
    }
}

template <class T>
void cross_entropy_bwd_of(const CrossEntropyBwdArgs& args) {
    const float scale = reduction_scale(args.targets, args.logits.outer * args.logits.inner);
    for_each_block(args.logits,
                   [&](int64_t begin, int64_t end) { gradient_rows<T>(args, scale, begin, end); });
}

}  // namespace

int64_t cross_entropy_fwd(const CrossEntropyFwdArgs& args) {
    const LogitsView& view = args.logits;
    const int64_t invalid = first_invalid(args.targets, view.outer * view.inner, view.columns);
    if (invalid >= 0) return invalid;
    if (view.dtype == DType::float32)
        cross_entropy_fwd_of<float>(args);
    else if (view.dtype == DType::float16)
        cross_entropy_fwd_of<F16>(args);
    else
        cross_entropy_fwd_of<BF16>(args);
    return -1;
}

void cross_entropy_bwd(const CrossEntropyBwdArgs& args) {
    if (args.logits.dtype == DType::float32) return cross_entropy_bwd_of<float>(args);
    if (args.logits.dtype == DType::float16) return cross_entropy_bwd_of<F16>(args);
    cross_entropy_bwd_of<BF16>(args);
}

#include "cpu/target_end.h"
