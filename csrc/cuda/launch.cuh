// How kernels are launched: on a stream, with errors thrown.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef FASTATTN_EMULATION
#include "emulation/launch.h"
#else

#include <cuda_runtime.h>

namespace fastattn::cuda {

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next call would fail by it
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// `kernel` on `stream` (a cudaStream_t) of the current device, with `shared` bytes of dynamic
// shared memory.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, void* stream,
            const Args&... args) {
    if (shared > 48 * 1024)
        check(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
            "shared memory");
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
    check(cudaGetLastError(), "launch");
}

// The same in clusters of `cluster` blocks, one after the other along x, of sm_90.
template <class... Params, class... Args>
void launch_clusters(int cluster, void (*kernel)(Params...), dim3 grid, int threads, size_t shared,
                     void* stream, const Args&... args) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
          "shared memory");
    cudaLaunchAttribute dimension{};
    dimension.id = cudaLaunchAttributeClusterDimension;
    dimension.val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared, config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &dimension, config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, args...), "launch");
}

// Multiprocessors of the current device, its compute capability as 10 * major + minor, and the
// bytes of shared memory that a block may have.
struct Device {
    int processors, capability, shared;
};
Device current_device();

}  // namespace fastattn::cuda

#endif

namespace fastattn::cuda {

inline dim3 grid_of(int64_t blocks) {
    if (blocks >> 31)
        throw std::invalid_argument("a launch of " + std::to_string(blocks) + " blocks >= 2^31");
    return dim3(unsigned(blocks));
}

}  // namespace fastattn::cuda
