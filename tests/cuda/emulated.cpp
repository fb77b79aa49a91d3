// The module `emulated`: the bindings of the CUDA kernels over the emulation, and its controls.
#include "bindings/cuda.h"
#include "emulation/engine.h"
#include "emulation/global_memory.h"

namespace fastattn::cuda {

// In place of csrc/cuda/device.cu: there is one device, the host.
std::string device_refusal(int) { return ""; }
void use_device(int) {}

}  // namespace fastattn::cuda

PYBIND11_MODULE(emulated, m) {
    using namespace fastattn;
    cuda::bind(m);
    m.def("set_capability", &emulation::set_emulated_capability);
    m.def("clear_global", &emulation::clear_global);
    m.def("register_global", [](uintptr_t address, size_t bytes) {
        emulation::register_global(pointer<void>(address), bytes);
    });
}
