#include "bindings/bindings.h"
#include "isa.h"

namespace fastattn {
namespace {

// (address, (row stride, column stride)), or None for an absent matrix.
MatrixView view(const py::object& matrix) {
    if (matrix.is_none()) return {nullptr, 0, 0};
    const auto [address, strides] =
        matrix.cast<std::pair<uintptr_t, std::pair<int64_t, int64_t>>>();
    return {pointer<void>(address), strides.first, strides.second};
}

FFNShape read_ffn_shape(const py::tuple& shape) {
    return {shape[0].cast<DType>(),   Activation(shape[1].cast<int>()), shape[2].cast<int64_t>(),
            shape[3].cast<int64_t>(), shape[4].cast<int64_t>(),         shape[5].cast<int64_t>()};
}

void ffn_fwd(const py::tuple& shape, double dropout_p, uintptr_t seed, const py::object& x,
             const py::object& w1, const py::object& w_up, const py::object& w2, uintptr_t b1,
             uintptr_t b2, uintptr_t y, uintptr_t preact, uintptr_t hidden) {
    const FFNFwdArgs args{
        .shape = read_ffn_shape(shape),
        .dropout = read_dropout(dropout_p, seed),
        .x = view(x),
        .w1 = view(w1),
        .w_up = view(w_up),
        .w2 = view(w2),
        .b1 = pointer<void>(b1),
        .b2 = pointer<void>(b2),
        .y = pointer<void>(y),
        .preact = pointer<void>(preact),
        .hidden = pointer<void>(hidden),
    };
    py::gil_scoped_release release;
    kernels().ffn_fwd(args);
}

void ffn_bwd(const py::tuple& shape, double dropout_p, uintptr_t seed, const py::object& x,
             const py::object& w1, const py::object& w_up, const py::object& w2,
             const py::object& dy, uintptr_t b1, uintptr_t preact, uintptr_t hidden, uintptr_t dx,
             uintptr_t dw1, uintptr_t db1, uintptr_t dw_up, uintptr_t dw2, uintptr_t db2) {
    const FFNBwdArgs args{
        .shape = read_ffn_shape(shape),
        .dropout = read_dropout(dropout_p, seed),
        .x = view(x),
        .w1 = view(w1),
        .w_up = view(w_up),
        .w2 = view(w2),
        .dy = view(dy),
        .b1 = pointer<void>(b1),
        .preact = pointer<void>(preact),
        .hidden = pointer<void>(hidden),
        .dx = pointer<void>(dx),
        .dw1 = pointer<void>(dw1),
        .db1 = pointer<void>(db1),
        .dw_up = pointer<void>(dw_up),
        .dw2 = pointer<void>(dw2),
        .db2 = pointer<void>(db2),
    };
    py::gil_scoped_release release;
    kernels().ffn_bwd(args);
}

}  // namespace

void bind_ffn(py::module_& m) {
    m.def("ffn_fwd", &ffn_fwd);
    m.def("ffn_bwd", &ffn_bwd);
}

}  // namespace fastattn
