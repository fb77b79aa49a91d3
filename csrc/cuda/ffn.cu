// Feed-forward network: y = dropout(act(x W1^T + b1)) W2^T + b2, and the gated form
// (act(x Wg^T) * (x Wu^T)) Wd^T (Shazeer, "GLU variants improve transformer", 2020); forward and
// backward. x (rows, d_model), hidden (rows, d_ff), y (rows, d_out).
// Each product is one kernel, whose epilogue applies what follows it (ffn_epilogue.cuh); here are
// their order and the memory between them.
// The floor is 2 * rows * d_model * d_ff flops a product or, of few rows, one read of the weights.
#include "cuda/ffn.h"

#include <algorithm>
#include <type_traits>

#include "cuda/ffn_epilogue.cuh"
#include "cuda/gemm_sm80.cuh"

namespace fastattn::cuda {
namespace {

// out (gridDim.y, columns): sums of in (rows, columns) over `share` rows each, + bias. A warp has
// 32 vectors of 16 bytes of every 8th row; the block adds up its 8 warps.
template <class In, class Out>
__global__ void __launch_bounds__(256)
    sum_rows_kernel(const In* in, int64_t stride, int rows, int share, const Out* bias,
                    int bias_columns, Out* out, int64_t columns) {
    constexpr int kVector = 16 / sizeof(In);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t column = (int64_t(blockIdx.x) * 32 + lane) * kVector;
    const int first = blockIdx.y * share, last = min(rows, first + share);
    const bool inside = column < columns;
    float sum[kVector] = {};
    if (inside) {
#pragma unroll 4
        for (int row = first + warp; row < last; row += 8) {
            const In* from = in + row * stride + column;
            if constexpr (same<In, float>) {
                const float4 four = ld_readonly(reinterpret_cast<const float4*>(from));
                sum[0] += four.x, sum[1] += four.y, sum[2] += four.z, sum[3] += four.w;
            } else {
                const uint4 words = ld_readonly(reinterpret_cast<const uint4*>(from));
                const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 pair = unpack<In>(pairs[i]);
                    sum[2 * i] += pair.x, sum[2 * i + 1] += pair.y;
                }
            }
        }
    }
    const auto slot = [&](int of_warp, int i) {
        return dynamic_shared() + 4 * ((of_warp * kVector + i) * 32 + lane);
    };
#pragma unroll
    for (int i = 0; i < kVector; ++i) st_shared(slot(warp, i), sum[i]);
    barrier();
    if (warp != 0 || !inside) return;
    out += blockIdx.y * columns + column;
#pragma unroll
    for (int i = 0; i < kVector; i += 2) {
        float2 both{0.0f, 0.0f};
        for (int w = 0; w < 8; ++w)
            both.x += ld_shared<float>(slot(w, i)), both.y += ld_shared<float>(slot(w, i + 1));
        if constexpr (same<Out, float>) {
            st_global(reinterpret_cast<float2*>(out + i), both);
        } else {
            if (bias) {
                const Out* at = bias + column % bias_columns + i;
                const float2 add = unpack<Out>(ld_readonly(reinterpret_cast<const uint32_t*>(at)));
                both.x += add.x, both.y += add.y;
            }
            st_global(reinterpret_cast<uint32_t*>(out + i), pack<Out>(both.x, both.y));
        }
    }
}

template <class In, class Out>
void sum_rows(const In* in, int64_t stride, int rows, int shares, const Out* bias, int bias_columns,
              Out* out, int64_t columns, void* stream) {
    constexpr int kColumns = 32 * 16 / sizeof(In);
    const dim3 grid(unsigned((columns + kColumns - 1) / kColumns), unsigned(shares));
    launch(sum_rows_kernel<In, Out>, grid, 256, 8 * kColumns * 4, stream, in, stride, rows,
           ceil_div(rows, shares), bias, bias_columns, out, columns);
}

// How many shares of the rows column sums take in their first pass.
int sum_shares(int rows, int columns) {
    const int blocks = ceil_div(columns, 256);
    return std::clamp(4 * current_device().processors / blocks, 1, ceil_div(rows, 64));
}

template <Major kA, Major kB, class Epilogue>
void gemm(GemmArgs args, const GemmPlan& plan, const Epilogue& epilogue, void* stream) {
    args.splits = plan.splits, args.share = plan.share;
    if (plan.size == TileSize::small)
        gemm_sm80<kA, kB, SmallTiles<Epilogue::kProducts>>(args, epilogue, stream);
    else if (has_sm90())
        gemm_sm90<kA, kB>(args, epilogue, plan.size, stream);
    else if (plan.size == TileSize::medium)
        gemm_sm80<kA, kB, MediumTiles>(args, epilogue, stream);
    else
        gemm_sm80<kA, kB, LargeTiles>(args, epilogue, stream);
}

// What the products of a call need between them, in scratch memory.
class Scratch {
  public:
    explicit Scratch(void* memory) : memory_(static_cast<uint8_t*>(memory)) {}
    void* take(int64_t bytes) {
        void* taken = memory_ + bytes_;
        bytes_ += (bytes + 15) / 16 * 16;
        return taken;
    }
    int64_t bytes() const { return bytes_; }

