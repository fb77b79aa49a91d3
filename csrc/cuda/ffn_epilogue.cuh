// What becomes of the sums of a tile's products, in the registers of the warps that hold them.
//
// A warp's sums are slices of (16, 64), each laid out as 8 accumulators of mma_m16n8k16 side by
// side. Global memory is read and written 16 bytes a lane; the four lanes that share a row exchange
// words to get from one layout to the other.
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
    FASTATTN_DEVICE bool contains(At at) const { return at.row < rows && at.column < columns; }
    FASTATTN_DEVICE int64_t offset(At at) const { return int64_t(at.row) * columns + at.column; }
    FASTATTN_DEVICE int64_t size() const { return int64_t(rows) * columns; }
};

// Sums of each slice's columns, float32: (kBlockM / 16, columns), in shared memory.
struct SliceSums {
    SharedAddress base;
    int columns;

    static constexpr int bytes(int block_m, int columns) { return block_m / 16 * columns * 4; }
    FASTATTN_DEVICE SharedAddress at(int row, int column) const {
        return base + 4 * (row / 16 * columns + column);
    }
};

// What a lane has of a slice's 8 rows from 8 h on and 32 columns from 32 half on: as pairs,
// words[k] is element [4 half + k][2 h] and the next; exchanged, words are 8 columns that follow
// each other.
struct HalfRow {
    uint32_t words[4];

    // Where those 8 columns begin, of a slice that begins at `at`.
    static FASTATTN_DEVICE At place(At at, int half, int h) {
        const int lane = threadIdx.x % 32;
        return at + At{8 * h + lane / 4, 32 * half + lane % 4 * 8};
    }
    // Not pairs yet: the load is still on its way.
    template <class T>
    FASTATTN_DEVICE void fetch(const T* matrix, Extent extent, At place) {
        uint4 four{0, 0, 0, 0};
        if (extent.contains(place))
            four = ld_global(reinterpret_cast<const uint4*>(matrix + extent.offset(place)));
        words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    }
    FASTATTN_DEVICE void exchange() { transpose_quad(words); }
    template <class T>
    FASTATTN_DEVICE void store(T* matrix, Extent extent, At place) {
        exchange();
        if (extent.contains(place))
            st_global(reinterpret_cast<uint4*>(matrix + extent.offset(place)),
                      uint4{words[0], words[1], words[2], words[3]});
    }
};

template <class T>
FASTATTN_DEVICE void store_slice(T* matrix, Extent extent, At at, const Slice& slice) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            HalfRow row;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float (&pair)[4] = slice[4 * half + k];
                row.words[k] = pack<T>(pair[2 * h], pair[2 * h + 1]);
            }
            row.store(matrix, extent, HalfRow::place(at, half, h));
        }
}

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

    // Bit 4 j + 2 h + e tells whether element [j][2 h + e] of the slice at `at` is kept.
    FASTATTN_DEVICE uint32_t kept(At at) const {
        const uint64_t key = ld_readonly(seed);
        const int lane = threadIdx.x % 32;
        uint32_t bits = 0;
#pragma unroll 2
        for (int i = 0; i < 8; ++i) {
            // The four words serve columns 16 apart, every second j.
            const int h = i / 4, odd = i / 2 % 2, e = i % 2;
            uint32_t words[4];
            philox_words(words, key, at.column + 8 * odd + lane % 4 * 2 + e,
                         at.row + 8 * h + lane / 4, 0, 0);
#pragma unroll
            for (int w = 0; w < 4; ++w)
                bits |= uint32_t(words[w] >= threshold) << (4 * (2 * w + odd) + 2 * h + e);
        }
        return bits;
    }
    FASTATTN_DEVICE void apply(Slice& slice, uint32_t kept) const {
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) slice[j][i] *= kept >> (4 * j + i) & 1 ? keep_scale : 0.0f;
    }
};

// Brings the next slice to the front: loops over slices that are not unrolled, so that the code
// stays in the instruction cache, index them by 0.
template <int slices>
FASTATTN_DEVICE void advance(Slice (&sums)[slices]) {
#pragma unroll
    for (int s = 0; s + 1 < slices; ++s)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[s][j][i] = sums[s + 1][j][i];
}

// An epilogue's run(sums, origin, split, local, slice_sums) finishes a warp's part of a tile:
// `sums` are the slices of the first product, then of the second; slice s of each lies at local(s)
// in the tile at `origin`.

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
                             SliceSums) const {
#pragma unroll
        for (int s = 0; s < slices; ++s) {
            const At at = origin + local(s);
            if (partials) {
                store_partial(split, at, sums[s]);
                continue;
            }
            if (bias) add_bias(sums[s], bias, extent.columns, at);
            store_slice(out, extent, at, sums[s]);
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
                if (extent.contains(pair))
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
    FASTATTN_DEVICE void run(Slice (&sums)[slices], At origin, int, Local local, SliceSums) const {
        constexpr int kOfProduct = slices / kProducts;
        uint32_t kept[kOfProduct] = {};
        if (!gated && dropout.seed) {
#pragma unroll
            for (int s = 0; s < kOfProduct; ++s) kept[s] = dropout.kept(origin + local(s));
        }
        with_activation(activation, [&](auto act) {
#pragma unroll
            for (int s = 0; s < kOfProduct; ++s)
                // Of one product, up is gate.
                finish_slice(act, sums[s], sums[s + slices - kOfProduct], origin + local(s),
                             kept[s]);
        });
    }

  private:
    template <class Act>
    FASTATTN_DEVICE void finish_slice(Act act, Slice& gate, Slice& up, At at, uint32_t kept) const {
        if (bias) add_bias(gate, bias, extent.columns, at);
        if (preact) {
            store_slice(preact, extent, at, gate);
            if constexpr (gated) store_slice(preact + extent.size(), extent, at, up);
        }
        if (!hidden) return;
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float value = act.value(gate[j][i]);
                gate[j][i] = gated ? value * up[j][i] : value;
            }
        if (!gated && dropout.seed) dropout.apply(gate, kept);
        store_slice(hidden, extent, at, gate);
    }
};

