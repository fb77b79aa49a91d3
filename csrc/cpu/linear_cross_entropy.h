// Arguments of the fused last linear and cross entropy. Strides in elements.
#pragma once

#include <cstdint>

#include "cpu/cross_entropy.h"
#include "cpu/matrix.h"
#include "dtype.h"

namespace fastattn {

struct LinearCrossEntropyInputs {
    DType dtype;  // of x, weight and bias
    int64_t rows, d_model, vocabulary;
    MatrixView x;  // (rows, d_model), of unit column stride
    MatrixView weight;
    const void* bias;  // or null
    CrossEntropyTargets targets;
};

// Contiguous; null where not asked for. float32 in every dtype: chunks of rows are added up.
struct LinearCrossEntropyGradients {
    float* dx;
    float* dweight;
    float* dbias;
    void* workspace;  // for the logits of a chunk of rows; null if no gradient is asked for
    int64_t workspace_bytes;
};

struct LinearCrossEntropyFwdArgs {
    LinearCrossEntropyInputs inputs;
    float* loss;   // (rows,), or one element where it is reduced
    float* stats;  // (rows, 2) as of cross_entropy
    // Of a reduced loss, for dloss 1.
    LinearCrossEntropyGradients gradients;
};

struct LinearCrossEntropyBwdArgs {
    LinearCrossEntropyInputs inputs;
    const float* dloss;  // as loss
    const float* stats;
    LinearCrossEntropyGradients gradients;
};

}  // namespace fastattn
