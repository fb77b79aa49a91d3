// Dropout's stream: Philox4x32 with 7 rounds (Salmon et al., SC 2011). Element (i, j) of matrix
// (batch, head) takes word (j / 16) % 4 of the block with counter (16 * (j / 64) + j % 16, i, head,
// batch), so that one block serves 64 consecutive columns.
#pragma once

#include "cuda/ptx.cuh"

namespace fastattn::cuda {

FASTATTN_DEVICE void philox(uint32_t (&c)[4], uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
    for (int round = 0; round < 7; ++round) {
        const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
        c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0, c[1] = uint32_t(p1);
        c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1, c[3] = uint32_t(p0);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
}

// The four words of columns column, column + 16, column + 32 and column + 48, where column % 64 <
// 16.
FASTATTN_DEVICE void philox_words(uint32_t (&words)[4], uint64_t seed, int column, int row,
                                  int head, int batch) {
    words[0] = uint32_t(16 * (column / 64) + column % 16), words[1] = uint32_t(row);
    words[2] = uint32_t(head), words[3] = uint32_t(batch);
    philox(words, seed);
}

// words[i % 4], i not known when compiled.
FASTATTN_DEVICE uint32_t word_of(const uint32_t (&words)[4], int i) {
    const uint32_t even = i & 2 ? words[2] : words[0], odd = i & 2 ? words[3] : words[1];
    return i & 1 ? odd : even;
}

}  // namespace fastattn::cuda
