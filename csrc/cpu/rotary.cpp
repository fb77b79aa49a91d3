// Rotary position embedding (Su et al. 2021, "RoFormer", section 3.2.2), and by the negative angle
// its gradient: each pair (a, b) becomes (a cos - b sin, b cos + a sin).
//
// A task owns a block of (batch, heads, seqlen), long in the dim that comes first in memory, so
// that x is read and out written once, in order, while the block's rows of cos and sin stay in
// cache.
#include "cpu/rotary.h"

#include "cpu/simd.h"

#include "cpu/target_begin.h"

#include "cpu/tile.h"

namespace {

// Elements that one task handles, enough to hide the cost of scheduling it.
constexpr int64_t kTaskElements = 16384;

// The even, and the odd elements of two vectors: undoes zip.
FASTATTN_INLINE void unzip(Vec low, Vec high, Vec& even, Vec& odd) {
#if FASTATTN_AVX512
    even = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28,
                                   30);
    odd = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29,
                                  31);
#elif FASTATTN_AVX2
    even = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
    odd = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    even = __builtin_shufflevector(low, high, 0, 2, 4, 6);
    odd = __builtin_shufflevector(low, high, 1, 3, 5, 7);
#endif
}

// `count` pairs of a row, from pair i on; count is at most kLanes.
template <class T, class Table>
FASTATTN_INLINE void rotate_halves(const T* x, const Table* cos, const Table* sin, Vec sign, T* out,
                                   int64_t half, int64_t i, int64_t count) {
    const Vec a = load(x + i, count), b = load(x + half + i, count);
    const Vec c = load(cos + i, count), s = load(sin + i, count) * sign;
    store(out + i, a * c - b * s, count);
    store(out + half + i, b * c + a * s, count);
}
template <class T, class Table>
FASTATTN_INLINE void rotate_neighbours(const T* x, const Table* cos, const Table* sin, Vec sign,
                                       T* out, int64_t i, int64_t count) {
    Vec a, b, low, high;
    unzip(load(x + 2 * i, 2 * count), load(x + 2 * i + kLanes, 2 * count - kLanes), a, b);
    const Vec c = load(cos + i, count), s = load(sin + i, count) * sign;
    zip(a * c - b * s, b * c + a * s, low, high);
    store(out + 2 * i, low, 2 * count);
    store(out + 2 * i + kLanes, high, 2 * count - kLanes);
}

template <bool kInterleaved, class T, class Table>
FASTATTN_INLINE void rotate_row(const T* x, const Table* cos, const Table* sin, Vec sign, T* out,
                                int64_t half) {
    const auto pairs = [=](int64_t i, int64_t count) {
        if constexpr (kInterleaved)
            rotate_neighbours(x, cos, sin, sign, out, i, count);
        else
            rotate_halves(x, cos, sin, sign, out, half, i, count);
    };
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) pairs(i, kLanes);
    if (i < half) pairs(i, half - i);
}

template <bool kInterleaved, class T, class Table>
struct Rotary {
    const RotaryArgs& args;

    const Table* row(const RotaryTable& table, int64_t batch, int64_t token) const {
        const int64_t offset = args.offsets ? args.offsets[batch] : args.offset;
        return static_cast<const Table*>(table.data) + batch * table.batch_stride +
               (offset + token) * table.row_stride;
    }

    FASTATTN_INLINE void one(int64_t batch, int64_t head, int64_t token, Vec sign) const {
        const RotaryStrides &xs = args.x_strides, &os = args.out_strides;
        const T* x =
            static_cast<const T*>(args.x) + batch * xs.batch + head * xs.heads + token * xs.seqlen;
        T* out = static_cast<T*>(args.out) + batch * os.batch + head * os.heads + token * os.seqlen;
        const int64_t rotary_dim = args.shape.rotary_dim;
        rotate_row<kInterleaved>(x, row(args.cos, batch, token), row(args.sin, batch, token), sign,
                                 out, rotary_dim / 2);
        std::copy(x + rotary_dim, x + args.shape.head_dim, out + rotary_dim);
    }
};

