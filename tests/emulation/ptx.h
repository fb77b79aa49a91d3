// The instructions of csrc/cuda/ptx.cuh, which documents them, on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cuda/dtype.cuh"
#include "emulation/cuda.h"
#include "emulation/engine.h"
#include "emulation/float16.h"
#include "emulation/global_memory.h"

namespace fastattn::emulation {

void cp_async(SharedAddress to, const void* from, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(int pending);
void ldmatrix(uint32_t (&d)[4], SharedAddress row, bool transposed, Site site);
// Rows that ldmatrix read from banks which another row of their matrix took, since this was asked.
int64_t take_ldmatrix_conflicts();
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16, Site site);

// Every lane of the warp gives x and receives that of lane `from`.
template <class T>
T shuffle(const char* instruction, Site site, T x, int from) {
    struct Lane {
        T x, result;
        int from;
    } mine{x, x, from};
    block().meet(kWarp, instruction, site, mine, [](Payloads<Lane> lanes) {
        for (int i = 0; i < kWarp; ++i) lanes[i]->result = lanes[lanes[i]->from]->x;
    });
    return mine.result;
}

inline float flush_subnormal(float x) {
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

}  // namespace fastattn::emulation

namespace fastattn::cuda {

using emulation::SharedAddress, emulation::Site;

inline SharedAddress dynamic_shared() {
    return emulation::kSharedBegin + emulation::block().rank() * emulation::kSharedWindow;
}

template <class T>
T ld_shared(SharedAddress from, Site site = Site::here()) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    emulation::Block& block = emulation::block();
    T value;
    std::memcpy(&value,
                block.shared().read(from, sizeof(T), sizeof(T), block.access("ld_shared", site)),
                sizeof(T));
    return value;
}
template <class T>
void st_shared(SharedAddress to, T value, Site site = Site::here()) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    emulation::Block& block = emulation::block();
    std::memcpy(block.shared().write(to, sizeof(T), sizeof(T), block.access("st_shared", site)),
                &value, sizeof(T));
}

template <class T>
T ld_global(const T* from, Site site = Site::here()) {
    emulation::check_global(from, sizeof(T), sizeof(T), "ld_global", site);
    return *from;
}
template <class T>
T ld_readonly(const T* from, Site site = Site::here()) {
    emulation::check_global(from, sizeof(T), sizeof(T), "ld_readonly", site);
    return *from;
}
template <class T>
void st_global(T* to, T value, Site site = Site::here()) {
    emulation::check_global(to, sizeof(T), sizeof(T), "st_global", site);
    *to = value;
}
inline void atomic_add(float* to, float value, Site site = Site::here()) {
    emulation::check_global(to, 4, 4, "atomic_add", site);
    *to += value;
}
inline int atomic_add(int* to, int value, Site site = Site::here()) {
    emulation::check_global(to, 4, 4, "atomic_add", site);
    return std::exchange(*to, *to + value);
}
inline void add_release(int* to, int value, Site site = Site::here()) {
    emulation::check_global(to, 4, 4, "add_release", site);
    *to += value;
}
inline int ld_acquire(const int* from, Site site = Site::here()) {
    emulation::check_global(from, 4, 4, "ld_acquire", site);
    emulation::block().poll("ld_acquire", site);
    return *from;
}

inline void cp_async_16(SharedAddress to, const void* from, bool valid, Site site = Site::here()) {
    emulation::cp_async(to, from, valid, site);
}
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int pending>
void cp_async_wait() {
    emulation::cp_async_wait(pending);
}

inline void ldmatrix_x4(uint32_t (&d)[4], SharedAddress row, Site site = Site::here()) {
    emulation::ldmatrix(d, row, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&d)[4], SharedAddress row, Site site = Site::here()) {
    emulation::ldmatrix(d, row, true, site);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Site site = Site::here()) {
    emulation::mma(d, a, b0, b1, same<T, bfloat16>, site);
}

template <class T>
uint32_t pack(float low, float high) {
    if constexpr (same<T, bfloat16>)
        return emulation::round_to_bfloat16(low) | uint32_t(emulation::round_to_bfloat16(high))
                                                       << 16;
    else
        return emulation::round_to_float16(low) | uint32_t(emulation::round_to_float16(high)) << 16;
}
template <class T>
float to_float(T x) {
    if constexpr (same<T, bfloat16>)
        return emulation::widen_bfloat16(x.bits);
    else
        return emulation::widen_float16(x.bits);
}
inline float to_float(float x) { return x; }
template <class T>
float2 unpack(uint32_t both) {
    return {to_float(T{uint16_t(both)}), to_float(T{uint16_t(both >> 16)})};
}
template <class T>
T from_float(float x) {
    if constexpr (same<T, float>)
        return x;
    else
        return T{uint16_t(pack<T>(x, 0.0f))};
}

// Exact where the hardware approximates; it flushes subnormal numbers on both sides.
inline float exp2_approx(float x) {
    return emulation::flush_subnormal(std::exp2(emulation::flush_subnormal(x)));
}
inline float log2_approx(float x) { return std::log2(emulation::flush_subnormal(x)); }
inline float reciprocal_approx(float x) {
    return emulation::flush_subnormal(1.0f / emulation::flush_subnormal(x));
}

inline int opaque(int x) { return x; }

template <class T>
T shuffle_xor(T x, int lane_mask, Site site = Site::here()) {
    return emulation::shuffle("shuffle_xor", site, x, (emulation::block().lane() ^ lane_mask) % 32);
}
template <class T>
T shuffle(T x, int lane, Site site = Site::here()) {
    return emulation::shuffle("shuffle", site, x, lane % 32);
}
inline bool any_of_warp(bool x, Site site = Site::here()) {
    bool any = x;
    emulation::block().meet(emulation::kWarp, "any_of_warp", site, any,
                            [](emulation::Payloads<bool> lanes) {
                                bool any = false;
                                for (int i = 0; i < 32; ++i) any |= *lanes[i];
                                for (int i = 0; i < 32; ++i) *lanes[i] = any;
                            });
    return any;
}
inline void warp_sync(Site site = Site::here()) { emulation::block().warp_sync(site); }

inline void barrier(Site site = Site::here()) { emulation::block().barrier("barrier", site); }
inline void barrier_sync(int number, int threads, Site site = Site::here()) {
    emulation::block().barrier(number, threads, true, "barrier_sync", site);
}
inline void barrier_arrive(int number, int threads, Site site = Site::here()) {
    emulation::block().barrier(number, threads, false, "barrier_arrive", site);
}

}  // namespace fastattn::cuda
