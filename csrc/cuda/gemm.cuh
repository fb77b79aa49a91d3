// Matrix products by tiles, what the kernels of sm_80 and sm_90 share: operands, the order of the
// tiles, and which tiles, in how many shares of the inner dim, a product is cut into.
#pragma once

#include <cstdint>

#include "cuda/ffn.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace fastattn::cuda {

// How an operand lies in memory, A (m, k) or B (n, k): in rows of k, or, transposed, in k rows.
enum class Major { k, mn };

__host__ __device__ constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Division by a number that the host knows: by a multiplication (Granlund and Montgomery, PLDI
// 1994). 0 <= dividend < 2^31.
struct Divisor {
    uint32_t multiplier;
    int shift;

    Divisor() = default;
    explicit Divisor(int by) : shift(31) {
        while ((int64_t(1) << (shift - 31)) < by) ++shift;
        multiplier = uint32_t(((uint64_t(1) << shift) + by - 1) / by);
    }
    FASTATTN_DEVICE int divide(int dividend) const {
        return int(uint64_t(multiplier) * uint32_t(dividend) >> shift);
    }
};

// Tiles go down in groups of 2048 rows, so that those computed at once share operands in L2.
constexpr int kGroupRows = 2048;

inline int tiles_of(int64_t count) {
    if (count >> 31)
        throw std::invalid_argument("a product of " + std::to_string(count) + " tiles >= 2^31");
    return int(count);
}

struct TileOrder {
    int down, across, count;  // count: of all splits
    Divisor tiles, group;     // by down * across, by those of a group

    TileOrder() = default;
    TileOrder(int m, int n, int splits, int block_m, int block_n)
        : down(ceil_div(m, block_m)),
          across(ceil_div(n, block_n)),
          count(tiles_of(int64_t(down) * across * splits)),
          tiles(down * across),
          group(kGroupRows / block_m * across) {}
};

// A_0 B_0^T, (m, n), plus A_1 B_1^T with two terms. A kernel of two products computes A_0 B_0^T and
// A_0 B_1^T side by side.
struct GemmArgs {
    Matrix a[2], b[2];
    int m, n, k, terms;
    int splits, share;  // of the inner dim; in how many steps of a tile's kBlockK
    TileOrder order;
};

// What a block, or a cluster of blocks, computes next: the tile of each product at (row, column),
// over steps [first, last) of the inner dim; those of the second term follow those of the first.
struct TileWork {
    int row, column, split, first, last;
};

template <int kBlockM, int kBlockN, int kBlockK>
FASTATTN_DEVICE TileWork work_of(const GemmArgs& args, int index) {
    constexpr int kGroup = kGroupRows / kBlockM;
    const TileOrder& order = args.order;
    const int split = order.tiles.divide(index), tile = index - split * order.down * order.across;
    const int group = order.group.divide(tile), within = tile - group * kGroup * order.across;
    const int height = min(kGroup, order.down - group * kGroup);
    const int across = height == kGroup ? within / kGroup : within / height;
    const int first = split * args.share;
    const int last = min(first + args.share, args.terms * ceil_div(args.k, kBlockK));
    return {(group * kGroup + within - across * height) * kBlockM, across * kBlockN, split, first,
            last};
}

// Whether the current device runs the kernels for sm_90.
inline bool has_sm90() { return current_device().capability == 90; }

enum class TileSize { small, medium, large };

// Rows, columns (of both products, where there are two) and inner dim of a tile that `blocks`, a
// cluster of them, compute together: each as many of its rows.
struct TileShape {
    int m, n, k, blocks;
};

// The kernels' tiles by their sizes; small ones are sm_80's on every device.
constexpr TileShape tile_shape(TileSize size, bool sm90, int products) {
    if (size == TileSize::small) return {64, 64 * products, 64, 1};
    if (size == TileSize::medium) return {128, 128, sm90 ? 64 : 32, 1};
    return sm90 ? TileShape{256, 256, 64, 2} : TileShape{128, 256, 32, 1};
}

struct GemmPlan {
    TileSize size;
    TileShape tile;
    int splits, share;
};

// The fastest plan by a model of time.
GemmPlan plan_gemm(int m, int n, int k, int terms, int products, bool may_split);

// The kernels for sm_90, of medium and large tiles.
template <Major kA, Major kB, class Epilogue>
void gemm_sm90(const GemmArgs& args, const Epilogue& epilogue, TileSize size, void* stream);

}  // namespace fastattn::cuda
