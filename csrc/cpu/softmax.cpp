// softmax(scale * x + bias) over rows of columns, where mask and causal diagonal allow, with
// dropout or the logarithm; and its gradient.
//
// A task owns a block of rows. Each row is read from memory once: its scores go to a float buffer
// that stays in cache (maximum), where they become exponentials (sum), which are then scaled and
// written out once. A row that sees nothing gives 0 (log: -inf). Rows are independent, so that the
// result does not depend on the number of threads; the bias's gradient is summed in an order that
// depends on the shapes alone.
#include "cpu/softmax.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "cpu/simd.h"

#include "cpu/target_begin.h"

#include "cpu/philox.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Elements that one task handles, enough to hide the cost of scheduling it.
constexpr int64_t kTaskElements = 16384;
constexpr int kBiasTasks = 16;
constexpr int64_t kSumRun = 1024;

// Walks the rows, keeping each operand's offset.
template <int Operands>
struct RowCursor {
    int rank = 0;
    int64_t sizes[kSoftmaxMaxRank];
    int64_t strides[Operands][kSoftmaxMaxRank];
    int64_t index[kSoftmaxMaxRank];
    int64_t offset[Operands];

    void add_dim(int64_t size, const int64_t (&dim_strides)[Operands]) {
        if (size == 1) return;
        sizes[rank] = size;
        for (int o = 0; o < Operands; ++o) strides[o][rank] = dim_strides[o];
        ++rank;
    }

    // Joins neighbouring dims that lie one after the other in every operand.
    void collapse() {
        int last = 0;
        for (int dim = 1; dim < rank; ++dim) {
            bool joins = true;
            for (int o = 0; o < Operands; ++o) {
                joins &= strides[o][last] == strides[o][dim] * sizes[dim];
            }
            const int64_t size = joins ? sizes[last] * sizes[dim] : sizes[dim];
            last += !joins;
            sizes[last] = size;
            for (int o = 0; o < Operands; ++o) strides[o][last] = strides[o][dim];
        }
        rank = rank ? last + 1 : 0;
    }

    void seek(int64_t row) {
        for (int o = 0; o < Operands; ++o) offset[o] = 0;
        for (int dim = rank - 1; dim >= 0; --dim) {
            index[dim] = row % sizes[dim];
            row /= sizes[dim];
            for (int o = 0; o < Operands; ++o) offset[o] += index[dim] * strides[o][dim];
        }
    }

    void advance() {
        for (int dim = rank - 1; dim >= 0; --dim) {
            for (int o = 0; o < Operands; ++o) offset[o] += strides[o][dim];
            if (++index[dim] < sizes[dim]) return;
            index[dim] = 0;
            for (int o = 0; o < Operands; ++o) offset[o] -= sizes[dim] * strides[o][dim];
        }
    }
};

template <typename T>
void fill(T* to, float value, int64_t n) {
    const Vec v = splat(value);
    for (int64_t j = 0; j < n; j += kLanes) store(to + j, v, n - j);
}

// scores[0, n) = scale * x, padded with -inf to whole vectors; returns their maximum.
template <typename T>
float load_scores(const T* x, int64_t n, float scale, float* scores) {
    const Vec factor = splat(scale);
    Vec top0 = splat(-kInfinity), top1 = top0;
    int64_t j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
        const Vec a = load(x + j) * factor, b = load(x + j + kLanes) * factor;
        store(scores + j, a);
        store(scores + j + kLanes, b);
        top0 = max(a, top0), top1 = max(b, top1);
    }
    for (; j < n; j += kLanes) {
        store(scores + j, load(x + j, n - j) * factor);
        for (int64_t pad = n; pad < j + kLanes; ++pad) scores[pad] = -kInfinity;
        top0 = max(load(scores + j), top0);
    }
    return reduce_max(max(top0, top1));
}

template <typename B>
void add_bias(const B* bias, int64_t column_stride, int64_t n, float* scores) {
    if (column_stride == 0) {
        const Vec value = splat(to_float(*bias));
        for (int64_t j = 0; j < n; j += kLanes) store(scores + j, load(scores + j) + value);
    } else {
        for (int64_t j = 0; j < n; j += kLanes) {
            store(scores + j, load(scores + j) + load(bias + j, n - j));
        }
    }
}

void hide(const uint8_t* mask, int64_t column_stride, int64_t n, float* scores) {
    if (column_stride == 0) {
        if (!*mask) std::fill(scores, scores + n, -kInfinity);
    } else {
        for (int64_t j = 0; j < n; ++j) scores[j] = mask[j] ? scores[j] : -kInfinity;
    }
}

