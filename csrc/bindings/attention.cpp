#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "isa.h"

namespace fastattn {
namespace {

using Sizes = Ints<7>;  // batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v
using Band = Ints<3>;   // left, right, offset

// The arguments beyond q, k and v that a call may have.
struct Features {
    std::optional<Strided<4>> mask, bias;
    DType bias_dtype = DType::float32;
    std::optional<Strided<2>> alibi_slopes;
    uintptr_t sinks = 0, offsets = 0, seqlens_k = 0;
    double dropout_p = 0.0;
    uint64_t seed = 0;
    uintptr_t cu_seqlens_q = 0, cu_seqlens_k = 0;
    int64_t total_q = 0;  // rows of all packed sequences
    std::optional<Strided<2>> block_table;
    int64_t page_size = 0;
};

Strides3 leading(const Ints<4>& strides) { return {strides[0], strides[1], strides[2]}; }

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

void fill(AttentionArgs& a, DType dtype, const Sizes& sizes, const Strided<4>& q,
          const Strided<4>& k, const Strided<4>& v, double softmax_scale, double softcap,
          const Band& band, const Features* features, bool deterministic) {
    a.dtype = dtype;
    a.batch = sizes[0], a.heads = sizes[1], a.heads_kv = sizes[2];
    a.seqlen_q = sizes[3], a.seqlen_k = sizes[4];
    a.head_dim = sizes[5], a.head_dim_v = sizes[6];
    a.q = pointer<void>(q.address), a.q_strides = leading(q.strides);
    a.k = pointer<void>(k.address), a.k_strides = leading(k.strides);
    a.v = pointer<void>(v.address), a.v_strides = leading(v.strides);
    a.softmax_scale = float(softmax_scale), a.softcap = float(softcap);
    a.window_left = band[0], a.window_right = band[1], a.offset = band[2];
    a.deterministic = deterministic;
    a.lse_strides = {a.heads * a.seqlen_q, a.seqlen_q};
    if (!features) return;
    if (features->mask) {
        a.mask = pointer<uint8_t>(features->mask->address);
        a.mask_strides = features->mask->strides;
    }
    if (features->bias) {
        a.bias = pointer<void>(features->bias->address);
        a.bias_strides = features->bias->strides;
        a.bias_dtype = features->bias_dtype;
    }
    if (features->alibi_slopes) {
        a.alibi_slopes = pointer<float>(features->alibi_slopes->address);
        a.alibi_strides = features->alibi_slopes->strides;
    }
    a.sinks = pointer<float>(features->sinks);
    a.offsets = pointer<int32_t>(features->offsets);
    a.seqlens_k = pointer<int32_t>(features->seqlens_k);
    a.dropout = make_dropout(features->dropout_p, features->seed);
    if (features->cu_seqlens_q) {
        a.cu_seqlens_q = pointer<int32_t>(features->cu_seqlens_q);
        a.cu_seqlens_k = pointer<int32_t>(features->cu_seqlens_k);
        a.lse_strides = {0, features->total_q};
    }
    if (features->block_table) {
        a.block_table = pointer<int32_t>(features->block_table->address);
        a.block_table_stride = features->block_table->strides[0];
        a.page_size = features->page_size;
    }
}

void attention_fwd(DType dtype, const Sizes& sizes, const Strided<4>& q, const Strided<4>& k,
                   const Strided<4>& v, double softmax_scale, double softcap, const Band& band,
                   const Features* features, bool deterministic, const Strided<4>& result,
                   uintptr_t lse) {
    AttentionFwdArgs a{};
    fill(a, dtype, sizes, q, k, v, softmax_scale, softcap, band, features, deterministic);
    a.out = pointer<void>(result.address), a.out_strides = leading(result.strides);
    a.lse = pointer<float>(lse);
    py::gil_scoped_release release;
    std::vector<int32_t> lengths;
    skip_padding(a, lengths);
    kernels().attention_fwd(a);
}

// dbias: strides in its own shape, 0 where broadcast; float32.
void attention_bwd(DType dtype, const Sizes& sizes, const Strided<4>& q, const Strided<4>& k,
                   const Strided<4>& v, double softmax_scale, double softcap, const Band& band,
                   const Features* features, bool deterministic, const Strided<4>& result,
                   uintptr_t lse, const Strided<4>& dout, uintptr_t dlse, uintptr_t delta,
                   const Strided<4>& dq, const Strided<4>& dk, const Strided<4>& dv,
                   const std::optional<Strided<4>>& dbias) {
    AttentionBwdArgs a{};
    fill(a, dtype, sizes, q, k, v, softmax_scale, softcap, band, features, deterministic);
    a.out = pointer<void>(result.address), a.out_strides = leading(result.strides);
    a.dout = pointer<void>(dout.address), a.dout_strides = leading(dout.strides);
    a.lse = pointer<float>(lse), a.dlse = pointer<float>(dlse), a.delta = pointer<float>(delta);
    a.dq = pointer<void>(dq.address), a.dq_strides = leading(dq.strides);
    a.dk = pointer<void>(dk.address), a.dk_strides = leading(dk.strides);
    a.dv = pointer<void>(dv.address), a.dv_strides = leading(dv.strides);
    if (dbias) {
        a.dbias = pointer<float>(dbias->address);
        a.dbias_strides = dbias->strides;
    }
    py::gil_scoped_release release;
    std::vector<int32_t> lengths;
    skip_padding(a, lengths);
    kernels().attention_bwd(a);
}

}  // namespace

void bind_attention(py::module_& m) {
    py::class_<Features> features(m, "AttentionFeatures", "What a call may have beside q, k, v.");
    features.def(py::init<>());
    const auto member = [&](const char* name, auto at) {
        const auto set = [at](Features& self,
                              std::decay_t<decltype(std::declval<Features>().*at)> value) {
            self.*at = value;
        };
        features.def_property(name, py::cpp_function(), py::cpp_function(set));
    };
    member("mask", &Features::mask), member("bias", &Features::bias);
    member("bias_dtype", &Features::bias_dtype);
    member("alibi_slopes", &Features::alibi_slopes), member("sinks", &Features::sinks);
    member("offsets", &Features::offsets), member("seqlens_k", &Features::seqlens_k);
    member("dropout_p", &Features::dropout_p), member("seed", &Features::seed);
    member("cu_seqlens_q", &Features::cu_seqlens_q);
    member("cu_seqlens_k", &Features::cu_seqlens_k);
    member("total_q", &Features::total_q);
    member("block_table", &Features::block_table), member("page_size", &Features::page_size);
    m.attr("UNBOUNDED") = kUnbounded;
    m.def("attention_fwd", &attention_fwd,
          "Each tensor is (address, strides); band is (left, right, offset).");
    m.def("attention_bwd", &attention_bwd, "As attention_fwd, then the gradients.");
}

}  // namespace fastattn
