#include "bindings/bindings.h"
#include "isa.h"

namespace fastattn {
namespace {

LogitsView read_logits(DType dtype, const Ints<3>& shape, const Strided<2>& logits) {
    return {pointer<void>(logits.address),
            dtype,
            shape[0],
            shape[1],
            shape[2],
            logits.strides[0],
            logits.strides[1]};
}

int64_t cross_entropy_fwd(DType dtype, const Ints<3>& shape, const Strided<2>& logits,
                          uintptr_t targets, int64_t ignore_index, float smoothing, int reduction,
                          uintptr_t loss, uintptr_t stats) {
    const CrossEntropyFwdArgs args{
        .logits = read_logits(dtype, shape, logits),
        .targets = read_targets(targets, ignore_index, smoothing, reduction),
        .loss = pointer<float>(loss),
        .stats = pointer<float>(stats),
    };
    py::gil_scoped_release release;
    return kernels().cross_entropy_fwd(args);
}

void cross_entropy_bwd(DType dtype, const Ints<3>& shape, const Strided<2>& logits,
                       uintptr_t targets, int64_t ignore_index, float smoothing, int reduction,
                       uintptr_t dloss, uintptr_t stats, uintptr_t dlogits) {
    const CrossEntropyBwdArgs args{
        .logits = read_logits(dtype, shape, logits),
        .targets = read_targets(targets, ignore_index, smoothing, reduction),
        .dloss = pointer<float>(dloss),
        .stats = pointer<float>(stats),
        .dlogits = pointer<void>(dlogits),
    };
    py::gil_scoped_release release;
    kernels().cross_entropy_bwd(args);
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
    m.def("cross_entropy_fwd", &cross_entropy_fwd);
    m.def("cross_entropy_bwd", &cross_entropy_bwd);
}

}  // namespace fastattn
