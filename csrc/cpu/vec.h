// Vec: kLanes floats on the compiler's vector extensions; loads, stores, conversions and math.
// Included inside a target region, so that everything here belongs to one instruction set.
#pragma once

#define FASTATTN_INLINE inline __attribute__((always_inline))

constexpr int kLanes = FASTATTN_VECTOR_BYTES / 4;

typedef float Vec __attribute__((vector_size(FASTATTN_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(FASTATTN_VECTOR_BYTES)));
typedef uint32_t UintVec __attribute__((vector_size(FASTATTN_VECTOR_BYTES)));
typedef uint16_t HalfVec __attribute__((vector_size(FASTATTN_VECTOR_BYTES / 2)));

// Storage of a half-precision number.
struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

// Not Vec{} + x, which adds: -0 + 0 is 0.
FASTATTN_INLINE Vec splat(float x) {
#if FASTATTN_AVX512
    return (Vec)_mm512_set1_ps(x);
#elif FASTATTN_AVX2
    return (Vec)_mm256_set1_ps(x);
#elif FASTATTN_X86
    return (Vec)_mm_set1_ps(x);
#else
    return (Vec)vdupq_n_f32(x);
#endif
}
FASTATTN_INLINE IntVec lane_index() {
    IntVec v;
    for (int i = 0; i < kLanes; ++i) v[i] = i;
    return v;
}

FASTATTN_INLINE Vec select(IntVec condition, Vec a, Vec b) {
    return (Vec)((condition & (IntVec)a) | (~condition & (IntVec)b));
}
// NaN in `b` is kept, NaN in `a` is not: put the running value in `b`.
FASTATTN_INLINE Vec max(Vec a, Vec b) {
#if FASTATTN_AVX512
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif FASTATTN_AVX2
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif FASTATTN_X86
    return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
    return select(a > b, a, b);
#endif
}
FASTATTN_INLINE Vec abs(Vec x) { return (Vec)((UintVec)x & 0x7fffffffu); }

#if FASTATTN_X86
FASTATTN_INLINE __m128 add_halves(__m128 v) { return _mm_add_ps(v, _mm_movehl_ps(v, v)); }
FASTATTN_INLINE __m128 max_halves(__m128 v) { return _mm_max_ps(v, _mm_movehl_ps(v, v)); }
#endif

FASTATTN_INLINE float reduce_add(Vec v) {
#if FASTATTN_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#elif FASTATTN_X86
#if FASTATTN_AVX2
    const __m256 wide = (__m256)v;
    const __m128 low = _mm256_castps256_ps128(wide), high = _mm256_extractf128_ps(wide, 1);
    const __m128 two = add_halves(_mm_add_ps(low, high));
#else
    const __m128 two = add_halves((__m128)v);
#endif
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    return vaddvq_f32((float32x4_t)v);
#endif
}
FASTATTN_INLINE float reduce_max(Vec v) {
#if FASTATTN_AVX512
    return _mm512_reduce_max_ps((__m512)v);
#elif FASTATTN_X86
#if FASTATTN_AVX2
    const __m256 wide = (__m256)v;
    const __m128 low = _mm256_castps256_ps128(wide), high = _mm256_extractf128_ps(wide, 1);
    const __m128 two = max_halves(_mm_max_ps(low, high));
#else
    const __m128 two = max_halves((__m128)v);
#endif
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    return vmaxnmvq_f32((float32x4_t)v);
#endif
}

// Conversions, to nearest even; NaN stays NaN.

// Instead of __builtin_convertvector, of which GCC makes two halves.
FASTATTN_INLINE UintVec zero_extend(HalfVec h) {
#if FASTATTN_AVX512
    return (UintVec)_mm512_cvtepu16_epi32((__m256i)h);
#elif FASTATTN_AVX2
    return (UintVec)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, UintVec);
#endif
}
FASTATTN_INLINE Vec widen(BF16, HalfVec h) { return (Vec)(zero_extend(h) << 16); }
// The 16 bits of the nearest bfloat16, in each lane.
FASTATTN_INLINE UintVec bf16_bits(Vec v) {
    UintVec bits = (UintVec)v;
    UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    UintVec is_nan = (UintVec)(v != v);
    return (is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded);
}
FASTATTN_INLINE HalfVec narrow(BF16, Vec v) {
#if FASTATTN_AVX512_BF16
    return (HalfVec)_mm512_cvtneps_pbh((__m512)v);
#else
    return __builtin_convertvector(bf16_bits(v), HalfVec);
#endif
}
FASTATTN_INLINE Vec widen(F16, HalfVec h) {
#if FASTATTN_AVX512
    return (Vec)_mm512_cvtph_ps((__m256i)h);
#elif FASTATTN_AVX2
    return (Vec)_mm256_cvtph_ps((__m128i)h);
#else
    // Exponent and mantissa move into a float that a product rebases; it also scales denormals.
    UintVec bits = __builtin_convertvector(h, UintVec);
    Vec rebased = (Vec)((bits & 0x7fff) << 13) * 0x1p112f;
    UintVec special = (UintVec)((bits & 0x7c00) == 0x7c00) & 0x7f800000u;
    return (Vec)((UintVec)rebased | special | ((bits & 0x8000) << 16));
#endif
}
FASTATTN_INLINE HalfVec narrow(F16, Vec v) {
#if FASTATTN_AVX512
    return (HalfVec)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif FASTATTN_AVX2
    return (HalfVec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    UintVec bits = (UintVec)v, sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffffu;
    UintVec normal = (size - 0x38000000u + 0xfff + ((size >> 13) & 1)) >> 13;
    // Adding 0.5 aligns a denormal's last bit with the float's: the addition rounds it.
    UintVec denormal = (UintVec)((Vec)size + 0.5f) - 0x3f000000u;
    UintVec is_denormal = (UintVec)(size < 0x38800000u), is_nan = (UintVec)(size > 0x7f800000u);
    UintVec is_infinite = (UintVec)(size >= 0x477ff000u) & ~is_nan;
    UintVec result = (is_denormal & denormal) | (~is_denormal & normal);
    result = (is_infinite & 0x7c00u) | (~is_infinite & result);
    result = (is_nan & 0x7e00u) | (~is_nan & result);
    return __builtin_convertvector(result | sign, HalfVec);
#endif
}

// Loads and stores of kLanes elements, or of the first `count` of them (the rest read as 0).

FASTATTN_INLINE Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
FASTATTN_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
template <class Half>
FASTATTN_INLINE Vec load(const Half* p) {
    HalfVec h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(Half{}, h);
}
template <class Half>
FASTATTN_INLINE void store(Half* p, Vec v) {
    HalfVec h = narrow(Half{}, v);
    __builtin_memcpy(p, &h, sizeof h);
}
template <class T>
FASTATTN_INLINE Vec load(const T* p, int64_t count) {
    if (count >= kLanes) return load(p);
#if FASTATTN_AVX512
    const __mmask16 first = count > 0 ? (1u << count) - 1 : 0;
    if constexpr (sizeof(T) == 4)
        return (Vec)_mm512_maskz_loadu_ps(first, p);
    else
        return widen(T{}, (HalfVec)_mm256_maskz_loadu_epi16(first, p));
#endif
    T padded[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
    return load(padded);
}
template <class T>
FASTATTN_INLINE void store(T* p, Vec v, int64_t count) {
    if (count >= kLanes) return store(p, v);
#if FASTATTN_AVX512
    const __mmask16 first = count > 0 ? (1u << count) - 1 : 0;
    if constexpr (sizeof(T) == 4)
        return _mm512_mask_storeu_ps(p, first, (__m512)v);
    else
        return _mm256_mask_storeu_epi16(p, first, (__m256i)narrow(T{}, v));
#endif
    T padded[kLanes];
    store(padded, v);
    for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}
template <class T>
FASTATTN_INLINE float to_float(T x) {
    return widen(T{}, HalfVec{x.bits})[0];
}
template <>
FASTATTN_INLINE float to_float(float x) {
    return x;
}

// Math.

// 2^x for x <= 127, within 2 units in the last place; 0 below -126 and for -inf; NaN stays NaN.
// Adding 1.5 * 2^23 rounds to the nearest integer; the rest, in [-1/2, 1/2], takes a minimax
// polynomial of relative error 2e-9.
FASTATTN_INLINE Vec exp2(Vec x) {
#if FASTATTN_AVX512
    const Vec n = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    const Vec f = x - n;
#else
    const Vec magic = splat(0x1.8p23f);
    IntVec underflow = x < splat(-126.0f);
    Vec clamped = max(splat(-126.0f), x);
    Vec shifted = clamped + magic;
    Vec f = clamped - (shifted - magic);
#endif
    Vec p = splat(1.53533618e-4f);
    p = p * f + 1.33988744e-3f;
    p = p * f + 9.61843736e-3f;
    p = p * f + 5.55033247e-2f;
    p = p * f + 2.40226479e-1f;
    p = p * f + 6.93147203e-1f;
    p = p * f + 1.0f;
#if FASTATTN_AVX512
    const __mmask16 large = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return (Vec)_mm512_maskz_scalef_ps(large, (__m512)p, (__m512)n);
#else
    return (Vec)(((IntVec)p + ((IntVec)shifted << 23)) & ~underflow);
#endif
}

// e^x within 1 unit in the last place; 0 below -87 and for -inf; NaN stays NaN. As exp2, with ln 2
// subtracted in two parts (Cody and Waite).
FASTATTN_INLINE Vec exp(Vec x) {
    const Vec magic = splat(0x1.8p23f);
    IntVec underflow = x < splat(-87.0f);
    Vec clamped = max(splat(-87.0f), x);
    Vec shifted = clamped * 1.44269504f + magic;
    Vec n = shifted - magic;
    Vec f = clamped - n * 0x1.63p-1f;
    f = f + n * 2.12194440e-4f;
    Vec p = splat(1.37805939e-3f);
    p = p * f + 8.37312452e-3f;
    p = p * f + 4.16695364e-2f;
    p = p * f + 1.66664720e-1f;
    p = p * f + 4.99999851e-1f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return (Vec)(((IntVec)p + ((IntVec)shifted << 23)) & ~underflow);
}

// tanh within 2e-7 absolutely; odd, saturating.
FASTATTN_INLINE Vec tanh(Vec x) {
    Vec size = abs(x);
    Vec e = exp2(max(splat(-126.0f), size * -2.88539008f));
    Vec large = (1.0f - e) / (1.0f + e);
    Vec square = x * x;
    // Taylor near 0, where 1 - e would cancel.
    Vec small =
        size * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
    Vec result = select(size < splat(0.25f), small, large);
    return (Vec)((UintVec)result | ((UintVec)x & 0x80000000u));
}
