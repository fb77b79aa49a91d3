// What the processor can do at best, for benchmarks to measure kernels against.
#include "dtype.h"

#include <omp.h>

#include <chrono>

#include "cpu/simd.h"

#include "cpu/target_begin.h"

#include "cpu/amx.h"
#include "cpu/tile.h"

namespace {

// The best of five timings, in seconds, of `work` on every thread at once.
template <class Work>
double best_time(Work work) {
    double best = INFINITY;
    for (int round = 0; round < 5; ++round) {
        const auto start = std::chrono::steady_clock::now();
#pragma omp parallel
        work(omp_get_thread_num(), omp_get_num_threads());
        const auto end = std::chrono::steady_clock::now();
        best = std::min(best, std::chrono::duration<double>(end - start).count());
    }
    return best;
}

// As many independent sums as a tile has, in registers alone.
template <class Dot>
double multiply_adds() {
    constexpr int64_t kSteps = 1 << 19;
    const double seconds = best_time([](int, int) {
        Vec sums[kTileRows][kTileVectors];
        const Vec factor = splat(0.999f), term = splat(1e-3f);
        const auto each = [](auto f) { for_each_vector<kTileRows, kTileVectors>(f); };
        each([&](int m, int n) { sums[m][n] = splat(float(m * kTileVectors + n)); });
        for (int64_t step = 0; step < kSteps; ++step)
            each([&](int m, int n) { sums[m][n] = Dot::multiply_add(sums[m][n], factor, term); });
        each([&](int m, int n) {
            volatile float sink = sums[m][n][0];
            (void)sink;
        });
    });
    constexpr int kFlops = 2 * Dot::kPair * kLanes * kTileRows * kTileVectors;
    return double(kFlops) * kSteps * omp_get_max_threads() / seconds;
}

#if FASTATTN_AMX
double tile_multiply_adds() {
    constexpr int64_t kSteps = 1 << 16;
    const double seconds = best_time([](int, int) {
        MatrixRegisters registers;
        for (int64_t step = 0; step < kSteps; ++step) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    });
    return 4.0 * 2 * 16 * 16 * 32 * kSteps * omp_get_max_threads() / seconds;
}
#endif

float sum(const float* from, int64_t count) {
    Vec sums[8] = {};
    for (int64_t n = 0; n + 8 * kLanes <= count; n += 8 * kLanes)
        for (int i = 0; i < 8; ++i) sums[i] += load(from + n + i * kLanes);
    for (int i = 1; i < 8; ++i) sums[0] += sums[i];
    return reduce_add(sums[0]);
}

}  // namespace

double peak_flops([[maybe_unused]] DType dtype) {
#if FASTATTN_AMX
    if (dtype == DType::bfloat16) return tile_multiply_adds();
#elif FASTATTN_AVX512_BF16
    if (dtype == DType::bfloat16) return multiply_adds<DotBF16>();
#endif
    return multiply_adds<DotF32>();
}

double read_bandwidth(const float* from, int64_t count) {
    const double seconds = best_time([=](int thread, int threads) {
        const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
        volatile float sink = sum(from + begin, end - begin);
        (void)sink;
    });
    return double(count) * sizeof(float) / seconds;
}

#include "cpu/target_end.h"
