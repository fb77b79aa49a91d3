// Included inside a target region. The activations of a feed-forward network and their slopes.
#pragma once

#include "cpu/vec.h"

// erf within 1e-7: polynomials fitted to erf below 0.93, and to log(1 - erf) above.
FASTATTN_INLINE Vec erf(Vec x) {
    const Vec size = abs(x), square = x * x;
    const Vec t = select(size > splat(10.0f), splat(10.0f), size), t2 = t * t;
    Vec low = splat(-5.96761703e-4f);
    low = low * square + 4.99119423e-3f;
    low = low * square - 2.67681349e-2f;
    low = low * square + 1.12819925e-1f;
    low = low * square - 3.76125336e-1f;
    low = low * square + 1.28379166e-1f;
    low = low * x + x;
    Vec high = -1.72853470e-5f * t + 3.83197126e-4f;
    high = high * t2 + (-3.88396438e-3f * t + 2.42546219e-2f);
    high = high * t - 1.06777877e-1f;
    high = high * t - 6.34846687e-1f;
    high = high * t - 1.28717512e-1f;
    high = 1.0f - exp(high * t - t);
    high = (Vec)((UintVec)high | ((UintVec)x & 0x80000000u));
    return select(size > splat(0.927734375f), high, low);
}

FASTATTN_INLINE Vec sigmoid(Vec x) {
    const Vec e = exp(-abs(x));
    return select(x < splat(0.0f), e, splat(1.0f)) / (1.0f + e);
}

struct Relu {
    static Vec value(Vec x) { return max(splat(0.0f), x); }
    static Vec slope(Vec x) { return select(x > splat(0.0f), splat(1.0f), splat(0.0f)); }
};

struct Gelu {
    static Vec normal_cdf(Vec x) { return 0.5f + 0.5f * erf(x * 0.70710678f); }
    static Vec value(Vec x) { return x * normal_cdf(x); }
    static Vec slope(Vec x) { return normal_cdf(x) + x * (0.39894228f * exp(-0.5f * x * x)); }
};

struct GeluTanh {
    static constexpr float kFactor = 0.79788456f, kCubic = 0.044715f;
    static Vec inner(Vec x) { return tanh(x * (kFactor + kFactor * kCubic * x * x)); }
    static Vec value(Vec x) { return 0.5f * x * (1.0f + inner(x)); }
    static Vec slope(Vec x) {
        const Vec t = inner(x);
        return 0.5f * (1.0f + t) +
               0.5f * x * (1.0f - t * t) * (kFactor + 3 * kFactor * kCubic * x * x);
    }
};

struct Silu {
    static Vec value(Vec x) { return x * sigmoid(x); }
    static Vec slope(Vec x) {
        const Vec s = sigmoid(x);
        return s * (1.0f + x * (1.0f - s));
    }
};

// Calls f with the activation's type.
template <class F>
void with_activation(Activation activation, F f) {
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
