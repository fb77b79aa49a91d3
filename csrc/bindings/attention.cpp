#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"

namespace fastattn {
namespace {

using Sizes = std::array<int64_t, 7>;  // batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, _v
using Tensor4 = std::tuple<uintptr_t, Strides4>;

// The arguments beyond q, k and v that a call may have.
struct Features {
    std::optional<Tensor4> mask, bias;
    DType bias_dtype = DType::float32;
    std::optional<std::tuple<uintptr_t, std::array<int64_t, 2>>> alibi_slopes;
    uintptr_t sinks = 0, offsets = 0, seqlens_k = 0;
    double dropout_p = 0.0;
    uint64_t seed = 0;

    mutable std::vector<int32_t> visible_lengths;
};

template <class T>
const T* in(uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}
template <class T>
T* out(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Strides3 leading(const Strides4& strides) { return {strides[0], strides[1], strides[2]}; }

// Shortens the sequences to the last key that is visible to any query.
template <class Visible>
void shorten(AttentionArgs& a, std::vector<int32_t>& lengths, Visible visible) {
    std::vector<int32_t> shorter(a.batch);
    for (int64_t b = 0; b < a.batch; ++b) {
        int64_t length = a.seqlens_k ? std::min<int64_t>(a.seqlens_k[b], a.seqlen_k) : a.seqlen_k;
        while (length > 0 && !visible(b, length - 1)) --length;
        shorter[b] = int32_t(length);
    }
    lengths.swap(shorter);
    a.seqlens_k = lengths.data();
}

// A mask or bias that is the same for all queries is padding: kernels skip keys by length, and
// need no mask that hides nothing else.
void skip_padding(AttentionArgs& a, std::vector<int32_t>& lengths) {
    if (a.mask && a.mask_strides[1] == 0 && a.mask_strides[2] == 0) {
        auto visible = [&a](int64_t b, int64_t j) {
            return a.mask[b * a.mask_strides[0] + j * a.mask_strides[3]] != 0;
        };
        shorten(a, lengths, visible);
        bool all = true;
        for (int64_t b = 0; b < a.batch && all; ++b)
            for (int64_t j = 0; j < lengths[b] && all; ++j) all = visible(b, j);
        if (all) a.mask = nullptr;
    }
    if (a.bias && a.bias_strides[1] == 0 && a.bias_strides[2] == 0)
        shorten(a, lengths, [&a](int64_t b, int64_t j) {
            const int64_t at = b * a.bias_strides[0] + j * a.bias_strides[3];
            if (a.bias_dtype == DType::float32) return ((const float*)a.bias)[at] != -INFINITY;
            return ((const uint16_t*)a.bias)[at] !=
                   (a.bias_dtype == DType::float16 ? 0xfc00 : 0xff80);
        });
}

void fill(AttentionArgs& a, DType dtype, const Sizes& sizes, const Tensor4& q, const Tensor4& k,
          const Tensor4& v, double softmax_scale, double softcap,
          const std::array<int64_t, 3>& band, const Features* features, bool deterministic) {
    a.dtype = dtype;
    a.batch = sizes[0], a.heads = sizes[1], a.heads_kv = sizes[2];
    a.seqlen_q = sizes[3], a.seqlen_k = sizes[4];
    a.head_dim = sizes[5], a.head_dim_v = sizes[6];
    a.q = in<void>(std::get<0>(q)), a.q_strides = leading(std::get<1>(q));
    a.k = in<void>(std::get<0>(k)), a.k_strides = leading(std::get<1>(k));
    a.v = in<void>(std::get<0>(v)), a.v_strides = leading(std::get<1>(v));
    a.softmax_scale = float(softmax_scale), a.softcap = float(softcap);
    a.window_left = band[0], a.window_right = band[1], a.offset = band[2];
    a.deterministic = deterministic;
    if (!features) return;
    if (features->mask) {
        a.mask = in<uint8_t>(std::get<0>(*features->mask));
        a.mask_strides = std::get<1>(*features->mask);
    }
    if (features->bias) {
        a.bias = in<void>(std::get<0>(*features->bias));
        a.bias_strides = std::get<1>(*features->bias);
        a.bias_dtype = features->bias_dtype;
    }
    if (features->alibi_slopes) {
        a.alibi_slopes = in<float>(std::get<0>(*features->alibi_slopes));
        a.alibi_strides = std::get<1>(*features->alibi_slopes);
    }
    a.sinks = in<float>(features->sinks);
    a.offsets = in<int32_t>(features->offsets);
    a.seqlens_k = in<int32_t>(features->seqlens_k);
    a.dropout = make_dropout(features->dropout_p, features->seed);
    skip_padding(a, features->visible_lengths);
}

void attention_fwd(DType dtype, const Sizes& sizes, const Tensor4& q, const Tensor4& k,
                   const Tensor4& v, double softmax_scale, double softcap,
                   const std::array<int64_t, 3>& band, const Features* features, bool deterministic,
                   const Tensor4& result, uintptr_t lse) {
    AttentionFwdArgs a{};
    fill(a, dtype, sizes, q, k, v, softmax_scale, softcap, band, features, deterministic);
    a.out = out<void>(std::get<0>(result)), a.out_strides = leading(std::get<1>(result));
    a.lse = out<float>(lse);
    py::gil_scoped_release release;
    kernels().attention_fwd(a);
}

// dbias: (address, strides in its own shape with 0 where broadcast, number of elements), float32.
void attention_bwd(DType dtype, const Sizes& sizes, const Tensor4& q, const Tensor4& k,
                   const Tensor4& v, double softmax_scale, double softcap,
                   const std::array<int64_t, 3>& band, const Features* features, bool deterministic,
                   const Tensor4& result, uintptr_t lse, const Tensor4& dout, uintptr_t dlse,
                   uintptr_t delta, const Tensor4& dq, const Tensor4& dk, const Tensor4& dv,
                   const std::optional<std::tuple<uintptr_t, Strides4, int64_t>>& dbias) {
    AttentionBwdArgs a{};
    fill(a, dtype, sizes, q, k, v, softmax_scale, softcap, band, features, deterministic);
    a.out = in<void>(std::get<0>(result)), a.out_strides = leading(std::get<1>(result));
    a.dout = in<void>(std::get<0>(dout)), a.dout_strides = leading(std::get<1>(dout));
    a.lse = in<float>(lse), a.dlse = in<float>(dlse), a.delta = out<float>(delta);
    a.dq = out<void>(std::get<0>(dq)), a.dq_strides = leading(std::get<1>(dq));
    a.dk = out<void>(std::get<0>(dk)), a.dk_strides = leading(std::get<1>(dk));
    a.dv = out<void>(std::get<0>(dv)), a.dv_strides = leading(std::get<1>(dv));
    if (dbias) {
        a.dbias = out<float>(std::get<0>(*dbias));
        a.dbias_strides = std::get<1>(*dbias), a.dbias_size = std::get<2>(*dbias);
    }
    py::gil_scoped_release release;
    kernels().attention_bwd(a);
}

}  // namespace

void bind_attention(py::module_& m) {
    py::class_<Features>(m, "AttentionFeatures", "What a call may have beside q, k and v.")
        .def(py::init<>())
        .def_readwrite("mask", &Features::mask)
        .def_readwrite("bias", &Features::bias)
        .def_readwrite("bias_dtype", &Features::bias_dtype)
        .def_readwrite("alibi_slopes", &Features::alibi_slopes)
        .def_readwrite("sinks", &Features::sinks)
        .def_readwrite("offsets", &Features::offsets)
        .def_readwrite("seqlens_k", &Features::seqlens_k)
        .def_readwrite("dropout_p", &Features::dropout_p)
        .def_readwrite("seed", &Features::seed);
    m.attr("UNBOUNDED") = kUnbounded;
    m.def("attention_fwd", &attention_fwd,
          "Each tensor is (address, strides); band is (left, right, offset).");
    m.def("attention_bwd", &attention_bwd, "As attention_fwd, then the gradients.");
}

}  // namespace fastattn
