// Layer norm (Ba et al. 2016) and RMS norm (Zhang and Sennrich 2019) of rows, alone or after a
// residual add, and their gradients.
//
// Forward: a task owns a block of rows; a row comes from memory once and stays in cache for the
// passes over it: mean, variance about that mean (corrected for the mean's own rounding), result.
// Backward: a task owns a run of rows, of which kBlockRows are in hand at a time, so that the sums
// of the parameters' gradients are touched once for all of them. Each task has sums of its own,
// which are added up in their order. Tasks depend on the shape alone, and so do the results.
#include "cpu/norm.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/simd.h"

#include "cpu/target_begin.h"

#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace {

// Elements that one task handles, enough to hide the cost of scheduling it.
constexpr int64_t kTaskElements = 16384;
// Columns, and rows, that one float32 sum runs over before it is added to a total.
constexpr int64_t kSumColumns = 1024;
constexpr int64_t kSumRows = 128;
// Backward with parameters' gradients: at most so many tasks, of at least so much.
constexpr int64_t kMaxParts = 64;
constexpr int64_t kMinPartRows = 16;
constexpr int64_t kMinPartElements = 32768;
constexpr int kBlockRows = 4;
// Longer rows go one by one, so that the passes over a row find it in the first cache.
constexpr int64_t kBlockRowBytes = 4096;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Calls step(j, count) for each vector of a row; count is below kLanes for the last at most.
template <class Step>
FASTATTN_INLINE void each_vector(int64_t begin, int64_t end, Step step) {
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) step(j, int64_t(kLanes));
    if (j < end) step(j, end - j);
}

// Deviations and their squares, added up side by side.
struct Moments {
    Vec first, second;
    FASTATTN_INLINE friend Moments operator+(Moments a, Moments b) {
        return {a.first + b.first, a.second + b.second};
    }
};

// The sum of value(j, count) over a row, lane by lane, in runs.
template <class Value>
FASTATTN_INLINE auto sum_of(int64_t columns, Value value) {
    typedef decltype(value(int64_t(0), int64_t(0))) Sum;
    Sum total = {};
    for (int64_t start = 0; start < columns; start += kSumColumns) {
        const int64_t end = std::min(columns, start + kSumColumns);
        Sum a = {}, b = {}, c = {}, d = {};
        int64_t j = start;
        for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
            a = a + value(j, int64_t(kLanes)), b = b + value(j + kLanes, int64_t(kLanes));
            c = c + value(j + 2 * kLanes, int64_t(kLanes));
            d = d + value(j + 3 * kLanes, int64_t(kLanes));
        }
        each_vector(j, end, [&](int64_t at, int64_t count) { a = a + value(at, count); });
        total = total + ((a + b) + (c + d));
    }
    return total;
}

// A parameter as floats: itself, a converted copy in a scratch slot, or `absent` throughout.
template <class T>
const float* as_floats(DType dtype, const void* parameter, int64_t n, float absent, int slot) {
    if (parameter && dtype == DType::float32) return static_cast<const float*>(parameter);
    float* floats = scratch<float>(round_up(n, kLanes), slot);
    each_vector(0, n, [&](int64_t j, int64_t count) {
        const Vec v = parameter ? load(static_cast<const T*>(parameter) + j, count) : splat(absent);
        store(floats + j, v);
    });
    return floats;
}

// Forward. A block's rows take each step in turn: they don't wait for one another's sums.

template <class T>
struct Forward {
    const NormFwdArgs& args;
    const float* weight;
    const float* bias;
    int64_t columns;
    float inverse_columns;

    struct Row {
        const T* x;
        const T* next;             // that of the next block, to be fetched
        float mean, offset, rstd;  // the mean is mean + offset
    };

