// What becomes of the sums of a tile's products, in the registers of the warps that hold them.
//
// A warp's sums are slices of (16, 64), each laid out as 8 accumulators of mma_m16n8k16 side by
// side. A slice passes through 2 KB of shared memory of the warp's own between this layout and rows
// of 128 bytes, as global memory is read and written.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/gemm.cuh"
#include "cuda/philox.cuh"
#include "cuda/tile.cuh"

namespace fastattn::cuda {

// Element (g + 8 h, 8 j + 2 c + e), g = lane / 4 and c = lane % 4, is [j][2 h + e].
using Slice = float[8][4];

// A position in a matrix.
struct At {
    int row, column;
    FASTATTN_DEVICE At operator+(At other) const {
        return {row + other.row, column + other.column};
    }
};

// The (rows, columns) matrices that a tile is read from and written to are contiguous.
struct Extent {
    int rows, columns;
    FASTATTN_DEVICE int64_t offset(At at) const { return int64_t(at.row) * columns + at.column; }
    FASTATTN_DEVICE int64_t size() const { return int64_t(rows) * columns; }
};

// Sums of each slice's columns, float32: (kBlockM / 16, columns), in shared memory.
struct SliceSums {
    SharedAddress base;
    int columns;

    FASTATTN_DEVICE SharedAddress at(int row, int column) const {
        return base + 4 * (row / 16 * columns + column);
    }
};

// A warp's way between its slice of a matrix and rows of it; warp_sync stands between the two.
struct Stage {
    static constexpr int kBytes = 16 * 64 * 2;

    Tile<16, 64> tile;

    // Pair [j][h] of this lane.
    FASTATTN_DEVICE SharedAddress pair(int j, int h) const {
        const int lane = threadIdx.x % 32;
        return tile.at(lane / 4 + 8 * h, j) + 4 * (lane % 4);
    }
    // Element 0 of this lane's i-th 8 of a row.
    static FASTATTN_DEVICE At chunk(int i) {
        const int lane = threadIdx.x % 32;
        return {4 * i + lane / 8, lane % 8 * 8};
    }
    FASTATTN_DEVICE SharedAddress chunk_address(int i) const {
        return tile.at(chunk(i).row, chunk(i).column / 8);
    }

    template <class T>
    FASTATTN_DEVICE void round_in(const Slice& slice) const {
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                st_shared(pair(j, h), pack<T>(slice[j][2 * h], slice[j][2 * h + 1]));
    }
    template <class T>
    FASTATTN_DEVICE void copy_out(T* matrix, Extent extent, At at) const {
        tile.template store<16>(matrix + extent.offset(at), extent.columns, extent.rows - at.row,
                                extent.columns - at.column, 0, threadIdx.x % 32);
    }
    // Both, and leaves the stage free.
    template <class T>
    FASTATTN_DEVICE void store(T* matrix, Extent extent, At at, const Slice& slice) const {
        round_in<T>(slice);
        warp_sync();
        copy_out(matrix, extent, at);
        warp_sync();
    }

    // The other way: loads are issued early, and put into the stage when they are needed.
    template <class T>
    static FASTATTN_DEVICE void fetch(uint4 (&words)[4], const T* matrix, Extent extent, At at) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const At from = at + chunk(i);
            words[i] = uint4{0, 0, 0, 0};
            if (from.row < extent.rows && from.column < extent.columns)
                words[i] = ld_global(reinterpret_cast<const uint4*>(matrix + extent.offset(from)));
        }
    }
    FASTATTN_DEVICE void put(const uint4 (&words)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) st_shared(chunk_address(i), words[i]);
    }
};

// Two stages a warp, then the sums.
constexpr int kStagesBytes = 2 * Stage::kBytes;
constexpr int sums_bytes(int block_m, int block_n) { return block_m / 16 * block_n * 4; }

template <class T>
FASTATTN_DEVICE void add_bias(Slice& slice, const T* bias, int columns, At at) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int column = at.column + 8 * j + threadIdx.x % 4 * 2;
        if (column >= columns) continue;
        const float2 pair =
            unpack<T>(ld_readonly(reinterpret_cast<const uint32_t*>(bias + column)));
#pragma unroll
        for (int h = 0; h < 2; ++h) slice[j][2 * h] += pair.x, slice[j][2 * h + 1] += pair.y;
    }
}

struct Dropout {
    const uint64_t* seed;  // or null
    uint32_t threshold;
    float keep_scale;

