// What the softmax kernels share: how a row's elements are shared out among threads, what these
// load, compute and store.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "cuda/math.cuh"
#include "cuda/philox.cuh"
#include "cuda/softmax.h"

namespace fastattn::cuda {

constexpr float kInfinity = INFINITY;
constexpr int kWholeBlock = 0, kMaxThreads = 512;

// How rows are shared out: kLanes threads (kWholeBlock: all of a block) have per_thread elements
// each, in vectors of kVector that lie kLanes vectors apart. kLoops: there are more columns.
template <int lanes, int per_thread, int vector, bool loops>
struct Layout {
    static constexpr int kLanes = lanes, kVector = vector, kVectors = per_thread / vector;
    static constexpr bool kLoops = loops;
    static constexpr int kThreads = lanes == kWholeBlock ? kMaxThreads : 128;  // at most

    static FASTATTN_DEVICE int lanes_of_row() { return lanes ? lanes : int(blockDim.x); }
    static FASTATTN_DEVICE int lane() { return lanes ? threadIdx.x % lanes : threadIdx.x; }
    static FASTATTN_DEVICE int rows_of_block() { return lanes ? blockDim.x / lanes : 1; }
    static FASTATTN_DEVICE int row_of_thread() { return lanes ? threadIdx.x / lanes : 0; }
    static FASTATTN_DEVICE int column(int first, int v) {
        return first + (v * lanes_of_row() + lane()) * vector;
    }
    static FASTATTN_DEVICE int columns_at_once() { return lanes_of_row() * per_thread; }
};

template <class T, int n>
FASTATTN_DEVICE void load(float (&values)[n], const T* from) {
    if constexpr (n == 1) {
        values[0] = to_float(ld_global(from));
    } else if constexpr (same<T, float>) {
        const float4 four = ld_global(reinterpret_cast<const float4*>(from));
        values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
    } else {
        const uint4 words = ld_global(reinterpret_cast<const uint4*>(from));
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<T>(pairs[i]);
            values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
        }
    }
}

template <class T, int n>
FASTATTN_DEVICE void store(T* to, const float (&values)[n]) {
    if constexpr (n == 1) {
        st_global(to, from_float<T>(values[0]));
    } else if constexpr (same<T, float>) {
#pragma unroll
        for (int i = 0; i < n; i += 4)
            st_global(reinterpret_cast<float4*>(to + i),
                      float4{values[i], values[i + 1], values[i + 2], values[i + 3]});
    } else {
        st_global(reinterpret_cast<uint4*>(to),
                  uint4{pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                        pack<T>(values[4], values[5]), pack<T>(values[6], values[7])});
    }
}

// The exponential, as exact as the type that is rounded to asks for.
template <class T>
FASTATTN_DEVICE float exponential(float x) {
    return same<T, float> ? expf(x) : cuda::exponential(x);
}

// Of `lanes` neighbouring threads.
template <int lanes, class Combine>
FASTATTN_DEVICE float reduce_lanes(float x, Combine combine) {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        x = combine(x, shuffle_xor(x, distance));
    return x;
}
struct Maximum {
    FASTATTN_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
    FASTATTN_DEVICE float operator()(float a, float b) const { return a + b; }
};

FASTATTN_DEVICE int64_t row_begin(const SoftmaxArgs& a, const SoftmaxRows& tensor, int64_t row) {
    if (a.sizes[0] * a.sizes[1] == 1) return row * tensor.strides[2];
    return row / (a.sizes[1] * a.sizes[2]) * tensor.strides[0] +
           row / a.sizes[2] % a.sizes[1] * tensor.strides[1] + row % a.sizes[2] * tensor.strides[2];
}

// The scores of kVector columns: scale * x + bias, -inf where hidden.
template <class T, int kVector, bool kFeatured>
struct Scores {
    const SoftmaxFwdArgs& a;
    int64_t row, x_at, mask_at, bias_at;
    int last;  // column that the row sees

    FASTATTN_DEVICE Scores(const SoftmaxFwdArgs& args, int64_t r)
        : a(args), row(r), x_at(row_begin(args, args.x, r)), last(args.columns - 1) {
        if constexpr (kFeatured) {
            mask_at = row_begin(a, a.mask, row), bias_at = row_begin(a, a.bias, row);
            if (a.causal_rows) last = int(min(int64_t(last), row % a.causal_rows));
        }
        if (row >= a.rows) last = -1;
    }

