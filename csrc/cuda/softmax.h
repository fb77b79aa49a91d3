// Arguments of the CUDA softmax kernels, which take them by value. Strides count elements; all
// pointers are to the device's memory.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastattn::cuda {

// A tensor (., ., ., columns); the strides of a broadcast dim are 0.
struct SoftmaxRows {
    const void* data;  // or null
    int64_t strides[4];
};

struct SoftmaxArgs {
    DType dtype;
    int64_t sizes[3];  // of the leading dims
    int64_t rows;      // product of sizes
    int columns;
    float scale;
    bool log;
    // Dropout: kept where the word of the Philox stream is at least `threshold`, times keep_scale.
    const uint64_t* seed;  // or null
    uint32_t threshold;
    float keep_scale;
    void* stream;
};

struct SoftmaxFwdArgs : SoftmaxArgs {
    SoftmaxRows x, mask, bias;  // mask: bytes
    DType bias_dtype;           // dtype or float32
    int64_t causal_rows;        // the diagonal starts again after so many rows; 0: not causal
    void* out;                  // contiguous
    void* weights;              // contiguous, before the dropout; null without
};

struct SoftmaxBwdArgs : SoftmaxArgs {
    const void* weights;  // contiguous, before the dropout; the result itself with `log`
    SoftmaxRows dout;
    void* dx;             // contiguous
    void* dscores;        // contiguous, before the scale; or null
    DType dscores_dtype;  // dtype or float32
};

void softmax_fwd(const SoftmaxFwdArgs& args);
void softmax_bwd(const SoftmaxBwdArgs& args);

// The kernels for one architecture; the functions above choose.
bool softmax_sm90_takes(const SoftmaxArgs& args);
void softmax_fwd_sm90(const SoftmaxFwdArgs& args);
void softmax_bwd_sm90(const SoftmaxBwdArgs& args);

}  // namespace fastattn::cuda
