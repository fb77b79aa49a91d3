// Rotary position embedding (Su et al. 2021, "RoFormer", section 3.2.2), and by the negative angle
// its gradient: each pair (a, b) becomes (a cos - b sin, b cos + a sin).
//
// A task owns a block of (batch, heads, seqlen), long in the dim that comes first in memory, so
// that x is read and out written once, in order, while the block's rows of cos and sin stay in
// cache.
#include "cpu/rotary.h"

#include <type_traits>

#include "cpu/simd.h"

#include "cpu/target_begin.h"

#include "cpu/tile.h"

namespace {

// Elements that one task handles, enough to hide the cost of scheduling it.
constexpr int64_t kTaskElements = 16384;
// How far ahead a row is fetched: the processor's own prefetching loses a fifth of the bandwidth.
constexpr int64_t kAheadBytes = 2048;

struct Pair {
    Vec a, b;
};
template <bool kInverse>
FASTATTN_INLINE Pair rotate(Vec a, Vec b, Vec c, Vec s) {
    if constexpr (kInverse) return {a * c + b * s, b * c - a * s};
    return {a * c - b * s, b * c + a * s};
}

// A row's pairs (i, i + half).
template <bool kInverse, class T, class Table>
FASTATTN_INLINE void rotate_halves(const T* x, const Table* cos, const Table* sin, T* out,
                                   int64_t half) {
    int64_t i = 0;
    if constexpr (std::is_same_v<T, BF16>) {
        for (; i + 2 * kLanes <= half; i += 2 * kLanes) {
            const EvenOdd a = load_even_odd(x + i), b = load_even_odd(x + half + i);
            const EvenOdd c = load_even_odd(cos + i), s = load_even_odd(sin + i);
            const Pair even = rotate<kInverse>(a.even, b.even, c.even, s.even);
            const Pair odd = rotate<kInverse>(a.odd, b.odd, c.odd, s.odd);
            store_even_odd(out + i, {even.a, odd.a});
            store_even_odd(out + half + i, {even.b, odd.b});
        }
    }
    for (; i + kLanes <= half; i += kLanes) {
        const Pair pair =
            rotate<kInverse>(load(x + i), load(x + half + i), load(cos + i), load(sin + i));
        store(out + i, pair.a);
        store(out + half + i, pair.b);
    }
    if (const int64_t n = half - i) {
        const Pair pair = rotate<kInverse>(load(x + i, n), load(x + half + i, n), load(cos + i, n),
                                           load(sin + i, n));
        store(out + i, pair.a, n);
        store(out + half + i, pair.b, n);
    }
}

// A row's pairs (2 i, 2 i + 1).
template <bool kInverse, class T, class Table>
FASTATTN_INLINE void rotate_neighbours(const T* x, const Table* cos, const Table* sin, T* out,
                                       int64_t half) {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const EvenOdd v = load_even_odd(x + 2 * i);
        const Pair pair = rotate<kInverse>(v.even, v.odd, load(cos + i), load(sin + i));
        store_even_odd(out + 2 * i, {pair.a, pair.b});
    }
    if (const int64_t n = half - i) {
        EvenOdd v;
        unzip(load(x + 2 * i, 2 * n), load(x + 2 * i + kLanes, 2 * n - kLanes), v.even, v.odd);
        const Pair pair = rotate<kInverse>(v.even, v.odd, load(cos + i, n), load(sin + i, n));
        Vec low, high;
        zip(pair.a, pair.b, low, high);
        store(out + 2 * i, low, 2 * n);
        store(out + 2 * i + kLanes, high, 2 * n - kLanes);
    }
}

// One of the dims heads and seqlen, in blocks of `step`, with the strides along it.
struct Dim {
    int64_t size, x, out, cos, sin;
    int64_t step = 1;

    int64_t blocks() const { return (size + step - 1) / step; }
    int64_t end(int64_t begin) const { return std::min(begin + step, size); }
};

template <bool kInterleaved, bool kInverse, class T, class Table>
struct Rotary {
    const RotaryArgs& args;

