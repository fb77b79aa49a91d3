// What the kernels compute by the special function unit, whose exponential is that of base 2.
#pragma once

#include "cuda/ptx.cuh"

namespace fastattn::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

FASTATTN_DEVICE float exponential(float x) { return exp2_approx(x * kLog2E); }

// Its absolute error is about 1e-7, tanh.approx's 5e-4.
FASTATTN_DEVICE float tanh_by_exp2(float x) {
    return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(2.0f * kLog2E * x));
}

}  // namespace fastattn::cuda
