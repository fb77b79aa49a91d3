// Compiled once per instruction set: an op adds its functions' declarations and their entries.
#include "cpu/kernels.h"

#include "cpu/target_begin.h"

const Kernels kernels = {
    .vector_bytes = FASTATTN_VECTOR_BYTES,
};

#include "cpu/target_end.h"
