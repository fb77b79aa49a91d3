// Small kernels of wgmma and of setmaxnreg, each sound or with one planted fault that the emulation
// must report.
#include "faults_sm90.h"

namespace fastattn::cuda {
namespace {

int warpgroup() { return threadIdx.x / 128; }

// Tiles 0 and 1, for all threads.
void load_both(const TensorMap& map) {
    start();
    if (threadIdx.x == 0) load_two(map);
    mbarrier_wait(full(0), 0);
}

void multiply(float (&acc)[32], int a = 0, int b = 1) {
    wgmma<bfloat16, 64>(acc, wgmma_operand(tile(a)), wgmma_operand(tile(b)), false);
}

void multiply_and_wait(float (&acc)[32]) {
    wgmma_fence();
    multiply(acc);
    wgmma_commit();
    wgmma_wait<0>();
}

template <bool fault>
void wgmma_without_fence(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    if (!fault) wgmma_fence();
    multiply(acc);
    wgmma_commit();
    wgmma_wait<0>();
}

template <bool fault>
void wgmma_fence_of_an_older_group(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    for (int i = 0; i < 2; ++i) {
        if (i == 0 || !fault) wgmma_fence();
        multiply(acc);
        wgmma_commit();
    }
    wgmma_wait<0>();
}

template <bool fault>
void wgmma_not_committed(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    wgmma_fence();
    multiply(acc);
    if (!fault) wgmma_commit();
    wgmma_wait<0>();
}

template <bool fault>
void wgmma_not_waited_for(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    wgmma_fence();
    multiply(acc);
    wgmma_commit();
    wgmma_wait<fault ? 1 : 0>();
}

template <bool fault>
void accumulator_written_too_early(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    wgmma_fence();
    multiply(acc);
    wgmma_commit();
    if (!fault) wgmma_wait<0>();
    acc[3] = 0.0f;
    if (fault) wgmma_wait<0>();
}

// It holds nothing before; the sound one's sums are zeros.
template <bool fault>
void accumulator_read_too_early(const TensorMap& map, float* x) {
    load_both(map);
    float acc[32];
    wgmma_fence();
    multiply(acc);
    wgmma_commit();
    if (!fault) wgmma_wait<0>();
    if (threadIdx.x == 0) st_global(x, acc[3]);
    if (fault) wgmma_wait<0>();
}

template <bool fault>
void accumulator_landed_too_early(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    wgmma_fence();
    multiply(acc);
    wgmma_commit();
    wgmma_wait<fault ? 1 : 0>();
    wgmma_landed(acc);
    wgmma_wait<0>();
}

template <bool fault>
void a_registers_written_too_early(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    uint32_t a[4] = {};
    wgmma_fence();
    wgmma<bfloat16, 64>(acc, a, wgmma_operand(tile(1)), false);
    wgmma_commit();
    if (!fault) wgmma_wait<0>();
    a[2] = 1;
    if (fault) wgmma_wait<0>();
}

template <bool fault>
void part_of_an_accumulator(const TensorMap& map, float*) {
    load_both(map);
    float acc[40];
    auto& first = reinterpret_cast<float (&)[32]>(acc);
    auto& other = reinterpret_cast<float (&)[8]>(acc[fault ? 8 : 32]);
    wgmma_fence();
    multiply(first);
    wgmma<bfloat16, 16>(other, wgmma_operand(tile(0)), wgmma_operand(tile(1)), false);
    wgmma_commit();
    wgmma_wait<0>();
}

template <bool fault>
void descriptors_differ(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    wgmma_fence();
    multiply(acc, fault && threadIdx.x >= 96 ? 1 : 0);
    wgmma_commit();
    wgmma_wait<0>();
}

template <bool fault>
void flags_differ(const TensorMap& map, float*) {
    load_both(map);
    float acc[32] = {};
    wgmma_fence();
    wgmma<bfloat16, 64>(acc, wgmma_operand(tile(0)), wgmma_operand(tile(1)),
                        fault && threadIdx.x < 32);
    wgmma_commit();
    wgmma_wait<0>();
}

template <bool fault>
void wgmma_of_three_warps(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    if (!fault || threadIdx.x / 32 != 2) multiply_and_wait(acc);
}

// The block has 192 threads.
template <bool fault>
void wgmma_of_half_a_warpgroup(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    if (fault || warpgroup() == 0) multiply_and_wait(acc);
}

template <bool fault>
void wgmma_of_divergent_warps(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    if (fault && threadIdx.x / 32 == 2)
        wgmma_wait<0>();
    else
        multiply_and_wait(acc);
}

template <bool fault>
void wgmma_without_swizzle(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    const uint64_t a = wgmma_operand(tile(0)) & (fault ? ~uint64_t(0) >> 2 : ~uint64_t(0));
    wgmma_fence();
    wgmma<bfloat16, 64>(acc, a, wgmma_operand(tile(1)), false);
    wgmma_commit();
    wgmma_wait<0>();
}

template <bool fault>
void wgmma_within_a_pattern(const TensorMap& map, float*) {
    load_both(map);
    float acc[8];
    wgmma_fence();
    wgmma<bfloat16, 16>(acc, wgmma_operand(tile(0)), wgmma_operand(tile(1) + (fault ? 128 : 1024)),
                        false);
    wgmma_commit();
    wgmma_wait<0>();
}

// Panels of 64 columns, of which the second is not where `leading` says.
template <bool fault>
void wgmma_without_leading(const TensorMap& map, float*) {
    load_both(map);
    float acc[64];
    const uint64_t b = fault ? wgmma_operand(tile(0)) : wgmma_operand(tile(0), kTile);
    wgmma_fence();
    wgmma<bfloat16, 128, false, true>(acc, wgmma_operand(tile(0)), b, false);
    wgmma_commit();
    wgmma_wait<0>();
}

template <bool fault>
void wgmma_before_landing(const TensorMap& map, float*) {
    start();
    if (threadIdx.x == 0) load(map, 0, 0), load(map, 1, 1);
    mbarrier_wait(full(0), 0);
    if (!fault) mbarrier_wait(full(1), 0);
    float acc[32];
    multiply_and_wait(acc);
    mbarrier_wait(full(1), 0);
}

// The producer loads again after warpgroups have released what they multiply.
template <bool fault>
void released_before_the_wait(const TensorMap& map, float*) {
    start(2);
    for (int step = 0; step < 2; ++step) {
        if (threadIdx.x == 0) mbarrier_wait(empty(), step ^ 1), load_two(map, step);
        mbarrier_wait(full(step), 0);
        float acc[32];
        wgmma_fence();
        multiply(acc);
        wgmma_commit();
        if (!fault) wgmma_wait<0>();
        if (threadIdx.x % 128 == 0) mbarrier_arrive(empty());
        if (fault) wgmma_wait<0>();
    }
}

template <bool fault>
void released_by_one_of_two(const TensorMap& map, float*) {
    start(fault ? 1 : 2);
    for (int step = 0; step < 2; ++step) {
        if (threadIdx.x == 0) mbarrier_wait(empty(), step ^ 1), load_two(map, step);
        mbarrier_wait(full(step), 0);
        float acc[32];
        multiply_and_wait(acc);
        if (threadIdx.x == 0 || (threadIdx.x == 128 && !fault)) mbarrier_arrive(empty());
    }
}

template <bool fault>
void store_over_what_wgmma_reads(const TensorMap& map, float*) {
    load_both(map);
    float acc[32];
    wgmma_fence();
    multiply(acc);
    wgmma_commit();
    if (!fault) wgmma_wait<0>();
    barrier();
    st_shared(word(threadIdx.x), 1.0f);
    if (fault) wgmma_wait<0>();
}

// Every warp multiplies the rows of A that it has written itself.
template <bool fault>
void own_rows_without_fence(const TensorMap& map, float*) {
    load_both(map);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t zeros[4] = {};
    for (int i = 0; i < 4; ++i)
        stmatrix_x4(tile(2 + warpgroup()) + 16 * 128 * (warp % 4) + 512 * i + 16 * lane, zeros);
    if (!fault) fence_proxy_async();
    warp_sync();
    float acc[32];
    wgmma_fence();
    multiply(acc, 2 + warpgroup());
    wgmma_commit();
    wgmma_wait<0>();
}

// cp.async is no copy of the asynchronous proxy.
template <bool fault>
void wgmma_of_cp_async_without_fence(const TensorMap& map, float* x) {
    load_both(map);
    for (int i = 0; i < 2; ++i) cp_async_16(tile(2) + 16 * (2 * threadIdx.x + i), x, true);
    cp_async_commit();
    cp_async_wait<0>();
    if (!fault) fence_proxy_async();
    barrier();
    float acc[32];
    wgmma_fence();
    multiply(acc, 0, 2);
    wgmma_commit();
    wgmma_wait<0>();
}

// The rows of B are for all warps.
template <bool fault>
void rows_of_other_warps(const TensorMap& map, float*) {
    load_both(map);
    for (int i = 0; i < 2; ++i) st_shared(tile(2) + 16 * (2 * threadIdx.x + i), float4{});
    fence_proxy_async();
    fault ? warp_sync() : barrier();
    float acc[32];
    wgmma_fence();
    multiply(acc, 0, 2);
    wgmma_commit();
    wgmma_wait<0>();
}

// Registers

// A block of 384 threads begins with 168 each, 3 * 168 = 24 + 2 * 240.
template <bool fault>
void more_registers_than_there_are(const TensorMap&, float*) {
    if (warpgroup() == 2)
        registers_down<fault ? 32 : 24>();
    else
        registers_up<240>();
}

template <bool fault>
void registers_of_three_warps(const TensorMap&, float*) {
    if (!fault || threadIdx.x / 32 != 1) registers_down<24>();
}

template <bool fault>
void registers_up_to_fewer(const TensorMap&, float*) {
    registers_down<64>();
    registers_up<fault ? 56 : 96>();
}

#define FASTATTN_CASE(name) #name, name<false>, name<true>
constexpr Case kCases[] = {
    {FASTATTN_CASE(wgmma_without_fence)},
    {FASTATTN_CASE(wgmma_fence_of_an_older_group)},
    {FASTATTN_CASE(wgmma_not_committed)},
    {FASTATTN_CASE(wgmma_not_waited_for)},
    {FASTATTN_CASE(accumulator_written_too_early)},
    {FASTATTN_CASE(accumulator_read_too_early)},
    {FASTATTN_CASE(accumulator_landed_too_early)},
    {FASTATTN_CASE(a_registers_written_too_early)},
    {FASTATTN_CASE(part_of_an_accumulator)},
    {FASTATTN_CASE(descriptors_differ)},
    {FASTATTN_CASE(flags_differ)},
    {FASTATTN_CASE(wgmma_of_three_warps)},
    {FASTATTN_CASE(wgmma_of_half_a_warpgroup), 192},
    {FASTATTN_CASE(wgmma_of_divergent_warps)},
    {FASTATTN_CASE(wgmma_without_swizzle)},
    {FASTATTN_CASE(wgmma_within_a_pattern)},
    {FASTATTN_CASE(wgmma_without_leading)},
    {FASTATTN_CASE(wgmma_before_landing)},
    {FASTATTN_CASE(released_before_the_wait)},
    {FASTATTN_CASE(released_by_one_of_two)},
    {FASTATTN_CASE(store_over_what_wgmma_reads)},
    {FASTATTN_CASE(own_rows_without_fence)},
    {FASTATTN_CASE(wgmma_of_cp_async_without_fence)},
    {FASTATTN_CASE(rows_of_other_warps)},
    {FASTATTN_CASE(more_registers_than_there_are), 384},
    {FASTATTN_CASE(registers_of_three_warps)},
    {FASTATTN_CASE(registers_up_to_fewer)},
};
#undef FASTATTN_CASE

}  // namespace
}  // namespace fastattn::cuda

FASTATTN_EXPORT void fault_of_wgmma(const char* name, bool planted, char* report, size_t size) {
    using namespace fastattn::cuda;
    std::strncpy(report, report_of(kCases, name, planted).c_str(), size - 1);
}
