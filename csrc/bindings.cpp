#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include "isa.h"

#ifdef FASTATTN_CUDA
#include "bindings/cuda.h"
#endif

namespace fastattn {
namespace {

#ifdef __clang__
const std::string kCompiler =
    "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#else
const std::string kCompiler =
    "gcc " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__);
#endif

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_C, m) {
    using namespace fastattn;
    m.doc() = "fastattn's native kernels, on raw pointers, sizes and strides.";

    // Integers: an enum's cast would cost as much as a small kernel.
    m.attr("DTYPES") =
        py::dict(py::arg("float32") = int(DType::float32), py::arg("float16") = int(DType::float16),
                 py::arg("bfloat16") = int(DType::bfloat16));

    m.def("isas", &isas, "Instruction sets that the kernels were compiled for.");
    m.def("isas_available", &isas_available, "Those of isas() that this processor runs.");
    m.def("isa", &isa, "The instruction set in use.");
    m.def("set_isa", &set_isa, py::arg("name"), "Use another instruction set from now on.");

    m.def(
        "peak_flops", [](DType dtype) { return kernels().peak_flops(dtype); },
        py::call_guard<py::gil_scoped_release>(), "Of the kernels' products, on all threads.");
    m.def(
        "read_bandwidth",
        [](uintptr_t address, int64_t count) {
            return kernels().read_bandwidth(pointer<float>(address), count);
        },
        py::call_guard<py::gil_scoped_release>(), "Bytes a second of reading `count` floats.");

    bind_attention(m);
    bind_softmax(m);
    bind_ffn(m);
    bind_norm(m);
    bind_cross_entropy(m);
    bind_linear_cross_entropy(m);
    bind_rotary(m);
#ifdef FASTATTN_CUDA
    py::module_ cuda_module = m.def_submodule("cuda");
    cuda::bind(cuda_module);
#endif

    m.attr("__version__") = FASTATTN_VERSION;
    m.attr("compiler") = kCompiler;
}