float max_of(const float* scores, int64_t n) {
    Vec top = splat(-kInfinity);
    for (int64_t j = 0; j < n; j += kLanes) top = max(load(scores + j), top);
    return reduce_max(top);
}

// Adds up kLanes sums, of `value(j)` for j = 0, kStep, ... below n, in runs of kSumRun, so that
// the rounding error does not grow with n.
template <int kStep = kLanes, class Value>
FASTATTN_INLINE float sum_of(int64_t n, Value value) {
    Vec total = splat(0.0f);
    for (int64_t start = 0; start < n; start += kSumRun) {
        const int64_t end = std::min(n, start + kSumRun);
        Vec a = {}, b = {}, c = {}, d = {};
        int64_t j = start;
        for (; j + 3 * kStep < end; j += 4 * kStep) {
            a += value(j), b += value(j + kStep);
            c += value(j + 2 * kStep), d += value(j + 3 * kStep);
        }
        for (; j < end; j += kStep) a += value(j);
        total += (a + b) + (c + d);
    }
    return reduce_add(total);
}

// exp(score - top), written back if Keep; returns the sum.
template <bool Keep>
float exponentials(float* scores, int64_t n, float top) {
    const Vec shift = splat(top);
    return sum_of(n, [=](int64_t j) {
        const Vec e = exp(load(scores + j) - shift);
        if (Keep) store(scores + j, e);
        return e;
    });
}

// values[0, n) times 0 or the dropout's scale; whole vectors are touched.
void drop(const Dropout& dropout, int64_t row, int64_t n, float* values) {
    alignas(64) uint32_t words[64];
    alignas(64) float factors[64];
    for (int64_t start = 0; start < n; start += 64) {
        philox_words(dropout.seed, start / 64, uint32_t(row), uint32_t(uint64_t(row) >> 32), 0,
                     words);
        for (int j = 0; j < 64; ++j) {
            factors[j] = words[j] >= dropout.threshold ? dropout.scale : 0.0f;
        }
        const int64_t here = std::min<int64_t>(64, n - start);
        for (int64_t j = 0; j < here; j += kLanes) {
            store(values + start + j, load(values + start + j) * load(factors + j));
        }
    }
}

template <typename T>
void write_scaled(T* out, const float* values, float factor, int64_t n) {
    const Vec f = splat(factor);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(out + j, load(values + j) * f);
    if (j < n) store(out + j, load(values + j) * f, n - j);
}

// values / sum, rounded as a division is, at the price of two more multiply-adds.
template <typename T>
void write_quotients(T* out, const float* values, float sum, int64_t n) {
    const Vec divisor = splat(sum), factor = splat(1.0f / sum);
    const auto quotient = [=](int64_t j) {
        const Vec value = load(values + j), near = value * factor;
        return near + (value - near * divisor) * factor;
    };
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(out + j, quotient(j));
    if (j < n) store(out + j, quotient(j), n - j);
}

// values - top - log_sum; one after the other, because top may be much larger.
template <typename T>
void write_logarithms(T* out, const float* values, float top, float log_sum, int64_t n) {
    for (int64_t j = 0; j < n; j += kLanes) {
        store(out + j, (load(values + j) - splat(top)) - splat(log_sum), n - j);
    }
}

template <typename T>
void softmax_rows(const SoftmaxFwdArgs& args, RowCursor<3>& cursor, int64_t begin, int64_t end,
                  float* scores) {
    const int64_t columns = args.shape.columns;
    const float hidden = args.log ? -kInfinity : 0.0f;
    cursor.seek(begin);
    for (int64_t row = begin; row < end; ++row, cursor.advance()) {
        T* out = static_cast<T*>(args.out) + row * columns;
        T* weights = static_cast<T*>(args.weights);
        if (weights) weights += row * columns;
        const int64_t n =
            args.causal ? std::min(columns, row % args.shape.matrix_rows + 1) : columns;
        float top =
            load_scores(static_cast<const T*>(args.x) + cursor.offset[0], n, args.scale, scores);
        if (args.bias) {
            const int64_t at = cursor.offset[2];
            if (args.bias_dtype == args.dtype) {
                add_bias(static_cast<const T*>(args.bias) + at, args.bias_column_stride, n, scores);
            } else {
                add_bias(static_cast<const float*>(args.bias) + at, args.bias_column_stride, n,
                         scores);
            }
        }
        if (args.mask) hide(args.mask + cursor.offset[1], args.mask_column_stride, n, scores);
        if (args.bias || args.mask) top = max_of(scores, n);
        if (top == -kInfinity && std::none_of(scores, scores + n, [](float s) { return s != s; })) {
            fill(out, hidden, columns);
            if (weights) fill(weights, 0.0f, columns);
            continue;
        }
        if (args.log) {
            const float sum = exponentials<false>(scores, n, top);
            write_logarithms(out, scores, top, std::log(sum), n);
        } else {
            const float sum = exponentials<true>(scores, n, top);
            if (args.dropout.threshold) {
                write_quotients(weights, scores, sum, n);
                fill(weights + n, 0.0f, columns - n);
                drop(args.dropout, row, n, scores);
            }
            write_quotients(out, scores, sum, n);
        }
        fill(out + n, hidden, columns - n);
    }
}

