// Softmax of the last dim: of scale * x + bias where mask and diagonal allow it, its logarithm,
// dropout, and the gradients. x (., ., ., columns) in any strides, results contiguous.
// A row of up to 64 columns is 8 lanes', of up to 1024 a warp's, of up to 8192 a block's, and up to
// 131072 columns on sm_90 a cluster's (softmax_sm90.cu): all stay in registers, so that global
// memory is read and written once. Longer rows are a block's too, and read twice, their maximum and
// sum first (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
#include "cuda/softmax.cuh"

#include <algorithm>

#include "cuda/launch.cuh"

namespace fastattn::cuda {
namespace {

// Reductions over a row. Every warp that calls one, of a block's row all of them, gets the result.
template <class L, class Combine>
FASTATTN_DEVICE float reduce(float x, float neutral, SharedAddress slots, Combine combine) {
    if constexpr (L::kLanes != kWholeBlock) return reduce_lanes<L::kLanes>(x, combine);
    x = reduce_lanes<32>(x, combine);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) st_shared(slots + 4 * warp, x);
    barrier();
    x = lane < int(blockDim.x) / 32 ? ld_shared<float>(slots + 4 * lane) : neutral;
    return reduce_lanes<32>(x, combine);
}
// Slots of two reductions that alternate: each one's barrier lets the other's be written again.
template <class L>
FASTATTN_DEVICE float row_maximum(float x) {
    const SharedAddress slots = L::kLanes == kWholeBlock ? dynamic_shared() : 0;
    return reduce<L>(x, -kInfinity, slots, Maximum());
}
template <class L>
FASTATTN_DEVICE float row_total(float x) {
    const SharedAddress slots = L::kLanes == kWholeBlock ? dynamic_shared() + 128 : 0;
    return reduce<L>(x, 0.0f, slots, Sum());
}

template <class T, class L, bool kFeatured>
__global__ void __launch_bounds__(L::kThreads)
    softmax_fwd_kernel(const __grid_constant__ SoftmaxFwdArgs a) {
    const uint64_t seed = kFeatured && a.seed ? ld_global(a.seed) : 0;
    for (int64_t first_row = int64_t(blockIdx.x) * L::rows_of_block(); first_row < a.rows;
         first_row += int64_t(gridDim.x) * L::rows_of_block()) {
        const Scores<T, L::kVector, kFeatured> source(a, first_row + L::row_of_thread());
        float scores[L::kVectors][L::kVector];
        float largest = -kInfinity, sum = 0.0f;
        for (int first = 0; first < a.columns; first += L::columns_at_once()) {
#pragma unroll
            for (int v = 0; v < L::kVectors; ++v) source.load(scores[v], L::column(first, v));
            float new_largest = maximum_of(scores, largest);
            if constexpr (!L::kLoops) new_largest = row_maximum<L>(new_largest);
            sum *= exponential<T>(largest - finite_maximum(new_largest));
            sum = sum_of_exponentials<T>(scores, finite_maximum(new_largest), sum);
            largest = new_largest;
            if constexpr (!L::kLoops) break;
        }
        float row_max = largest;
        if constexpr (L::kLoops) row_max = row_maximum<L>(largest);
        row_max = finite_maximum(row_max);
        if constexpr (L::kLoops) sum *= exponential<T>(largest - row_max);
        const Normalizer of(row_max, row_total<L>(sum));

        for (int first = 0; first < a.columns; first += L::columns_at_once()) {
            store_weights<T, L, kFeatured>(a, seed, source, first, scores, of);
            if constexpr (!L::kLoops) break;
        }
    }
}

template <class T, class L, bool kFeatured>
__global__ void __launch_bounds__(L::kThreads)
    softmax_bwd_kernel(const __grid_constant__ SoftmaxBwdArgs a) {
    const uint64_t seed = kFeatured && a.seed ? ld_global(a.seed) : 0;
    for (int64_t first_row = int64_t(blockIdx.x) * L::rows_of_block(); first_row < a.rows;
         first_row += int64_t(gridDim.x) * L::rows_of_block()) {
        const int64_t row = first_row + L::row_of_thread(), dout_at = row_begin(a, a.dout, row);
        float p[L::kVectors][L::kVector], dout[L::kVectors][L::kVector];
        float delta = 0.0f;
        for (int first = 0; first < a.columns; first += L::columns_at_once()) {
            load_gradient<T, L, kFeatured>(a, seed, row, dout_at, first, p, dout);
            delta = delta_of<L>(a, p, dout, delta);
            if constexpr (!L::kLoops) break;
        }
        // The last row's total was read by all before its slots are written again.
        if constexpr (L::kLanes == kWholeBlock) barrier();
        delta = row_total<L>(delta);

        for (int first = 0; first < a.columns; first += L::columns_at_once()) {
            if constexpr (L::kLoops)
                load_gradient<T, L, kFeatured>(a, seed, row, dout_at, first, p, dout);
            store_gradient<T, L, kFeatured>(a, row, first, p, dout, delta);
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

// Launches the kernel that kernel_of returns for the layout of the rows.
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

}  // namespace

void softmax_fwd(const SoftmaxFwdArgs& args) {
    SoftmaxFwdArgs a = args;
    if (a.rows * a.columns == 0) return;
    merge_dims(a, {&a.x, &a.mask, &a.bias});
    if (softmax_sm90_takes(a)) return softmax_fwd_sm90(a);
    with_form(a, [&]<class T, int kVector, bool kFeatured>() {
        with_layout<kVector>(
            a, [](auto layout) { return softmax_fwd_kernel<T, decltype(layout), kFeatured>; });
    });
}

void softmax_bwd(const SoftmaxBwdArgs& args) {
    SoftmaxBwdArgs a = args;
    if (a.rows * a.columns == 0) return;
    merge_dims(a, {&a.dout});
    if (softmax_sm90_takes(a)) return softmax_bwd_sm90(a);
    with_form(a, [&]<class T, int kVector, bool kFeatured>() {
        with_layout<kVector>(
            a, [](auto layout) { return softmax_bwd_kernel<T, decltype(layout), kFeatured>; });
    });
}

}  // namespace fastattn::cuda
