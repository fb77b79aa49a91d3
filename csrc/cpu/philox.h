// Included inside a target region. Dropout's stream: Philox4x32 with 7 rounds (Salmon et al., SC
// 2011). Element (i, j) of matrix (batch, head) takes word (j / 16) % 4 of the block with counter
// (16 * (j / 64) + j % 16, i, head, batch), so that one evaluation serves 64 consecutive columns.
#pragma once

#if FASTATTN_AVX512
using PhiloxVec = __m512i;
inline PhiloxVec philox_multiply(PhiloxVec a, PhiloxVec b) { return _mm512_mul_epu32(a, b); }
#elif FASTATTN_AVX2
using PhiloxVec = __m256i;
inline PhiloxVec philox_multiply(PhiloxVec a, PhiloxVec b) { return _mm256_mul_epu32(a, b); }
#elif FASTATTN_X86
using PhiloxVec = __m128i;
inline PhiloxVec philox_multiply(PhiloxVec a, PhiloxVec b) { return _mm_mul_epu32(a, b); }
#else
using PhiloxVec = int64x2_t;
inline PhiloxVec philox_multiply(PhiloxVec a, PhiloxVec b) {
    return PhiloxVec(vmull_u32(vmovn_u64(uint64x2_t(a)), vmovn_u64(uint64x2_t(b))));
}
#endif
typedef uint32_t PhiloxWords __attribute__((vector_size(sizeof(PhiloxVec))));
typedef uint64_t PhiloxPairs __attribute__((vector_size(sizeof(PhiloxVec))));

struct PhiloxProduct {
    PhiloxWords high, low;
};

inline PhiloxProduct philox_product(PhiloxWords a, uint32_t factor) {
    const PhiloxPairs low_half = PhiloxPairs{} + 0xFFFFFFFFu;
    const PhiloxVec b = PhiloxVec(PhiloxPairs{} + factor);
    const PhiloxPairs even = PhiloxPairs(philox_multiply(PhiloxVec(a), b));
    const PhiloxPairs odd = PhiloxPairs(philox_multiply(PhiloxVec(PhiloxPairs(a) >> 32), b));
    return {PhiloxWords((even >> 32) | (odd & ~low_half)),
            PhiloxWords((even & low_half) | (odd << 32))};
}

// The words of columns [64 * block, 64 * block + 64), in the columns' order.
inline void philox_words(uint64_t seed, int64_t block, uint32_t row, uint32_t high,
                         uint32_t highest, uint32_t* words /* [64] */) {
    constexpr int kLanesOfWords = sizeof(PhiloxWords) / 4;
    for (int lane = 0; lane < 16; lane += kLanesOfWords) {
        PhiloxWords c0, c1 = PhiloxWords{} + row, c2 = PhiloxWords{} + high;
        PhiloxWords c3 = PhiloxWords{} + highest;
        for (int i = 0; i < kLanesOfWords; ++i) c0[i] = uint32_t(16 * block + lane + i);
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
        for (int round = 0; round < 7; ++round) {
            const PhiloxProduct p0 = philox_product(c0, 0xD2511F53u);
            const PhiloxProduct p1 = philox_product(c2, 0xCD9E8D57u);
            const PhiloxWords keyed1 = p1.high ^ c1 ^ k0, keyed3 = p0.high ^ c3 ^ k1;
            c0 = keyed1, c1 = p1.low, c2 = keyed3, c3 = p0.low;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        __builtin_memcpy(words + lane, &c0, sizeof(c0));
        __builtin_memcpy(words + 16 + lane, &c1, sizeof(c1));
        __builtin_memcpy(words + 32 + lane, &c2, sizeof(c2));
        __builtin_memcpy(words + 48 + lane, &c3, sizeof(c3));
    }
}