  private:
    uint8_t* memory_;
    int64_t bytes_ = 0;
};

// A product whose inner dim may be shared out: out (m, n) contiguous.
struct Product {
    GemmPlan plan;
    int m, n;

    Product(int m, int n, int k, int terms = 1)
        : plan(plan_gemm(m, n, k, terms, 1, true)), m(m), n(n) {}
    int64_t partials() const { return plan.splits > 1 ? int64_t(plan.splits) * m * n : 0; }

    template <class T, Major kA, Major kB>
    void run(GemmArgs args, void* out, const void* bias, float* partials, void* stream) const {
        T* to = static_cast<T*>(out);
        const T* add = static_cast<const T*>(bias);
        args.m = m, args.n = n;
        if (plan.splits == 1) partials = nullptr;
        gemm<kA, kB>(args, plan, OutEpilogue<T>{to, {m, n}, add, partials}, stream);
        if (partials)
            sum_rows(partials, int64_t(m) * n, plan.splits, 1, add, n, to, int64_t(m) * n, stream);
    }
};

struct FwdPlan {
    GemmPlan hidden;
    Product y;
    float* partials;
    int64_t scratch;

    explicit FwdPlan(const FFNFwdArgs& a)
        : hidden(plan_gemm(a.rows, a.d_ff, a.d_model, 1, a.w_up.data ? 2 : 1, false)),
          y(a.rows, a.d_out, a.d_ff) {
        Scratch memory(a.scratch);
        partials = static_cast<float*>(memory.take(4 * y.partials()));
        scratch = memory.bytes();
    }
};

Dropout dropout_of(const FFNArgs& a) { return {a.seed, a.threshold, a.keep_scale}; }

template <class T, bool gated>
void hidden_fwd(const FFNArgs& a, const GemmPlan& plan, void* hidden, void* preact) {
    const HiddenEpilogue<T, gated> epilogue{static_cast<T*>(hidden), static_cast<T*>(preact),
                                            {a.rows, a.d_ff},        static_cast<const T*>(a.b1),
                                            dropout_of(a),           a.activation};
    const GemmArgs args{{a.x, a.x}, {a.w1, a.w_up}, a.rows, a.d_ff, a.d_model, 1, 1, 0, {}};
    gemm<Major::k, Major::k>(args, plan, epilogue, a.stream);
}

template <class T, bool gated>
void ffn_fwd_of(const FFNFwdArgs& a) {
    const FwdPlan plan(a);
    hidden_fwd<T, gated>(a, plan.hidden, a.hidden, a.preact);
    const Matrix hidden{a.hidden, a.d_ff};
    const GemmArgs args{{hidden, hidden}, {a.w2, a.w2}, a.rows, a.d_out, a.d_ff, 1, 1, 0, {}};
    plan.y.run<T, Major::k, Major::k>(args, a.y, a.b2, plan.partials, a.stream);
}

struct BwdPlan {
    GemmPlan preact, dpreact;
    Product dw1, dw2, dx;
    int db2_shares;
    void *dpreact_memory, *hidden;
    float* sums;  // partial ones, of each product in its turn
    int64_t scratch;

