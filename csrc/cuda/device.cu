// What launching needs to know of devices, asked of the driver once each.
#include "cuda/device.h"

#include <array>
#include <mutex>

#include "cuda/launch.cuh"

namespace fastattn::cuda {
namespace {

constexpr int kMaxDevices = 64;

__global__ void probe_kernel() {}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "attribute of a device");
    return value;
}

Device describe(int device) {
    return {attribute(cudaDevAttrMultiProcessorCount, device),
            10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                attribute(cudaDevAttrComputeCapabilityMinor, device),
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

std::string dotted(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// A call's failure must not surface as the next call's.
std::string forget(cudaError_t status) {
    cudaGetLastError();
    return cudaGetErrorString(status);
}

}  // namespace

Device current_device() {
    static std::array<std::once_flag, kMaxDevices> asked;
    static std::array<Device, kMaxDevices> devices;
    int device = 0;
    check(cudaGetDevice(&device), "current device");
    if (device >= kMaxDevices) return describe(device);
    std::call_once(asked[device], [&] { devices[device] = describe(device); });
    return devices[device];
}

std::string device_refusal(int device) {
    int count = 0, current = 0;
    const cudaError_t counted = cudaGetDeviceCount(&count);
    if (counted != cudaSuccess) {
        const std::string why = forget(counted);
        return counted == cudaErrorInsufficientDriver ? "no NVIDIA driver, or too old a one" : why;
    }
    if (device < 0 || device >= count)
        return "device " + std::to_string(device) + " of " + std::to_string(count);
    const int capability = describe(device).capability;
    if (capability < 80) return "compute capability " + dotted(capability) + " < 8.0";

    check(cudaGetDevice(&current), "current device");
    check(cudaSetDevice(device), "current device");
    cudaFuncAttributes attributes;
    const cudaError_t probed = cudaFuncGetAttributes(&attributes, probe_kernel);
    check(cudaSetDevice(current), "current device");
    if (probed == cudaErrorNoKernelImageForDevice || probed == cudaErrorInvalidDeviceFunction) {
        forget(probed);
        return "not built for compute capability " + dotted(capability);
    }
    return probed == cudaSuccess ? "" : forget(probed);
}

void use_device(int device) {
    int current = 0;
    check(cudaGetDevice(&current), "current device");
    if (current != device) check(cudaSetDevice(device), "current device");
}

}  // namespace fastattn::cuda