    // The row's values and, for layer norm, their mean; x + residual where there is one.
    Row read(int64_t row, int64_t rows) const {
        const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
        const T* next = x + rows * args.x_stride;
        Vec total = {};
        if (args.residual) {
            const T* residual = static_cast<const T*>(args.residual) + row * args.residual_stride;
            T* sum = static_cast<T*>(args.sum) + row * columns;
            total = sum_of(columns, [=](int64_t j, int64_t count) {
                store(sum + j, load(x + j, count) + load(residual + j, count), count);
                return load(sum + j, count);
            });
            x = sum;
        } else if (args.shape.centered) {
            total = sum_of(columns, [=](int64_t j, int64_t count) { return load(x + j, count); });
        }
        const float mean = args.shape.centered ? reduce_add(total) * inverse_columns : 0.0f;
        return {.x = x, .next = next, .mean = mean, .offset = 0.0f, .rstd = 0.0f};
    }

    // The variance about the mean, and what the mean is off by.
    void center(Row& row) const {
        const T* x = row.x;
        const Vec mean = splat(row.mean), lanes = __builtin_convertvector(lane_index(), Vec);
        const Moments sums = sum_of(columns, [=](int64_t j, int64_t count) -> Moments {
            Vec d = load(x + j, count) - mean;
            if (count < kLanes) d = select(lanes < splat(float(count)), d, Vec{});
            return {d, d * d};
        });
        row.offset = reduce_add(sums.first) * inverse_columns;
        const float square = reduce_add(sums.second) * inverse_columns;
        const float variance = std::max(square - row.offset * row.offset, 0.0f);
        row.rstd = 1.0f / std::sqrt(variance + args.eps);
    }

    void mean_square(Row& row) const {
        const T* x = row.x;
        const Vec sums = sum_of(columns, [=](int64_t j, int64_t count) {
            const Vec v = load(x + j, count);
            return v * v;
        });
        row.rstd = 1.0f / std::sqrt(reduce_add(sums) * inverse_columns + args.eps);
    }

    void write(const Row& row, T* y) const {
        const Vec mean = splat(row.mean), factor = splat(row.rstd);
        const Vec shift = splat(-row.offset * row.rstd);
        const T *x = row.x, *next = row.next;
        const float *w = weight, *b = bias;
        each_vector(0, columns, [=](int64_t j, int64_t count) {
            __builtin_prefetch(next + j);
            const Vec normed = (load(x + j, count) - mean) * factor + shift;
            store(y + j, normed * load(w + j, count) + load(b + j, count), count);
        });
    }

    void block(int64_t begin, int64_t rows) const {
        Row block[kBlockRows];
        for (int64_t r = 0; r < rows; ++r) block[r] = read(begin + r, rows);
        for (int64_t r = 0; r < rows; ++r) {
            if (args.shape.centered)
                center(block[r]);
            else
                mean_square(block[r]);
        }
        for (int64_t r = 0; r < rows; ++r) {
            write(block[r], static_cast<T*>(args.y) + (begin + r) * columns);
            if (!args.stats) continue;
            float* stats = args.stats + begin + r;
            if (args.shape.centered) *stats = block[r].mean + block[r].offset;
            stats[args.shape.centered ? args.shape.rows : 0] = block[r].rstd;
        }
    }

    void run(int64_t begin, int64_t end) const {
        const int64_t step = columns * int64_t(sizeof(T)) <= kBlockRowBytes ? kBlockRows : 1;
        for (int64_t row = begin; row < end; row += step) block(row, std::min(step, end - row));
    }
};

template <class T>
void norm_fwd_of(const NormFwdArgs& args) {
    const NormShape& s = args.shape;
    const Forward<T> forward{
        .args = args,
        .weight = as_floats<T>(s.parameter_dtype, args.weight, s.columns, 1.0f, 0),
        .bias = as_floats<T>(s.parameter_dtype, args.bias, s.columns, 0.0f, 1),
        .columns = s.columns,
        .inverse_columns = 1.0f / float(s.columns),
    };
    const int64_t step = round_up(std::max<int64_t>(1, kTaskElements / s.columns), kBlockRows);
    const int64_t tasks = (s.rows + step - 1) / step;
#pragma omp parallel for schedule(dynamic) if (tasks > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        forward.run(task * step, std::min((task + 1) * step, s.rows));
    }
}

// Backward. With h = (x - mean) * rstd and g = dy * weight, of which RMS norm has no mean(g):
// dx = rstd * (g - mean(g) - h * mean(g * h)) + dsum.

template <class T>
struct Backward {
    const NormBwdArgs& args;
    const float* weight;
    float inverse_columns;