struct Range {
    int64_t begin, end;
};

// The blocks of one dim, of `step` each.
struct Blocks {
    int64_t size, step;

    int64_t count() const { return (size + step - 1) / step; }
    Range operator[](int64_t index) const {
        return {index * step, std::min((index + 1) * step, size)};
    }
};

// As many of `size` as make up `elements`, of which one takes `each`.
Blocks blocks_of(int64_t size, int64_t elements, int64_t each) {
    return {size, std::clamp<int64_t>(elements / each, 1, size)};
}

template <bool kInterleaved, class T, class Table>
void rotary_of(const RotaryArgs& args) {
    const RotaryShape& s = args.shape;
    const Rotary<kInterleaved, T, Table> rotary{args};
    const bool heads_first = args.x_strides.heads < args.x_strides.seqlen;
    const int64_t inner_size = heads_first ? s.heads : s.seqlen;
    const int64_t outer_size = heads_first ? s.seqlen : s.heads;
    const Blocks inner = blocks_of(inner_size, kTaskElements, s.head_dim);
    const Blocks outer = blocks_of(outer_size, kTaskElements, s.head_dim * inner.step);
    const Blocks batches = blocks_of(s.batch, kTaskElements, s.head_dim * inner.step * outer.step);
    const Vec sign = splat(args.inverse ? -1.0f : 1.0f);
    const int64_t tasks = batches.count() * outer.count() * inner.count();
#pragma omp parallel for schedule(dynamic) if (tasks > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        // Neighbouring tasks of (batch, heads, seqlen) take the same rows of cos and sin.
        const int64_t faster = heads_first ? inner.count() : outer.count();
        const int64_t a = task % faster, rest = task / faster;
        const int64_t slower = heads_first ? outer.count() : inner.count();
        const int64_t b = rest % slower;
        const Range heads = (heads_first ? inner : outer)[a];
        const Range tokens = (heads_first ? outer : inner)[b];
        const Range sequences = batches[rest / slower];
        for (int64_t batch = sequences.begin; batch < sequences.end; ++batch) {
            if (heads_first) {
                for (int64_t token = tokens.begin; token < tokens.end; ++token)
                    for (int64_t head = heads.begin; head < heads.end; ++head)
                        rotary.one(batch, head, token, sign);
            } else {
                for (int64_t head = heads.begin; head < heads.end; ++head)
                    for (int64_t token = tokens.begin; token < tokens.end; ++token)
                        rotary.one(batch, head, token, sign);
            }
        }
    }
}

template <class T, class Table>
void rotary_of(const RotaryArgs& args) {
    return args.interleaved ? rotary_of<true, T, Table>(args) : rotary_of<false, T, Table>(args);
}

template <class T>
void rotary_of(const RotaryArgs& args) {
    return args.table_dtype == DType::float32 ? rotary_of<T, float>(args) : rotary_of<T, T>(args);
}

// The first sequence whose tokens have no rows of cos and sin, or -1.
int64_t first_invalid(const RotaryArgs& args) {
    if (!args.offsets) return -1;
    const int64_t last = args.shape.seqlen_max - args.shape.seqlen;
    for (int64_t batch = 0; batch < args.shape.batch; ++batch)
        if (args.offsets[batch] < 0 || args.offsets[batch] > last) return batch;
    return -1;
}

}  // namespace

int64_t rotary(const RotaryArgs& args) {
    const int64_t invalid = first_invalid(args);
    if (invalid >= 0) return invalid;
    const RotaryShape& s = args.shape;
    if (s.batch * s.heads * s.seqlen * s.head_dim == 0) return -1;
    if (args.dtype == DType::float32)
        rotary_of<float>(args);
    else if (args.dtype == DType::float16)
        rotary_of<F16>(args);
    else
        rotary_of<BF16>(args);
    return -1;
}

#include "cpu/target_end.h"
