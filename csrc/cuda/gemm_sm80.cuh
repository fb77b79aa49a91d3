// The matrix product on sm_80: one tile, or a share of its inner dim, a block; 16 or 32 rows by 64
// or 128 columns of it a warp. Operands arrive by cp.async, kStages deep, the copies of one stage
// in flight while another is multiplied, with one barrier a step (as CUTLASS's multistage kernels).
#pragma once

#include "cuda/ffn_epilogue.cuh"
#include "cuda/gemm.cuh"
#include "cuda/tile.cuh"

namespace fastattn::cuda {

// 4 x warps_n warps, each with slices_m x slices_n slices of (16, 64).
template <int warps_n, int slices_m, int slices_n, int block_k, int stages>
struct Tiling {
    static constexpr int kSlicesM = slices_m, kSlicesN = slices_n, kSlices = slices_m * slices_n;
    static constexpr int kThreads = 128 * warps_n;
    static constexpr int kBlockM = 64 * slices_m, kBlockN = 64 * slices_n * warps_n;
    static constexpr int kBlockK = block_k, kStages = stages;
    static constexpr int kABytes = kBlockM * kBlockK * 2, kBBytes = kBlockN * kBlockK * 2;
    static constexpr int kShared = kStages * (kABytes + kBBytes);
    static_assert(kShared >= SliceSums::bytes(kBlockM, kBlockN) && kThreads >= kBlockN);
};
template <int products>
using SmallTiles = Tiling<1, 1, products, 64, 4>;
using MediumTiles = Tiling<1, 2, 2, 32, 4>;
using LargeTiles = Tiling<2, 2, 2, 32, 4>;

// kOuter rows of m or n by kBlockK of the inner dim, in shared memory as it lies in global memory.
template <Major major, int kOuter, int kBlockK>
struct OperandTile {
    static constexpr bool kTrans = major == Major::mn;
    Tile<kTrans ? kBlockK : kOuter, kTrans ? kOuter : kBlockK> tile;

