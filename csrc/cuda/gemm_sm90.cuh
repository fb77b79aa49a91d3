// The matrix product on sm_90: one block a multiprocessor, which goes from tile to tile. A producer
// thread has the copy engine fill a ring of kStages steps of both operands, and runs ahead into the
// next tile; two warpgroups multiply them by wgmma, each 64 of the block's 128 rows, and finish the
// tile while the ring fills (as CUTLASS's persistent cooperative kernels). The blocks of a cluster
// compute tiles one below the other: each copies its share of the columns of B to all of them.
#pragma once

#include <algorithm>

#include "cuda/ffn_epilogue.cuh"
#include "cuda/gemm.cuh"
#include "cuda/tile.cuh"
#include "cuda/wgmma.cuh"

namespace fastattn::cuda {

struct OperandMaps {
    TensorMap a[2], b[2];  // as in GemmArgs
};

// Shared memory of a block's 128 rows by kBlockN columns, those of both products where there are
// two: the operands, the epilogue's sums, then the barriers.
template <int block_n, int cluster>
struct TilingSm90 {
    static constexpr int kBlockM = 128, kBlockN = block_n, kBlockK = 64, kCluster = cluster;
    static constexpr int kStages = kBlockN == 256 ? 4 : 6;
    static constexpr int kABytes = kBlockM * kBlockK * 2, kBBytes = kBlockN * kBlockK * 2;
    static constexpr int kProducers = 128, kConsumers = 256;
    static constexpr int kThreads = kProducers + kConsumers;
    static constexpr int kSums = kStages * (kABytes + kBBytes);
    static constexpr int kBarriers = kSums + SliceSums::bytes(kBlockM, kBlockN);
    static constexpr int kShared = kBarriers + 2 * kStages * 8;
    static_assert(kShared <= 227 * 1024 && kConsumers >= kBlockN);

    static FASTATTN_DEVICE SharedAddress a(int slot) { return dynamic_shared() + slot * kABytes; }
    static FASTATTN_DEVICE SharedAddress b(int slot) {
        return dynamic_shared() + kStages * kABytes + slot * kBBytes;
    }
    // Of a slot: its operands have arrived; they have been read.
    static FASTATTN_DEVICE SharedAddress full(int slot) {
        return dynamic_shared() + kBarriers + 8 * slot;
    }
    static FASTATTN_DEVICE SharedAddress empty(int slot) { return full(kStages + slot); }
};

// Where producer and consumers stand in the ring.
template <int kStages>
struct Ring {
    int slot = 0;
    uint32_t parity = 0;
    FASTATTN_DEVICE void advance() {
        if (++slot == kStages) slot = 0, parity ^= 1;
    }
};

// Rows of m or n, outer to outer + kOuter, and 64 of the inner dim from `inner` on, as `major` has
// them in memory: for Major::mn in panels of 64 columns, one after the other. To kBlocks blocks.
template <Major major, int kOuter, int kBlocks>
FASTATTN_DEVICE void load_operand(SharedAddress to, const TensorMap* map, SharedAddress barrier,
                                  int outer, int inner) {
    const auto load = [&](SharedAddress to, int c0, int c1) {
        if constexpr (kBlocks == 1)
            tma_load_4d(to, map, barrier, c0, c1, 0, 0);
        else
            tma_multicast_4d(to, map, barrier, c0, c1, 0, 0, (1 << kBlocks) - 1);
    };
    if constexpr (major == Major::k) {
        load(to, inner, outer);
    } else {
#pragma unroll
        for (int i = 0; i < kOuter; i += 64) load(to + i * 128, outer + i, inner);
    }
}

// B's columns arrive in pieces: one a product, or one a block of the cluster.
template <class Tiles, class Epilogue>
struct Pieces {
    static constexpr int kCount = Tiles::kCluster > 1 ? Tiles::kCluster : Epilogue::kProducts;
    static_assert(kCount % Epilogue::kProducts == 0);
    static constexpr int kColumns = Tiles::kBlockN / kCount;
};

template <Major kA, Major kB, class Tiles, class Epilogue>
__global__ void __launch_bounds__(Tiles::kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ OperandMaps maps,
                     const __grid_constant__ GemmArgs args,
                     const __grid_constant__ Epilogue epilogue) {
    using T = typename Epilogue::Element;
    constexpr int kBlockM = Tiles::kBlockM, kBlockK = Tiles::kBlockK, kStages = Tiles::kStages;
    constexpr int kProducts = Epilogue::kProducts, kBlockN = Tiles::kBlockN / kProducts;

    // Blocks of a cluster arrive at each other's barriers.
    constexpr int kCluster = Tiles::kCluster;
    const int rank = kCluster > 1 ? cluster_rank() : 0;
    const int clusters = gridDim.x / kCluster, cluster = blockIdx.x / kCluster;
    const auto work_at = [&](int index) {
        TileWork work = work_of<kCluster * kBlockM, kBlockN, kBlockK>(args, index);
        work.row += rank * kBlockM;
        return work;
    };
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kStages; ++slot) {
            mbarrier_init(Tiles::full(slot), 1);
            mbarrier_init(Tiles::empty(slot), kCluster * Tiles::kConsumers / 32);
        }
        fence_mbarrier_init();
    }
    if constexpr (kCluster > 1)
        cluster_barrier();
    else
        barrier();

    if (threadIdx.x < Tiles::kProducers) {
        registers_down<40>();
        using B = Pieces<Tiles, Epilogue>;
        const int steps = ceil_div(args.k, kBlockK);
        Ring<kStages> ring;
        for (int index = cluster; threadIdx.x == 0 && index < args.order.count; index += clusters) {
            const TileWork work = work_at(index);
#pragma unroll 1
            for (int step = work.first; step < work.last; ++step) {
                const int term = step >= steps, k = (step - term * steps) * kBlockK;
                const SharedAddress full = Tiles::full(ring.slot);
                mbarrier_wait(Tiles::empty(ring.slot), ring.parity ^ 1);
                mbarrier_arrive_expect(full, Tiles::kABytes + Tiles::kBBytes);
                load_operand<kA, kBlockM, 1>(Tiles::a(ring.slot), &maps.a[term], full, work.row, k);
#pragma unroll
                for (int i = 0; i < B::kCount; i += kCluster) {
                    const int piece = i + rank, at = piece * B::kColumns;
                    load_operand<kB, B::kColumns, kCluster>(
                        Tiles::b(ring.slot) + at * 128, &maps.b[kProducts == 2 ? piece : term],
                        full, work.column + (kProducts == 2 ? 0 : at), k);
                }
                ring.advance();
            }
        }
    } else {
        registers_up<232>();
        constexpr int kSlices = Tiles::kBlockN / 64;
        const int thread = threadIdx.x - Tiles::kProducers, warp = thread / 32;
        // The first 64 rows or the others: 8 KB in both layouts, as is a panel.
        const int a_offset = warp / 4 * 64 * 128;
        const auto release = [&](int slot) {
            const int lane = thread % 32;
            if (kCluster > 1 && lane < kCluster) mbarrier_arrive_at(Tiles::empty(slot), lane);
            if (kCluster == 1 && lane == 0) mbarrier_arrive(Tiles::empty(slot));
        };
        Ring<kStages> ring;
        for (int index = cluster; index < args.order.count; index += clusters) {
            const TileWork work = work_at(index);
            float acc[Tiles::kBlockN / 2];
            int read = 0;  // the slot of the step before
#pragma unroll 1
            for (int step = work.first; step < work.last; ++step) {
                mbarrier_wait(Tiles::full(ring.slot), ring.parity);
                const SharedAddress a = Tiles::a(ring.slot) + a_offset, b = Tiles::b(ring.slot);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kBlockK; k += 16)
                    wgmma<T, Tiles::kBlockN, kA == Major::mn, kB == Major::mn>(
                        acc, wgmma_operand(a + k * (kA == Major::mn ? 128 : 2), kBlockK * 128),
                        wgmma_operand(b + k * (kB == Major::mn ? 128 : 2), kBlockK * 128),
                        step > work.first || k > 0);
                wgmma_commit();
                wgmma_wait<1>();
                if (step > work.first) release(read);
                read = ring.slot;
                ring.advance();
            }
            wgmma_wait<0>();
            wgmma_landed(acc);
            release(read);

            const auto local = [&](int s) { return At{16 * warp, 64 * s}; };
            const At origin{work.row, work.column};
            const SliceSums sums{dynamic_shared() + Tiles::kSums, kBlockN};
            epilogue.run(reinterpret_cast<Slice(&)[kSlices]>(acc), origin, work.split, local, sums);
            if constexpr (Epilogue::kSumsColumns)
                epilogue.template finish<kBlockM>(origin, sums, thread,
                                                  [] { barrier_sync(1, Tiles::kConsumers); });
        }
    }
    // None leaves while others may still reach its shared memory.
    if constexpr (kCluster > 1) cluster_barrier();
}

