#include <stdexcept>

#include "bindings/bindings.h"
#include "isa.h"

namespace fastattn {
namespace {

void read_strides(const py::tuple& strides, int rank, int64_t* leading, int64_t* last) {
    if (int(strides.size()) != rank + 1) throw std::invalid_argument("strides: not of x's rank");
    for (int dim = 0; dim < rank; ++dim) leading[dim] = strides[dim].cast<int64_t>();
    *last = strides[rank].cast<int64_t>();
}

SoftmaxShape read_shape(const py::tuple& sizes) {
    SoftmaxShape shape{};
    const int rank = int(sizes.size()) - 1;
    if (rank < 0 || rank > kSoftmaxMaxRank) throw std::invalid_argument("shape: rank too large");
    shape.rank = rank;
    shape.rows = 1;
    for (int dim = 0; dim < rank; ++dim) {
        shape.sizes[dim] = sizes[dim].cast<int64_t>();
        shape.rows *= shape.sizes[dim];
    }
    shape.columns = sizes[rank].cast<int64_t>();
    shape.matrix_rows = rank ? shape.sizes[rank - 1] : 1;
    return shape;
}

template <class Args>
int64_t result_bytes(const Args& args) {
    return args.shape.rows * args.shape.columns * itemsize(args.dtype);
}

void softmax_fwd(DType dtype, const py::tuple& shape, uintptr_t x, const py::tuple& x_strides,
                 uintptr_t mask, const py::tuple& mask_strides, DType bias_dtype, uintptr_t bias,
                 const py::tuple& bias_strides, float scale, bool causal, bool log,
                 double dropout_p, uintptr_t seed, uintptr_t out, uintptr_t weights) {
    SoftmaxFwdArgs args{};
    args.dtype = dtype;
    args.shape = read_shape(shape);
    const int rank = args.shape.rank;
    int64_t x_column_stride;
    args.x = pointer<void>(x);
    read_strides(x_strides, rank, args.x_strides, &x_column_stride);
    args.mask = pointer<uint8_t>(mask);
    if (mask) read_strides(mask_strides, rank, args.mask_strides, &args.mask_column_stride);
    args.bias_dtype = bias_dtype;
    args.bias = pointer<void>(bias);
    if (bias) read_strides(bias_strides, rank, args.bias_strides, &args.bias_column_stride);
    args.scale = scale;
    args.causal = causal;
    args.log = log;
    args.dropout = read_dropout(dropout_p, seed);
    args.out = result<void>(out, result_bytes(args));
    args.weights = result<void>(weights, result_bytes(args));
    py::gil_scoped_release release;
    kernels().softmax_fwd(args);
}

void softmax_bwd(DType dtype, const py::tuple& shape, uintptr_t weights, uintptr_t dout,
                 const py::tuple& dout_strides, float scale, bool log, double dropout_p,
                 uintptr_t seed, uintptr_t dx, DType bias_dtype, const py::tuple& bias_shape,
                 uintptr_t dbias) {
    SoftmaxBwdArgs args{};
    args.dtype = dtype;
    args.shape = read_shape(shape);
    const int rank = args.shape.rank;
    int64_t dout_column_stride;
    args.weights = pointer<void>(weights);
    args.dout = pointer<void>(dout);
    read_strides(dout_strides, rank, args.dout_strides, &dout_column_stride);
    args.scale = scale;
    args.log = log;
    args.dropout = read_dropout(dropout_p, seed);
    args.dx = result<void>(dx, result_bytes(args));
    args.bias_dtype = bias_dtype;
    args.dbias = pointer<void>(dbias);
    if (dbias) {
        const SoftmaxShape kept = read_shape(bias_shape);
        for (int dim = 0; dim < rank; ++dim) args.bias_kept[dim] = kept.sizes[dim] != 1;
        args.bias_columns = kept.columns != 1;
    }
    py::gil_scoped_release release;
    kernels().softmax_bwd(args);
}

}  // namespace

void bind_softmax(py::module_& m) {
    m.def("softmax_fwd", &softmax_fwd);
    m.def("softmax_bwd", &softmax_bwd);
}

}  // namespace fastattn
