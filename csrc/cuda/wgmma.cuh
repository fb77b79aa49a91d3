// wgmma, the matrix product of a warpgroup (4 warps) on sm_90a.
#pragma once

#include "cuda/ptx_sm90.cuh"

namespace fastattn::cuda {

// Describes a tile of 16-bit elements in shared memory whose rows of 128 bytes are swizzled as TMA
// does it (chunk c of row r lies at c ^ (r % 8)); `tile` is the first element of the operand, in a
// row at a multiple of 1024 bytes, and rows r and r + 8 are 1024 bytes apart. K-major operands (k
// runs along the rows) advance by 32 bytes a step of k = 16 within the 128 bytes; `leading` is
// unused there. MN-major ones (k runs down the rows; kTrans) advance by 2048 bytes a step of k =
// 16, and `leading` is the distance in bytes between panels of 64 elements along m or n. PTX ISA,
// "Matrix Descriptor Format" and "Canonical Layouts".
FASTATTN_DEVICE uint64_t wgmma_operand(SharedAddress tile, uint32_t leading = 16) {
    constexpr uint64_t kSwizzle128 = 1;
    return uint64_t((tile & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 |
           uint64_t(1024 >> 4) << 32 | kSwizzle128 << 62;
}
// The operand that begins `bytes` further on.
FASTATTN_DEVICE uint64_t advanced(uint64_t operand, uint32_t bytes) {
    return operand + (bytes >> 4);
}

// Whether wgmma below has a form of n columns.
template <int n>
constexpr bool is_wgmma_n = n == 16 || n == 32 || n == 64 || n == 80 || n == 96 || n == 128 ||
                            n == 176 || n == 192 || n == 256;

}  // namespace fastattn::cuda

#ifdef FASTATTN_EMULATION
#include "emulation/wgmma.h"
#else

namespace fastattn::cuda {

// Before the first wgmma, and after registers of its operands were written: orders them.
FASTATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTATTN_DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the newest `pending` groups are done. Their accumulators, and A where it is in
// registers, must not be touched before.
template <int pending>
FASTATTN_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving uses of an accumulator above a wait.
template <int n>
FASTATTN_DEVICE void wgmma_landed(float (&d)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FASTATTN_D8(i)                                                                          \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTATTN_D16 FASTATTN_D8(0)
#define FASTATTN_R16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTATTN_D32 FASTATTN_D8(0), FASTATTN_D8(8)
#define FASTATTN_R32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTATTN_D64 FASTATTN_D8(0), FASTATTN_D8(8), FASTATTN_D8(16), FASTATTN_D8(24)
#define FASTATTN_R64                                                         \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_D80 \
    FASTATTN_D8(0), FASTATTN_D8(8), FASTATTN_D8(16), FASTATTN_D8(24), FASTATTN_D8(32)
#define FASTATTN_R80                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39"
#define FASTATTN_D96                                                                   \
    FASTATTN_D8(0), FASTATTN_D8(8), FASTATTN_D8(16), FASTATTN_D8(24), FASTATTN_D8(32), \
        FASTATTN_D8(40)
#define FASTATTN_R96                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTATTN_D128                                                                  \
    FASTATTN_D8(0), FASTATTN_D8(8), FASTATTN_D8(16), FASTATTN_D8(24), FASTATTN_D8(32), \
        FASTATTN_D8(40), FASTATTN_D8(48), FASTATTN_D8(56)
#define FASTATTN_R128                                                                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_D176                                                                        \
    FASTATTN_D8(0), FASTATTN_D8(8), FASTATTN_D8(16), FASTATTN_D8(24), FASTATTN_D8(32),       \
        FASTATTN_D8(40), FASTATTN_D8(48), FASTATTN_D8(56), FASTATTN_D8(64), FASTATTN_D8(72), \
        FASTATTN_D8(80)
#define FASTATTN_R176                                                                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87"
#define FASTATTN_D192                                                                        \
    FASTATTN_D8(0), FASTATTN_D8(8), FASTATTN_D8(16), FASTATTN_D8(24), FASTATTN_D8(32),       \
        FASTATTN_D8(40), FASTATTN_D8(48), FASTATTN_D8(56), FASTATTN_D8(64), FASTATTN_D8(72), \
        FASTATTN_D8(80), FASTATTN_D8(88)
#define FASTATTN_R192                                                                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTATTN_D256                                                                          \
    FASTATTN_D8(0), FASTATTN_D8(8), FASTATTN_D8(16), FASTATTN_D8(24), FASTATTN_D8(32),         \
        FASTATTN_D8(40), FASTATTN_D8(48), FASTATTN_D8(56), FASTATTN_D8(64), FASTATTN_D8(72),   \
        FASTATTN_D8(80), FASTATTN_D8(88), FASTATTN_D8(96), FASTATTN_D8(104), FASTATTN_D8(112), \
        FASTATTN_D8(120)
#define FASTATTN_R256                                                                              \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "   \
    "%127"

#define FASTATTN_WGMMA_SS(N, TYPE, A, B, P, TA, TB)                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                     \
                 ", 0;\n"                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE             \
                 " {" FASTATTN_R##N "}, %" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}\n" \
                 : FASTATTN_D##N                                                             \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kTransA), "n"(kTransB))
#define FASTATTN_WGMMA_RS(N, TYPE, A0, A1, A2, A3, B, P, TB)                               \
    asm volatile(                                                                          \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                            \
        ", 0;\n"                                                                           \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FASTATTN_R##N \
        "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB ";\n}\n"    \
        : FASTATTN_D##N                                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(kTransB))
#define FASTATTN_WGMMA(N, FORM, ...)                       \
    if constexpr (n == N) {                                \
        if constexpr (same<T, bfloat16>)                   \
            FASTATTN_WGMMA_##FORM(N, "bf16", __VA_ARGS__); \
        else                                               \
            FASTATTN_WGMMA_##FORM(N, "f16", __VA_ARGS__);  \
    }

// d (64, n) = a (64, 16) b (16, n), + d where `accumulate`; asynchronous, float32 accumulation.
// Warp w of the warpgroup holds rows 16 w to 16 w + 15; of column block j (8 wide) a lane holds
// d[4 j .. 4 j + 3] as mma_m16n8k16 has them. Operands from `wgmma_operand`; kTransA, kTransB: they
// are MN-major.
template <class T, int n, bool kTransA = false, bool kTransB = false>
FASTATTN_DEVICE void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(is_wgmma_n<n>);
    FASTATTN_WGMMA(16, SS, 8, 9, 10, 11, 12)
    FASTATTN_WGMMA(32, SS, 16, 17, 18, 19, 20)
    FASTATTN_WGMMA(64, SS, 32, 33, 34, 35, 36)
    FASTATTN_WGMMA(80, SS, 40, 41, 42, 43, 44)
    FASTATTN_WGMMA(96, SS, 48, 49, 50, 51, 52)
    FASTATTN_WGMMA(128, SS, 64, 65, 66, 67, 68)
    FASTATTN_WGMMA(176, SS, 88, 89, 90, 91, 92)
    FASTATTN_WGMMA(192, SS, 96, 97, 98, 99, 100)
    FASTATTN_WGMMA(256, SS, 128, 129, 130, 131, 132)
}
// The same with a in registers, laid out as mma_m16n8k16 has it, 16 rows a warp.
template <class T, int n, bool kTransB = false>
FASTATTN_DEVICE void wgmma(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(is_wgmma_n<n>);
    FASTATTN_WGMMA(16, RS, 8, 9, 10, 11, 12, 13, 14)
    FASTATTN_WGMMA(32, RS, 16, 17, 18, 19, 20, 21, 22)
    FASTATTN_WGMMA(64, RS, 32, 33, 34, 35, 36, 37, 38)
    FASTATTN_WGMMA(80, RS, 40, 41, 42, 43, 44, 45, 46)
    FASTATTN_WGMMA(96, RS, 48, 49, 50, 51, 52, 53, 54)
    FASTATTN_WGMMA(128, RS, 64, 65, 66, 67, 68, 69, 70)
    FASTATTN_WGMMA(176, RS, 88, 89, 90, 91, 92, 93, 94)
    FASTATTN_WGMMA(192, RS, 96, 97, 98, 99, 100, 101, 102)
    FASTATTN_WGMMA(256, RS, 128, 129, 130, 131, 132, 133, 134)
}

#undef FASTATTN_WGMMA
#undef FASTATTN_WGMMA_RS
#undef FASTATTN_WGMMA_SS

}  // namespace fastattn::cuda

#endif
