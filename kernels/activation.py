"""The activations of a feed-forward network and their slopes, on float32 tiles."""

import triton
import triton.language as tl

INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _normal_cdf(x):
    """``(1 + erf(x / sqrt(2))) / 2`` within 1.2e-7: a polynomial fitted to its tail's logarithm."""
    t = tl.abs(x)
    log2_tail = t * -8.764624e-7 + 1.5362955e-5
    log2_tail = log2_tail * t - 7.1556962e-5
    log2_tail = log2_tail * t - 4.0907518e-4
    log2_tail = log2_tail * t + 7.4046291e-3
    log2_tail = log2_tail * t - 5.2717324e-2
    log2_tail = log2_tail * t - 4.5914119e-1
    log2_tail = log2_tail * t - 1.1511126
    log2_tail = log2_tail * t - 9.9999988e-1
    tail = tl.exp2(log2_tail)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def _tanh_sigmoid(x):
    """``(1 + tanh(u)) / 2`` of gelu_tanh, u its inner polynomial: the sigmoid of 2 u."""
    return tl.sigmoid(x * TWICE_SQRT_2_OVER_PI * (x * x * CUBIC + 1.0))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of each element."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    elif ACTIVATION == "gelu":
        return x * _normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        return x * _tanh_sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "silu")
        return x * tl.sigmoid(x)


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """The activation of each element, and its derivative."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        cdf = _normal_cdf(x)
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * INVERSE_SQRT_2PI
    elif ACTIVATION == "gelu_tanh":
        cdf = _tanh_sigmoid(x)
        value = x * cdf
        inner_slope = (x * x * (3.0 * CUBIC) + 1.0) * TWICE_SQRT_2_OVER_PI
        return value, cdf + value * (1.0 - cdf) * inner_slope
    else:
        tl.static_assert(ACTIVATION == "silu")
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        return value, sigmoid + value * (1.0 - sigmoid)
