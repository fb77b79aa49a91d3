// Included inside a target region. What both cross entropies need of one row: the online maximum
// and sum (Milakov and Gimelshein 2018), its loss, the reduction over rows.
#pragma once

#include "cpu/vec.h"

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Elements [0, count) of a vector, `fill` beyond.
template <class T>
FASTATTN_INLINE Vec load_or(const T* p, int64_t count, float fill) {
    if (count >= kLanes) return load(p);
    return select(lane_index() < (int32_t)count, load(p, count), splat(fill));
}

struct RowStats {
    float top = -kInfinity;  // the maximum
    float sum = 0.0f;        // of exp(x - top)
    float anchor = 0.0f;
    float linear = 0.0f;  // sum of x - anchor, where labels are smoothed
};

// The maximum to subtract; 0 for a row of -inf only, so that -inf - -inf does not arise.
FASTATTN_INLINE float shift_of(float top) { return top == -kInfinity ? 0.0f : top; }

FASTATTN_INLINE float exp(float x) { return exp(splat(x))[0]; }

// Whether all of a row's logits are -inf; the maximum of NaN only is -inf too, but not the sum 0.
FASTATTN_INLINE bool no_class_left(float top, float sum) { return top == -kInfinity && sum == 0; }

// What a row adds to the loss.
FASTATTN_INLINE float row_loss(const RowStats& row, float target_logit, float smoothing,
                               int64_t columns) {
    const float log_sum = std::log(row.sum);
    const float plain = (row.top - target_logit) + log_sum;
    if (no_class_left(row.top, row.sum)) return kInfinity;
    if (smoothing == 0.0f) return plain;
    const float uniform = (row.top - row.anchor) - row.linear / float(columns) + log_sum;
    return (1.0f - smoothing) * plain + smoothing * uniform;
}

inline bool takes_part(const CrossEntropyTargets& targets, int64_t row) {
    return targets.data[row] != targets.ignore_index;
}

inline int64_t count_rows(const CrossEntropyTargets& targets, int64_t rows) {
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) count += takes_part(targets, row);
    return count;
}

// The first row whose target is neither a class nor ignored; -1 if there is none.
inline int64_t first_invalid(const CrossEntropyTargets& targets, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; ++row) {
        const bool valid = targets.data[row] >= 0 && targets.data[row] < columns;
        if (!valid && takes_part(targets, row)) return row;
    }
    return -1;
}

// The factor of every row's gradient, but for dloss.
inline float reduction_scale(const CrossEntropyTargets& targets, int64_t rows) {
    if (targets.reduction != Reduction::mean) return 1.0f;
    return 1.0f / float(std::max<int64_t>(1, count_rows(targets, rows)));
}

inline void reduce_losses(const CrossEntropyTargets& targets, const float* losses, int64_t rows,
                          float* loss) {
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row) sum += losses[row];
    if (targets.reduction == Reduction::mean)
        sum /= double(std::max<int64_t>(1, count_rows(targets, rows)));
    *loss = float(sum);
}
