// Opens the code region of one instruction set, FASTATTN_ISA, and its namespace. No include guard:
// a file may open several regions. Every system header comes before it: code that several sets
// share (inline functions of the standard library) must be compiled for the baseline.
#ifndef FASTATTN_ISA
#error "FASTATTN_ISA names the instruction set: baseline, avx2, avx512, avx512_bf16, amx or neon"
#endif

#ifndef FASTATTN_ISA_LEVEL
#define FASTATTN_ISA_LEVEL_baseline 0
#define FASTATTN_ISA_LEVEL_avx2 1
#define FASTATTN_ISA_LEVEL_avx512 2
#define FASTATTN_ISA_LEVEL_avx512_bf16 3
#define FASTATTN_ISA_LEVEL_amx 4
#define FASTATTN_ISA_LEVEL_neon 100
#define FASTATTN_PASTE_EXPANDED(a, b) a##b
#define FASTATTN_PASTE(a, b) FASTATTN_PASTE_EXPANDED(a, b)
#define FASTATTN_ISA_LEVEL FASTATTN_PASTE(FASTATTN_ISA_LEVEL_, FASTATTN_ISA)

// Kernels ask these, not __AVX2__: clang's target region does not define the compiler's own.
#define FASTATTN_NEON (FASTATTN_ISA_LEVEL == FASTATTN_ISA_LEVEL_neon)
#define FASTATTN_X86 (!FASTATTN_NEON)
#define FASTATTN_AVX2 (FASTATTN_X86 && FASTATTN_ISA_LEVEL >= FASTATTN_ISA_LEVEL_avx2)
#define FASTATTN_AVX512 (FASTATTN_X86 && FASTATTN_ISA_LEVEL >= FASTATTN_ISA_LEVEL_avx512)
#define FASTATTN_AVX512_BF16 (FASTATTN_X86 && FASTATTN_ISA_LEVEL >= FASTATTN_ISA_LEVEL_avx512_bf16)
#define FASTATTN_AMX (FASTATTN_X86 && FASTATTN_ISA_LEVEL >= FASTATTN_ISA_LEVEL_amx)
#define FASTATTN_VECTOR_BYTES (FASTATTN_AVX512 ? 64 : FASTATTN_AVX2 ? 32 : 16)
#endif

// clang-format off
#if FASTATTN_AVX2 && defined(__clang__)
#if FASTATTN_AMX
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw," \
    "avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#elif FASTATTN_AVX512_BF16
#pragma clang attribute push(__attribute__((target( \
    "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#elif FASTATTN_AVX512
#pragma clang attribute push(__attribute__((target( \
    "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#endif
#elif FASTATTN_AVX2
#pragma GCC push_options
#if FASTATTN_AMX
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#pragma GCC target("amx-tile,amx-bf16")
#elif FASTATTN_AVX512_BF16
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#elif FASTATTN_AVX512
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#if FASTATTN_AVX512
#pragma GCC target("prefer-vector-width=512")
#endif
#endif
// clang-format on

namespace fastattn {
namespace FASTATTN_ISA {
