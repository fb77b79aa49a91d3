// The weights of a block of queries and keys and the gradients of their scores, on fragments of
// mma_m16n8k16. The kernel's configuration C says which of them a warp has: C::Scores with kM x kN
// fragments (16, 8), from row() on, and the n-th of them from column(n) = column(0) + kStep * n on.
#pragma once

#include "cuda/attention_softmax.cuh"

namespace fastattn::cuda {

// Where a block is: a block of queries of one head against its own keys.
struct Step {
    int batch, head, first_row, first_key;
};

// Which of a row's weights dropout keeps, bit 2 * n + i for key `key` + kStep * n + i.
template <class C>
FASTATTN_DEVICE uint32_t kept(const AttentionArgs& a, uint64_t seed, const Step& step, int row,
                              int key) {
    constexpr int kHalves = 16 / C::Scores::kStep, kWords = C::Scores::kN / kHalves;
    static_assert(kWords <= 4);
    uint32_t bits = 0;
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t words[4];
            philox_words(words, seed, key + 8 * half + i, row, step.head, step.batch);
#pragma unroll
            for (int word = 0; word < kWords; ++word) {
                const uint32_t drawn = word_of(words, kWords < 4 ? key / 16 + word : word);
                bits |= uint32_t(drawn >= a.threshold) << (2 * (kHalves * word + half) + i);
            }
        }
    return bits;
}

// Turns products into weights, which go to `p` as the tensor cores take them, 0 where dropped. What
// stays is what ds needs: the weight times the softcap's slope, negative where dropped.
template <class T, class C, bool kFeatured, bool kBoundary>
FASTATTN_DEVICE void weights(const AttentionArgs& a, const Sequence& s, const Step& step,
                             typename C::Scores::Acc& scores, SharedAddress row_lse,
                             typename C::Weights p, unsigned lane) {
    using Scores = typename C::Scores;
    const int first = step.first_key + Scores::column(0) + 2 * (lane % 4);
    const float factor = kFeatured ? 1.0f : a.softmax_scale * kLog2E;
    const float per_cap = a.softcap != 0.0f ? 1.0f / (a.softcap * kLog2E) : 0.0f;
    const float slope = kFeatured ? alibi_slope(a, step.batch, step.head) * kLog2E : 0.0f;
    const uint64_t seed = kFeatured && a.seed ? ld_readonly(a.seed) : 0;
#pragma unroll
    for (int m = 0; m < Scores::kM; ++m) {
        if (kFeatured) scale_scores(a, scores[m]);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const int local = Scores::row() + 16 * m + 4 * i + lane / 4;
            const int row = step.first_row + local;
            const float lse = ld_shared<float>(row_lse + 4 * local);
            const Range seen = keys_seen(a, s, row, row);
            const float distance = float(first - row - s.offset);
            uint32_t keep = ~0u;
            if (kFeatured && a.seed) keep = kept<C>(a, seed, step, row, first);
#pragma unroll
            for (int n = 0; n < Scores::kN; ++n) {
                float pair[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int key = Scores::kStep * n + j;
                    float& score = scores[m][n][i + j];
                    float exponent = score * factor - lse;
                    if (kFeatured) exponent -= slope * fabsf(distance + float(key));
                    float weight = exp2_approx(exponent);
                    if (kBoundary && (key < seen.begin - first || key >= seen.end - first))
                        weight = 0.0f;
                    const float capped = score * per_cap;
                    pair[j] = weight;
                    score = kFeatured ? weight * fmaxf(1.0f - capped * capped, 0.0f) : weight;
                    if (kFeatured && !(keep >> (2 * n + j) & 1)) {
                        pair[j] = 0.0f;
                        score = -score;
                    }
                }
                st_shared(
                    p.lane_at(lane / 4, 0, Scores::row() + 16 * m + 4 * i, Scores::column(n) / 8) +
                        4 * (lane % 4),
                    pack<T>(pair[0], pair[1]));
            }
        }
    }
}

// ds from dp and what `weights` left.
template <class T, class C, bool kFeatured>
FASTATTN_DEVICE void score_gradients(const AttentionArgs& a, const typename C::Scores::Acc& scores,
                                     const typename C::Scores::Acc& dp, SharedAddress row_delta,
                                     typename C::Weights ds, unsigned lane) {
    using Scores = typename C::Scores;
#pragma unroll
    for (int m = 0; m < Scores::kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const int local = Scores::row() + 16 * m + 4 * i + lane / 4;
            const float delta = ld_shared<float>(row_delta + 4 * local);
#pragma unroll
            for (int n = 0; n < Scores::kN; ++n) {
                float pair[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float weight = scores[m][n][i + j], own = dp[m][n][i + j];
                    pair[j] = weight * (own - delta);
                    if (kFeatured) {
                        const bool dropped = __float_as_uint(weight) >> 31;
                        pair[j] = fabsf(weight) * ((dropped ? 0.0f : own * a.keep_scale) - delta);
                    }
                }
                st_shared(
                    ds.lane_at(lane / 4, 0, Scores::row() + 16 * m + 4 * i, Scores::column(n) / 8) +
                        4 * (lane % 4),
                    pack<T>(pair[0], pair[1]));
            }
        }
}

}  // namespace fastattn::cuda
