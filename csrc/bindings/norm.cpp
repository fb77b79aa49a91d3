#include "bindings/bindings.h"
#include "isa.h"

namespace fastattn {
namespace {

NormShape norm_shape(const Ints<5>& shape) {
    return {DType(shape[0]), DType(shape[1]), shape[2], shape[3], shape[4] != 0};
}

int64_t result_bytes(const NormShape& shape) {
    return shape.rows * shape.columns * itemsize(shape.dtype);
}

void norm_fwd(const Ints<5>& shape, float eps, uintptr_t x, int64_t x_stride, uintptr_t residual,
              int64_t residual_stride, uintptr_t weight, uintptr_t bias, uintptr_t y, uintptr_t sum,
              uintptr_t stats) {
    const NormShape sizes = norm_shape(shape);
    const NormFwdArgs args{
        .shape = sizes,
        .eps = eps,
        .x = pointer<void>(x),
        .x_stride = x_stride,
        .residual = pointer<void>(residual),
        .residual_stride = residual_stride,
        .weight = pointer<void>(weight),
        .bias = pointer<void>(bias),
        .y = result<void>(y, result_bytes(sizes)),
        .sum = result<void>(sum, result_bytes(sizes)),
        .stats = pointer<float>(stats),
    };
    py::gil_scoped_release release;
    kernels().norm_fwd(args);
}

void norm_bwd(const Ints<5>& shape, uintptr_t x, int64_t x_stride, uintptr_t dy, int64_t dy_stride,
              uintptr_t dsum, int64_t dsum_stride, uintptr_t weight, uintptr_t stats, uintptr_t dx,
              uintptr_t dweight, uintptr_t dbias) {
    const NormShape sizes = norm_shape(shape);
    const NormBwdArgs args{
        .shape = sizes,
        .x = pointer<void>(x),
        .x_stride = x_stride,
        .dy = pointer<void>(dy),
        .dy_stride = dy_stride,
        .dsum = pointer<void>(dsum),
        .dsum_stride = dsum_stride,
        .weight = pointer<void>(weight),
        .stats = pointer<float>(stats),
        .dx = result<void>(dx, result_bytes(sizes)),
        .dweight = pointer<void>(dweight),
        .dbias = pointer<void>(dbias),
    };
    py::gil_scoped_release release;
    kernels().norm_bwd(args);
}

}  // namespace

void bind_norm(py::module_& m) {
    m.def("norm_fwd", &norm_fwd, "Shape is (dtype, parameters' dtype, rows, columns, centered).");
    m.def("norm_bwd", &norm_bwd, "As norm_fwd, then the gradients.");
}

}  // namespace fastattn
