// Arguments of the rotary kernel. Sizes and strides in elements; the last stride is 1.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastattn {

struct RotaryShape {
    int64_t batch, heads, seqlen, head_dim, rotary_dim, seqlen_max;
};

// cos or sin: seqlen_max rows of rotary_dim / 2 for each sequence.
struct RotaryTable {
    const void* data;
    int64_t batch_stride, row_stride;  // batch_stride 0 where all sequences share it
};

// Strides of (batch, heads, seqlen).
struct RotaryStrides {
    int64_t batch, heads, seqlen;
};

struct RotaryArgs {
    DType dtype;
    DType table_dtype;  // of cos and sin: dtype or float32
    RotaryShape shape;
    const void* x;
    RotaryStrides x_strides;
    RotaryTable cos, sin;
    int64_t offset;          // row of cos and sin of the first token
    const int64_t* offsets;  // (batch,), that of each sequence, or null
    bool interleaved;
    bool inverse;  // rotate by the negative angle
    void* out;
    RotaryStrides out_strides;
};

}  // namespace fastattn