    template <int kRows>
    struct Block {
        const T* x[kRows];
        const T* dy[kRows];
        float mean[kRows], rstd[kRows];
    };

    template <int kRows>
    Block<kRows> block(int64_t row) const {
        Block<kRows> b;
        for (int r = 0; r < kRows; ++r) {
            b.x[r] = static_cast<const T*>(args.x) + (row + r) * args.x_stride;
            b.dy[r] = static_cast<const T*>(args.dy) + (row + r) * args.dy_stride;
            const float* stats = args.stats + row + r;
            b.mean[r] = args.shape.centered ? *stats : 0.0f;
            b.rstd[r] = stats[args.shape.centered ? args.shape.rows : 0];
        }
        return b;
    }

    // Adds to dweight and dbias (if kParameters), returns each row's sums of g and of g * h.
    template <int kRows, bool kParameters>
    void reduce(const Block<kRows>& b, float* dweight, float* dbias, float (&sum_g)[kRows],
                float (&sum_gh)[kRows]) const {
        const int64_t columns = args.shape.columns;
        for (int r = 0; r < kRows; ++r) sum_g[r] = sum_gh[r] = 0.0f;
        for (int64_t start = 0; start < columns; start += kSumColumns) {
            Vec gs[kRows] = {}, ghs[kRows] = {};
            each_vector(start, std::min(columns, start + kSumColumns),
                        [&](int64_t j, int64_t count) {
                            const Vec w = load(weight + j, count);
                            Vec dw = {}, db = {};
#pragma GCC unroll 4
                            for (int r = 0; r < kRows; ++r) {
                                const Vec d = load(b.dy[r] + j, count);
                                const Vec h =
                                    (load(b.x[r] + j, count) - splat(b.mean[r])) * splat(b.rstd[r]);
                                if (kParameters) dw += d * h, db += d;
                                const Vec g = d * w;
                                gs[r] += g, ghs[r] += g * h;
                            }
                            if (!kParameters) return;
                            store(dweight + j, load(dweight + j) + dw);
                            store(dbias + j, load(dbias + j) + db);
                        });
            for (int r = 0; r < kRows; ++r) {
                sum_g[r] += reduce_add(gs[r]), sum_gh[r] += reduce_add(ghs[r]);
            }
        }
    }

    template <int kRows, bool kParameters>
    void rows(int64_t row, float* dweight, float* dbias) const {
        const int64_t columns = args.shape.columns;
        const Block<kRows> b = block<kRows>(row);
        float sum_g[kRows], sum_gh[kRows];
        reduce<kRows, kParameters>(b, dweight, dbias, sum_g, sum_gh);
        for (int r = 0; r < kRows; ++r) {
            const float mean_g = args.shape.centered ? sum_g[r] * inverse_columns : 0.0f;
            const T* dsum = static_cast<const T*>(args.dsum);
            if (dsum) dsum += (row + r) * args.dsum_stride;
            T* dx = static_cast<T*>(args.dx) + (row + r) * columns;
            write(b.x[r], b.dy[r], dsum, b.mean[r], b.rstd[r], mean_g, sum_gh[r] * inverse_columns,
                  dx);
        }
    }

    void write(const T* x, const T* dy, const T* dsum, float mean, float rstd, float mean_g,
               float mean_gh, T* dx) const {
        const Vec center = splat(mean), factor = splat(rstd);
        const Vec shift = splat(mean_g), slope = splat(mean_gh);
        const auto gradient = [=, this](int64_t j, int64_t count) {
            const Vec h = (load(x + j, count) - center) * factor;
            const Vec g = load(dy + j, count) * load(weight + j, count);
            return (g - shift - h * slope) * factor;
        };
        if (dsum) {
            each_vector(0, args.shape.columns, [=](int64_t j, int64_t count) {
                store(dx + j, gradient(j, count) + load(dsum + j, count), count);
            });
        } else {
            each_vector(0, args.shape.columns, [=](int64_t j, int64_t count) {
                store(dx + j, gradient(j, count), count);
            });
        }
    }

