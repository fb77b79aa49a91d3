// Arguments of the cross-entropy kernels. Sizes and strides in elements.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastattn {

enum class Reduction : int32_t { none, mean, sum };

// How targets become a loss; those equal to ignore_index take no part.
struct CrossEntropyTargets {
    const int64_t* data;  // (rows,)
    int64_t ignore_index;
    float smoothing;
    Reduction reduction;
};

// Rows (outer, inner) of `columns` elements of unit stride.
struct LogitsView {
    const void* data;
    DType dtype;
    int64_t outer, inner, columns;
    int64_t outer_stride, inner_stride;
};

struct CrossEntropyFwdArgs {
    LogitsView logits;
    CrossEntropyTargets targets;
    float* loss;   // (rows,), or one element where it is reduced
    float* stats;  // (rows, 2): the row's maximum, and the sum of exp(logit - maximum)
};

struct CrossEntropyBwdArgs {
    LogitsView logits;
    CrossEntropyTargets targets;
    const float* dloss;  // as loss
    const float* stats;
    void* dlogits;  // (rows, columns) contiguous, in the dtype of the logits
};

}  // namespace fastattn
