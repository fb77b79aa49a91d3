// Softmax of the last dim: of scale * x + bias where mask and diagonal allow it, its logarithm,
// dropout, and the gradients. x (., ., ., columns) in any strides, results contiguous.
// A row of up to 64 columns is 8 lanes', of up to 1024 a warp's, a longer one a block's; up to
// 8192 columns stay in registers, so that global memory is read and written once. Longer rows are
// read twice, their maximum and sum first (Milakov and Gimelshein, "Online normalizer calculation
// for softmax", 2018).
#include "cuda/softmax.h"

#include <algorithm>
#include <cmath>

#include "cuda/launch.cuh"
#include "cuda/math.cuh"
#include "cuda/philox.cuh"

namespace fastattn::cuda {
namespace {

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

// Reductions over a row. Every warp that calls one, of a block's row all of them, gets the result.
template <class L, class Combine>
FASTATTN_DEVICE float reduce(float x, float neutral, SharedAddress slots, Combine combine) {
    constexpr int kInWarp = L::kLanes == kWholeBlock ? 32 : L::kLanes;
#pragma unroll
    for (int distance = kInWarp / 2; distance > 0; distance /= 2)
        x = combine(x, shuffle_xor(x, distance));
    if constexpr (L::kLanes == kWholeBlock) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane == 0) st_shared(slots + 4 * warp, x);
        barrier();
        x = lane < int(blockDim.x) / 32 ? ld_shared<float>(slots + 4 * lane) : neutral;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            x = combine(x, shuffle_xor(x, distance));
    }
    return x;
}
// Slots of two reductions that alternate: each one's barrier lets the other's be written again.
template <class L>
FASTATTN_DEVICE float row_maximum(float x) {
    const SharedAddress slots = L::kLanes == kWholeBlock ? dynamic_shared() : 0;
    return reduce<L>(x, -kInfinity, slots, [](float a, float b) { return fmaxf(a, b); });
}
template <class L>
FASTATTN_DEVICE float row_total(float x) {
    const SharedAddress slots = L::kLanes == kWholeBlock ? dynamic_shared() + 128 : 0;
    return reduce<L>(x, 0.0f, slots, [](float a, float b) { return a + b; });
}

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

