// launch of csrc/cuda/launch.cuh on the host.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>

#include "emulation/cuda.h"
#include "emulation/engine.h"

namespace fastattn::emulation {

// A grid, and where it was launched.
struct Grid {
    dim3 size;
    const char* launcher;
    Site site;

    Grid(dim3 size, const char* launcher = __builtin_FUNCTION(), Site site = Site::here())
        : size(size), launcher(launcher), site(site) {}
    Grid(unsigned x, unsigned y = 1, unsigned z = 1, const char* launcher = __builtin_FUNCTION(),
         Site site = Site::here())
        : size(x, y, z), launcher(launcher), site(site) {}
};

// Bytes of shared memory that a block of the emulated chip may have.
size_t max_shared();

// Runs the blocks one after the other, `cluster` of them at a time; body(context) is what a thread
// does.
void run_grid(const Grid& grid, int cluster, int threads, size_t shared, void (*body)(const void*),
              const void* context);

}  // namespace fastattn::emulation

namespace fastattn::cuda {

template <class... Params, class... Args>
void launch_clusters(int cluster, void (*kernel)(Params...), emulation::Grid grid, int threads,
                     size_t shared, [[maybe_unused]] void* stream, const Args&... args) {
    struct Call {
        void (*kernel)(Params...);
        std::tuple<std::remove_cv_t<Params>...> params;
    } call{kernel, {args...}};
    emulation::run_grid(
        grid, cluster, threads, shared,
        [](const void* context) {
            const Call& call = *static_cast<const Call*>(context);
            std::apply(call.kernel, call.params);
        },
        &call);
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), emulation::Grid grid, int threads, size_t shared,
            void* stream, const Args&... args) {
    launch_clusters(1, kernel, grid, threads, shared, stream, args...);
}

struct Device {
    int processors, capability, shared;
};
inline Device current_device() {
    return {4, emulation::emulated_capability(), int(emulation::max_shared())};
}

}  // namespace fastattn::cuda