// `outers` rows of m or n and `inners` of the inner dim; `box` of the outers at once.
template <class T, Major major>
TensorMap map_operand(const Matrix& matrix, int outers, int inners, int box) {
    const bool transposed = major == Major::mn;
    // That of a single row may be anything, but the driver takes no 0.
    const int64_t stride = matrix.stride ? matrix.stride : 8;
    return make_tensor_map({same<T, bfloat16> ? Element::bfloat16 : Element::float16,
                            matrix.data,
                            {transposed ? outers : inners, transposed ? inners : outers, 1, 1},
                            {1, stride, stride, stride},
                            {64, transposed ? 64 : box, 1, 1},
                            true});
}

template <Major kA, Major kB, class Tiles, class Epilogue>
void launch_sm90(GemmArgs args, const Epilogue& epilogue, void* stream) {
    using T = typename Epilogue::Element;
    constexpr int kCluster = Tiles::kCluster;
    OperandMaps maps;
    for (int i = 0; i < 2; ++i) {
        // Where there is one only, it stands for both.
        const Matrix& a = args.a[args.terms == 2 ? i : 0];
        const Matrix& b = args.b[args.terms == 2 || Epilogue::kProducts == 2 ? i : 0];
        maps.a[i] = map_operand<T, kA>(a, args.m, args.k, Tiles::kBlockM);
        maps.b[i] = map_operand<T, kB>(b, args.n, args.k, Pieces<Tiles, Epilogue>::kColumns);
    }
    args.order = TileOrder(args.m, args.n, args.splits, kCluster * Tiles::kBlockM,
                           Tiles::kBlockN / Epilogue::kProducts);
    const int clusters = std::min(args.order.count, current_device().processors / kCluster);
    launch_clusters(kCluster, gemm_sm90_kernel<kA, kB, Tiles, Epilogue>,
                    dim3(unsigned(kCluster * clusters)), Tiles::kThreads, Tiles::kShared, stream,
                    maps, args, epilogue);
}

template <Major kA, Major kB, class Epilogue>
void gemm_sm90(const GemmArgs& args, const Epilogue& epilogue, TileSize size, void* stream) {
    if (size == TileSize::medium)
        launch_sm90<kA, kB, TilingSm90<128, 1>>(args, epilogue, stream);
    else
        launch_sm90<kA, kB, TilingSm90<256, 2>>(args, epilogue, stream);
}

}  // namespace fastattn::cuda