    FASTATTN_DEVICE void load(float (&scores)[kVector], int column) const {
        const bool inside = column <= last;
        if (inside)
            cuda::load(scores, static_cast<const T*>(a.x.data) + x_at + column * a.x.strides[3]);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            scores[e] = inside ? scores[e] * a.scale : -kInfinity;
            if constexpr (kFeatured) {
                const int j = column + e;
                if (inside && a.bias.data) scores[e] += bias(bias_at + j * a.bias.strides[3]);
                if (inside && (j > last || hidden(mask_at + j * a.mask.strides[3])))
                    scores[e] = -kInfinity;
            }
        }
    }

    FASTATTN_DEVICE float bias(int64_t at) const {
        if (a.bias_dtype == DType::float32)
            return ld_global(static_cast<const float*>(a.bias.data) + at);
        return to_float(ld_global(static_cast<const T*>(a.bias.data) + at));
    }
    FASTATTN_DEVICE bool hidden(int64_t at) const {
        return a.mask.data && !ld_global(static_cast<const uint8_t*>(a.mask.data) + at);
    }
};

// Which of a thread's elements dropout keeps, from bit 0 on in the order of the vectors. Not
// unrolled: all those rounds at once would take the registers of the row.
template <class L>
FASTATTN_DEVICE uint32_t kept(const SoftmaxArgs& a, uint64_t seed, int64_t row, int first) {
    uint32_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < L::kVectors * L::kVector; ++i) {
        const int column = L::column(first, i / L::kVector) + i % L::kVector;
        uint32_t words[4];
        philox_words(words, seed, column, int(row), int(row >> 32), 0);
        bits |= uint32_t(word_of(words, column / 16) >= a.threshold) << i;
    }
    return bits;
}

// What a thread has of a row, and what it adds up.
template <int kVectors, int kVector>
FASTATTN_DEVICE float maximum_of(const float (&scores)[kVectors][kVector], float least) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int e = 0; e < kVector; ++e) least = fmaxf(least, scores[v][e]);
    return least;
}
template <class T, int kVectors, int kVector>
FASTATTN_DEVICE float sum_of_exponentials(const float (&scores)[kVectors][kVector], float maximum,
                                          float sum) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum += exponential<T>(scores[v][e] - maximum);
    return sum;
}
// What is subtracted for a maximum: 0 of what sees nothing, whose exponentials are then 0, not NaN.
FASTATTN_DEVICE float finite_maximum(float maximum) {
    return maximum == -kInfinity ? 0.0f : maximum;
}

// The maximum of a row and the sum of its exponentials, as results are made of them.
struct Normalizer {
    float maximum, factor, log_sum;

    FASTATTN_DEVICE Normalizer(float row_max, float sum)
        : maximum(row_max), factor(sum == 0.0f ? 0.0f : 1.0f / sum), log_sum(row_max + logf(sum)) {}
};

// Writes a thread's results from column `first` on.
template <class T, class L, bool kFeatured>
FASTATTN_DEVICE void store_weights(const SoftmaxFwdArgs& a, uint64_t seed,
                                   const Scores<T, L::kVector, kFeatured>& source, int first,
                                   float (&scores)[L::kVectors][L::kVector], const Normalizer& of) {
    constexpr int kVector = L::kVector;
    const int64_t row = source.row;
    const uint32_t keep = kFeatured && a.seed ? kept<L>(a, seed, row, first) : 0;
#pragma unroll
    for (int v = 0; v < L::kVectors; ++v) {
        const int column = L::column(first, v);
        const int64_t at = row * a.columns + column;
        if constexpr (L::kLoops) source.load(scores[v], column);
        float out[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            const float score = scores[v][e];
            if (a.log)
                // -inf - -inf, in a row that sees nothing, would be NaN.
                out[e] = score == -kInfinity ? score : score - of.log_sum;
            else
                out[e] = exponential<T>(score - of.maximum) * of.factor;
        }
        if (row >= a.rows || column >= a.columns) continue;
        if constexpr (kFeatured) {
            if (a.seed) {
                store(static_cast<T*>(a.weights) + at, out);
#pragma unroll
                for (int e = 0; e < kVector; ++e)
                    out[e] = keep >> (v * kVector + e) & 1 ? out[e] * a.keep_scale : 0.0f;
            }
        }
        store(static_cast<T*>(a.out) + at, out);
    }
}