    template <bool kParameters>
    void run(int64_t begin, int64_t end, float* dweight, float* dbias) const {
        int64_t row = begin;
        for (; row + kBlockRows <= end; row += kBlockRows)
            rows<kBlockRows, kParameters>(row, dweight, dbias);
        for (; row < end; ++row) rows<1, kParameters>(row, dweight, dbias);
    }

    // As run, into `sums`, (2, width); more than kSumRows rows by way of a buffer of this thread.
    void run_with_sums(int64_t begin, int64_t end, int64_t width, float* sums) const {
        std::fill(sums, sums + 2 * width, 0.0f);
        if (end - begin <= kSumRows) return run<true>(begin, end, sums, sums + width);
        float* few = scratch<float>(2 * width, 2);
        for (int64_t row = begin; row < end; row += kSumRows) {
            std::fill(few, few + 2 * width, 0.0f);
            run<true>(row, std::min(end, row + kSumRows), few, few + width);
            for (int64_t j = 0; j < 2 * width; j += kLanes)
                store(sums + j, load(sums + j) + load(few + j));
        }
    }
};

// Columns [begin, end) of a parameter's gradient: the sum of all parts, `stride` floats apart.
template <class T>
void add_parts(DType dtype, const float* sums, int64_t parts, int64_t stride, int64_t begin,
               int64_t end, void* to) {
    if (!to) return;
    each_vector(begin, end, [&](int64_t j, int64_t count) {
        Vec total = {};
        for (int64_t part = 0; part < parts; ++part) total += load(sums + part * stride + j);
        if (dtype == DType::float32)
            store(static_cast<float*>(to) + j, total, count);
        else
            store(static_cast<T*>(to) + j, total, count);
    });
}

template <class T>
void norm_bwd_of(const NormBwdArgs& args) {
    const NormShape& s = args.shape;
    const bool parameters = args.dweight || args.dbias;
    const Backward<T> backward{
        .args = args,
        .weight = as_floats<T>(s.parameter_dtype, args.weight, s.columns, 1.0f, 0),
        .inverse_columns = 1.0f / float(s.columns),
    };
    const int64_t width = round_up(s.columns, 16);
    int64_t step = std::max<int64_t>(kBlockRows, kTaskElements / s.columns);
    if (parameters) {
        const int64_t least = std::max(kMinPartRows, kMinPartElements / s.columns);
        step = std::max(least, (s.rows + kMaxParts - 1) / kMaxParts);
    }
    step = round_up(step, kBlockRows);
    const int64_t tasks = (s.rows + step - 1) / step;
    float* sums = parameters ? scratch<float>(std::max<int64_t>(tasks, 1) * 2 * width, 1) : nullptr;
#pragma omp parallel for schedule(dynamic) if (tasks > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t begin = task * step, end = std::min(begin + step, s.rows);
        if (parameters)
            backward.run_with_sums(begin, end, width, sums + task * 2 * width);
        else
            backward.template run<false>(begin, end, nullptr, nullptr);
    }
    if (!parameters) return;
    constexpr int64_t kColumns = 512;
#pragma omp parallel for schedule(static) if (tasks * s.columns > kTaskElements)
    for (int64_t begin = 0; begin < s.columns; begin += kColumns) {
        const int64_t end = std::min(begin + kColumns, s.columns);
        add_parts<T>(s.parameter_dtype, sums, tasks, 2 * width, begin, end, args.dweight);
        add_parts<T>(s.parameter_dtype, sums + width, tasks, 2 * width, begin, end, args.dbias);
    }
}

}  // namespace

void norm_fwd(const NormFwdArgs& args) {
    if (args.shape.rows == 0 || args.shape.columns == 0) return;
    if (args.shape.dtype == DType::float32) return norm_fwd_of<float>(args);
    if (args.shape.dtype == DType::float16) return norm_fwd_of<F16>(args);
    norm_fwd_of<BF16>(args);
}

void norm_bwd(const NormBwdArgs& args) {
    if (args.shape.columns == 0) return;
    if (args.shape.dtype == DType::float32) return norm_bwd_of<float>(args);
    if (args.shape.dtype == DType::float16) return norm_bwd_of<F16>(args);
    norm_bwd_of<BF16>(args);
}

#include "cpu/target_end.h"
