// What the planted faults of sm_90's instructions have in common: memory, helpers, running a case.
#pragma once

#include <cmath>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/wgmma.cuh"

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastattn::cuda {

constexpr int kRows = 64, kTile = kRows * 128, kShared = 1024 + 4 * kTile;

// Shared memory: mbarriers, and tiles of 64 rows of 128 bytes.
inline SharedAddress full(int index) { return dynamic_shared() + 8 * index; }
inline SharedAddress empty() { return dynamic_shared() + 16; }
inline SharedAddress tile(int index) { return dynamic_shared() + 1024 + index * kTile; }
inline SharedAddress word(int index) { return tile(0) + 4 * index; }

// Two mbarriers of one arrival, and `empty` of `arrivals`.
inline void start(uint32_t arrivals = 1) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) mbarrier_init(full(i), 1);
        mbarrier_init(empty(), arrivals);
        fence_mbarrier_init();
    }
    barrier();
}

inline void load(const TensorMap& map, int to, int counting = 0) {
    mbarrier_arrive_expect(full(counting), kTile);
    tma_load_4d(tile(to), &map, full(counting), 0, 0, 0, 0);
}

// Tiles 0 and 1, by one thread.
inline void load_two(const TensorMap& map, int counting = 0) {
    mbarrier_arrive_expect(full(counting), 2 * kTile);
    for (int i = 0; i < 2; ++i) tma_load_4d(tile(i), &map, full(counting), 0, 0, 0, 0);
}

// A kernel of `threads` threads without and with its fault. `map` is of the (64, 64) bfloat16 at x.
struct Case {
    using Kernel = void(const TensorMap& map, float* x);

    const char* name;
    Kernel *sound, *faulty;
    int threads = 256, cluster = 1;
};

// What is reported of one of the cases: nothing if all is well.
inline std::string report_of(std::span<const Case> cases, const std::string& name, bool fault) {
    for (const Case& one : cases) {
        if (name != one.name) continue;
        alignas(16) float x[kTile / 4] = {};
        emulation::GlobalBuffers buffers;
        buffers.add(x, sizeof x);
        const TensorMap map = make_tensor_map({Element::bfloat16,
                                               x,
                                               {64, kRows, 1, 1},
                                               {1, 64, 64 * kRows, 64 * kRows},
                                               {64, kRows, 1, 1},
                                               true});
        try {
            launch_clusters(one.cluster, fault ? one.faulty : one.sound, 2, one.threads, kShared,
                            nullptr, map, static_cast<float*>(x));
        } catch (const std::runtime_error& error) {
            return error.what();
        }
        return std::isnan(x[0]) ? "the result is not a number" : "";
    }
    return "no such case";
}

}  // namespace fastattn::cuda
