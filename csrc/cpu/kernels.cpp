// Compiled once per instruction set: an op adds its functions' declarations and their entries.
#include "cpu/kernels.h"

#include "cpu/target_begin.h"

void attention_fwd(const AttentionFwdArgs&);
void attention_bwd(const AttentionBwdArgs&);
void softmax_fwd(const SoftmaxFwdArgs&);
void softmax_bwd(const SoftmaxBwdArgs&);
void ffn_fwd(const FFNFwdArgs&);
void ffn_bwd(const FFNBwdArgs&);
void norm_fwd(const NormFwdArgs&);
void norm_bwd(const NormBwdArgs&);
int64_t cross_entropy_fwd(const CrossEntropyFwdArgs&);
void cross_entropy_bwd(const CrossEntropyBwdArgs&);
int64_t linear_cross_entropy_fwd(const LinearCrossEntropyFwdArgs&);
void linear_cross_entropy_bwd(const LinearCrossEntropyBwdArgs&);
int64_t rotary(const RotaryArgs&);
double peak_flops(DType);
double read_bandwidth(const float* from, int64_t count);

const Kernels kernels = {
    .vector_bytes = FASTATTN_VECTOR_BYTES,
    .attention_fwd = attention_fwd,
    .attention_bwd = attention_bwd,
    .softmax_fwd = softmax_fwd,
    .softmax_bwd = softmax_bwd,
    .ffn_fwd = ffn_fwd,
    .ffn_bwd = ffn_bwd,
    .norm_fwd = norm_fwd,
    .norm_bwd = norm_bwd,
    .cross_entropy_fwd = cross_entropy_fwd,
    .cross_entropy_bwd = cross_entropy_bwd,
    .linear_cross_entropy_fwd = linear_cross_entropy_fwd,
    .linear_cross_entropy_bwd = linear_cross_entropy_bwd,
    .rotary = rotary,
    .peak_flops = peak_flops,
    .read_bandwidth = read_bandwidth,
};

#include "cpu/target_end.h"
