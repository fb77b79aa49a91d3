// Kernels of one instruction or one tile, whose results test_emulation.py compares.
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/philox.cuh"
#include "cuda/tile.cuh"

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastattn::cuda {

namespace {

// d (lanes, 4) of four matrices (4, 8, 8) one after the other.
__global__ void ldmatrix_kernel(const uint4* matrices, uint4* d, bool transposed) {
    const int lane = threadIdx.x;
    const SharedAddress row = dynamic_shared() + 16 * lane;
    st_shared(row, ld_global(matrices + lane));
    warp_sync();
    uint32_t mine[4];
    if (transposed)
        ldmatrix_x4_trans(mine, row);
    else
        ldmatrix_x4(mine, row);
    st_global(d + lane, uint4{mine[0], mine[1], mine[2], mine[3]});
}

// d (16, 8) = c + a (16, 16) b (16, 8), row by row; fragments gathered as ptx.cuh documents them.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, const float* c, float* d) {
    const int g = threadIdx.x / 4, j = 2 * (threadIdx.x % 4);
    const auto pair = [](T low, T high) { return uint32_t(low.bits) | uint32_t(high.bits) << 16; };
    const auto a_pair = [&](int row, int column) {
        return pair(a[16 * row + column], a[16 * row + column + 1]);
    };
    const auto b_pair = [&](int row) { return pair(b[8 * row + g], b[8 * row + 8 + g]); };
    const uint32_t fragment[4] = {a_pair(g, j), a_pair(g + 8, j), a_pair(g, j + 8),
                                  a_pair(g + 8, j + 8)};
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = c[8 * (g + i / 2 * 8) + j + i % 2];
    mma_m16n8k16<T>(sum, fragment, b_pair(j), b_pair(j + 8));
    for (int i = 0; i < 4; ++i) d[8 * (g + i / 2 * 8) + j + i % 2] = sum[i];
}

template <class T>
__global__ void round_kernel(const float* from, uint32_t* to) {
    const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
    st_global(to + i, pack<T>(ld_global(from + 2 * i), ld_global(from + 2 * i + 1)));
}

template <class T>
__global__ void widen_kernel(const uint32_t* from, float2* to) {
    const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
    st_global(to + i, unpack<T>(ld_global(from + i)));
}

__global__ void approximations_kernel(const float* x, float* results) {
    const float mine = ld_global(x + threadIdx.x);
    const int count = blockDim.x;
    st_global(results + threadIdx.x, exp2_approx(mine));
    st_global(results + count + threadIdx.x, log2_approx(mine));
    st_global(results + 2 * count + threadIdx.x, reciprocal_approx(mine));
}

// results (6, threads)
__global__ void shuffles_kernel(float* results) {
    const int thread = threadIdx.x, threads = blockDim.x;
    const float x = float(thread);
    st_global(results + thread, shuffle_xor(x, 1));
    st_global(results + threads + thread, shuffle_xor(x, 16));
    st_global(results + 2 * threads + thread, shuffle(x, 3));
    st_global(results + 3 * threads + thread, shuffle(x, thread / 4));
    st_global(results + 4 * threads + thread, any_of_warp(thread == 40) ? 1.0f : 0.0f);
    st_global(results + 5 * threads + thread, float(shuffle(uint64_t(thread) << 32, 7) >> 32));
}

// Warp 0 hands `steps` numbers to warp 1 through one place, by a barrier for full and one for free.
__global__ void handshake_kernel(int* sums, int steps) {
    constexpr int kFull = 1, kFree = 2;
    const int lane = threadIdx.x % 32;
    const SharedAddress place = dynamic_shared() + 4 * lane;
    int sum = 0;
    for (int step = 0; step < steps; ++step) {
        if (threadIdx.x < 32) {
            barrier_sync(kFree, 64);
            st_shared(place, 100 * step + lane);
            barrier_arrive(kFull, 64);
        } else {
            barrier_arrive(kFree, 64);
            barrier_sync(kFull, 64);
            sum += ld_shared<int>(place ^ 4);
        }
    }
    if (threadIdx.x >= 32) st_global(sums + lane, sum);
}

// Each block waits for its turn, then doubles the sum and adds its number.
__global__ void turns_kernel(int* turn, int* sum) {
    if (threadIdx.x == 0) {
        while (ld_acquire(turn) != int(blockIdx.x)) continue;
        st_global(sum, 2 * ld_global(sum) + int(blockIdx.x));
        add_release(turn, 1);
    }
    barrier();
}

// words (rows, columns / 64, 16, 4) of the stream of (batch, head)
__global__ void philox_kernel(uint32_t* words, uint64_t seed, int head, int batch) {
    const int row = blockIdx.x, columns = int(64 * gridDim.y);
    const int column = 64 * int(blockIdx.y) + threadIdx.x;
    uint32_t mine[4];
    if (threadIdx.x < 16) {
        philox_words(mine, seed, column, row, head, batch);
        for (int i = 0; i < 4; ++i) st_global(words + row * columns + column + 16 * i, mine[i]);
    }
}

// d (m, n), a product of the first `columns` columns or rows of the k side, by one warp a 16 rows.
// a is (kM, kK), or (kK, kM) if transposed, b (kN, kK), or (kK, kN); rows from `rows` on count as
// zeros.
template <int kM, int kN, int kK, bool kTransA, bool kTransB>
__global__ void tile_kernel(const float16* a, const float16* b, float* d, int rows, int columns) {
    constexpr int kThreads = 2 * kM;
    using TileA = Tile<kTransA ? kK : kM, kTransA ? kM : kK>;
    using TileB = Tile<kTransB ? kK : kN, kTransB ? kN : kK>;
    constexpr int kColumnsA = kTransA ? kM : kK, kColumnsB = kTransB ? kN : kK;
    const TileA tile_a{dynamic_shared()};
    const TileB tile_b{dynamic_shared() + TileA::kBytes};
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    tile_a.template load<kThreads>(a, kColumnsA, rows, columns, thread);
    tile_b.template load<kThreads>(b, kColumnsB, rows, columns, thread);
    cp_async_commit();
    cp_async_wait<0>();
    barrier();
    float acc[kN / 8][4] = {};
    for (int k = 0; k < kK; k += 16) {
        uint32_t fragment[4];
        if (kTransA)
            tile_a.fragment_a_trans(fragment, k, 16 * warp);
        else
            tile_a.fragment_a(fragment, 16 * warp, k);
        for (int n = 0; n < kN; n += 16) {
            uint32_t other[4];
            if (kTransB)
                tile_b.fragment_b_trans(other, k, n);
            else
                tile_b.fragment_b(other, n, k);
            mma_m16n8k16<float16>(acc[n / 8], fragment, other[0], other[1]);
            mma_m16n8k16<float16>(acc[n / 8 + 1], fragment, other[2], other[3]);
        }
    }
    for (int j = 0; j < kN / 8; ++j)
        for (int i = 0; i < 4; ++i)
            st_global(d + (16 * warp + lane / 4 + i / 2 * 8) * kN + 8 * j + 2 * (lane % 4) + i % 2,
                      acc[j][i]);
}

template <int kM, int kN, int kK, bool kTransA, bool kTransB>
void tile_product(const void* a, const void* b, float* d, int rows, int columns) {
    launch(tile_kernel<kM, kN, kK, kTransA, kTransB>, 1, 2 * kM, 2 * (kM + kN) * kK, nullptr,
           static_cast<const float16*>(a), static_cast<const float16*>(b), d, rows, columns);
}

}  // namespace

