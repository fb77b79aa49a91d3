#pragma once

#include <cstdint>

namespace fastattn {

// One of the two strides is 1; in elements.
struct MatrixView {
    const void* data;
    int64_t row_stride;
    int64_t column_stride;
};

}  // namespace fastattn
