#include "cuda/softmax.h"

#include <pybind11/stl.h>

#include "bindings/cuda.h"

namespace fastattn::cuda {
namespace {

SoftmaxRows rows(const std::optional<Strided<4>>& tensor) {
    if (!tensor) return {};
    const auto& s = tensor->strides;
    return {pointer<void>(tensor->address), {s[0], s[1], s[2], s[3]}};
}

// shape: (., ., ., columns).
template <class Args>
Args make_args(const Where& where, DType dtype, const Ints<4>& shape, double scale, bool log,
               const Dropped& dropout) {
    Args a{};
    a.dtype = dtype;
    for (int dim = 0; dim < 3; ++dim) a.sizes[dim] = shape[dim];
    a.rows = shape[0] * shape[1] * shape[2], a.columns = int(shape[3]);
    a.scale = float(scale), a.log = log;
    a.seed = dropout.seed, a.threshold = dropout.threshold, a.keep_scale = dropout.keep_scale;
    a.stream = where.stream;
    return a;
}

void fwd(const Where& where, DType dtype, const Ints<4>& shape, double scale, bool log,
         const Dropped& dropout, const Strided<4>& x, const std::optional<Strided<4>>& mask,
         const std::optional<Strided<4>>& bias, DType bias_dtype, int64_t causal_rows,
         uintptr_t out, uintptr_t weights) {
    auto a = make_args<SoftmaxFwdArgs>(where, dtype, shape, scale, log, dropout);
    a.x = rows(x), a.mask = rows(mask), a.bias = rows(bias), a.bias_dtype = bias_dtype;
    a.causal_rows = causal_rows;
    a.out = pointer<void>(out), a.weights = pointer<void>(weights);
    py::gil_scoped_release release;
    use_device(where.device);
    softmax_fwd(a);
}

void bwd(const Where& where, DType dtype, const Ints<4>& shape, double scale, bool log,
         const Dropped& dropout, uintptr_t weights, const Strided<4>& dout, uintptr_t dx,
         uintptr_t dscores, DType dscores_dtype) {
    auto a = make_args<SoftmaxBwdArgs>(where, dtype, shape, scale, log, dropout);
    a.weights = pointer<void>(weights), a.dout = rows(dout), a.dx = pointer<void>(dx);
    a.dscores = pointer<void>(dscores), a.dscores_dtype = dscores_dtype;
    py::gil_scoped_release release;
    use_device(where.device);
    softmax_bwd(a);
}

}  // namespace

void bind_softmax(py::module_& m) {
    m.def("softmax_fwd", &fwd);
    m.def("softmax_bwd", &bwd);
}

}  // namespace fastattn::cuda
