// The bindings of the CUDA kernels: one bind_<op> an op that has some, in bindings/cuda/<op>.cpp.
// Each call names its device and stream; tensors are addresses and strides, as in bindings.h.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings/bindings.h"
#include "cuda/device.h"

namespace fastattn::cuda {

// Where a call runs: a device's number, and the handle of one of its streams.
struct Where {
    int device;
    void* stream;
};

// Dropout: where its seed lies, 0 without; the least word that is kept; what is kept times.
struct Dropped {
    const uint64_t* seed;
    uint32_t threshold;
    float keep_scale;
};

inline int narrow(int64_t size, const char* name) {
    if (size < 0 || size > std::numeric_limits<int32_t>::max())
        throw std::invalid_argument(std::string(name) + ": " + std::to_string(size) +
                                    " is not a size of 31 bits");
    return int(size);
}

void bind_attention(py::module_& m);
void bind_softmax(py::module_& m);
void bind_ffn(py::module_& m);

// All of them, into the module that is to be _C.cuda.
inline void bind(py::module_& m) {
    m.doc() = "The CUDA kernels, on addresses of the device's memory.";
    m.def("device_refusal", &device_refusal, py::arg("device"),
          "Why no kernel can run on a device; empty if they can. It opens the device.");
    bind_attention(m);
    bind_softmax(m);
    bind_ffn(m);
}

}  // namespace fastattn::cuda

namespace pybind11::detail {

template <>
struct type_caster<fastattn::cuda::Where> {
    PYBIND11_TYPE_CASTER(fastattn::cuda::Where, const_name("tuple[int, int]"));

    bool load(handle source, bool convert) {
        make_caster<std::pair<int, uintptr_t>> pair;
        if (!pair.load(source, convert)) return false;
        const auto [device, stream] = cast_op<std::pair<int, uintptr_t>>(pair);
        value = {device, fastattn::pointer<void>(stream)};
        return true;
    }
};

template <>
struct type_caster<fastattn::cuda::Dropped> {
    PYBIND11_TYPE_CASTER(fastattn::cuda::Dropped, const_name("tuple[int, int, float]"));

    bool load(handle source, bool convert) {
        make_caster<std::tuple<uintptr_t, uint32_t, float>> words;
        if (!words.load(source, convert)) return false;
        const auto [seed, threshold, keep_scale] =
            cast_op<std::tuple<uintptr_t, uint32_t, float>>(words);
        value = {fastattn::pointer<uint64_t>(seed), threshold, keep_scale};
        return true;
    }
};

}  // namespace pybind11::detail