template <class T, class L, bool kFeatured>
__global__ void __launch_bounds__(L::kThreads)
    softmax_fwd_kernel(const __grid_constant__ SoftmaxFwdArgs a) {
    constexpr int kVector = L::kVector;
    const int64_t rows = a.rows;
    const uint64_t seed = kFeatured && a.seed ? ld_global(a.seed) : 0;
    for (int64_t first_row = int64_t(blockIdx.x) * L::rows_of_block(); first_row < rows;
         first_row += int64_t(gridDim.x) * L::rows_of_block()) {
        const int64_t row = first_row + L::row_of_thread();
        const Scores<T, kVector, kFeatured> source(a, row);
        float scores[L::kVectors][kVector];
        float largest = -kInfinity, sum = 0.0f;
        for (int first = 0; first < a.columns; first += L::columns_at_once()) {
            float new_largest = largest;
#pragma unroll
            for (int v = 0; v < L::kVectors; ++v) source.load(scores[v], L::column(first, v));
#pragma unroll
            for (int v = 0; v < L::kVectors; ++v)
#pragma unroll
                for (int e = 0; e < kVector; ++e) new_largest = fmaxf(new_largest, scores[v][e]);
            if constexpr (!L::kLoops) new_largest = row_maximum<L>(new_largest);
            // 0 for what sees nothing: its exponentials are then 0, not NaN.
            const float finite = new_largest == -kInfinity ? 0.0f : new_largest;
            sum *= exponential<T>(largest - finite);
#pragma unroll
            for (int v = 0; v < L::kVectors; ++v)
#pragma unroll
                for (int e = 0; e < kVector; ++e) sum += exponential<T>(scores[v][e] - finite);
            largest = new_largest;
            if constexpr (!L::kLoops) break;
        }
        float row_max = largest;
        if constexpr (L::kLoops) row_max = row_maximum<L>(largest);
        row_max = row_max == -kInfinity ? 0.0f : row_max;
        if constexpr (L::kLoops) sum *= exponential<T>(largest - row_max);
        const float row_sum = row_total<L>(sum);
        const float factor = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
        const float log_sum = row_max + logf(row_sum);

        for (int first = 0; first < a.columns; first += L::columns_at_once()) {
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
                        out[e] = score == -kInfinity ? score : score - log_sum;
                    else
                        out[e] = exponential<T>(score - row_max) * factor;
                }
                if (row >= rows || column >= a.columns) continue;
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
            if constexpr (!L::kLoops) break;
        }
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

template <class T, class L, bool kFeatured>
__global__ void __launch_bounds__(L::kThreads)
    softmax_bwd_kernel(const __grid_constant__ SoftmaxBwdArgs a) {
    constexpr int kVector = L::kVector;
    const int64_t rows = a.rows;
    const uint64_t seed = kFeatured && a.seed ? ld_global(a.seed) : 0;
    for (int64_t first_row = int64_t(blockIdx.x) * L::rows_of_block(); first_row < rows;
         first_row += int64_t(gridDim.x) * L::rows_of_block()) {
        const int64_t row = first_row + L::row_of_thread(), dout_at = row_begin(a, a.dout, row);
        float p[L::kVectors][kVector], dout[L::kVectors][kVector];
        float delta = 0.0f;
        for (int first = 0; first < a.columns; first += L::columns_at_once()) {
            load_gradient<T, L, kFeatured>(a, seed, row, dout_at, first, p, dout);
#pragma unroll
            for (int v = 0; v < L::kVectors; ++v)
#pragma unroll
                for (int e = 0; e < kVector; ++e)
                    delta += a.log ? dout[v][e] : p[v][e] * dout[v][e];
            if constexpr (!L::kLoops) break;
        }
        // The last row's total was read by all before its slots are written again.
        if constexpr (L::kLanes == kWholeBlock) barrier();
        delta = row_total<L>(delta);

        for (int first = 0; first < a.columns; first += L::columns_at_once()) {
            if constexpr (L::kLoops)
                load_gradient<T, L, kFeatured>(a, seed, row, dout_at, first, p, dout);
#pragma unroll
            for (int v = 0; v < L::kVectors; ++v) {
                const int column = L::column(first, v);
                const int64_t at = row * a.columns + column;
                float dscores[kVector], dx[kVector];
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    const float weight = p[v][e];
                    if (a.log)
                        dscores[e] = weight == -kInfinity
                                         ? 0.0f
                                         : dout[v][e] - exponential<T>(weight) * delta;
                    else
                        dscores[e] = weight * (dout[v][e] - delta);
                    dx[e] = dscores[e] * a.scale;
                }
                if (row >= rows || column >= a.columns) continue;
                if constexpr (kFeatured) {
                    if (a.dscores && a.dscores_dtype == DType::float32)
                        store(static_cast<float*>(a.dscores) + at, dscores);
                    else if (a.dscores)
                        store(static_cast<T*>(a.dscores) + at, dscores);
                }
                store(static_cast<T*>(a.dx) + at, dx);
            }
            if constexpr (!L::kLoops) break;
        }
    }
}

// Dims that lie one after the other in every tensor become one, so that rows need no division.
void merge_dims(SoftmaxArgs& a, std::initializer_list<SoftmaxRows*> tensors) {
    for (int pass = 0; pass < 2; ++pass) {
        const bool apart = std::any_of(tensors.begin(), tensors.end(), [&](const SoftmaxRows* t) {
            return t->data && a.sizes[1] > 1 && t->strides[1] != a.sizes[2] * t->strides[2];
        });
        if (apart) return;
        a.sizes[2] *= a.sizes[1], a.sizes[1] = a.sizes[0], a.sizes[0] = 1;
        for (SoftmaxRows* t : tensors) t->strides[1] = t->strides[0];
    }
}

