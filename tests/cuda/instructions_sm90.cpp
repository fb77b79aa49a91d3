// Kernels of sm_90's instructions, whose results test_emulation_sm90.py compares.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/wgmma.cuh"
#include "emulation/wgmma_operand.h"

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastattn::cuda {

namespace {

constexpr int kM = 64, kK = 128;

// A matrix (rows, columns) of 16-bit elements, in boxes of 64 columns and `box_rows` rows.
template <class T>
TensorMap matrix_map(const void* from, int rows, int columns, int box_rows) {
    const Element element = same<T, bfloat16> ? Element::bfloat16 : Element::float16;
    const int64_t whole = int64_t(rows) * columns;
    return make_tensor_map({element,
                            from,
                            {columns, rows, 1, 1},
                            {1, columns, whole, whole},
                            {64, box_rows, 1, 1},
                            true});
}

// d (64, n) of this warpgroup, row by row.
template <int n>
void store_accumulator(float* d, const float (&acc)[n / 2]) {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    for (int j = 0; j < n / 8; ++j)
        for (int i = 0; i < 4; ++i)
            st_global(d + (16 * warp + lane / 4 + i / 2 * 8) * n + 8 * j + 2 * (lane % 4) + i % 2,
                      acc[4 * j + i]);
}

// d (64, n) = a (64, 128) b (128, n). a is stored as it is, or transposed; b transposed, as (n,
// 128), or as it is. In shared memory each is panels of 64 columns, one after the other.
template <class T, int n, bool kTransA, bool kTransB, bool kRegisters>
__global__ void product_kernel(const __grid_constant__ TensorMap map_a,
                               const __grid_constant__ TensorMap map_b, const T* a, float* d) {
    constexpr int kPanelA = (kTransA ? kK : kM) * 128, kPanelB = (kTransB ? kK : n) * 128;
    constexpr int kPanelsA = kTransA ? 1 : 2, kPanelsB = kTransB ? (n + 63) / 64 : 2;
    const SharedAddress loaded = dynamic_shared(), tile_a = loaded + 1024;
    const SharedAddress tile_b = tile_a + kPanelsA * kPanelA;
    if (threadIdx.x == 0) {
        mbarrier_init(loaded, 1);
        fence_mbarrier_init();
    }
    barrier();
    if (threadIdx.x == 0) {
        prefetch_tensor_map(&map_a);
        mbarrier_arrive_expect(loaded, kPanelsA * kPanelA + kPanelsB * kPanelB);
        for (int p = 0; p < kPanelsA; ++p)
            tma_load_4d(tile_a + p * kPanelA, &map_a, loaded, 64 * p, 0, 0, 0);
        for (int p = 0; p < kPanelsB; ++p)
            tma_load_4d(tile_b + p * kPanelB, &map_b, loaded, 64 * p, 0, 0, 0);
    }
    uint32_t fragments[kK / 16][4];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int k = 0; k < kK / 16; ++k)
        for (int i = 0; i < 4; ++i) {
            const int row = 16 * warp + lane / 4 + i % 2 * 8;
            const int column = 16 * k + 2 * (lane % 4) + i / 2 * 8;
            fragments[k][i] = ld_global(reinterpret_cast<const uint32_t*>(a + row * kK + column));
        }
    mbarrier_wait(loaded, 0);

    float acc[n / 2];
    for (float& x : acc) x = 1e30f;
    for (int k = 0; k < kK / 16; ++k) {
        // Two groups, so that the sums of the second go on from the first's.
        if (k % 4 == 0) wgmma_fence();
        const SharedAddress a_k =
            kTransA ? tile_a + 2048 * k : tile_a + k / 4 * kPanelA + k % 4 * 32;
        const SharedAddress b_k =
            kTransB ? tile_b + 2048 * k : tile_b + k / 4 * kPanelB + k % 4 * 32;
        const uint64_t b_operand = kTransB ? wgmma_operand(b_k, kPanelB) : wgmma_operand(b_k);
        if constexpr (kRegisters)
            wgmma<T, n, kTransB>(acc, fragments[k], b_operand, k > 0);
        else
            wgmma<T, n, kTransA, kTransB>(acc, wgmma_operand(a_k), b_operand, k > 0);
        if (k % 4 == 3) wgmma_commit();
    }
    wgmma_wait<1>();
    wgmma_wait<0>();
    wgmma_landed(acc);
    store_accumulator<n>(d, acc);
}

// form: bit 0 a transposed, bit 1 b transposed, bit 2 a in registers.
template <class T, int n>
void product(const void* a, const void* b, float* d, int form) {
    const bool trans_a = form & 1, trans_b = form & 2;
    const TensorMap map_a = trans_a ? matrix_map<T>(a, kK, kM, kK) : matrix_map<T>(a, kM, kK, kM);
    const TensorMap map_b = trans_b ? matrix_map<T>(b, kK, n, kK) : matrix_map<T>(b, n, kK, n);
    constexpr decltype(&product_kernel<T, n, false, false, false>) kKernels[] = {
        product_kernel<T, n, false, false, false>, product_kernel<T, n, true, false, false>,
        product_kernel<T, n, false, true, false>,  product_kernel<T, n, true, true, false>,
        product_kernel<T, n, false, false, true>,  nullptr,
        product_kernel<T, n, false, true, true>,   nullptr};
    launch(kKernels[form], 1, 128, 1024 + (kM + 256) * kK * 2, nullptr, map_a, map_b,
           static_cast<const T*>(a), d);
}

// d (128, 64) = a (128, k) b (64, k)^T, k a multiple of 64: one warpgroup loads ahead through
// kStages places, two multiply 64 rows each and store their sums through shared memory.
__global__ void pipeline_kernel(const __grid_constant__ TensorMap map_a,
                                const __grid_constant__ TensorMap map_b,
                                const __grid_constant__ TensorMap map_d, int steps) {
    constexpr int kStages = 2, kBytesA = 128 * 128, kBytesB = 64 * 128;
    const SharedAddress full = dynamic_shared(), empty = full + 8 * kStages;
    const SharedAddress places = dynamic_shared() + 1024;
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s)
            mbarrier_init(full + 8 * s, 1), mbarrier_init(empty + 8 * s, 2 * 4);
        fence_mbarrier_init();
    }
    barrier();
    const int warpgroup = threadIdx.x / 128;
    if (warpgroup == 2) {
        registers_down<24>();
        for (int step = 0; threadIdx.x == 256 && step < steps; ++step) {
            const int s = step % kStages;
            const SharedAddress place = places + s * (kBytesA + kBytesB);
            mbarrier_wait(empty + 8 * s, (step / kStages + 1) % 2);
            mbarrier_arrive_expect(full + 8 * s, kBytesA + kBytesB);
            tma_load_4d(place, &map_a, full + 8 * s, 64 * step, 0, 0, 0);
            tma_load_4d(place + kBytesA, &map_b, full + 8 * s, 64 * step, 0, 0, 0);
        }
        return;
    }
    registers_up<240>();
    float acc[32];
    for (int step = 0; step < steps; ++step) {
        const int s = step % kStages;
        const SharedAddress a = places + s * (kBytesA + kBytesB) + warpgroup * (kBytesA / 2);
        const SharedAddress b = places + s * (kBytesA + kBytesB) + kBytesA;
        mbarrier_wait(full + 8 * s, step / kStages % 2);
        wgmma_fence();
        for (int k = 0; k < 4; ++k)
            wgmma<bfloat16, 64>(acc, wgmma_operand(a + 32 * k), wgmma_operand(b + 32 * k),
                                step + k > 0);
        wgmma_commit();
        // The step before has been read.
        wgmma_wait<1>();
        if (step > 0 && threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * ((step - 1) % kStages));
    }
    wgmma_wait<0>();
    wgmma_landed(acc);

    // (64, 64) of float32 in two panels of 32 columns, where a place's tile of A was.
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    barrier_sync(1, 256);
    const SharedAddress out = places + warpgroup * (64 * 64 * 4);
    for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) {
            const int row = 16 * warp + lane / 4 + i / 2 * 8,
                      column = 8 * j + 2 * (lane % 4) + i % 2;
            st_shared(out + column / 32 * (64 * 128) + row * 128 +
                          ((column % 32 / 4 ^ row % 8) * 16) + column % 4 * 4,
                      acc[4 * j + i]);
        }
    fence_proxy_async();
    barrier_sync(2 + warpgroup, 128);
    if (threadIdx.x % 128 == 0) {
        for (int p = 0; p < 2; ++p)
            tma_store_4d(&map_d, out + p * (64 * 128), 32 * p, 64 * warpgroup, 0, 0);
        bulk_commit();
        bulk_wait_read<0>();
    }
}

