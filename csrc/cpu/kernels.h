// The table of kernels that each instruction set fills (kernels.cpp). An op adds the include of its
// argument structs and one member per function here, and its two lines in kernels.cpp.
#pragma once

#include "cpu/attention.h"
#include "cpu/cross_entropy.h"
#include "cpu/ffn.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/norm.h"
#include "cpu/rotary.h"
#include "cpu/softmax.h"
#include "dtype.h"

namespace fastattn {

struct Kernels {
    int64_t vector_bytes;
    void (*attention_fwd)(const AttentionFwdArgs&);
    void (*attention_bwd)(const AttentionBwdArgs&);
    void (*softmax_fwd)(const SoftmaxFwdArgs&);
    void (*softmax_bwd)(const SoftmaxBwdArgs&);
    void (*ffn_fwd)(const FFNFwdArgs&);
    void (*ffn_bwd)(const FFNBwdArgs&);
    void (*norm_fwd)(const NormFwdArgs&);
    void (*norm_bwd)(const NormBwdArgs&);
    int64_t (*cross_entropy_fwd)(const CrossEntropyFwdArgs&);
    void (*cross_entropy_bwd)(const CrossEntropyBwdArgs&);
    int64_t (*linear_cross_entropy_fwd)(const LinearCrossEntropyFwdArgs&);
    void (*linear_cross_entropy_bwd)(const LinearCrossEntropyBwdArgs&);
    int64_t (*rotary)(const RotaryArgs&);
    double (*peak_flops)(DType);                                 // a second, on all threads
    double (*read_bandwidth)(const float* from, int64_t count);  // bytes a second
};

// clang-format off
namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }
namespace neon { extern const Kernels kernels; }
// clang-format on

}  // namespace fastattn