FASTATTN_EXPORT void run_ldmatrix(const uint4* matrices, uint4* d, bool transposed) {
    launch(ldmatrix_kernel, 1, 32, 512, nullptr, matrices, d, transposed);
}
FASTATTN_EXPORT int64_t take_ldmatrix_conflicts() { return emulation::take_ldmatrix_conflicts(); }
FASTATTN_EXPORT void run_mma(const void* a, const void* b, const float* c, float* d, bool bf16) {
    if (bf16)
        launch(mma_kernel<bfloat16>, 1, 32, 0, nullptr, static_cast<const bfloat16*>(a),
               static_cast<const bfloat16*>(b), c, d);
    else
        launch(mma_kernel<float16>, 1, 32, 0, nullptr, static_cast<const float16*>(a),
               static_cast<const float16*>(b), c, d);
}
// count: a multiple of 256
FASTATTN_EXPORT void run_round(const float* from, uint32_t* to, int count, bool bf16) {
    launch(bf16 ? round_kernel<bfloat16> : round_kernel<float16>, count / 256, 128, 0, nullptr,
           from, to);
}
FASTATTN_EXPORT void run_widen(const uint32_t* from, float2* to, int count, bool bf16) {
    launch(bf16 ? widen_kernel<bfloat16> : widen_kernel<float16>, count / 256, 128, 0, nullptr,
           from, to);
}
FASTATTN_EXPORT void run_approximations(const float* x, float* results, int count) {
    launch(approximations_kernel, 1, count, 0, nullptr, x, results);
}
FASTATTN_EXPORT void run_shuffles(float* results) {
    launch(shuffles_kernel, 1, 64, 0, nullptr, results);
}
FASTATTN_EXPORT void run_handshake(int* sums, int steps) {
    launch(handshake_kernel, 1, 64, 128, nullptr, sums, steps);
}
FASTATTN_EXPORT void run_turns(int* turn, int* sum, int blocks) {
    launch(turns_kernel, blocks, 64, 0, nullptr, turn, sum);
}
FASTATTN_EXPORT void run_philox(uint32_t* words, int rows, int columns, uint64_t seed, int head,
                                int batch) {
    launch(philox_kernel, dim3(rows, columns / 64), 32, 0, nullptr, words, seed, head, batch);
}
FASTATTN_EXPORT void run_tile(const void* a, const void* b, float* d, int rows, int columns,
                              int form) {
    switch (form) {
        case 0:
            return tile_product<64, 32, 64, false, false>(a, b, d, rows, columns);
        case 1:
            return tile_product<64, 64, 128, true, true>(a, b, d, rows, columns);
        case 2:
            return tile_product<32, 128, 32, false, true>(a, b, d, rows, columns);
        case 3:
            return tile_product<64, 64, 32, true, false>(a, b, d, rows, columns);
    }
}

}  // namespace fastattn::cuda