template <typename T>
void softmax_fwd_of(const SoftmaxFwdArgs& args) {
    const SoftmaxShape& shape = args.shape;
    RowCursor<3> rows;
    for (int dim = 0; dim < shape.rank; ++dim) {
        rows.add_dim(shape.sizes[dim],
                     {args.x_strides[dim], args.mask_strides[dim], args.bias_strides[dim]});
    }
    rows.collapse();
    const int64_t step = std::max<int64_t>(1, kTaskElements / shape.columns);
    const int64_t tasks = (shape.rows + step - 1) / step;
#pragma omp parallel if (tasks > 1)
    {
        RowCursor<3> cursor = rows;
        float* scores = scratch<float>(round_up(shape.columns, 64));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t begin = task * step;
            softmax_rows<T>(args, cursor, begin, std::min(begin + step, shape.rows), scores);
        }
    }
}

// The gradient of the scores of one row, into dscores (whole vectors).
template <typename T>
void score_gradient(const SoftmaxBwdArgs& args, const T* weights, const T* dout, int64_t row,
                    float* dscores) {
    const int64_t n = args.shape.columns;
    for (int64_t j = 0; j < n; j += kLanes) store(dscores + j, load(dout + j, n - j));
    if (args.dropout.threshold) drop(args.dropout, row, n, dscores);
    if (args.log) {
        const float sum = sum_of(n, [=](int64_t j) {
            const Vec w = load(weights + j, n - j);
            const Vec g = select(w == splat(-kInfinity), splat(0.0f), load(dscores + j));
            store(dscores + j, g);
            return g;
        });
        for (int64_t j = 0; j < n; j += kLanes) {
            const Vec w = load(weights + j, n - j);
            store(dscores + j, load(dscores + j) - exp(w) * splat(sum));
        }
        return;
    }
    const float sum =
        sum_of(n, [=](int64_t j) { return load(weights + j, n - j) * load(dscores + j); });
    for (int64_t j = 0; j < n; j += kLanes) {
        store(dscores + j, load(weights + j, n - j) * (load(dscores + j) - splat(sum)));
    }
}

// The gradient of one row without dropout, log or bias: two passes, nothing kept between them.
// bfloat16 by pairs: a lane's two are each a shift or a mask away from floats.
template <typename T>
void row_gradient(const T* weights, const T* dout, float scale, int64_t n, T* dx) {
    constexpr bool kPairs = std::is_same_v<T, BF16>;
    const int64_t paired = kPairs ? n / (2 * kLanes) * (2 * kLanes) : 0;
    const int64_t whole = n / kLanes * kLanes, rest = n - whole;
    Vec last_w = {}, last_g = {};
    if (rest) last_w = load(weights + whole, rest), last_g = load(dout + whole, rest);
    float sum = rest ? reduce_add(last_w * last_g) : 0.0f;
    if constexpr (kPairs) {
        sum += sum_of<2 * kLanes>(paired, [=](int64_t j) {
            const EvenOdd w = load_even_odd(weights + j), g = load_even_odd(dout + j);
            return w.even * g.even + w.odd * g.odd;
        });
    }
    const auto product = [=](int64_t j) {
        return load(weights + paired + j) * load(dout + paired + j);
    };
    sum += sum_of(whole - paired, product);
    const Vec total = splat(sum), factor = splat(scale);
    const auto gradient = [=](Vec w, Vec g) { return w * (g - total) * factor; };
    if constexpr (kPairs) {
        for (int64_t j = 0; j < paired; j += 2 * kLanes) {
            const EvenOdd w = load_even_odd(weights + j), g = load_even_odd(dout + j);
            store_even_odd(dx + j, {gradient(w.even, g.even), gradient(w.odd, g.odd)});
        }
    }
    for (int64_t j = paired; j < whole; j += kLanes)
        store(dx + j, gradient(load(weights + j), load(dout + j)));
    if (rest) store(dx + whole, gradient(last_w, last_g), rest);
}

