// Arguments of the CUDA feed-forward kernels. Strides count elements. All pointers are to the
// device's memory and 16-byte aligned; strides and sizes, except rows, are multiples of 8.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "dtype.h"

namespace fastattn::cuda {

// Rows of contiguous elements, `stride` apart.
struct Matrix {
    const void* data;
    int64_t stride;
};

struct FFNArgs {
    DType dtype;  // of every tensor: float16 or bfloat16
    Activation activation;
    int rows, d_model, d_ff, d_out;
    Matrix x, w1, w_up, w2;  // w_up.data is null in the plain form
    const void* b1;          // or null
    // Dropout: kept where the word of the Philox stream is at least `threshold`, times keep_scale.
    const uint64_t* seed;  // or null
    uint32_t threshold;
    float keep_scale;
    void* scratch;  // of ffn_fwd_scratch or ffn_bwd_scratch bytes
    void* stream;
};

// Results are contiguous.
struct FFNFwdArgs : FFNArgs {
    const void* b2;  // or null
    void* y;
    void* preact;  // (rows, d_ff), gated (2, rows, d_ff); or null
    void* hidden;  // (rows, d_ff)
};

struct FFNBwdArgs : FFNArgs {
    Matrix dy;
    const void* preact;  // null: computed again
    const void* hidden;  // null: computed again
    void* dx;            // null where not asked for, as all of these
    void* dw1;
    void* db1;
    void* dw_up;
    void* dw2;
    void* db2;
};

// On the current device, which has one of the capabilities that `device_refusal` lets pass.
void ffn_fwd(const FFNFwdArgs& args);
void ffn_bwd(const FFNBwdArgs& args);

// Bytes of scratch, which pointers decide only by being null or not.
int64_t ffn_fwd_scratch(const FFNFwdArgs& args);
int64_t ffn_bwd_scratch(const FFNBwdArgs& args);

}  // namespace fastattn::cuda
