// Arguments of the softmax kernels. Sizes and strides in elements.
#pragma once

#include <cstdint>

#include "cpu/dropout.h"
#include "dtype.h"

namespace fastattn {

constexpr int kSoftmaxMaxRank = 8;

// The leading dims of x, (rows of columns); the last dim is `columns`, of unit stride in x.
struct SoftmaxShape {
    int rank;
    int64_t sizes[kSoftmaxMaxRank];
    int64_t rows;  // product of sizes
    int64_t columns;
    int64_t matrix_rows;  // size of the last leading dim: the causal diagonal restarts there
};

struct SoftmaxFwdArgs {
    DType dtype;
    SoftmaxShape shape;
    const void* x;
    int64_t x_strides[kSoftmaxMaxRank];
    const uint8_t* mask;  // or null
    int64_t mask_strides[kSoftmaxMaxRank];
    int64_t mask_column_stride;
    DType bias_dtype;
    const void* bias;  // or null
    int64_t bias_strides[kSoftmaxMaxRank];
    int64_t bias_column_stride;
    float scale;
    bool causal;
    bool log;
    Dropout dropout;
    void* out;      // contiguous
    void* weights;  // contiguous, before the dropout; null without
};

struct SoftmaxBwdArgs {
    DType dtype;
    SoftmaxShape shape;
    const void* weights;  // contiguous, before the dropout; the result itself with log
    const void* dout;
    int64_t dout_strides[kSoftmaxMaxRank];
    float scale;
    bool log;
    Dropout dropout;
    void* dx;  // contiguous
    DType bias_dtype;
    void* dbias;                      // contiguous in the bias's shape, or null
    bool bias_kept[kSoftmaxMaxRank];  // dims that the bias has; it is broadcast over the others
    bool bias_columns;                // the last dim alike
};

}  // namespace fastattn
