#include "cuda/attention.h"

#include <algorithm>

#include "bindings/cuda.h"

namespace fastattn::cuda {
namespace {

using Sizes = Ints<7>;  // batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v
using Band = Ints<3>;   // left, right, offset

// A call but for its results: what is asked about it, and both directions, take it.
struct Call {
    int device;
    AttentionArgs args;
};

Strides leading(const Ints<4>& strides) { return {strides[0], strides[1], strides[2]}; }

int bounded(int64_t bound) { return int(std::clamp<int64_t>(bound, -kUnbounded, kUnbounded)); }

Call make_call(const Where& where, DType dtype, const Sizes& sizes, const Strided<4>& q,
               const Strided<4>& k, const Strided<4>& v, double softmax_scale, double softcap,
               const Band& band) {
    AttentionArgs a{};
    a.bfloat16 = dtype == DType::bfloat16;
    a.batch = narrow(sizes[0], "batch"), a.heads = narrow(sizes[1], "heads");
    a.heads_kv = narrow(sizes[2], "heads_kv");
    a.seqlen_q = narrow(sizes[3], "seqlen_q"), a.seqlen_k = narrow(sizes[4], "seqlen_k");
    a.head_dim = narrow(sizes[5], "head_dim"), a.head_dim_v = narrow(sizes[6], "head_dim_v");
    a.q = pointer<void>(q.address), a.q_strides = leading(q.strides);
    a.k = pointer<void>(k.address), a.k_strides = leading(k.strides);
    a.v = pointer<void>(v.address), a.v_strides = leading(v.strides);
    a.softmax_scale = float(softmax_scale), a.softcap = float(softcap);
    a.window_left = bounded(band[0]), a.window_right = bounded(band[1]);
    a.offset = bounded(band[2]);
    a.keep_scale = 1.0f;
    a.lse_batch_stride = sizes[1] * sizes[3], a.lse_head_stride = sizes[3];
    a.stream = where.stream;
    return {where.device, a};
}

void set_packed(Call& call, uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k, int64_t total_q,
                int64_t total_k) {
    AttentionArgs& a = call.args;
    a.cu_seqlens_q = pointer<int32_t>(cu_seqlens_q);
    a.cu_seqlens_k = pointer<int32_t>(cu_seqlens_k);
    a.total_q = narrow(total_q, "total_q"), a.total_k = narrow(total_k, "total_k");
    a.lse_batch_stride = 0, a.lse_head_stride = total_q;
}

void set_paged(Call& call, const Strided<2>& block_table, int64_t page_size) {
    call.args.block_table = pointer<int32_t>(block_table.address);
    call.args.block_table_stride = block_table.strides[0];
    call.args.page_size = narrow(page_size, "page_size");
}

void set_alibi_slopes(Call& call, const Strided<2>& alibi_slopes) {
    call.args.alibi_slopes = pointer<float>(alibi_slopes.address);
    call.args.alibi_batch_stride = alibi_slopes.strides[0];
    call.args.alibi_head_stride = alibi_slopes.strides[1];
}

void set_dropout(Call& call, const Dropped& dropout) {
    call.args.seed = dropout.seed;
    call.args.threshold = dropout.threshold, call.args.keep_scale = dropout.keep_scale;
}

// partial_out and partial_lse: 0 unless the call is split.
void fwd(const Call& call, const Strided<4>& out, uintptr_t lse, int splits, uintptr_t partial_out,
         uintptr_t partial_lse) {
    AttentionFwdArgs a{};
    static_cast<AttentionArgs&>(a) = call.args;
    a.out = pointer<void>(out.address), a.out_strides = leading(out.strides);
    a.lse = pointer<float>(lse), a.splits = splits;
    a.partial_out = pointer<float>(partial_out), a.partial_lse = pointer<float>(partial_lse);
    py::gil_scoped_release release;
    use_device(call.device);
    attention_fwd(a);
}

void bwd(const Call& call, const Strided<4>& out, uintptr_t lse, const Strided<4>& dout,
         uintptr_t dlse, uintptr_t delta, const Strided<4>& dq, const Strided<4>& dk,
         const Strided<4>& dv, uintptr_t dq_sum, bool deterministic) {
    AttentionBwdArgs a{};
    static_cast<AttentionArgs&>(a) = call.args;
    a.out = pointer<void>(out.address), a.out_strides = leading(out.strides);
    a.dout = pointer<void>(dout.address), a.dout_strides = leading(dout.strides);
    a.lse = pointer<float>(lse), a.dlse = pointer<float>(dlse), a.delta = pointer<float>(delta);
    a.dq = pointer<void>(dq.address), a.dq_strides = leading(dq.strides);
    a.dk = pointer<void>(dk.address), a.dk_strides = leading(dk.strides);
    a.dv = pointer<void>(dv.address), a.dv_strides = leading(dv.strides);
    a.dq_sum = pointer<float>(dq_sum), a.deterministic = deterministic;
    py::gil_scoped_release release;
    use_device(call.device);
    attention_bwd(a);
}

int splits(const Call& call) {
    use_device(call.device);
    return attention_splits(call.args);
}

int64_t dq_sum(const Call& call, bool deterministic) {
    use_device(call.device);
    return attention_dq_sum(call.args, deterministic);
}

}  // namespace

void bind_attention(py::module_& m) {
    const auto address = [](auto member) {
        return [member](Call& call, uintptr_t value) {
            call.args.*member = pointer<std::remove_pointer_t<
                std::decay_t<decltype(std::declval<AttentionArgs>().*member)>>>(value);
        };
    };
    py::class_<Call> call(m, "AttentionCall", "A call but for its results.");
    call.def(py::init(&make_call), "Each tensor is (address, strides); band (left, right, offset).")
        .def("set_offsets", address(&AttentionArgs::offsets))
        .def("set_seqlens_k", address(&AttentionArgs::seqlens_k))
        .def("set_sinks", address(&AttentionArgs::sinks))
        .def("set_alibi_slopes", &set_alibi_slopes)
        .def("set_packed", &set_packed, "cu_seqlens_q, cu_seqlens_k, total_q, total_k.")
        .def("set_paged", &set_paged, "block_table, page_size.")
        .def("set_dropout", &set_dropout);
    m.def("attention_splits", &splits, "Into how many parts of the keys attention_fwd is split.");
    m.def("attention_dq_sum", &dq_sum, "How many floats attention_bwd wants zeroed.");
    m.def("attention_fwd", &fwd);
    m.def("attention_bwd", &bwd);
}

}  // namespace fastattn::cuda