    // From (outer, inner) on of a matrix of (outers, inners), zeros beyond.
    template <int kThreads, class T>
    FASTATTN_DEVICE void load(const T* matrix, int64_t stride, int outer, int outers, int inner,
                              int inners) const {
        const int row = kTrans ? inner : outer, rows = kTrans ? inners : outers;
        const int column = kTrans ? outer : inner, columns = kTrans ? outers : inners;
        tile.template load<kThreads>(matrix + row * stride + column, stride, rows - row,
                                     columns - column, threadIdx.x);
    }
    FASTATTN_DEVICE void fragment_a(uint32_t (&a)[4], int outer, int inner) const {
        kTrans ? tile.fragment_a_trans(a, inner, outer) : tile.fragment_a(a, outer, inner);
    }
    FASTATTN_DEVICE void fragment_b(uint32_t (&b)[4], int outer, int inner) const {
        kTrans ? tile.fragment_b_trans(b, inner, outer) : tile.fragment_b(b, outer, inner);
    }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr bool kOnSm90 = true;
#else
constexpr bool kOnSm90 = false;
#endif

template <Major kA, Major kB, class Tiles, class Epilogue>
__global__ void __launch_bounds__(Tiles::kThreads)
    gemm_sm80_kernel(const __grid_constant__ GemmArgs args,
                     const __grid_constant__ Epilogue epilogue) {
    using T = typename Epilogue::Element;
    constexpr int kBlockM = Tiles::kBlockM, kBlockK = Tiles::kBlockK, kStages = Tiles::kStages;
    constexpr int kSlicesM = Tiles::kSlicesM, kSlicesN = Tiles::kSlicesN;
    constexpr int kBlockN = Tiles::kBlockN / Epilogue::kProducts;  // of one product
    // There the kernels of gemm_sm90.cuh have all larger tiles.
    if (kOnSm90 && kBlockM > 64) return;
    using ATile = OperandTile<kA, kBlockM, kBlockK>;
    using BTile = OperandTile<kB, Tiles::kBlockN, kBlockK>;
    const int warp_m = threadIdx.x / 32 % 4, warp_n = threadIdx.x / 128;
    const TileWork work = work_of<kBlockM, kBlockN, kBlockK>(args, blockIdx.x);
    const int steps = ceil_div(args.k, kBlockK);

    const auto a_tile = [&](int slot) { return ATile{dynamic_shared() + slot * Tiles::kABytes}; };
    const auto b_tile = [&](int slot) {
        return BTile{dynamic_shared() + kStages * Tiles::kABytes + slot * Tiles::kBBytes};
    };
    const auto load = [&](int step, int slot) {
        const bool second = step >= steps;
        const int k = (second ? step - steps : step) * kBlockK;
        const Matrix& a = second ? args.a[1] : args.a[0];
        const Matrix& b = second ? args.b[1] : args.b[0];
        a_tile(slot).template load<Tiles::kThreads>(static_cast<const T*>(a.data), a.stride,
                                                    work.row, args.m, k, args.k);
        if constexpr (Epilogue::kProducts == 1) {
            b_tile(slot).template load<Tiles::kThreads>(static_cast<const T*>(b.data), b.stride,
                                                        work.column, args.n, k, args.k);
        } else {
            // One tile below the other.
            static_assert(kB == Major::k);
#pragma unroll
            for (int product = 0; product < 2; ++product)
                OperandTile<kB, kBlockN, kBlockK>{b_tile(slot).tile.at(product * kBlockN, 0)}
                    .template load<Tiles::kThreads>(static_cast<const T*>(args.b[product].data),
                                                    args.b[product].stride, work.column, args.n, k,
                                                    args.k);
        }
    };
    // Where slices of the second operand's rows begin in its tile, and in the product's columns.
    const auto b_row = [&](int n) {
        return Epilogue::kProducts == 1 ? 64 * (kSlicesN * warp_n + n) : kBlockN * n + 64 * warp_n;
    };

    Slice acc[Tiles::kSlices] = {};  // [n * kSlicesM + m]
    const auto multiply = [&](int slot) {
#pragma unroll
        for (int k = 0; k < kBlockK; k += 16) {
            uint32_t a[kSlicesM][4];
#pragma unroll
            for (int m = 0; m < kSlicesM; ++m)
                a_tile(slot).fragment_a(a[m], 16 * (kSlicesM * warp_m + m), k);
#pragma unroll
            for (int n = 0; n < kSlicesN; ++n)
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    uint32_t b[4];
                    b_tile(slot).fragment_b(b, b_row(n) + 8 * j, k);
#pragma unroll
                    for (int m = 0; m < kSlicesM; ++m) {
                        mma_m16n8k16<T>(acc[n * kSlicesM + m][j], a[m], b[0], b[1]);
                        mma_m16n8k16<T>(acc[n * kSlicesM + m][j + 1], a[m], b[2], b[3]);
                    }
                }
        }
    };

#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
        if (work.first + i < work.last) load(work.first + i, i);
        cp_async_commit();
    }
    int slot = 0;
    for (int step = work.first; step < work.last; ++step) {
        cp_async_wait<kStages - 2>();
        // Also: all are done with the slot that is filled next.
        barrier();
        const int ahead = step + kStages - 1;
        if (ahead < work.last) load(ahead, slot == 0 ? kStages - 1 : slot - 1);
        cp_async_commit();
        multiply(slot);
        slot = slot + 1 == kStages ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    barrier();

    const auto local = [&](int s) {
        const int row = 16 * (kSlicesM * warp_m + s % kSlicesM);
        return At{row, Epilogue::kProducts == 1 ? b_row(s / kSlicesM) : 64 * warp_n};
    };
    const At origin{work.row, work.column};
    const SliceSums sums{dynamic_shared(), kBlockN};
    epilogue.run(acc, origin, work.split, local, sums);
    if constexpr (Epilogue::kSumsColumns)
        epilogue.template finish<kBlockM>(origin, sums, threadIdx.x, [] { barrier(); });
}

template <Major kA, Major kB, class Tiles, class Epilogue>
void gemm_sm80(GemmArgs args, const Epilogue& epilogue, void* stream) {
    args.order = TileOrder(args.m, args.n, args.splits, Tiles::kBlockM,
                           Tiles::kBlockN / Epilogue::kProducts);
    launch(gemm_sm80_kernel<kA, kB, Tiles, Epilogue>, dim3(unsigned(args.order.count)),
           Tiles::kThreads, Tiles::kShared, stream, args, epilogue);
}

}  // namespace fastattn::cuda
