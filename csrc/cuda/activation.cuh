// The activations of a feed-forward network and their slopes, in float32.
#pragma once

#include "../activation.h"
#include "cuda/math.cuh"

namespace fastattn::cuda {

struct ValueAndSlope {
    float value, slope;
};

FASTATTN_DEVICE float sigmoid(float x) { return reciprocal_approx(1.0f + exponential(-x)); }

struct Relu {
    // A NaN stays one.
    static FASTATTN_DEVICE float value(float x) { return x < 0.0f ? 0.0f : x; }
    static FASTATTN_DEVICE ValueAndSlope both(float x) {
        return {value(x), x > 0.0f ? 1.0f : 0.0f};
    }
};

struct Gelu {
    // (1 + erf(x / sqrt(2))) / 2 within 1.2e-7: a polynomial fitted to its tail's logarithm.
    static FASTATTN_DEVICE float normal_cdf(float x) {
        const float t = fabsf(x);
        float log2_tail = t * -8.764624e-7f + 1.5362955e-5f;
        log2_tail = log2_tail * t - 7.1556962e-5f;
        log2_tail = log2_tail * t - 4.0907518e-4f;
        log2_tail = log2_tail * t + 7.4046291e-3f;
        log2_tail = log2_tail * t - 5.2717324e-2f;
        log2_tail = log2_tail * t - 4.5914119e-1f;
        log2_tail = log2_tail * t - 1.1511126f;
        log2_tail = log2_tail * t - 9.9999988e-1f;
        const float tail = exp2_approx(log2_tail);
        return x < 0.0f ? tail : 1.0f - tail;
    }
    static FASTATTN_DEVICE float value(float x) { return x * normal_cdf(x); }
    static FASTATTN_DEVICE ValueAndSlope both(float x) {
        constexpr float kInverseSqrt2Pi = 0.3989422804014327f;
        const float cdf = normal_cdf(x);
        return {x * cdf, cdf + x * exponential(-0.5f * x * x) * kInverseSqrt2Pi};
    }
};

struct GeluTanh {
    static constexpr float kTwiceSqrt2OverPi = 1.5957691216057308f, kCubic = 0.044715f;
    // (1 + tanh(u)) / 2, u the inner polynomial: the sigmoid of 2 u.
    static FASTATTN_DEVICE float cdf(float x) {
        return sigmoid(x * kTwiceSqrt2OverPi * (x * x * kCubic + 1.0f));
    }
    static FASTATTN_DEVICE float value(float x) { return x * cdf(x); }
    static FASTATTN_DEVICE ValueAndSlope both(float x) {
        const float c = cdf(x), value = x * c;
        const float inner_slope = (x * x * (3.0f * kCubic) + 1.0f) * kTwiceSqrt2OverPi;
        return {value, c + value * (1.0f - c) * inner_slope};
    }
};

struct Silu {
    static FASTATTN_DEVICE float value(float x) { return x * sigmoid(x); }
    static FASTATTN_DEVICE ValueAndSlope both(float x) {
        const float s = sigmoid(x), value = x * s;
        return {value, s + value * (1.0f - s)};
    }
};

// Calls f with the activation's type: a branch that all threads take alike.
template <class F>
FASTATTN_DEVICE void with_activation(Activation activation, F f) {
    switch (activation) {
        case Activation::relu:
            return f(Relu{});
        case Activation::gelu:
            return f(Gelu{});
        case Activation::gelu_tanh:
            return f(GeluTanh{});
        case Activation::silu:
            return f(Silu{});
    }
}

}  // namespace fastattn::cuda
