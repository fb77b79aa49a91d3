// The backward of attention around its main kernel: delta = rowsum(dout * out) - dlse, of which
// every gradient of a score takes its row's, before it; and dq, rounded from the float32 sum to
// which blocks of keys have added, after it. Both read and write memory once.
// FlashAttention-2 (Dao 2023, arXiv 2307.08691).
#include <algorithm>
#include <stdexcept>

#include "cuda/attention_dq.cuh"
#include "cuda/launch.cuh"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 256;
// Rows of dq that a block converts.
constexpr int kBlockM = 32;

template <class T>
FASTATTN_DEVICE float dot(uint32_t a, uint32_t b) {
    const float2 x = unpack<T>(a), y = unpack<T>(b);
    return x.x * y.x + x.y * y.y;
}

// kLanes threads have a row, 8 elements each. Packed sequences are one: delta has no use for where
// they begin.
template <class T, int kLanes>
__global__ __launch_bounds__(kThreads) void attention_delta_kernel(
    const __grid_constant__ AttentionBwdArgs a, int rows, int64_t all_rows) {
    const int lane = threadIdx.x % kLanes;
    const int64_t index = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
    const int row = int(index % rows), head = int(index / rows % a.heads);
    const int64_t batch = index / rows / a.heads;
    float sum = 0.0f;
    if (index < all_rows && 8 * lane < a.head_dim_v) {
        const Strides &so = a.out_strides, &sd = a.dout_strides;
        const int64_t at_out = batch * so.batch + head * so.head + row * so.row + 8 * lane;
        const int64_t at_dout = batch * sd.batch + head * sd.head + row * sd.row + 8 * lane;
        const uint4 x =
            ld_readonly(reinterpret_cast<const uint4*>(static_cast<const T*>(a.out) + at_out));
        const uint4 y =
            ld_readonly(reinterpret_cast<const uint4*>(static_cast<const T*>(a.dout) + at_dout));
        sum = dot<T>(x.x, y.x) + dot<T>(x.y, y.y) + dot<T>(x.z, y.z) + dot<T>(x.w, y.w);
    }
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) sum += shuffle_xor(sum, mask);
    if (index < all_rows && lane == 0) {
        const int64_t at = batch * a.lse_batch_stride + head * a.lse_head_stride + row;
        st_global(a.delta + at, a.dlse ? sum - ld_readonly(a.dlse + at) : sum);
    }
}

template <class T>
void launch_delta(const AttentionBwdArgs& a) {
    const int rows = a.cu_seqlens_q ? a.total_q : a.seqlen_q;
    const int64_t all_rows = int64_t(a.cu_seqlens_q ? 1 : a.batch) * a.heads * rows;
    if (!all_rows) return;
    const int lanes = a.head_dim_v <= 64 ? 8 : a.head_dim_v <= 128 ? 16 : 32;
    const dim3 grid = grid_of((all_rows + kThreads / lanes - 1) / (kThreads / lanes));
    const auto kernel = lanes == 8    ? attention_delta_kernel<T, 8>
                        : lanes == 16 ? attention_delta_kernel<T, 16>
                                      : attention_delta_kernel<T, 32>;
    launch(kernel, grid, kThreads, 0, a.stream, a, rows, all_rows);
}

// A warp rounds 8 rows of 32 columns at once, a thread 8 columns of one of them.
template <class T>
__global__ __launch_bounds__(kThreads) void attention_dq_kernel(
    const __grid_constant__ AttentionBwdArgs a, const DqSum dq_sum) {
    const int blocks = (a.seqlen_q + kBlockM - 1) / kBlockM;
    const int first_row = int(blockIdx.x % blocks) * kBlockM;
    const int head = int(blockIdx.x / blocks % a.heads), batch = int(blockIdx.x / blocks / a.heads);
    const Sequence s = sequence_of(a, batch);
    if (first_row >= s.seqlen_q) return;

    const int64_t first = dq_sum.first_row(a, s, batch, head) + first_row;
    const float* const from = dq_sum.sum + first * dq_sum.head_dim;
    T* const dq = static_cast<T*>(a.dq) +
                  row_offset(a.dq_strides, a.cu_seqlens_q, batch, head, s.start_q, first_row);
    const int lane = threadIdx.x % 32, tiles = dq_sum.head_dim / 8;
    for (int i = threadIdx.x / 32; i < kBlockM / 8 * (tiles / 4); i += kThreads / 32) {
        const int row = i / (tiles / 4) * 8 + lane % 8,
                  column = i % (tiles / 4) * 32 + lane / 8 * 8;
        if (first_row + row >= s.seqlen_q || column >= a.head_dim) continue;
        const float* const tile = from + (row / 8 * tiles + column / 8) * 64 + row % 8 * 4;
        const float4 even = ld_global(reinterpret_cast<const float4*>(tile));
        const float4 odd = ld_global(reinterpret_cast<const float4*>(tile + 32));
        const float f = a.softmax_scale;
        st_global(reinterpret_cast<uint4*>(dq + row * a.dq_strides.row + column),
                  uint4{pack<T>(even.x * f, odd.x * f), pack<T>(even.y * f, odd.y * f),
                        pack<T>(even.z * f, odd.z * f), pack<T>(even.w * f, odd.w * f)});
    }
}

}  // namespace

void attention_delta(const AttentionBwdArgs& a) {
    a.bfloat16 ? launch_delta<bfloat16>(a) : launch_delta<float16>(a);
}

void attention_dq(const AttentionBwdArgs& a, const DqSum& dq_sum) {
    const int64_t blocks = int64_t((a.seqlen_q + kBlockM - 1) / kBlockM) * a.heads * a.batch;
    if (!blocks) return;
    const auto kernel = a.bfloat16 ? attention_dq_kernel<bfloat16> : attention_dq_kernel<float16>;
    launch(kernel, grid_of(blocks), kThreads, 0, a.stream, a, dq_sum);
}

int64_t attention_dq_sum(const AttentionArgs& a, bool deterministic) {
    return dq_sum_floats(a, padded_head_dim(a), deterministic);
}

void attention_bwd(const AttentionBwdArgs& a) {
    if (a.block_table) throw std::invalid_argument("attention_bwd: no gradient of a paged cache");
    attention_delta(a);
    if (attention_bwd_sm90_takes(a))
        attention_bwd_sm90(a);
    else
        attention_bwd_sm80(a);
}

}  // namespace fastattn::cuda
