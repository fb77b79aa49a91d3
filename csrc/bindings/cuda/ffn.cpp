#include "cuda/ffn.h"

#include <pybind11/stl.h>

#include "bindings/cuda.h"

namespace fastattn::cuda {
namespace {

using Sizes = Ints<4>;  // rows, d_model, d_ff, d_out

// A call of one direction, but for its scratch.
template <class Args>
struct Call {
    int device;
    Args args;
};

// A matrix of contiguous rows, or None.
Matrix matrix(const std::optional<Strided<2>>& rows) {
    if (!rows) return {nullptr, 0};
    return {pointer<void>(rows->address), rows->strides[0]};
}

template <class Args>
Args make_args(const Where& where, DType dtype, int activation, const Sizes& sizes,
               const std::optional<Strided<2>>& x, const std::optional<Strided<2>>& w1,
               const std::optional<Strided<2>>& w_up, const std::optional<Strided<2>>& w2,
               uintptr_t b1, const Dropped& dropout) {
    Args a{};
    a.dtype = dtype, a.activation = Activation(activation);
    a.rows = narrow(sizes[0], "rows"), a.d_model = narrow(sizes[1], "d_model");
    a.d_ff = narrow(sizes[2], "d_ff"), a.d_out = narrow(sizes[3], "d_out");
    a.x = matrix(x), a.w1 = matrix(w1), a.w_up = matrix(w_up), a.w2 = matrix(w2);
    a.b1 = pointer<void>(b1);
    a.seed = dropout.seed, a.threshold = dropout.threshold, a.keep_scale = dropout.keep_scale;
    a.stream = where.stream;
    return a;
}

// preact, hidden: 0 where not wanted or not kept.
Call<FFNFwdArgs> fwd_call(const Where& where, DType dtype, int activation, const Sizes& sizes,
                          const std::optional<Strided<2>>& x, const std::optional<Strided<2>>& w1,
                          const std::optional<Strided<2>>& w_up,
                          const std::optional<Strided<2>>& w2, uintptr_t b1, const Dropped& dropout,
                          uintptr_t b2, uintptr_t y, uintptr_t preact, uintptr_t hidden) {
    auto a = make_args<FFNFwdArgs>(where, dtype, activation, sizes, x, w1, w_up, w2, b1, dropout);
    a.b2 = pointer<void>(b2), a.y = pointer<void>(y);
    a.preact = pointer<void>(preact), a.hidden = pointer<void>(hidden);
    return {where.device, a};
}

Call<FFNBwdArgs> bwd_call(const Where& where, DType dtype, int activation, const Sizes& sizes,
                          const std::optional<Strided<2>>& x, const std::optional<Strided<2>>& w1,
                          const std::optional<Strided<2>>& w_up,
                          const std::optional<Strided<2>>& w2, uintptr_t b1, const Dropped& dropout,
                          const std::optional<Strided<2>>& dy, uintptr_t preact, uintptr_t hidden,
                          uintptr_t dx, uintptr_t dw1, uintptr_t db1, uintptr_t dw_up,
                          uintptr_t dw2, uintptr_t db2) {
    auto a = make_args<FFNBwdArgs>(where, dtype, activation, sizes, x, w1, w_up, w2, b1, dropout);
    a.dy = matrix(dy), a.preact = pointer<void>(preact), a.hidden = pointer<void>(hidden);
    a.dx = pointer<void>(dx), a.dw1 = pointer<void>(dw1), a.db1 = pointer<void>(db1);
    a.dw_up = pointer<void>(dw_up), a.dw2 = pointer<void>(dw2), a.db2 = pointer<void>(db2);
    return {where.device, a};
}

template <class Args>
auto scratch_of(int64_t (*bytes)(const Args&)) {
    return [bytes](const Call<Args>& call) {
        use_device(call.device);
        return bytes(call.args);
    };
}

template <class Args>
auto run(void (*kernel)(const Args&)) {
    return [kernel](const Call<Args>& call, uintptr_t scratch) {
        Args args = call.args;
        args.scratch = pointer<void>(scratch);
        py::gil_scoped_release release;
        use_device(call.device);
        kernel(args);
    };
}

}  // namespace

void bind_ffn(py::module_& m) {
    py::class_<Call<FFNFwdArgs>>(m, "FFNFwdCall").def(py::init(&fwd_call));
    py::class_<Call<FFNBwdArgs>>(m, "FFNBwdCall").def(py::init(&bwd_call));
    m.def("ffn_fwd_scratch", scratch_of(&ffn_fwd_scratch), "Bytes that ffn_fwd needs.");
    m.def("ffn_bwd_scratch", scratch_of(&ffn_bwd_scratch), "Bytes that ffn_bwd needs.");
    m.def("ffn_fwd", run(&ffn_fwd));
    m.def("ffn_bwd", run(&ffn_bwd));
}

}  // namespace fastattn::cuda
