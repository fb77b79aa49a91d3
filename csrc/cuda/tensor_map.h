// Tensor maps: what the copy engine of sm_90 knows of a tensor in global memory.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

enum class Element : int { float16, bfloat16, float32 };

// A tensor of 4 dims, the innermost first, and the box of it that one copy moves. The innermost
// dim's stride is 1. Strides count elements; in bytes they must be multiples of 16, as must be the
// address. With `swizzle`, the box's rows are 128 bytes, and their 16-byte chunk c lies at c ^ (row
// % 8).
struct Tiled {
    Element element;
    const void* address;
    int64_t sizes[4], strides[4];
    int box[4];
    bool swizzle;
};

}  // namespace fastattn::cuda

#ifdef FASTATTN_EMULATION
#include "emulation/tensor_map.h"
#else
#include <cuda.h>

namespace fastattn::cuda {

using TensorMap = CUtensorMap;

// Host. Throws std::runtime_error where the driver refuses.
TensorMap make_tensor_map(const Tiled& tensor);

}  // namespace fastattn::cuda

#endif