void add_to(float* sums, const float* values, int64_t n, bool columns) {
    if (columns) {
        for (int64_t j = 0; j < n; ++j) sums[j] += values[j];
    } else {
        *sums += sum_of(n, [=](int64_t j) { return load(values + j, n - j); });
    }
}

template <typename T>
void softmax_bwd_of(const SoftmaxBwdArgs& args) {
    const SoftmaxShape& shape = args.shape;
    // Dims that the bias has come first: its gradient's element is then a run of rows.
    RowCursor<2> rows;
    int64_t kept = 1, contiguous[kSoftmaxMaxRank], stride = 1;
    for (int dim = shape.rank - 1; dim >= 0; --dim) {
        contiguous[dim] = stride;
        stride *= shape.sizes[dim];
    }
    for (const bool wanted : {true, false}) {
        for (int dim = 0; dim < shape.rank; ++dim) {
            if ((args.dbias && args.bias_kept[dim]) != wanted) continue;
            rows.add_dim(shape.sizes[dim], {contiguous[dim], args.dout_strides[dim]});
            if (wanted) kept *= shape.sizes[dim];
        }
    }
    rows.collapse();

    // Without a bias a task is a block of rows; with one it is a part of one bias row's run.
    const int64_t run = args.dbias ? shape.rows / kept : shape.rows;
    int64_t step = std::max<int64_t>(1, kTaskElements / shape.columns);
    if (args.dbias) step = kept >= kBiasTasks ? run : std::max(step, run * kept / kBiasTasks);
    step = std::min(step, run);
    const int64_t parts = (run + step - 1) / step;
    const int64_t tasks = args.dbias ? kept * parts : parts;
    const int64_t bias_columns = args.bias_columns ? shape.columns : 1;
    const bool simple = !args.log && !args.dropout.threshold && !args.dbias;
    // Padded: its end is read in whole vectors.
    std::vector<float> partial(args.dbias ? tasks * bias_columns + kLanes : 0);

#pragma omp parallel if (tasks > 1)
    {
        RowCursor<2> cursor = rows;
        float* dscores = scratch<float>(round_up(shape.columns, 64));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t begin = task / parts * run + task % parts * step;
            const int64_t end = std::min(begin + step, (task / parts + 1) * run);
            cursor.seek(begin);
            for (int64_t at = begin; at < end; ++at, cursor.advance()) {
                const int64_t row = cursor.offset[0];
                const T* weights = static_cast<const T*>(args.weights) + row * shape.columns;
                const T* dout = static_cast<const T*>(args.dout) + cursor.offset[1];
                T* dx = static_cast<T*>(args.dx) + row * shape.columns;
                if (simple) {
                    row_gradient(weights, dout, args.scale, shape.columns, dx);
                    continue;
                }
                score_gradient(args, weights, dout, row, dscores);
                if (args.dbias) {
                    add_to(&partial[task * bias_columns], dscores, shape.columns,
                           args.bias_columns);
                }
                write_scaled(dx, dscores, args.scale, shape.columns);
            }
        }
    }
    if (!args.dbias) return;
    for (int64_t one = 0; one < kept; ++one) {
        float* sums = &partial[one * parts * bias_columns];
        for (int64_t part = 1; part < parts; ++part) {
            for (int64_t j = 0; j < bias_columns; ++j) sums[j] += sums[part * bias_columns + j];
        }
        if (args.bias_dtype == args.dtype) {
            T* to = static_cast<T*>(args.dbias) + one * bias_columns;
            write_scaled(to, sums, 1.0f, bias_columns);
        } else {
            std::copy(sums, sums + bias_columns,
                      static_cast<float*>(args.dbias) + one * bias_columns);
        }
    }
}

}  // namespace

void softmax_fwd(const SoftmaxFwdArgs& args) {
    if (args.shape.rows == 0 || args.shape.columns == 0) return;
    if (args.dtype == DType::float32) return softmax_fwd_of<float>(args);
    if (args.dtype == DType::float16) return softmax_fwd_of<F16>(args);
    softmax_fwd_of<BF16>(args);
}

void softmax_bwd(const SoftmaxBwdArgs& args) {
    if (args.shape.rows == 0 || args.shape.columns == 0) return;
    if (args.dtype == DType::float32) return softmax_bwd_of<float>(args);
    if (args.dtype == DType::float16) return softmax_bwd_of<F16>(args);
    softmax_bwd_of<BF16>(args);
}

#include "cpu/target_end.h"