// From the sums, which are the gradient of the hidden layer, to that of preact: times the dropout's
// factor and the activation's slope. Gated: d = sums * slope * up, and of up sums * act(gate).
template <class T, bool gated>
struct PreactEpilogue {
    using Element = T;
    static constexpr int kProducts = 1;
    static constexpr bool kSumsColumns = !gated;
    static constexpr int kMatrices = gated ? 2 : 1;

    T* dpreact;       // (rows, columns), gated (2, rows, columns); may be preact
    const T* preact;  // the same
    T* hidden;        // computed again, or null
    Extent extent;
    float* column_sums;  // of dpreact, one row a tile: (tiles, columns); or null
    Dropout dropout;
    Activation activation;

    template <int slices, class Local>
    FASTATTN_DEVICE void run(Slice (&sums)[slices], At origin, int, Local local,
                             SliceSums slice_sums) const {
        HalfRow next[kMatrices][2];  // [gate or up][h]
        const auto fetch = [&](int s, int half) {
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int matrix = 0; matrix < kMatrices; ++matrix)
                    next[matrix][h].fetch(preact + matrix * extent.size(), extent,
                                          HalfRow::place(origin + local(s), half, h));
        };
        fetch(0, 0);
#pragma unroll 1
        for (int s = 0; s < slices; ++s, advance(sums)) {
            const At at = origin + local(s);
            const bool drops = !gated && dropout.seed;
            uint32_t kept = 0;
            if (drops) {
                kept = dropout.kept(at);
                dropout.apply(sums[0], kept);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                HalfRow now[kMatrices][2];
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int matrix = 0; matrix < kMatrices; ++matrix) {
                        now[matrix][h] = next[matrix][h];
                        now[matrix][h].exchange();
                    }
                if (half == 0)
                    fetch(s, 1);
                else if (s + 1 < slices)
                    fetch(s + 1, 0);
                float2 column_sum[4] = {};
                with_activation(activation, [&](auto act) {
#pragma unroll
                    for (int k = 0; k < 4; ++k)
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const int j = 4 * half + k;
                            float (&pair)[2] = reinterpret_cast<float (&)[2]>(sums[0][j][2 * h]);
                            const float2 gradient = differentiate(act, pair, now[0][h].words[k],
                                                                  now[kMatrices - 1][h].words[k]);
                            column_sum[k].x += gradient.x, column_sum[k].y += gradient.y;
                        }
                });
                if (kSumsColumns && column_sums)
                    sum_rows(column_sum, slice_sums, local(s) + At{0, 32 * half});
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int matrix = 0; matrix < kMatrices; ++matrix)
                        now[matrix][h].store(dpreact + matrix * extent.size(), extent,
                                             HalfRow::place(at, half, h));
            }
            if (!hidden) continue;
            if (drops) dropout.apply(sums[0], kept);
            store_slice(hidden, extent, at, sums[0]);
        }
    }

    // Of a pair of elements: gate and up become their gradients, d, hidden's gradient, becomes
    // hidden. Returns gate's gradient, not rounded.
    template <class Act>
    static FASTATTN_DEVICE float2 differentiate(Act act, float (&d)[2], uint32_t& gate,
                                                uint32_t& up) {
        const float2 before = unpack<T>(gate);
        const ValueAndSlope low = act.both(before.x), high = act.both(before.y);
        float2 gradient;
        if constexpr (gated) {
            const float2 by = unpack<T>(up);
            gradient = {d[0] * by.x * low.slope, d[1] * by.y * high.slope};
            up = pack<T>(d[0] * low.value, d[1] * high.value);
            d[0] = low.value * by.x, d[1] = high.value * by.y;
        } else {
            gradient = {d[0] * low.slope, d[1] * high.slope};
            d[0] = low.value, d[1] = high.value;
        }
        gate = pack<T>(gradient.x, gradient.y);
        return gradient;
    }

    // Sums over the slice's rows, of 32 columns from `local` on; a lane's are 8 k + 2 c and the
    // next.
    static FASTATTN_DEVICE void sum_rows(float2 (&sum)[4], SliceSums sums, At local) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) {
                sum[k].x += shuffle_xor(sum[k].x, distance);
                sum[k].y += shuffle_xor(sum[k].y, distance);
            }
            if (lane < 4) st_shared(sums.at(local.row, local.column + 8 * k + 2 * lane), sum[k]);
        }
    }

    // After the last slice of a tile of kBlockM rows: by as many threads as it has columns or more,
    // which `sync` orders.
    template <int kBlockM, class Sync>
    FASTATTN_DEVICE void finish(At origin, SliceSums sums, int thread, Sync sync) const {
        if (!column_sums) return;
        sync();
        const int column = origin.column + thread;
        if (thread < sums.columns && extent.contains({origin.row, column})) {
            float sum = 0.0f;
#pragma unroll
            for (int row = 0; row < kBlockM; row += 16)
                sum += ld_shared<float>(sums.at(row, thread));
            st_global(column_sums + extent.offset({origin.row / kBlockM, column}), sum);
        }
        sync();
    }
};

}  // namespace fastattn::cuda
