// Compiled once per instruction set: an op adds its functions' declarations and their entries.
#include "cpu/kernels.h"

#include "cpu/target_begin.h"

void attention_fwd(const AttentionFwdArgs&);

const Kernels kernels = {
    .vector_bytes = FASTATTN_VECTOR_BYTES,
    .attention_fwd = attention_fwd,
};

#include "cpu/target_end.h"