    explicit BwdPlan(const FFNBwdArgs& a)
        : preact(plan_gemm(a.rows, a.d_ff, a.d_model, 1, a.w_up.data ? 2 : 1, false)),
          dpreact(plan_gemm(a.rows, a.d_ff, a.d_out, 1, 1, false)),
          dw1(a.d_ff, a.d_model, a.rows),
          dw2(a.d_out, a.d_ff, a.rows),
          dx(a.rows, a.d_model, a.d_ff, a.w_up.data ? 2 : 1),
          db2_shares(sum_shares(a.rows, a.d_out)) {
        const int64_t elements = int64_t(a.rows) * a.d_ff;
        Scratch memory(a.scratch);
        dpreact_memory = memory.take(2 * elements * (a.w_up.data ? 2 : 1));
        hidden = memory.take(a.dw2 && !a.hidden ? 2 * elements : 0);
        int64_t floats = 0;
        if (a.dw1 || a.dw_up) floats = std::max(floats, dw1.partials());
        if (a.dw2) floats = std::max(floats, dw2.partials());
        if (a.dx) floats = std::max(floats, dx.partials());
        if (a.db1) floats = std::max(floats, int64_t(db1_tiles(a)) * a.d_ff);
        if (a.db2) floats = std::max(floats, int64_t(db2_shares) * a.d_out);
        sums = static_cast<float*>(memory.take(4 * floats));
        scratch = memory.bytes();
    }
    int db1_tiles(const FFNBwdArgs& a) const {
        return ceil_div(a.rows, dpreact.tile.m / dpreact.tile.blocks);
    }
};

template <class T, bool gated>
void ffn_bwd_of(const FFNBwdArgs& a) {
    const BwdPlan plan(a);
    T* dpreact = static_cast<T*>(plan.dpreact_memory);
    const void* preact = a.preact;
    if (!preact) {
        // Each element is read before it is overwritten by its gradient.
        preact = dpreact;
        hidden_fwd<T, gated>(a, plan.preact, nullptr, dpreact);
    }
    T* hidden_again = a.dw2 && !a.hidden ? static_cast<T*>(plan.hidden) : nullptr;
    const PreactEpilogue<T, gated> epilogue{
        dpreact,          static_cast<const T*>(preact), hidden_again,
        {a.rows, a.d_ff}, a.db1 ? plan.sums : nullptr,   dropout_of(a),
        a.activation};
    const GemmArgs to_hidden{{a.dy, a.dy}, {a.w2, a.w2}, a.rows, a.d_ff, a.d_out, 1, 1, 0, {}};
    gemm<Major::k, Major::mn>(to_hidden, plan.dpreact, epilogue, a.stream);
    if (a.db1)
        sum_rows(plan.sums, a.d_ff, plan.db1_tiles(a), 1, static_cast<const T*>(nullptr), 1,
                 static_cast<T*>(a.db1), a.d_ff, a.stream);
    if (a.db2) {
        sum_rows(static_cast<const T*>(a.dy.data), a.dy.stride, a.rows, plan.db2_shares,
                 static_cast<const float*>(nullptr), 1, plan.sums, a.d_out, a.stream);
        sum_rows(plan.sums, a.d_out, plan.db2_shares, 1, static_cast<const T*>(nullptr), 1,
                 static_cast<T*>(a.db2), a.d_out, a.stream);
    }

    const Matrix dgate{dpreact, a.d_ff}, dup{dpreact + int64_t(a.rows) * a.d_ff, a.d_ff};
    const Matrix hidden{hidden_again ? hidden_again : a.hidden, a.d_ff};
    const auto weight = [&](const Product& product, void* to, const Matrix& d, const Matrix& by) {
        if (!to) return;
        const GemmArgs args{{d, d}, {by, by}, 0, 0, a.rows, 1, 1, 0, {}};
        product.run<T, Major::mn, Major::mn>(args, to, nullptr, plan.sums, a.stream);
    };
    weight(plan.dw1, a.dw1, dgate, a.x);
    weight(plan.dw1, a.dw_up, dup, a.x);
    weight(plan.dw2, a.dw2, a.dy, hidden);
    if (!a.dx) return;
    const GemmArgs args{{dgate, dup}, {a.w1, a.w_up}, 0, 0, a.d_ff, gated ? 2 : 1, 1, 0, {}};
    plan.dx.run<T, Major::k, Major::mn>(args, a.dx, nullptr, plan.sums, a.stream);
}

// Calls f with the type of the tensors and whether the form is gated.
template <class F>
void with_form(const FFNArgs& args, F f) {
    const auto of_type = [&](auto type) {
        args.w_up.data ? f(type, std::true_type{}) : f(type, std::false_type{});
    };
    args.dtype == DType::bfloat16 ? of_type(bfloat16{}) : of_type(float16{});
}

}  // namespace

