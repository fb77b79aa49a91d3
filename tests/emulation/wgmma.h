// The instructions of csrc/cuda/wgmma.cuh, which documents them and includes this, on the host.
#pragma once

#include <cstdint>

#include "cuda/dtype.cuh"
#include "emulation/engine.h"

namespace fastattn::emulation {

// What a thread brings to a wgmma. `a`: its registers of A, or null where a_descriptor says where A
// lies.
struct WgmmaCall {
    float* d;
    const uint32_t* a;
    uint64_t a_descriptor, b_descriptor;
    int n;
    bool bfloat16, trans_a, trans_b, accumulate;
};

void wgmma(WgmmaCall call, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
void wgmma_landed(const float* d, int count, Site site);

}  // namespace fastattn::emulation

namespace fastattn::cuda {

using emulation::Site;

inline void wgmma_fence(Site site = Site::here()) { emulation::wgmma_fence(site); }
inline void wgmma_commit(Site site = Site::here()) { emulation::wgmma_commit(site); }
template <int pending>
void wgmma_wait(Site site = Site::here()) {
    static_assert(0 <= pending && pending <= 7);
    emulation::wgmma_wait(pending, site);
}
template <int n>
void wgmma_landed(float (&d)[n], Site site = Site::here()) {
    emulation::wgmma_landed(d, n, site);
}

template <class T, int n, bool kTransA = false, bool kTransB = false>
void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate, Site site = Site::here()) {
    static_assert(is_wgmma_n<n>);
    emulation::wgmma({d, nullptr, a, b, n, same<T, bfloat16>, kTransA, kTransB, accumulate}, site);
}
template <class T, int n, bool kTransB = false>
void wgmma(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
           Site site = Site::here()) {
    static_assert(is_wgmma_n<n>);
    emulation::wgmma({d, a, 0, b, n, same<T, bfloat16>, false, kTransB, accumulate}, site);
}

}  // namespace fastattn::cuda