// Whether rows of 16-byte vectors can be read: all begin at a multiple of them.
bool in_vectors(const SoftmaxArgs& a, const SoftmaxRows& tensor,
                std::initializer_list<void*> more) {
    const int64_t vector = 16 / itemsize(a.dtype);
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    bool all = a.columns % vector == 0 && aligned(tensor.data) && tensor.strides[3] == 1;
    for (int i = 0; i < 3; ++i) all = all && (a.sizes[i] == 1 || tensor.strides[i] % vector == 0);
    return all && std::all_of(more.begin(), more.end(), aligned);
}

// Calls f with the layout of rows and launches what it returns.
template <int kVector, class Args, class F>
void with_layout(const Args& a, F kernel_of) {
    const auto start = [&](auto layout, int threads) {
        using L = decltype(layout);
        const int64_t rows_of_block = L::kLanes ? threads / L::kLanes : 1;
        const int64_t blocks = (a.rows + rows_of_block - 1) / rows_of_block;
        const dim3 grid(unsigned(std::min<int64_t>(blocks, (int64_t(1) << 31) - 1)));
        launch(kernel_of(layout), grid, threads, L::kLanes ? 0 : 256, a.stream, a);
    };
    if (a.columns <= 8 * 8) return start(Layout<8, 8, kVector, false>{}, 128);
    if (a.columns <= 32 * 8) return start(Layout<32, 8, kVector, false>{}, 128);
    constexpr int kLong = kVector == 1 ? 16 : 32;
    if (a.columns <= 32 * kLong) return start(Layout<32, kLong, kVector, false>{}, 128);
    const int warps =
        int(std::min<int64_t>((a.columns + 32 * 16 - 1) / (32 * 16), kMaxThreads / 32));
    if (a.columns <= kMaxThreads * 16)
        return start(Layout<kWholeBlock, 16, kVector, false>{}, 32 * warps);
    // A loop around 16 float32 of each of two tensors, or around 16 addresses, would spill.
    start(Layout<kWholeBlock, kVector == 8 ? 16 : 8, kVector, true>{}, kMaxThreads);
}

template <class F>
void with_type(DType dtype, F f) {
    if (dtype == DType::float32) return f(float{});
    if (dtype == DType::float16) return f(float16{});
    f(bfloat16{});
}

}  // namespace

void softmax_fwd(const SoftmaxFwdArgs& args) {
    SoftmaxFwdArgs a = args;
    if (a.rows * a.columns == 0) return;
    merge_dims(a, {&a.x, &a.mask, &a.bias});
    const bool vectors = in_vectors(a, a.x, {a.out, a.weights});
    const bool featured = a.mask.data || a.bias.data || a.causal_rows || a.seed;
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        const auto kernel_of = [&](auto layout) {
            using L = decltype(layout);
            return featured ? softmax_fwd_kernel<T, L, true> : softmax_fwd_kernel<T, L, false>;
        };
        vectors ? with_layout<16 / sizeof(T)>(a, kernel_of) : with_layout<1>(a, kernel_of);
    });
}

void softmax_bwd(const SoftmaxBwdArgs& args) {
    SoftmaxBwdArgs a = args;
    if (a.rows * a.columns == 0) return;
    merge_dims(a, {&a.dout});
    const bool vectors = in_vectors(a, a.dout, {const_cast<void*>(a.weights), a.dx, a.dscores});
    const bool featured = a.dscores || a.seed;
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        const auto kernel_of = [&](auto layout) {
            using L = decltype(layout);
            return featured ? softmax_bwd_kernel<T, L, true> : softmax_bwd_kernel<T, L, false>;
        };
        vectors ? with_layout<16 / sizeof(T)>(a, kernel_of) : with_layout<1>(a, kernel_of);
    });
}

}  // namespace fastattn::cuda