    // Bit 4 j + 2 h + e tells whether element [j][2 h + e] of the slice is kept.
    FASTATTN_DEVICE uint32_t kept(At at) const {
        if (!seed) return ~0u;
        const uint64_t key = ld_readonly(seed);
        const int lane = threadIdx.x % 32;
        uint32_t bits = 0;
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int column = 0; column < 4; ++column) {
                // Its four words serve columns 16 apart, every second j.
                const int odd = column / 2, e = column % 2;
                uint32_t words[4];
                philox_words(words, key, at.column + 8 * odd + lane % 4 * 2 + e,
                             at.row + 8 * h + lane / 4, 0, 0);
#pragma unroll
                for (int w = 0; w < 4; ++w)
                    if (words[w] >= threshold) bits |= 1u << (4 * (2 * w + odd) + 2 * h + e);
            }
        return bits;
    }
    FASTATTN_DEVICE float factor(uint32_t kept, int j, int element) const {
        return kept >> (4 * j + element) & 1 ? keep_scale : 0.0f;
    }
};

// An epilogue's run(sums, origin, split, local, stages, slice_sums) finishes a warp's part of a
// tile: `sums` are the slices of the first product, then of the second; slice s of each lies at
// local(s) in the tile at `origin`.

// out = sums + bias; of a share of the inner dim: the sums in float32.
template <class T>
struct OutEpilogue {
    using Element = T;
    static constexpr int kProducts = 1;
    static constexpr bool kSumsColumns = false;

    T* out;
    Extent extent;
    const T* bias;    // or null
    float* partials;  // (splits, rows, columns), or null

    template <int slices, class Local>
    FASTATTN_DEVICE void run(Slice (&sums)[slices], At origin, int split, Local local,
                             const Stage (&stages)[2], SliceSums) const {
#pragma unroll
        for (int s = 0; s < slices; ++s) {
            const At at = origin + local(s);
            if (partials) {
                store_partial(split, at, sums[s]);
                continue;
            }
            if (bias) add_bias(sums[s], bias, extent.columns, at);
            stages[0].store(out, extent, at, sums[s]);
        }
    }

    FASTATTN_DEVICE void store_partial(int split, At at, const Slice& slice) const {
        const int lane = threadIdx.x % 32;
        float* to = partials + split * extent.size();
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const At pair = at + At{lane / 4 + 8 * h, 8 * j + lane % 4 * 2};
                if (pair.row < extent.rows && pair.column < extent.columns)
                    st_global(reinterpret_cast<float2*>(to + extent.offset(pair)),
                              float2{slice[j][2 * h], slice[j][2 * h + 1]});
            }
    }
};

// hidden = dropout(act(preact)), preact = sums + b1; gated: act(gate) * up, preact both of them.
template <class T, bool gated>
struct HiddenEpilogue {
    using Element = T;
    static constexpr int kProducts = gated ? 2 : 1;
    static constexpr bool kSumsColumns = false;

    T* hidden;  // or null
    T* preact;  // (kProducts, rows, columns), or null
    Extent extent;
    const T* bias;  // or null
    Dropout dropout;
    Activation activation;

    template <int slices, class Local>
    FASTATTN_DEVICE void run(Slice (&sums)[slices], At origin, int, Local local,
                             const Stage (&stages)[2], SliceSums) const {
        constexpr int kOfProduct = slices / kProducts;
#pragma unroll
        for (int s = 0; s < kOfProduct; ++s) {
            const At at = origin + local(s);
            Slice& gate = sums[s];
            Slice& up = sums[s + slices - kOfProduct];  // gate itself where there is none
            if (bias) add_bias(gate, bias, extent.columns, at);
            if (preact) {
                stages[0].store(preact, extent, at, gate);
                if constexpr (gated) stages[1].store(preact + extent.size(), extent, at, up);
            }
            if (!hidden) continue;
            with_activation(activation, [&](auto act) {
#pragma unroll
                for (int j = 0; j < 8; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float value = act.value(gate[j][i]);
                        gate[j][i] = gated ? value * up[j][i] : value;
                    }
            });
            if constexpr (!gated) {
                if (dropout.seed) {
                    const uint32_t kept = dropout.kept(at);
#pragma unroll
                    for (int j = 0; j < 8; ++j)
#pragma unroll
                        for (int i = 0; i < 4; ++i) gate[j][i] *= dropout.factor(kept, j, i);
                }
            }
            stages[0].store(hidden, extent, at, gate);
        }
    }
};

// From the sums, which are the gradient of the hidden layer, to that of preact: times the dropout's
// factor and the activation's slope. Gated: d = sums * slope * up, and of up sums * act(gate).
template <class T, bool gated>
struct PreactEpilogue {
    using Element = T;
    static constexpr int kProducts = 1;
    static constexpr bool kSumsColumns = !gated;

