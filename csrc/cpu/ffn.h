// Arguments of the feed-forward kernels. Sizes and strides in elements.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "cpu/dropout.h"
#include "cpu/matrix.h"
#include "dtype.h"

namespace fastattn {

struct FFNShape {
    DType dtype;  // of every tensor
    Activation activation;
    int64_t rows, d_model, d_ff, d_out;
};

// w_up.data is null in the plain form. Vectors and results are contiguous.
struct FFNFwdArgs {
    FFNShape shape;
    Dropout dropout;
    MatrixView x, w1, w_up, w2;
    const void* b1;  // or null
    const void* b2;  // or null
    void* y;
    void* preact;  // (rows, d_ff), gated (2, rows, d_ff); or null
    void* hidden;  // (rows, d_ff); or null
};

struct FFNBwdArgs {
    FFNShape shape;
    Dropout dropout;
    MatrixView x, w1, w_up, w2, dy;
    const void* b1;
    const void* preact;  // null: computed again
    const void* hidden;  // null: computed again
    void* dx;            // null where not asked for, as all of these
    void* dw1;
    void* db1;
    void* dw_up;
    void* dw2;
    void* db2;
};

}  // namespace fastattn
