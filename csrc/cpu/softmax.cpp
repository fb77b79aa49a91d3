// softmax(scale * x + bias) over rows of columns, where mask and causal diagonal allow, with
// dropout or the logarithm; and its gradient.
//
// A task owns a run of rows, of which short ones go kBlockRows at a time. Each row is read from
// memory once: its scores go to a float buffer that stays in cache (maximum), where they become
// exponentials (sum), which are then scaled and written out once. A row that sees nothing gives 0
// (log: -inf). Rows are independent, so that the result does not depend on the number of threads;
// the bias's gradient is summed in an order that depends on the shapes alone.
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
constexpr int kBlockRows = 4;
constexpr int64_t kBlockColumns = 1024;
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

// exp(score - top), written back if `keep`; returns the sum. It computes more than it moves, so
// that meanwhile the next row and the lines of the result come from memory.
template <typename T>
float exponentials(float* scores, int64_t n, float top, bool keep, const T* next, const T* out) {
    const Vec shift = splat(top);
    return sum_of(n, [=](int64_t j) {
        __builtin_prefetch(next + j);
        __builtin_prefetch(out + j, 1);
        const Vec e = exp(load(scores + j) - shift);
        if (keep) store(scores + j, e);
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

// Rows in hand at a time: short ones don't wait for one another's maximum and sum.
int64_t block_rows(int64_t columns) { return columns <= kBlockColumns ? kBlockRows : 1; }

struct Row {
    int64_t n;  // columns that the causal diagonal leaves
    float top, sum;
    bool visible;
};

// The scores of the row at the cursor, with bias and mask, and their maximum.
template <typename T>
Row read_row(const SoftmaxFwdArgs& args, const RowCursor<3>& cursor, int64_t row, float* scores) {
    const int64_t columns = args.shape.columns;
    const int64_t n = args.causal ? std::min(columns, row % args.shape.matrix_rows + 1) : columns;
    float top =
        load_scores(static_cast<const T*>(args.x) + cursor.offset[0], n, args.scale, scores);
    if (args.bias) {
        const int64_t at = cursor.offset[2];
        if (args.bias_dtype == args.dtype) {
            add_bias(static_cast<const T*>(args.bias) + at, args.bias_column_stride, n, scores);
        } else {
            add_bias(static_cast<const float*>(args.bias) + at, args.bias_column_stride, n, scores);
        }
    }
    if (args.mask) hide(args.mask + cursor.offset[1], args.mask_column_stride, n, scores);
    if (args.bias || args.mask) top = max_of(scores, n);
    const bool visible =
        top != -kInfinity || std::any_of(scores, scores + n, [](float s) { return s != s; });
    return {.n = n, .top = top, .sum = 0.0f, .visible = visible};
}

// The result of a row whose scores have become exponentials (with log: have not).
template <typename T>
void write_row(const SoftmaxFwdArgs& args, const Row& row, int64_t index, float* scores, T* out) {
    const int64_t columns = args.shape.columns, n = row.visible ? row.n : 0;
    const float hidden = args.log ? -kInfinity : 0.0f;
    if (args.weights) {
        T* weights = static_cast<T*>(args.weights) + index * columns;
        write_quotients(weights, scores, row.sum, n);
        fill(weights + n, 0.0f, columns - n);
        drop(args.dropout, index, n, scores);
    }
    if (args.log) {
        write_logarithms(out, scores, row.top, std::log(row.sum), n);
    } else {
        write_quotients(out, scores, row.sum, n);
    }
    fill(out + n, hidden, columns - n);
}

template <typename T>
void softmax_rows(const SoftmaxFwdArgs& args, RowCursor<3>& cursor, int64_t begin, int64_t end,
                  float* scores) {
    const int64_t columns = args.shape.columns, width = round_up(columns, 64);
    const int64_t step = block_rows(columns);
    cursor.seek(begin);
    for (int64_t first = begin; first < end; first += step) {
        const int64_t rows = std::min(step, end - first);
        T* out = static_cast<T*>(args.out) + first * columns;
        Row block[kBlockRows];
        for (int64_t r = 0; r < rows; ++r, cursor.advance())
            block[r] = read_row<T>(args, cursor, first + r, scores + r * width);
        for (int64_t r = 0; r < rows; ++r) {
            Row& row = block[r];
            if (!row.visible) continue;
            const T* next = static_cast<const T*>(args.x) + cursor.offset[0] + r * columns;
            row.sum = exponentials(scores + r * width, row.n, row.top, !args.log, next,
                                   out + r * columns);
        }
        for (int64_t r = 0; r < rows; ++r)
            write_row(args, block[r], first + r, scores + r * width, out + r * columns);
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
        float* scores = scratch<float>(block_rows(shape.columns) * round_up(shape.columns, 64));
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

// bfloat16 goes by pairs: a lane's two are each a shift or a mask away from floats.
template <typename T>
constexpr bool kPairs = std::is_same_v<T, BF16>;

// The gradient of a row without dropout, log or bias, given the sum of weights * dout. Meanwhile
// the next rows come from memory, `ahead` elements further.
template <typename T>
void row_gradient(const T* weights, const T* dout, float sum, float scale, int64_t n, int64_t ahead,
                  T* dx) {
    const Vec total = splat(sum), factor = splat(scale);
    const auto gradient = [=](Vec w, Vec g) { return w * (g - total) * factor; };
    int64_t j = 0;
    if constexpr (kPairs<T>) {
        for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
            __builtin_prefetch(weights + j + ahead);
            __builtin_prefetch(dout + j + ahead);
            const EvenOdd w = load_even_odd(weights + j), g = load_even_odd(dout + j);
            store_even_odd(dx + j, {gradient(w.even, g.even), gradient(w.odd, g.odd)});
        }
    }
    for (; j < n; j += kLanes) {
        __builtin_prefetch(weights + j + ahead);
        __builtin_prefetch(dout + j + ahead);
        store(dx + j, gradient(load(weights + j, n - j), load(dout + j, n - j)), n - j);
    }
}

template <typename T>
float dot(const T* a, const T* b, int64_t n) {
    float sum = 0.0f;
    if constexpr (kPairs<T>) {
        const int64_t paired = n / (2 * kLanes) * (2 * kLanes);
        sum = sum_of<2 * kLanes>(paired, [=](int64_t j) {
            const EvenOdd x = load_even_odd(a + j), y = load_even_odd(b + j);
            return x.even * y.even + x.odd * y.odd;
        });
        a += paired, b += paired, n -= paired;
    }
    return sum + sum_of(n, [=](int64_t j) { return load(a + j, n - j) * load(b + j, n - j); });
}

// The gradient of rows without dropout, log or bias: two passes, nothing kept between them.
template <typename T>
void plain_gradient(const SoftmaxBwdArgs& args, RowCursor<2>& cursor, int64_t begin, int64_t end) {
    const int64_t columns = args.shape.columns, step = block_rows(columns);
    for (int64_t first = begin; first < end; first += step) {
        const int64_t rows = std::min(step, end - first);
        const T *weights[kBlockRows], *dout[kBlockRows];
        float sums[kBlockRows];
        for (int64_t r = 0; r < rows; ++r, cursor.advance()) {
            weights[r] = static_cast<const T*>(args.weights) + (first + r) * columns;
            dout[r] = static_cast<const T*>(args.dout) + cursor.offset[1];
            sums[r] = dot(weights[r], dout[r], columns);
        }
        T* dx = static_cast<T*>(args.dx) + first * columns;
        for (int64_t r = 0; r < rows; ++r, dx += columns)
            row_gradient(weights[r], dout[r], sums[r], args.scale, columns, rows * columns, dx);
    }
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
            if (simple) {
                plain_gradient<T>(args, cursor, begin, end);
                continue;
            }
            for (int64_t at = begin; at < end; ++at, cursor.advance()) {
                const int64_t row = cursor.offset[0];
                const T* weights = static_cast<const T*>(args.weights) + row * shape.columns;
                const T* dout = static_cast<const T*>(args.dout) + cursor.offset[1];
                T* dx = static_cast<T*>(args.dx) + row * shape.columns;
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
