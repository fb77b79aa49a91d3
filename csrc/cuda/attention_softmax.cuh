// The online softmax on scores as mma_m16n8k16 leaves them in a warp's registers: scores[j] are
// keys 8 * j to 8 * j + 7, of which a lane has two, of row g (half 0: elements 0 and 1) and of row
// g + 8 (half 1). `key` is the first key that the lane holds.
#pragma once

#include <cmath>

#include "cuda/attention_scores.cuh"

namespace fastattn::cuda {

// Products to scores in units of log2, capped.
template <int kTiles>
FASTATTN_DEVICE void scale_scores(const AttentionArgs& a, float (&scores)[kTiles][4]) {
    const float factor = a.softmax_scale * kLog2E;
    if (a.softcap == 0.0f) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[j][i] *= factor;
        return;
    }
    const float cap = a.softcap * kLog2E, slope = a.softmax_scale / a.softcap;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[j][i] = cap * tanh_by_exp2(scores[j][i] * slope);
}

// ALiBi on one row; `distance` is that of `key` from the row's diagonal.
template <int kTiles>
FASTATTN_DEVICE void add_alibi(float (&scores)[kTiles][4], int half, float slope, int distance) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            scores[j][2 * half + i] -= slope * kLog2E * fabsf(float(distance + 8 * j + i));
}

// Hides what one row does not see: all but `keys`, counted from `key`.
template <int kTiles>
FASTATTN_DEVICE void hide_scores(float (&scores)[kTiles][4], int half, Range keys) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (8 * j + i < keys.begin || 8 * j + i >= keys.end)
                scores[j][2 * half + i] = -INFINITY;
}

// Turns the scores of the next keys into weights; what was summed of the values so far is to be
// multiplied by `rescale`. row_max and row_sum are of rows g and g + 8; row_sum is the lane's
// share. `factor` takes scores to units of log2.
template <int kTiles>
FASTATTN_DEVICE void softmax_step(float (&scores)[kTiles][4], float (&row_max)[2],
                                  float (&row_sum)[2], float (&rescale)[2], float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float new_max = row_max[half];
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
            new_max = fmaxf(new_max, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
        new_max = fmaxf(new_max, shuffle_xor(new_max, 1));
        new_max = fmaxf(new_max, shuffle_xor(new_max, 2));
        // While a row has seen nothing its maximum is -inf, and -inf - -inf would be NaN.
        const float shift = new_max == -INFINITY ? 0.0f : new_max * factor;
        rescale[half] = exp2_approx(row_max[half] * factor - shift);
        row_max[half] = new_max;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                scores[j][i] = exp2_approx(scores[j][i] * factor - shift);
                sum += scores[j][i];
            }
        row_sum[half] = row_sum[half] * rescale[half] + sum;
    }
}

// acc (16, 8 * kTiles) times the factors of rows g and g + 8.
template <int kTiles>
FASTATTN_DEVICE void multiply_rows(float (&acc)[kTiles][4], const float (&factors)[2]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][i] *= factors[i / 2];
}

// Both at once.
template <int kTiles, int kTilesV>
FASTATTN_DEVICE void softmax_step(float (&scores)[kTiles][4], float (&acc)[kTilesV][4],
                                  float (&row_max)[2], float (&row_sum)[2], float factor) {
    float rescale[2];
    softmax_step(scores, row_max, row_sum, rescale, factor);
    multiply_rows(acc, rescale);
}

// Dropout on the weights of one row. `key` % 16 is below 8.
template <int kTiles>
FASTATTN_DEVICE void drop_weights(const AttentionArgs& a, float (&p)[kTiles][4], int half, int row,
                                  int key, int head, int batch) {
    const uint64_t seed = ld_readonly(a.seed);
    // A block of the stream serves columns that lie 16 apart: 4 of them where tiles are whole.
    constexpr int kWords = kTiles < 8 ? kTiles / 2 : 4;
#pragma unroll
    for (int j = 0; j < kTiles; j += 2 * kWords)
#pragma unroll
        for (int column = 0; column < 4; ++column) {
            const int high = column / 2, i = 2 * half + column % 2;
            uint32_t words[4];
            philox_words(words, seed, key + 8 * (j + high) + column % 2, row, head, batch);
#pragma unroll
            for (int word = 0; word < kWords; ++word)
                if (word_of(words, kWords < 4 ? key / 16 % 4 + word : word) < a.threshold)
                    p[j + 2 * word + high][i] = 0.0f;
        }
}

// Weights of 16 keys from key 16 * step on as the operand a of a product.
template <class T, int kTiles>
FASTATTN_DEVICE void weights_fragment(uint32_t (&a)[4], const float (&p)[kTiles][4], int step) {
    a[0] = pack<T>(p[2 * step][0], p[2 * step][1]);
    a[1] = pack<T>(p[2 * step][2], p[2 * step][3]);
    a[2] = pack<T>(p[2 * step + 1][0], p[2 * step + 1][1]);
    a[3] = pack<T>(p[2 * step + 1][2], p[2 * step + 1][3]);
}

// The sink's share of a row: `sink` in units of log2, as is the maximum; returns the factor of what
// was summed so far.
FASTATTN_DEVICE float add_sink(float& row_max, float& row_sum, float sink) {
    const float new_max = fmaxf(row_max, sink);
    if (new_max == -INFINITY) return 1.0f;
    const float rescale = exp2_approx(row_max - new_max);
    row_sum = row_sum * rescale + exp2_approx(sink - new_max);
    row_max = new_max;
    return rescale;
}

}  // namespace fastattn::cuda
