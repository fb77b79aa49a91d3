#include "emulation/launch.h"

#include <mutex>
#include <stdexcept>
#include <string>

namespace fastattn::emulation {

namespace {

std::string refusal(const dim3& grid, int cluster, int threads, size_t shared) {
    if (cluster < 1 || cluster > kMaxCluster || grid.x % cluster != 0)
        return "clusters of " + std::to_string(cluster) +
               " blocks; 1 to 8, which divide the grid's x, are allowed";
    if (threads <= 0 || threads > kMaxBlockThreads || threads % kWarp != 0)
        return "a block of " + std::to_string(threads) +
               " threads; it must have whole warps, 1024 threads at most";
    if (shared > max_shared())
        return std::to_string(shared) + " bytes of shared memory; a block has " +
               std::to_string(max_shared()) + " at most";
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 0xffff ||
        grid.z > 0xffff)
        return "a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
               std::to_string(grid.z) +
               ") blocks; from (1, 1, 1) to (2^31 - 1, 65535, 65535) are "
               "allowed";
    return "";
}

}  // namespace

size_t max_shared() {
    switch (emulated_capability()) {
        case 80:
        case 87:
            return 163 << 10;
        case 86:
        case 89:
        case 120:
            return 99 << 10;
        default:
            return 227 << 10;
    }
}

void run_grid(const Grid& grid, int cluster, int threads, size_t shared, void (*body)(const void*),
              const void* context) {
    static std::mutex mutex;
    static Block block;
    const std::lock_guard lock(mutex);
    block.kernel = "kernel of " + std::string(grid.launcher) + " (" + grid.site.str() + ")";
    if (const std::string why = refusal(grid.size, cluster, threads, shared); !why.empty())
        throw std::runtime_error(block.kernel + ": launched with " + why);
    gridDim = grid.size;
    blockDim = {unsigned(threads)};
    threadIdx = {0, 0, 0};
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x += cluster)
                block.run(cluster, threads, shared, body, context);
}

}  // namespace fastattn::emulation
