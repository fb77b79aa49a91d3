#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int32_t { float32, float16, bfloat16 };

constexpr int64_t itemsize(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace fastattn