// The shared memory that a box is loaded to, as it lies there.
__global__ void load_kernel(const __grid_constant__ TensorMap map, int4 at, uint32_t* memory,
                            int words) {
    const SharedAddress loaded = dynamic_shared(), box = loaded + 1024;
    if (threadIdx.x == 0) {
        mbarrier_init(loaded, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(loaded, 4 * words);
        tma_load_4d(box, &map, loaded, at.x, at.y, at.z, at.w);
    }
    barrier();
    mbarrier_wait(loaded, 0);
    for (int i = threadIdx.x; i < words; i += 128)
        st_global(memory + i, ld_shared<uint32_t>(box + 4 * i));
}

// A box stored, or added, from shared memory that looks like `memory`.
__global__ void store_kernel(const __grid_constant__ TensorMap map, int4 at, const uint32_t* memory,
                             int words, bool add) {
    const SharedAddress box = dynamic_shared();
    for (int i = threadIdx.x; i < words; i += 128) st_shared(box + 4 * i, ld_global(memory + i));
    fence_proxy_async();
    barrier();
    if (threadIdx.x == 32) {
        if (add)
            tma_reduce_add_4d(&map, box, at.x, at.y, at.z, at.w);
        else
            tma_store_4d(&map, box, at.x, at.y, at.z, at.w);
        bulk_commit();
        bulk_wait<0>();
    }
}

// sums[i] += 2 * from[i], in two groups; 128 floats.
__global__ void bulk_kernel(const float* from, float* sums) {
    const SharedAddress loaded = dynamic_shared(), row = loaded + 16;
    if (threadIdx.x == 0) {
        mbarrier_init(loaded, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(loaded, 512);
        bulk_load(row, from, 512, loaded);
        mbarrier_wait(loaded, 0);
        for (int i = 0; i < 2; ++i) {
            bulk_reduce_add(sums, row, 512);
            bulk_commit();
            bulk_wait<1>();
        }
        bulk_wait<0>();
    }
}

// Four matrices (4, 8, 8) from the registers (lanes, 4).
__global__ void stmatrix_kernel(const uint4* d, uint4* matrices) {
    const SharedAddress row = dynamic_shared() + 16 * threadIdx.x;
    const uint4 mine = ld_global(d + threadIdx.x);
    stmatrix_x4(row, {mine.x, mine.y, mine.z, mine.w});
    warp_sync();
    st_global(matrices + threadIdx.x, ld_shared<uint4>(row));
}

// What each block of a cluster is told by each: its rank, and with it the number of blocks.
__global__ void clusters_kernel(int* words, int2* pairs) {
    const int rank = cluster_rank(), blocks = cluster_size(), other = threadIdx.x;
    const SharedAddress told = dynamic_shared(), ranks = told + 32, sizes = told + 64;
    if (threadIdx.x == 0) {
        mbarrier_init(told, 1);
        fence_mbarrier_init();
    }
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x == 0) mbarrier_arrive_expect(told, 12 * blocks);
    if (other < blocks) {
        st_async_at(ranks + 4 * rank, rank, told, other);
        st_async_at(sizes + 8 * rank, int2{rank, blocks}, told, other);
    }
    mbarrier_wait(told, 0);
    if (other >= blocks) return;
    st_global(words + blockIdx.x * blocks + other, ld_shared<int>(ranks + 4 * other));
    st_global(pairs + blockIdx.x * blocks + other, ld_shared<int2>(sizes + 8 * other));
}

}  // namespace

