// Softmax of long rows on sm_90: a row is a cluster's, each of whose blocks keeps a part of it in
// registers, so that global memory is read and written once. What its warps have found, each tells
// every block through distributed shared memory: one exchange a row, and no barrier of a block.
#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"
#include "cuda/softmax.cuh"

namespace fastattn::cuda {
namespace {

constexpr int kPerThread = 16;
// Shorter rows are one block's. Clusters of more than 8 blocks are not portable.
constexpr int kShortest = kMaxThreads * kPerThread + 1, kMaxBlocks = 8, kMaxBlockThreads = 1024;
constexpr int kLongest = kMaxBlocks * kMaxBlockThreads * kPerThread;

template <int vector>
struct ClusterLayout : Layout<kWholeBlock, kPerThread, vector, false> {
    static constexpr int kThreads = kMaxBlockThreads;
};

// What the warps of a cluster tell each other, in the shared memory of every block: a T of each,
// and an mbarrier that counts their bytes.
template <class T>
struct Exchange {
    int warps = blockDim.x / 32, lane = threadIdx.x % 32, blocks = cluster_size();

    static FASTATTN_DEVICE SharedAddress told() { return dynamic_shared(); }
    static FASTATTN_DEVICE SharedAddress slot(int i) { return told() + 8 + sizeof(T) * i; }

    FASTATTN_DEVICE Exchange() {
        if (threadIdx.x == 0) {
            mbarrier_init(told(), 1);
            fence_mbarrier_init();
        }
        cluster_arrive();
    }
    // `mine` of this warp to all blocks, and theirs to this one. No block exits before it has all
    // that is sent to it.
    FASTATTN_DEVICE void tell(T mine) const {
        cluster_wait();
        if (threadIdx.x == 0) mbarrier_arrive_expect(told(), sizeof(T) * blocks * warps);
        if (lane < blocks)
            st_async_at(slot(cluster_rank() * warps + threadIdx.x / 32), mine, told(), lane);
        mbarrier_wait(told(), 0);
    }
    // Every warp combines value_of what all have told.
    template <class F, class Combine>
    FASTATTN_DEVICE float over_all(F value_of, float neutral, Combine combine) const {
        float x = neutral;
        for (int i = lane; i < blocks * warps; i += 32)
            x = combine(x, value_of(ld_shared<T>(slot(i))));
        return reduce_lanes<32>(x, combine);
    }
};

template <class T, class L, bool kFeatured>
__global__ void __launch_bounds__(L::kThreads)
    softmax_fwd_sm90_kernel(const __grid_constant__ SoftmaxFwdArgs a) {
    const Exchange<float2> exchange;
    const uint64_t seed = kFeatured && a.seed ? ld_global(a.seed) : 0;
    const Scores<T, L::kVector, kFeatured> source(a, blockIdx.x / cluster_size());
    const int first = cluster_rank() * L::columns_at_once();
    float scores[L::kVectors][L::kVector];
#pragma unroll
    for (int v = 0; v < L::kVectors; ++v) source.load(scores[v], L::column(first, v));
    // A warp's maximum, and its sum of exponentials relative to it.
    const float largest = reduce_lanes<32>(maximum_of(scores, -kInfinity), Maximum());
    const float sum = sum_of_exponentials<T>(scores, finite_maximum(largest), 0.0f);

    exchange.tell({largest, reduce_lanes<32>(sum, Sum())});
    const float row_max =
        finite_maximum(exchange.over_all([](float2 one) { return one.x; }, -kInfinity, Maximum()));
    const float row_sum = exchange.over_all(
        [&](float2 one) { return one.y * exponential<T>(one.x - row_max); }, 0.0f, Sum());
    store_weights<T, L, kFeatured>(a, seed, source, first, scores, Normalizer(row_max, row_sum));
}

template <class T, class L, bool kFeatured>
__global__ void __launch_bounds__(L::kThreads)
    softmax_bwd_sm90_kernel(const __grid_constant__ SoftmaxBwdArgs a) {
    const Exchange<float> exchange;
    const uint64_t seed = kFeatured && a.seed ? ld_global(a.seed) : 0;
    const int64_t row = blockIdx.x / cluster_size(), dout_at = row_begin(a, a.dout, row);
    const int first = cluster_rank() * L::columns_at_once();
    float p[L::kVectors][L::kVector], dout[L::kVectors][L::kVector];
    load_gradient<T, L, kFeatured>(a, seed, row, dout_at, first, p, dout);

    exchange.tell(reduce_lanes<32>(delta_of<L>(a, p, dout, 0.0f), Sum()));
    const float delta = exchange.over_all([](float one) { return one; }, 0.0f, Sum());
    store_gradient<T, L, kFeatured>(a, row, first, p, dout, delta);
}

// As few blocks as take the row in kMaxThreads each, two of which fit on a multiprocessor, so that
// one loads while the other waits for its cluster; of the longest rows 8 of up to kMaxBlockThreads.
template <class Kernel, class Args>
void launch_rows(Kernel kernel, const Args& a) {
    int blocks = 2;
    while (blocks < kMaxBlocks && a.columns > blocks * kMaxThreads * kPerThread) blocks *= 2;
    const int of_warp = 32 * kPerThread * blocks, warps = (a.columns + of_warp - 1) / of_warp;
    launch_clusters(blocks, kernel, grid_of(a.rows * blocks), 32 * warps,
                    8 + sizeof(float2) * warps * blocks, a.stream, a);
}

}  // namespace

bool softmax_sm90_takes(const SoftmaxArgs& args) {
    return current_device().capability == 90 && args.columns >= kShortest &&
           args.columns <= kLongest;
}

void softmax_fwd_sm90(const SoftmaxFwdArgs& args) {
    with_form(args, [&]<class T, int kVector, bool kFeatured>() {
        launch_rows(softmax_fwd_sm90_kernel<T, ClusterLayout<kVector>, kFeatured>, args);
    });
}

void softmax_bwd_sm90(const SoftmaxBwdArgs& args) {
    with_form(args, [&]<class T, int kVector, bool kFeatured>() {
        launch_rows(softmax_bwd_sm90_kernel<T, ClusterLayout<kVector>, kFeatured>, args);
    });
}

}  // namespace fastattn::cuda
