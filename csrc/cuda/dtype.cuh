// 16-bit floats as the kernels keep them: bits in memory, two to a register.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

struct float16 {
    uint16_t bits;
};

struct bfloat16 {
    uint16_t bits;
};

template <class T, class U>
constexpr bool same = false;
template <class T>
constexpr bool same<T, T> = true;

}  // namespace fastattn::cuda
