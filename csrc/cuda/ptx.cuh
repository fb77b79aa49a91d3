// The PTX instructions that the kernels use, one inline function each, as of the PTX ISA manual.
// Kernels reach shared memory through them alone (SharedAddress, not pointers), so that the host
// emulation (tests/emulation), which stands in for this file, sees every access.
//
// Here: what sm_80 has. Of sm_90a: ptx_sm90.cuh.
#pragma once

#ifdef FASTATTN_EMULATION
#include "emulation/ptx.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/dtype.cuh"

#define FASTATTN_DEVICE __device__ __forceinline__

namespace fastattn::cuda {

// Bytes from the begin of the block's shared memory window.
using SharedAddress = uint32_t;

// The dynamic shared memory of this block; 1024-byte aligned, as TMA's 128-byte swizzle wants it.
FASTATTN_DEVICE SharedAddress dynamic_shared() {
    extern __shared__ __align__(1024) uint8_t memory[];
    return SharedAddress(__cvta_generic_to_shared(memory));
}

// ld.shared and st.shared of 4, 8 or 16 bytes, which the address must be aligned to.
template <class T>
FASTATTN_DEVICE T ld_shared(SharedAddress from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    union {
        T value;
        uint32_t words[sizeof(T) / 4];
    } u;
    if constexpr (sizeof(T) == 4)
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(u.words[0]) : "r"(from));
    else if constexpr (sizeof(T) == 8)
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                     : "=r"(u.words[0]), "=r"(u.words[1])
                     : "r"(from));
    else
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(u.words[0]), "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3])
                     : "r"(from));
    return u.value;
}

template <class T>
FASTATTN_DEVICE void st_shared(SharedAddress to, T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    union {
        T value;
        uint32_t words[sizeof(T) / 4];
    } u{value};
    if constexpr (sizeof(T) == 4)
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(u.words[0]) : "memory");
    else if constexpr (sizeof(T) == 8)
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(u.words[0]), "r"(u.words[1])
                     : "memory");
    else
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(u.words[0]),
                     "r"(u.words[1]), "r"(u.words[2]), "r"(u.words[3])
                     : "memory");
}

// Global memory, through the read-only path where nothing writes it during the kernel.
template <class T>
FASTATTN_DEVICE T ld_global(const T* from) {
    return *from;
}
template <class T>
FASTATTN_DEVICE T ld_readonly(const T* from) {
    return __ldg(from);
}
template <class T>
FASTATTN_DEVICE void st_global(T* to, T value) {
    *to = value;
}
FASTATTN_DEVICE void atomic_add(float* to, float value) { atomicAdd(to, value); }
FASTATTN_DEVICE int atomic_add(int* to, int value) { return atomicAdd(to, value); }
// Turns between blocks: what a thread wrote before add_release, others see after ld_acquire saw the
// sum.
FASTATTN_DEVICE void add_release(int* to, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
FASTATTN_DEVICE int ld_acquire(const int* from) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

// cp.async of 16 bytes, both addresses aligned to them; zeros where !valid, and `from` is not read.
FASTATTN_DEVICE void cp_async_16(SharedAddress to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
                 : "memory");
}
FASTATTN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the newest `pending` groups of this thread have arrived.
template <int pending>
FASTATTN_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements, one register each: lane l gives the address of row l % 8
// of matrix l / 8 and receives elements (l / 4, 2 * (l % 4)) and the next. `_trans`: of the
// transposed matrices.
FASTATTN_DEVICE void ldmatrix_x4(uint32_t (&d)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(row)
                 : "memory");
}
FASTATTN_DEVICE void ldmatrix_x4_trans(uint32_t (&d)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(row)
                 : "memory");
}

// d (16, 8) += a (16, 16) b (16, 8), float32 accumulation. Lane l, g = l / 4, c = 2 * (l % 4), has
//   d: (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1)
//   a: pairs from (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8)
//   b: pairs down column g from rows c and c + 8
template <class T>
FASTATTN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (same<T, bfloat16>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to nearest even into one register, and back.
template <class T>
FASTATTN_DEVICE uint32_t pack(float low, float high) {
    uint32_t both;
    if constexpr (same<T, bfloat16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <class T>
FASTATTN_DEVICE float to_float(T x) {
    if constexpr (same<T, bfloat16>) return __uint_as_float(uint32_t(x.bits) << 16);
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}
FASTATTN_DEVICE float to_float(float x) { return x; }
template <class T>
FASTATTN_DEVICE float2 unpack(uint32_t both) {
    return {to_float(T{uint16_t(both)}), to_float(T{uint16_t(both >> 16)})};
}
template <class T>
FASTATTN_DEVICE T from_float(float x) {
    if constexpr (same<T, float>)
        return x;
    else
        return T{uint16_t(pack<T>(x, 0.0f))};
}

// Approximations of the special function unit: error about 2 ulp (ex2), 2^-11 (tanh).
FASTATTN_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FASTATTN_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FASTATTN_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x, of which the compiler knows nothing: in a loop, what follows from it is computed again rather
// than kept in registers.
FASTATTN_DEVICE int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Of a whole warp.
template <class T>
FASTATTN_DEVICE T shuffle_xor(T x, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, x, lane_mask);
}
template <class T>
FASTATTN_DEVICE T shuffle(T x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}
FASTATTN_DEVICE bool any_of_warp(bool x) { return __any_sync(0xffffffffu, x); }
FASTATTN_DEVICE void warp_sync() { __syncwarp(); }

// Barriers of a block: of all its threads, and the numbered ones (1 to 15) of `threads`, a multiple
// of 32. arrive does not wait.
FASTATTN_DEVICE void barrier() { __syncthreads(); }
FASTATTN_DEVICE void barrier_sync(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
FASTATTN_DEVICE void barrier_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace fastattn::cuda

#endif
