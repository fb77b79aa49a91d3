// Arguments of the norm kernels. Strides in elements, from row to row; results are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastattn {

struct NormShape {
    DType dtype;
    DType parameter_dtype;  // of weight, bias and their gradients
    int64_t rows, columns;
    bool centered;  // layer norm; else RMS norm, which has no mean
};

struct NormFwdArgs {
    NormShape shape;
    float eps;
    const void* x;
    int64_t x_stride;
    const void* residual;  // or null
    int64_t residual_stride;
    const void* weight;  // or null
    const void* bias;    // or null
    void* y;
    void* sum;     // x + residual; null without
    float* stats;  // (2, rows), mean and rstd; RMS norm (1, rows), rstd; or null
};

struct NormBwdArgs {
    NormShape shape;
    const void* x;  // what was normed: the sum, where there was a residual
    int64_t x_stride;
    const void* dy;
    int64_t dy_stride;
    const void* dsum;  // or null
    int64_t dsum_stride;
    const void* weight;  // or null
    const float* stats;  // of the forward
    void* dx;
    void* dweight;  // or null
    void* dbias;    // or null
};

}  // namespace fastattn