    // The block of heads and tokens, in either order, that begins at (first_outer, first_inner).
    void block(int64_t batch, const Dim& outer, int64_t first_outer, const Dim& inner,
               int64_t first_inner) const {
        const int64_t offset = args.offsets ? args.offsets[batch] : args.offset;
        const int64_t head_dim = args.shape.head_dim, rotary_dim = args.shape.rotary_dim;
        const int64_t row_bytes = head_dim * int64_t(sizeof(T));
        const T* x = static_cast<const T*>(args.x) + batch * args.x_strides.batch;
        T* out = static_cast<T*>(args.out) + batch * args.out_strides.batch;
        const Table *cos = table(args.cos, batch, offset), *sin = table(args.sin, batch, offset);
        for (int64_t o = first_outer; o < outer.end(first_outer); ++o) {
            for (int64_t i = first_inner; i < inner.end(first_inner); ++i) {
                const T* from = x + o * outer.x + i * inner.x;
                T* to = out + o * outer.out + i * inner.out;
                const char* ahead = reinterpret_cast<const char*>(from) + kAheadBytes;
                for (int64_t j = 0; j < row_bytes; j += 64) __builtin_prefetch(ahead + j);
                const Table* c = cos + o * outer.cos + i * inner.cos;
                const Table* s = sin + o * outer.sin + i * inner.sin;
                if constexpr (kInterleaved)
                    rotate_neighbours<kInverse>(from, c, s, to, rotary_dim / 2);
                else
                    rotate_halves<kInverse>(from, c, s, to, rotary_dim / 2);
                if (rotary_dim < head_dim)
                    std::copy(from + rotary_dim, from + head_dim, to + rotary_dim);
            }
        }
    }

    static const Table* table(const RotaryTable& table, int64_t batch, int64_t row) {
        return static_cast<const Table*>(table.data) + batch * table.batch_stride +
               row * table.row_stride;
    }

    void run() const {
        const RotaryShape& s = args.shape;
        const RotaryStrides &x = args.x_strides, &out = args.out_strides;
        Dim heads{s.heads, x.heads, out.heads, 0, 0};
        Dim tokens{s.seqlen, x.seqlen, out.seqlen, args.cos.row_stride, args.sin.row_stride};
        const bool heads_inside = x.heads < x.seqlen;
        Dim &inner = heads_inside ? heads : tokens, &outer = heads_inside ? tokens : heads;
        const int64_t rows = std::max<int64_t>(kTaskElements / s.head_dim, 1);
        inner.step = std::min(rows, inner.size);
        outer.step = std::clamp<int64_t>(rows / inner.step, 1, outer.size);
        const int64_t sequences = std::clamp<int64_t>(rows / (inner.step * outer.step), 1, s.batch);
        const int64_t blocks = heads.blocks() * tokens.blocks();
        const int64_t tasks = (s.batch + sequences - 1) / sequences * blocks;
#pragma omp parallel for schedule(dynamic) if (tasks > 1)
        for (int64_t task = 0; task < tasks; ++task) {
            // The heads of a block of tokens follow one another: they take the same cos and sin.
            const int64_t head = task % heads.blocks() * heads.step;
            const int64_t token = task / heads.blocks() % tokens.blocks() * tokens.step;
            const int64_t first = task / blocks * sequences;
            for (int64_t batch = first; batch < std::min(first + sequences, s.batch); ++batch) {
                block(batch, outer, heads_inside ? token : head, inner,
                      heads_inside ? head : token);
            }
        }
    }
};

template <bool kInterleaved, class T, class Table>
void rotary_of(const RotaryArgs& args) {
    if (args.inverse) return Rotary<kInterleaved, true, T, Table>{args}.run();
    Rotary<kInterleaved, false, T, Table>{args}.run();
}

template <class T>
void rotary_of(const RotaryArgs& args) {
    const bool wide = args.table_dtype == DType::float32;
    if (args.interleaved)
        return wide ? rotary_of<true, T, float>(args) : rotary_of<true, T, T>(args);
    wide ? rotary_of<false, T, float>(args) : rotary_of<false, T, T>(args);
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