// Of a thread's elements from column `first` on: p, and the gradient of the weights before dropout,
// 0 where hidden.
template <class T, class L, bool kFeatured>
FASTATTN_DEVICE void load_gradient(const SoftmaxBwdArgs& a, uint64_t seed, int64_t row,
                                   int64_t dout_at, int first, float (&p)[L::kVectors][L::kVector],
                                   float (&dout)[L::kVectors][L::kVector]) {
    const uint32_t keep = kFeatured && a.seed ? kept<L>(a, seed, row, first) : 0;
#pragma unroll
    for (int v = 0; v < L::kVectors; ++v) {
        const int column = L::column(first, v);
        const bool inside = row < a.rows && column < a.columns;
        if (inside) {
            load(p[v], static_cast<const T*>(a.weights) + row * a.columns + column);
            load(dout[v],
                 static_cast<const T*>(a.dout.data) + dout_at + column * a.dout.strides[3]);
        }
#pragma unroll
        for (int e = 0; e < L::kVector; ++e) {
            if (!inside) p[v][e] = a.log ? -kInfinity : 0.0f, dout[v][e] = 0.0f;
            if (a.log && p[v][e] == -kInfinity) dout[v][e] = 0.0f;
            if (kFeatured && a.seed)
                dout[v][e] = keep >> (v * L::kVector + e) & 1 ? dout[v][e] * a.keep_scale : 0.0f;
        }
    }
}

// The thread's part of the sum that the gradient of each score wants of its row.
template <class L>
FASTATTN_DEVICE float delta_of(const SoftmaxBwdArgs& a, const float (&p)[L::kVectors][L::kVector],
                               const float (&dout)[L::kVectors][L::kVector], float delta) {
#pragma unroll
    for (int v = 0; v < L::kVectors; ++v)
#pragma unroll
        for (int e = 0; e < L::kVector; ++e) delta += a.log ? dout[v][e] : p[v][e] * dout[v][e];
    return delta;
}

// Writes the gradients of a thread's elements from column `first` on.
template <class T, class L, bool kFeatured>
FASTATTN_DEVICE void store_gradient(const SoftmaxBwdArgs& a, int64_t row, int first,
                                    const float (&p)[L::kVectors][L::kVector],
                                    const float (&dout)[L::kVectors][L::kVector], float delta) {
    constexpr int kVector = L::kVector;
#pragma unroll
    for (int v = 0; v < L::kVectors; ++v) {
        const int column = L::column(first, v);
        const int64_t at = row * a.columns + column;
        float dscores[kVector], dx[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            const float weight = p[v][e];
            if (a.log)
                dscores[e] =
                    weight == -kInfinity ? 0.0f : dout[v][e] - exponential<T>(weight) * delta;
            else
                dscores[e] = weight * (dout[v][e] - delta);
            dx[e] = dscores[e] * a.scale;
        }
        if (row >= a.rows || column >= a.columns) continue;
        if constexpr (kFeatured) {
            if (a.dscores && a.dscores_dtype == DType::float32)
                store(static_cast<float*>(a.dscores) + at, dscores);
            else if (a.dscores)
                store(static_cast<T*>(a.dscores) + at, dscores);
        }
        store(static_cast<T*>(a.dx) + at, dx);
    }
}

// Whether rows of 16-byte vectors can be read: all begin at a multiple of them.
inline bool in_vectors(const SoftmaxArgs& a, const SoftmaxRows& tensor,
                       std::initializer_list<const void*> more) {
    const int64_t vector = 16 / itemsize(a.dtype);
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    bool all = a.columns % vector == 0 && aligned(tensor.data) && tensor.strides[3] == 1;
    for (int i = 0; i < 3; ++i) all = all && (a.sizes[i] == 1 || tensor.strides[i] % vector == 0);
    return all && std::all_of(more.begin(), more.end(), aligned);
}

// Calls f<type, elements of a vector, featured>().
template <class F>
void with_form(DType dtype, bool vectors, bool featured, F f) {
    const auto with_type = [&]<class T>() {
        const auto with_vector = [&]<int kVector>() {
            featured ? f.template operator()<T, kVector, true>()
                     : f.template operator()<T, kVector, false>();
        };
        vectors ? with_vector.template operator()<16 / sizeof(T)>()
                : with_vector.template operator()<1>();
    };
    if (dtype == DType::float32) return with_type.template operator()<float>();
    if (dtype == DType::float16) return with_type.template operator()<float16>();
    with_type.template operator()<bfloat16>();
}
template <class F>
void with_form(const SoftmaxFwdArgs& a, F f) {
    with_form(a.dtype, in_vectors(a, a.x, {a.out, a.weights}),
              a.mask.data || a.bias.data || a.causal_rows || a.seed, f);
}
template <class F>
void with_form(const SoftmaxBwdArgs& a, F f) {
    with_form(a.dtype, in_vectors(a, a.dout, {a.weights, a.dx, a.dscores}), a.dscores || a.seed, f);
}

}  // namespace fastattn::cuda