GemmPlan plan_gemm(int m, int n, int k, int terms, int products, bool may_split) {
    // Costs in products of a processor: of loading an element for a step of the inner dim, of the
    // kernel that adds partial sums, of writing and reading one of them.
    constexpr double kLoad = 64, kLaunch = 1.3e7, kPartial = 11;
    constexpr double kSmallOnSm90 = 2;  // mma.sync has half of wgmma's rate
    const int processors = current_device().processors;
    GemmPlan best{};
    double best_time = 0;
    for (const TileSize size : {TileSize::large, TileSize::medium, TileSize::small}) {
        const TileShape tile = tile_shape(size, has_sm90(), products);
        const int64_t tiles = int64_t(ceil_div(m, tile.m)) * ceil_div(n, tile.n / products);
        const int64_t steps = int64_t(terms) * ceil_div(k, tile.k);
        for (int splits = 1; splits <= (may_split ? 64 : 1); splits *= 2) {
            const int64_t share = (steps + splits - 1) / splits;
            const int64_t at_once = processors / tile.blocks;
            const int64_t waves = (tiles * splits + at_once - 1) / at_once;
            const double step = (tile.m * tile.n + kLoad * (tile.m + tile.n)) / tile.blocks;
            double time = double(waves * share * tile.k) * step;
            if (size == TileSize::small && has_sm90()) time *= kSmallOnSm90;
            if (splits > 1) time += kLaunch + kPartial * splits * m * n;
            if (best_time != 0 && time >= best_time) continue;
            best_time = time;
            // None is empty.
            best = {size, tile, int((steps + share - 1) / share), int(share)};
        }
    }
    return best;
}

void ffn_fwd(const FFNFwdArgs& args) {
    with_form(args, [&](auto type, auto gated) {
        ffn_fwd_of<decltype(type), decltype(gated)::value>(args);
    });
}

void ffn_bwd(const FFNBwdArgs& args) {
    with_form(args, [&](auto type, auto gated) {
        ffn_bwd_of<decltype(type), decltype(gated)::value>(args);
    });
}

int64_t ffn_fwd_scratch(const FFNFwdArgs& args) { return FwdPlan(args).scratch; }
int64_t ffn_bwd_scratch(const FFNBwdArgs& args) { return BwdPlan(args).scratch; }

}  // namespace fastattn::cuda