// What is reported of run(): nothing if all is well. Until the next call.
template <class Run>
const char* report_of(Run run) {
    static std::string said;
    said.clear();
    try {
        run();
    } catch (const std::exception& error) {
        said = error.what();
    }
    return said.c_str();
}

FASTATTN_EXPORT const char* run_product(const void* a, const void* b, float* d, int n, bool bf16,
                                        int form) {
    const auto run = [&]<int kN>() {
        if (n != kN) return false;
        bf16 ? product<bfloat16, kN>(a, b, d, form) : product<float16, kN>(a, b, d, form);
        return true;
    };
    const auto run_one = [&]<int... kN>() { return (run.template operator()<kN>() || ...); };
    return report_of([&] {
        if (!run_one.template operator()<16, 32, 64, 80, 96, 128, 176, 192, 256>())
            throw std::invalid_argument("no such n");
    });
}
FASTATTN_EXPORT const char* run_pipeline(const void* a, const void* b, float* d, int steps) {
    const int k = 64 * steps;
    return report_of([&] {
        const TensorMap map_d = make_tensor_map(
            {Element::float32, d, {64, 128, 1, 1}, {1, 64, 8192, 8192}, {32, 64, 1, 1}, true});
        launch(pipeline_kernel, 1, 384, 1024 + 2 * (128 + 64) * 128, nullptr,
               matrix_map<bfloat16>(a, 128, k, 128), matrix_map<bfloat16>(b, 64, k, 64), map_d,
               steps);
    });
}
FASTATTN_EXPORT const char* run_load(const Tiled* tensor, const int4* at, uint32_t* memory,
                                     int words) {
    return report_of([&] {
        launch(load_kernel, 1, 128, 1024 + 4 * words, nullptr, make_tensor_map(*tensor), *at,
               memory, words);
    });
}
FASTATTN_EXPORT const char* run_store(const Tiled* tensor, const int4* at, const uint32_t* memory,
                                      int words, bool add) {
    return report_of([&] {
        launch(store_kernel, 1, 128, 4 * words, nullptr, make_tensor_map(*tensor), *at, memory,
               words, add);
    });
}
FASTATTN_EXPORT const char* run_bulk(const float* from, float* sums) {
    return report_of([&] { launch(bulk_kernel, 1, 128, 1024, nullptr, from, sums); });
}
FASTATTN_EXPORT const char* run_stmatrix(const uint4* d, uint4* matrices) {
    return report_of([&] { launch(stmatrix_kernel, 1, 32, 512, nullptr, d, matrices); });
}
FASTATTN_EXPORT const char* run_clusters(int blocks, int clusters, int* words, int2* pairs) {
    return report_of([&] {
        launch_clusters(blocks, clusters_kernel, unsigned(blocks * clusters), 64, 128, nullptr,
                        words, pairs);
    });
}
// Where the emulation looks for the chunk of an operand that holds element (mn, k).
FASTATTN_EXPORT uint32_t operand_chunk(uint64_t descriptor, bool mn_major, int extent, int mn,
                                       int k) {
    const auto operand = emulation::decode_wgmma_operand(descriptor, mn_major, extent);
    return mn_major ? operand.chunk_of_column(mn, k) : operand.chunk_of_row(mn, k / 8);
}
FASTATTN_EXPORT uint64_t operand_descriptor(uint32_t tile, uint32_t leading) {
    return wgmma_operand(tile, leading);
}

}  // namespace fastattn::cuda
