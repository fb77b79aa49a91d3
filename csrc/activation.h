#pragma once

#include <cstdint>

namespace fastattn {

enum class Activation : int32_t { relu, gelu, gelu_tanh, silu };

}  // namespace fastattn
