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

// A_0 B_0^T, (m, n), plus A_1 B_1^T with two terms. A kernel of two products computes A_0 B_0^T and
// A_0 B_1^T side by side.
struct GemmArgs {
    Matrix a[2], b[2];
    int m, n, k, terms;
    int splits, share;  // of the inner dim; in how many steps of a tile's kBlockK
};

// What a block computes next: the tile of each product at (row, column), over steps [first, last)
// of the inner dim; those of the second term follow those of the first.
struct Work {
    int row, column, split, first, last;
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Tiles go down kGroup at a time, so that those computed at once share operands in L2.
template <int kBlockM, int kBlockN, int kBlockK>
FASTATTN_DEVICE Work work_of(const GemmArgs& args, int index) {
    constexpr int kGroup = 16;
    const int down = ceil_div(args.m, kBlockM), across = ceil_div(args.n, kBlockN);
    const int split = index / (down * across), tile = index % (down * across);
    const int first_down = tile / (kGroup * across) * kGroup;
    const int height = min(kGroup, down - first_down), within = tile % (kGroup * across);
    const int first = split * args.share;
    const int last = min(first + args.share, args.terms * ceil_div(args.k, kBlockK));
    return {(first_down + within % height) * kBlockM, within / height * kBlockN, split, first,
            last};
}

// Whether the current device runs the kernels for sm_90.
inline bool has_sm90() { return current_device().capability == 90; }

enum class TileSize { small, medium, large };

// Of a block: rows, columns (of both products, where there are two) and inner dim.
struct TileShape {
    int m, n, k;
};

// The kernels' tiles by their sizes; small ones are sm_80's on every device.
constexpr TileShape tile_shape(TileSize size, bool sm90, int products) {
    if (size == TileSize::small) return {64, 64 * products, 64};
    return {128, size == TileSize::medium ? 128 : 256, sm90 ? 64 : 32};
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
