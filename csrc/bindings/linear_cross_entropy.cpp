#include "bindings/bindings.h"
#include "isa.h"

namespace fastattn {
namespace {

LinearCrossEntropyInputs read_inputs(DType dtype, const Ints<3>& shape, const Strided<2>& x,
                                     const Strided<2>& weight, uintptr_t bias,
                                     const CrossEntropyTargets& targets) {
    const auto view = [](const Strided<2>& matrix) {
        return MatrixView{pointer<void>(matrix.address), matrix.strides[0], matrix.strides[1]};
    };
    return {dtype,  shape[0], shape[1], shape[2], view(x), view(weight), pointer<void>(bias),
            targets};
}

LinearCrossEntropyGradients read_gradients(const Ints<5>& gradients) {
    return {pointer<float>(gradients[0]), pointer<float>(gradients[1]),
            pointer<float>(gradients[2]), pointer<void>(gradients[3]), gradients[4]};
}

int64_t linear_cross_entropy_fwd(DType dtype, const Ints<3>& shape, const Strided<2>& x,
                                 const Strided<2>& weight, uintptr_t bias, uintptr_t targets,
                                 int64_t ignore_index, float smoothing, int reduction,
                                 uintptr_t loss, uintptr_t stats, const Ints<5>& gradients) {
    const LinearCrossEntropyFwdArgs args{
        .inputs = read_inputs(dtype, shape, x, weight, bias,
                              read_targets(targets, ignore_index, smoothing, reduction)),
        .loss = pointer<float>(loss),
        .stats = pointer<float>(stats),
        .gradients = read_gradients(gradients),
    };
    py::gil_scoped_release release;
    return kernels().linear_cross_entropy_fwd(args);
}

void linear_cross_entropy_bwd(DType dtype, const Ints<3>& shape, const Strided<2>& x,
                              const Strided<2>& weight, uintptr_t bias, uintptr_t targets,
                              int64_t ignore_index, float smoothing, int reduction, uintptr_t dloss,
                              uintptr_t stats, const Ints<5>& gradients) {
    const LinearCrossEntropyBwdArgs args{
        .inputs = read_inputs(dtype, shape, x, weight, bias,
                              read_targets(targets, ignore_index, smoothing, reduction)),
        .dloss = pointer<float>(dloss),
        .stats = pointer<float>(stats),
        .gradients = read_gradients(gradients),
    };
    py::gil_scoped_release release;
    kernels().linear_cross_entropy_bwd(args);
}

}  // namespace

void bind_linear_cross_entropy(py::module_& m) {
    m.def("linear_cross_entropy_fwd", &linear_cross_entropy_fwd);
    m.def("linear_cross_entropy_bwd", &linear_cross_entropy_bwd);
}

}  // namespace fastattn