    T* dpreact;       // (rows, columns), gated (2, rows, columns); may be preact
    const T* preact;  // the same
    T* hidden;        // computed again, or null
    Extent extent;
    float* column_sums;  // of dpreact, one row a tile: (tiles, columns); or null
    Dropout dropout;
    Activation activation;

    template <int slices, class Local>
    FASTATTN_DEVICE void run(Slice (&sums)[slices], At origin, int, Local local,
                             const Stage (&stages)[2], SliceSums slice_sums) const {
        uint4 gate_words[4], up_words[4];
        const auto fetch = [&](int s) {
            Stage::fetch(gate_words, preact, extent, origin + local(s));
            if constexpr (gated)
                Stage::fetch(up_words, preact + extent.size(), extent, origin + local(s));
        };
        fetch(0);
#pragma unroll
        for (int s = 0; s < slices; ++s) {
            const At at = origin + local(s);
            stages[0].put(gate_words);
            if constexpr (gated) stages[1].put(up_words);
            warp_sync();
            if (s + 1 < slices) fetch(s + 1);

            with_activation(activation, [&](auto act) {
                if constexpr (gated)
                    differentiate(act, sums[s], stages);
                else
                    differentiate(act, sums[s], stages[0], slice_sums, at, local(s));
            });
            warp_sync();
            stages[0].copy_out(dpreact, extent, at);
            if constexpr (gated) stages[1].copy_out(dpreact + extent.size(), extent, at);
            warp_sync();
            if (hidden) stages[0].store(hidden, extent, at, sums[s]);
        }
    }

    // The stages' gate and up become their gradients, d, from hidden's gradient, hidden.
    template <class Act>
    FASTATTN_DEVICE void differentiate(Act act, Slice& d, const Stage (&stages)[2]) const {
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const SharedAddress gate_at = stages[0].pair(j, h), up_at = stages[1].pair(j, h);
                const float2 gate = unpack<T>(ld_shared<uint32_t>(gate_at));
                const float2 up = unpack<T>(ld_shared<uint32_t>(up_at));
                const ValueAndSlope low = act.both(gate.x), high = act.both(gate.y);
                float &d_low = d[j][2 * h], &d_high = d[j][2 * h + 1];
                st_shared(up_at, pack<T>(d_low * low.value, d_high * high.value));
                st_shared(gate_at, pack<T>(d_low * up.x * low.slope, d_high * up.y * high.slope));
                d_low = low.value * up.x, d_high = high.value * up.y;
            }
    }

    // The same of the plain form, with the sums of the gradient's columns.
    template <class Act>
    FASTATTN_DEVICE void differentiate(Act act, Slice& d, Stage stage, SliceSums sums, At at,
                                       At local) const {
        const int lane = threadIdx.x % 32;
        const uint32_t kept = dropout.kept(at);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float2 column_sum{0.0f, 0.0f};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const SharedAddress preact_at = stage.pair(j, h);
                const float2 before = unpack<T>(ld_shared<uint32_t>(preact_at));
                const ValueAndSlope low = act.both(before.x), high = act.both(before.y);
                float &d_low = d[j][2 * h], &d_high = d[j][2 * h + 1];
                const float factor_low = dropout.factor(kept, j, 2 * h);
                const float factor_high = dropout.factor(kept, j, 2 * h + 1);
                const float2 both{d_low * factor_low * low.slope,
                                  d_high * factor_high * high.slope};
                column_sum.x += both.x, column_sum.y += both.y;
                st_shared(preact_at, pack<T>(both.x, both.y));
                d_low = low.value * factor_low, d_high = high.value * factor_high;
            }
            if (!column_sums) continue;
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) {
                column_sum.x += shuffle_xor(column_sum.x, distance);
                column_sum.y += shuffle_xor(column_sum.y, distance);
            }
            if (lane < 4)
                st_shared(sums.at(local.row, local.column + 8 * j + 2 * lane), column_sum);
        }
    }
    // After the last slice of a tile of kBlockM rows: by `threads` threads, which `sync` orders.
    template <int kBlockM, class Sync>
    FASTATTN_DEVICE void finish(At origin, SliceSums sums, int thread, int threads,
                                Sync sync) const {
        if (!column_sums) return;
        sync();
        for (int column = thread; column < sums.columns; column += threads) {
            float sum = 0.0f;
#pragma unroll
            for (int row = 0; row < kBlockM; row += 16)
                sum += ld_shared<float>(sums.at(row, column));
            if (origin.column + column < extent.columns)
                st_global(column_sums + int64_t(origin.row / kBlockM) * extent.columns +
                              origin.column + column,
                          sum);
        }
        sync();
    }
};

}  // namespace fastattn::cuda
