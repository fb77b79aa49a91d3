// Feed-forward network: y = dropout(act(x W1^T + b1)) W2^T + b2, and the gated form
// (act(x Wg^T) * (x Wu^T)) Wd^T (Shazeer 2020); forward and backward.
//
// Matrix products on blocks of packed operands (gemm.h); biases, activations, dropout and their
// derivatives are applied to each tile as it leaves the registers. bfloat16 multiplies natively
// where the machine does, otherwise everything multiplies in float32; sums are float32. The forward
// takes rows in blocks whose hidden layer stays in cache.
#include "cpu/ffn.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "cpu/simd.h"

#include "cpu/target_begin.h"

#include "cpu/activation.h"
#include "cpu/gemm_tiles.h"
#include "cpu/philox.h"

namespace {

constexpr int64_t kHiddenBytes = 8 << 20;  // of a row block's hidden layer

// What is kept between two products.
template <class Dot>
constexpr DType kHidden = Dot::kPair == 2 ? DType::bfloat16 : DType::float32;

enum { kSlotHidden = 0, kSlotPreact = 1, kSlotDpreact = 2 };

void* scratch_of(DType dtype, int64_t count, int slot) {
    return scratch<char>(count * itemsize(dtype), slot);
}

// Multiplies a tile by the dropout's factors. Neighbouring tiles share the words of a row.
void drop(const Dropout& dropout, int64_t m, int64_t rows, int64_t n, float* tile) {
    struct Words {
        uint64_t seed = 0;
        int64_t row = -1, block = -1, rows = 0;
        uint32_t words[kMostRows][64];
    };
    static thread_local Words kept;
    const int64_t block = n / 64;
    if (kept.seed != dropout.seed || kept.row != m || kept.block != block || kept.rows < rows) {
        kept.seed = dropout.seed, kept.row = m, kept.block = block, kept.rows = rows;
        for (int64_t row = 0; row < rows; ++row) {
            const uint64_t index = uint64_t(m + row);
            philox_words(dropout.seed, block, uint32_t(index), uint32_t(index >> 32), 0,
                         kept.words[row]);
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        const uint32_t* words = kept.words[row] + n % 64;
        for (int j = 0; j < kPanel; ++j) {
            tile[row * kPanel + j] *= words[j] >= dropout.threshold ? dropout.scale : 0.0f;
        }
    }
}

// tile = act(tile + b1), times the tile of the gated form's second product; the preact is kept
// where asked for. The result goes to `hidden` at once, if given.
template <class Dot>
void activate(const FFNFwdArgs& args, int64_t m, int64_t rows, int64_t n, int64_t columns,
              float* tile, void* hidden) {
    const FFNShape& s = args.shape;
    typedef std::conditional_t<Dot::kPair == 2, BF16, float> Hidden;
    alignas(64) float bias[kPanel] = {};
    if (args.b1) read_tile(s.dtype, args.b1, 0, 0, 1, n, columns, bias);
    const bool gated = args.w_up.data;
    with_activation(s.activation, [&](auto act) {
        with_storage_of<Dot>(s.dtype, [&](auto type) {
            auto* preact = (std::remove_const_t<std::remove_pointer_t<decltype(type)>>*)args.preact;
            for (int64_t row = 0; row < rows; ++row) {
                for (int64_t j = 0; j < columns; j += kLanes) {
                    float* at = tile + row * kPanel + j;
                    const int64_t kept_at = (m + row) * s.d_ff + n + j, count = columns - j;
                    const Vec x = load(at) + load(bias + j);
                    if (preact) store(preact + kept_at, x, count);
                    Vec value = act.value(x);
                    if (gated) {
                        const Vec up = load(at + kTileSize);
                        if (preact) store(preact + s.rows * s.d_ff + kept_at, up, count);
                        value = value * up;
                    }
                    if (hidden)
                        store((Hidden*)hidden + row * s.d_ff + j, value, count);
                    else
                        store(at, value);
                }
            }
        });
    });
}

// From dhidden and preact tiles (the pair's at + kTileSize): dhidden becomes dpreact, preact
// becomes hidden. The dropout factors are in `factors`, already applied to dhidden.
void differentiate(Activation activation, bool gated, int64_t rows, float* dhidden, float* preact) {
    with_activation(activation, [&](auto act) {
        for (int64_t j = 0; j < rows * kPanel; j += kLanes) {
            const Vec x = load(preact + j), d = load(dhidden + j);
            const Vec value = act.value(x);
            if (gated) {
                const Vec up = load(preact + kTileSize + j);
                store(dhidden + j, d * up * act.slope(x));
                store(dhidden + kTileSize + j, d * value);
                store(preact + j, value * up);
            } else {
                store(dhidden + j, d * act.slope(x));
                store(preact + j, value);
            }
        }
    });
}

// Everything but the preact's bias and storage is in the shape; rows begin at `first`.
template <class Dot>
void preact_product(const FFNShape& shape, const MatrixView& x, const MatrixView& w1,
                    const MatrixView& w_up, int64_t first, int64_t rows, GemmSink sink) {
    MatrixView block = x;
    block.data = (const char*)x.data + first * x.row_stride * itemsize(shape.dtype);
    const GemmTerm term{rows_of(block, shape.dtype), rows_of(w1, shape.dtype),
                        rows_of(w_up, shape.dtype), shape.d_model};
    gemm<Dot>(&term, 1, rows, shape.d_ff, sink);
}

template <class Dot>
void ffn_fwd_of(const FFNFwdArgs& args) {
    const FFNShape& s = args.shape;
    constexpr DType kind = kHidden<Dot>;
    const bool keeps_kind = args.hidden && kind == s.dtype;
    const int64_t most = std::max<int64_t>(192, kHiddenBytes / (s.d_ff * itemsize(kind)));
    const int64_t step = ceil_div(s.rows, ceil_div(s.rows, most));
    for (int64_t first = 0; first < s.rows; first += step) {
        const int64_t rows = std::min(step, s.rows - first);
        void* hidden = keeps_kind ? (char*)args.hidden + first * s.d_ff * itemsize(kind)
                                  : scratch_of(kind, rows * s.d_ff, kSlotHidden);
        const auto take_preact = [&](float* tile, int64_t m, int64_t here, int64_t n,
                                     int64_t columns) {
            const bool plain = !args.dropout.threshold && (!args.hidden || keeps_kind);
            activate<Dot>(args, first + m, here, n, columns, tile,
                          plain ? (char*)hidden + (m * s.d_ff + n) * itemsize(kind) : nullptr);
            if (plain) return;
            if (args.dropout.threshold) drop(args.dropout, first + m, here, n, tile);
            write_tile(kind, hidden, s.d_ff, m, here, n, columns, tile);
            if (args.hidden && !keeps_kind)
                write_tile(s.dtype, args.hidden, s.d_ff, first + m, here, n, columns, tile);
        };
        preact_product<Dot>(s, args.x, args.w1, args.w_up, first, rows, GemmSink(take_preact));
        const auto take_y = [&](float* tile, int64_t m, int64_t here, int64_t n, int64_t columns) {
            add_bias(s.dtype, args.b2, here, n, columns, tile);
            write_tile(s.dtype, args.y, s.d_out, first + m, here, n, columns, tile);
        };
        const GemmTerm term{
            rows_of(contiguous(hidden, s.d_ff, kind), kind), rows_of(args.w2, s.dtype), {}, s.d_ff};
        gemm<Dot>(&term, 1, rows, s.d_out, GemmSink(take_y));
    }
}

template <class Dot>
void ffn_bwd_of(const FFNBwdArgs& args) {
    const FFNShape& s = args.shape;
    constexpr DType kind = kHidden<Dot>;
    const bool gated = args.w_up.data;
    const int64_t elements = s.rows * s.d_ff;

    const void* preact = args.preact;
    if (!preact) {
        void* again = scratch_of(s.dtype, (gated ? 2 : 1) * elements, kSlotPreact);
        const auto take = [&](float* tile, int64_t m, int64_t here, int64_t n, int64_t columns) {
            add_bias(s.dtype, args.b1, here, n, columns, tile);
            write_tile(s.dtype, again, s.d_ff, m, here, n, columns, tile);
            if (gated)
                write_tile(s.dtype, again, s.d_ff, s.rows + m, here, n, columns, tile + kTileSize);
        };
        preact_product<Dot>(s, args.x, args.w1, args.w_up, 0, s.rows, GemmSink(take));
        preact = again;
    }

    // dpreact of the gate, then of the up product.
    void* dpreact = scratch_of(kind, (gated ? 2 : 1) * elements, kSlotDpreact);
    void* hidden = args.dw2 && !args.hidden ? scratch_of(kind, elements, kSlotHidden) : nullptr;
    const auto take_dhidden = [&](float* tile, int64_t m, int64_t here, int64_t n,
                                  int64_t columns) {
        alignas(64) float pair[2][2 * kTileSize];
        float *before = pair[0], *d = pair[1];
        read_tile(s.dtype, preact, s.d_ff, m, here, n, columns, before);
        if (gated)
            read_tile(s.dtype, preact, s.d_ff, s.rows + m, here, n, columns, before + kTileSize);
        std::copy(tile, tile + here * kPanel, d);
        if (args.dropout.threshold) drop(args.dropout, m, here, n, d);
        differentiate(s.activation, gated, here, d, before);
        write_tile(kind, dpreact, s.d_ff, m, here, n, columns, d);
        if (gated) write_tile(kind, dpreact, s.d_ff, s.rows + m, here, n, columns, d + kTileSize);
        if (!hidden) return;
        if (args.dropout.threshold) drop(args.dropout, m, here, n, before);
        write_tile(kind, hidden, s.d_ff, m, here, n, columns, before);
    };
    const GemmTerm to_hidden{rows_of(args.dy, s.dtype), columns_of(args.w2, s.dtype), {}, s.d_out};
    gemm<Dot>(&to_hidden, 1, s.rows, s.d_ff, GemmSink(take_dhidden));

    const MatrixView dgate = contiguous(dpreact, s.d_ff, kind);
    const MatrixView dup = contiguous(dpreact, s.d_ff, kind, s.rows);
    // The gradient `to` of a weight (outer, inner): the product over the rows.
    const auto weight_gradient = [&](void* to, const MatrixView& d, DType d_dtype, int64_t outer,
                                     const MatrixView& by, DType by_dtype, int64_t inner) {
        if (!to) return;
        const auto take = [&](float* tile, int64_t m, int64_t here, int64_t n, int64_t columns) {
            write_tile(s.dtype, to, inner, m, here, n, columns, tile);
        };
        const GemmTerm term{columns_of(d, d_dtype), columns_of(by, by_dtype), {}, s.rows};
        gemm<Dot>(&term, 1, outer, inner, GemmSink(take));
    };
    const DType hidden_dtype = args.hidden ? s.dtype : kind;
    weight_gradient(args.dw2, args.dy, s.dtype, s.d_out,
                    contiguous(args.hidden ? args.hidden : hidden, s.d_ff, hidden_dtype),
                    hidden_dtype, s.d_ff);
    weight_gradient(args.dw1, dgate, kind, s.d_ff, args.x, s.dtype, s.d_model);
    weight_gradient(args.dw_up, dup, kind, s.d_ff, args.x, s.dtype, s.d_model);
    if (args.db1) sum_columns(kind, dgate, s.rows, s.d_ff, s.dtype, args.db1);
    if (args.db2) sum_columns(s.dtype, args.dy, s.rows, s.d_out, s.dtype, args.db2);

    if (!args.dx) return;
    const auto take_dx = [&](float* tile, int64_t m, int64_t here, int64_t n, int64_t columns) {
        write_tile(s.dtype, args.dx, s.d_model, m, here, n, columns, tile);
    };
    const GemmTerm terms[] = {
        {rows_of(dgate, kind), columns_of(args.w1, s.dtype), {}, s.d_ff},
        {rows_of(dup, kind), columns_of(args.w_up, s.dtype), {}, s.d_ff},
    };
    gemm<Dot>(terms, gated ? 2 : 1, s.rows, s.d_model, GemmSink(take_dx));
}

}  // namespace

void ffn_fwd(const FFNFwdArgs& args) {
#if FASTATTN_AVX512_BF16
    if (args.shape.dtype == DType::bfloat16) return ffn_fwd_of<DotBF16>(args);
#endif
    ffn_fwd_of<DotF32>(args);
}

void ffn_bwd(const FFNBwdArgs& args) {
#if FASTATTN_AVX512_BF16
    if (args.shape.dtype == DType::bfloat16) return ffn_bwd_of<DotBF16>(args);
#endif
    ffn_bwd_of<DotF32>(args);
}

#include "cpu/target_end.h"
