// Included inside a target region. The blocked matrix product of the feed-forward network on the
// register tile (blocking after BLIS, Van Zee and van de Geijn, ACM TOMS 2015).
//
// C (m, n) = the sum over terms of A (m, k) B (k, n), handed tile by tile to a sink, which adds
// biases, applies activations, converts and stores. An item of work is a block of rows and some
// panels of columns: it packs its block of B into the second-level cache, and takes a group of rows
// of A at a time. Of B's panels, kRun steps stay in the first-level cache for the whole group. An
// element's sum is formed in an order that depends on k alone, whichever item it is in.
#pragma once

#include "cpu/amx.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"

constexpr int kPanel = kTileVectors * kLanes;
constexpr int kMostRows = FASTATTN_AMX ? 32 : kTileRows;  // of a tile that a sink gets
constexpr int kTileSize = kMostRows * kPanel;
constexpr int64_t kDepth = 512;  // of a packed block, in elements of Dot
template <class Dot>
constexpr int64_t kItemRows = Dot::kMatrix ? 1536 : 768;
constexpr int64_t kFewRows = 16;    // of A: B is not packed for them if it can be read
constexpr int64_t kGroupRows = 96;  // of A
constexpr int64_t kItemPanels = 16 / kTileVectors;  // twice as many where packing costs most
static_assert(kGroupRows % kTileRows == 0 && kGroupRows % kMostRows == 0);
constexpr double kSerialWork = 1 << 19;  // multiply-adds worth one thread only
constexpr int64_t kSerialWeights = 1 << 16;

// Slots of scratch memory that a product uses.
enum { kSlotA = 4, kSlotB = 5, kSlotC = 6 };

// A matrix (outer, k) of which one stride is 1; outer is m or n.
struct GemmOperand {
    const void* data;
    int64_t outer_stride, k_stride;
    DType dtype;
};

// With b_pair, panels of B and of b_pair alternate, and the sink gets the tiles of both.
struct GemmTerm {
    GemmOperand a, b, b_pair;
    int64_t k;
};

// Takes rows [m, m + rows) and columns [n, n + columns) of C: tile[row * kPanel + column]; of the
// pair at tile + kTileSize.
struct GemmSink {
    const void* context;
    void (*take)(const void* context, float* tile, int64_t m, int64_t rows, int64_t n,
                 int64_t columns);

    template <class F>
    explicit GemmSink(const F& f)
        : context(&f),
          take([](const void* c, float* tile, int64_t m, int64_t rows, int64_t n, int64_t columns) {
              (*static_cast<const F*>(c))(tile, m, rows, n, columns);
          }) {}
};

// Calls f with a null pointer to the storage type.
template <class F>
void with_storage(DType dtype, F f) {
    if (dtype == DType::float32) return f((const float*)nullptr);
    if (dtype == DType::float16) return f((const F16*)nullptr);
    f((const BF16*)nullptr);
}

// One step along k of an operand whose outer dim is contiguous: `width` elements of outer, of which
// `count` exist. May write up to kLanes elements beyond.
template <class Dot, class T>
FASTATTN_INLINE void pack_step(const T* at, int64_t k_stride, bool last, int64_t count,
                               int64_t width, typename Dot::Element* to) {
    for (int64_t n = 0; n < width; n += kLanes) {
        if constexpr (Dot::kPair == 1) {
            store(to + n, load(at + n, count - n));
        } else {
            const UintVec low = load_bits(at + n, count - n);
            const UintVec high = last ? UintVec{} : load_bits(at + k_stride + n, count - n);
            store((float*)(to + n), (Vec)(low | (high << 16)));
        }
    }
}

// Steps of a product over k elements.
template <class Dot>
int64_t depth_of(int64_t k) {
    return round_up(ceil_div(k, Dot::kPair), Dot::kDepthStep);
}

// All steps: to[step * width + outer].
template <class Dot, class T>
void pack_outer(const T* from, int64_t k_stride, int64_t k, int64_t count, int64_t width,
                typename Dot::Element* to) {
    auto* end = to + depth_of<Dot>(k) * width;
    for (int64_t step = 0; step < k; step += Dot::kPair, to += width)
        pack_step<Dot>(from + step * k_stride, k_stride, step + 1 == k, count, width, to);
    std::memset((void*)to, 0, (end - to) * sizeof(*to));
}

// Calls f for the operand's storage types that Dot multiplies.
template <class Dot, class F>
void with_storage_of(DType dtype, F f) {
    if constexpr (Dot::kPair == 2)
        f((const BF16*)nullptr);
    else
        with_storage(dtype, f);
}

// A panel of B: (k / kPair, kPanel).
template <class Dot>
void pack_panel(const GemmOperand& b, int64_t n, int64_t columns, int64_t k0, int64_t k,
                typename Dot::Element* to) {
    with_storage_of<Dot>(b.dtype, [&](auto type) {
        const auto from = (decltype(type))b.data + n * b.outer_stride + k0 * b.k_stride;
        if (b.k_stride != 1)
            pack_outer<Dot>(from, b.k_stride, k, columns, kPanel, to);
        else if constexpr (Dot::kPair == 1)
            pack_transposed(from, b.outer_stride, columns, k, k, to, kPanel);
        else
            pack_transposed_pairs(from, b.outer_stride, columns, k, depth_of<Dot>(k), (float*)to,
                                  kPanel);
    });
}

// Where a panel of B lies: rows of kPanel Elements, `k` apart.
template <class Dot>
struct Panel {
    const typename Dot::Element* at;
    int64_t k;
};

// Packed into `to`; for one tile of rows read where it lies, if it can be: packing would cost more.
template <class Dot>
Panel<Dot> panel_of(const GemmOperand& b, int64_t n, int64_t columns, int64_t k0, int64_t k,
                    bool one_tile, typename Dot::Element* to) {
    const bool readable = Dot::kPair == 1 && b.dtype == DType::float32 && b.outer_stride == 1;
    if (one_tile && readable && columns == kPanel)
        return {(const typename Dot::Element*)b.data + n + k0 * b.k_stride, b.k_stride};
    pack_panel<Dot>(b, n, columns, k0, k, to);
    return {to, kPanel};
}

// Where the rows of a tile of A lie.
struct PackedRows {
    int64_t row, k;
};
constexpr int64_t kRowStride = kDepth + 16;

// Elements of a row packed whole, zeros beyond k.
template <class Dot>
int64_t padded_depth(int64_t k) {
    return ceil_div(ceil_div(k, Dot::kPair), kLanes) * kLanes;
}

// Rows of A, and zeros beyond k.
template <class Dot>
void pack_rows(const GemmOperand& a, int64_t m, int64_t rows, int64_t k0, int64_t k,
               typename Dot::Element* to) {
    with_storage_of<Dot>(a.dtype, [&](auto type) {
        const auto from = (decltype(type))a.data + m * a.outer_stride + k0;
        for (int64_t row = 0; row < rows; ++row, to += kRowStride) {
            auto source = from + row * a.outer_stride;
            if constexpr (Dot::kPair == 1) {
                for (int64_t j = 0; j < k; j += kLanes) store(to + j, load(source + j, k - j));
            } else {
                const int64_t depth = depth_of<Dot>(k);
                for (int64_t j = k / 2; j < depth; ++j) to[j].bits = 0;
                std::memcpy(to, source, k * sizeof(*source));
            }
        }
    });
}

// Tiles of an A whose outer dim (of `outer` rows) is contiguous, all of them step by step along k:
// they share cache lines and pages.
template <class Dot>
void pack_tiles(const GemmOperand& a, int64_t m, int64_t rows, int64_t outer, int64_t k0, int64_t k,
                typename Dot::Element* to) {
    with_storage_of<Dot>(a.dtype, [&](auto type) {
        for (int64_t step = 0; step < k; step += Dot::kPair, to += kTileRows) {
            const auto from = (decltype(type))a.data + m + (k0 + step) * a.k_stride;
            for (int64_t row = 0; row < rows; row += kTileRows)
                pack_step<Dot>(from + row, a.k_stride, step + 1 == k, outer - m - row, kTileRows,
                               to + row * kRowStride);
        }
    });
}

// The same A as rows, zeros beyond.
template <class Dot>
void pack_transposed_rows(const GemmOperand& a, int64_t m, int64_t rows, int64_t k0, int64_t k,
                          typename Dot::Element* to) {
    with_storage_of<Dot>(a.dtype, [&](auto type) {
        const auto from = (decltype(type))a.data + m + k0 * a.k_stride;
        for (int64_t step = 0; step < depth_of<Dot>(k); step += kLanes) {
            for (int64_t row = 0; row < rows; row += kLanes) {
                Vec block[kLanes] = {};
                for (int64_t i = 0; i < kLanes && (step + i) * Dot::kPair < k; ++i) {
                    const int64_t at = (step + i) * Dot::kPair;
                    pack_step<Dot>(from + at * a.k_stride + row, a.k_stride, at + 1 == k,
                                   rows - row, kLanes, (typename Dot::Element*)&block[i]);
                }
                transpose(block);
                for (int64_t i = 0; i < kLanes; ++i)
                    store((float*)(to + (row + i) * kRowStride + step), block[i]);
            }
        }
    });
}

// Rows of A as products read them.
template <class Dot>
struct Rows {
    const typename Dot::Element* at;
    PackedRows strides;
    int64_t tile;  // from a tile to the next
};

// Rows [m, m + rows), of a group, where they lie if they can be read there, otherwise packed.
template <class Dot>
Rows<Dot> group_of(const GemmOperand& a, int64_t m, int64_t rows, int64_t outer, int64_t k0,
                   int64_t k, typename Dot::Element* to) {
    constexpr int64_t kRows = Dot::kRows;
    if (a.k_stride != 1) {
        if constexpr (Dot::kMatrix) {
            pack_transposed_rows<Dot>(a, m, rows, k0, k, to);
            return {to, {kRowStride, 1}, kRows * kRowStride};
        }
        pack_tiles<Dot>(a, m, rows, outer, k0, k, to);
        return {to, {1, kTileRows}, kTileRows * kRowStride};
    }
    // Products read whole tiles.
    const bool whole = Dot::kMatrix ? rows % kMatrixRows == 0 && k % (2 * Dot::kDepthStep) == 0
                                    : rows % kTileRows == 0 && a.dtype == DType::float32;
    // Elements of pairs are read at even places.
    if (whole && a.outer_stride % Dot::kPair == 0) {
        const int64_t stride = a.outer_stride / Dot::kPair;
        const auto* at = (const char*)a.data + (m * a.outer_stride + k0) * itemsize(a.dtype);
        return {(const typename Dot::Element*)at, {stride, 1}, kRows * stride};
    }
    pack_rows<Dot>(a, m, rows, k0, k, to);
    if constexpr (Dot::kMatrix)
        for (int64_t row = rows; row % kMatrixRows; ++row)
            std::memset((void*)(to + row * kRowStride), 0, depth_of<Dot>(k) * sizeof(*to));
    return {to, {kRowStride, 1}, kRows * kRowStride};
}

// A part of rows that are read soon.
inline void prefetch_rows(const GemmOperand& a, int64_t m, int64_t rows, int64_t k0, int64_t k,
                          int64_t part, int64_t parts) {
    if (a.k_stride != 1) return;
    const int64_t size = itemsize(a.dtype), first = k * part / parts, last = k * (part + 1) / parts;
    for (int64_t row = m; row < m + rows; ++row) {
        const char* from = (const char*)a.data + (row * a.outer_stride + k0) * size;
        for (int64_t byte = first * size; byte < last * size; byte += 64)
            __builtin_prefetch(from + byte);
    }
}

// Short runs, each summed on its own, round less than one long chain.
template <class Dot, int kRows>
void tile_product(const typename Dot::Element* a, PackedRows strides, Panel<Dot> b, int64_t k,
                  bool first, float* c) {
    Vec acc[kRows][kTileVectors];
    for_each_vector<kRows, kTileVectors>([&](int m, int n) { acc[m][n] = Vec{}; });
    tile<Dot, kRows, kTileVectors>(a, strides.row, strides.k, b.at, b.k, k, acc);
    for_each_vector<kRows, kTileVectors>([&](int m, int n) {
        float* at = c + m * kPanel + n * kLanes;
        store(at, first ? acc[m][n] : acc[m][n] + load(at));
    });
}

template <class Dot>
void product_of_rows(int64_t rows, int64_t columns, const typename Dot::Element* a,
                     PackedRows strides, Panel<Dot> b, int64_t k, bool first, float* c) {
    if constexpr (Dot::kMatrix)
        return matrix_product<Dot>(rows, columns, a, strides.row, b.at, b.k, k, c, kPanel, !first);
    constexpr int kMiddle = kTileRows > 8 ? 8 : 4;
    if (rows > kMiddle) return tile_product<Dot, kTileRows>(a, strides, b, k, first, c);
    if (rows > 4) return tile_product<Dot, kMiddle>(a, strides, b, k, first, c);
    if (rows > 2) return tile_product<Dot, 4>(a, strides, b, k, first, c);
    if (rows > 1) return tile_product<Dot, 2>(a, strides, b, k, first, c);
    tile_product<Dot, 1>(a, strides, b, k, first, c);
}

// Rows [m, m + rows) and panels [panel, panel + panels) of C.
template <class Dot>
void gemm_item(const GemmTerm* terms, int count, int64_t m, int64_t rows, int64_t outer, int64_t n,
               int64_t panel, int64_t panels, GemmSink sink) {
    typedef typename Dot::Element Element;
    constexpr int64_t kRows = Dot::kRows, kRun = Dot::kMatrix ? 128 : 256;
    const int sources = terms[0].b_pair.data ? 2 : 1;
    int64_t blocks = 0;
    for (int t = 0; t < count; ++t) blocks += ceil_div(terms[t].k, kDepth * Dot::kPair);
    // Sums of several blocks are kept of all rows, of one block of a group.
    const int64_t tile_rows = ceil_div(blocks > 1 ? rows : std::min(rows, kGroupRows), kRows);
    Element* a = scratch<Element>(kGroupRows * kRowStride + kLanes, kSlotA);
    Element* b = scratch<Element>(panels * sources * kPanel * kDepth, kSlotB);
    float* c = scratch<float>(tile_rows * panels * sources * kTileSize, kSlotC);
    Panel<Dot> panels_b[2 * kItemPanels];  // panels * sources is no more
    const auto columns_of_panel = [&](int64_t p) {
        return std::min<int64_t>(kPanel, n - (panel + p) * kPanel);
    };
    int64_t block = 0;
    for (int t = 0; t < count; ++t) {
        const GemmTerm& term = terms[t];
        const int64_t parts = ceil_div(term.k, kDepth * Dot::kPair);
        const int64_t step = round_up(ceil_div(term.k, parts), Dot::kPair * Dot::kDepthStep);
        for (int64_t k0 = 0; k0 < term.k; k0 += step, ++block) {
            const int64_t k = std::min(step, term.k - k0), depth = depth_of<Dot>(k);
            for (int64_t p = 0; p < panels; ++p) {
                for (int s = 0; s < sources; ++s)
                    panels_b[p * sources + s] = panel_of<Dot>(
                        s ? term.b_pair : term.b, (panel + p) * kPanel, columns_of_panel(p), k0, k,
                        outer <= kTileRows, b + (p * sources + s) * kPanel * kDepth);
            }
            for (int64_t group = 0; group < rows; group += kGroupRows) {
                const int64_t here = std::min(kGroupRows, rows - group);
                const Rows<Dot> group_a = group_of<Dot>(term.a, m + group, here, outer, k0, k, a);
                float* group_c =
                    c + (blocks > 1 ? group / kRows : 0) * panels * sources * kTileSize;
                const auto tile_c = [&](int64_t row, int64_t p) {
                    return group_c + (row / kRows * panels + p) * sources * kTileSize;
                };
                // The rows of A that come after this run: the group's next run or the next group.
                const auto prefetch_next = [&](int64_t row, int64_t count, int64_t start,
                                               int64_t part) {
                    const bool same = start + kRun < depth;
                    const int64_t next = group + row + (same ? 0 : kGroupRows);
                    const int64_t at = same ? (start + kRun) * Dot::kPair : 0;
                    prefetch_rows(term.a, m + next, std::min(count, rows - next), k0 + at,
                                  std::min(kRun * Dot::kPair, k - at), part, panels * sources);
                };
                for (int64_t start = 0; start < depth; start += kRun) {
                    const int64_t run = std::min(kRun, depth - start);
                    const bool first = block == 0 && start == 0;
                    const bool last = block == blocks - 1 && start + run == depth;
                    for (int64_t p = 0; p < panels; ++p) {
                        for (int s = 0; s < sources; ++s) {
                            Panel<Dot> run_b = panels_b[p * sources + s];
                            run_b.at += start * run_b.k;
                            for (int64_t row = 0; row < here; row += kRows) {
                                const int64_t tile = std::min(kRows, here - row);
                                const auto* from = group_a.at + row / kRows * group_a.tile +
                                                   start * group_a.strides.k;
                                prefetch_next(row, tile, start, p * sources + s);
                                product_of_rows<Dot>(tile, columns_of_panel(p), from,
                                                     group_a.strides, run_b, run, first,
                                                     tile_c(row, p) + s * kTileSize);
                                // At once: what it writes goes to memory under the next products.
                                if (last && s == sources - 1)
                                    sink.take(sink.context, tile_c(row, p), m + group + row, tile,
                                              (panel + p) * kPanel, columns_of_panel(p));
                            }
                        }
                    }
                }
            }
        }
    }
}

// Dot products along k for few rows: B is read once as it lies, kDotColumns columns at a time.

constexpr int kDotColumns = 4;

// c[row * kPanel + column] += A (kRows, k) B (k, up to kDotColumns), A packed as Elements.
template <class Dot, int kRows, class T>
void dot_products(const typename Dot::Element* a, int64_t a_row, const T* b, int64_t b_column,
                  int64_t columns, int64_t k, float* c) {
    constexpr int kStep = kLanes * Dot::kPair;
    Vec acc[kRows][kDotColumns] = {};
    const T* from[kDotColumns];
    for (int n = 0; n < kDotColumns; ++n)
        from[n] = b + std::min<int64_t>(n, columns - 1) * b_column;
    const auto step = [&](int64_t j, auto whole) {
#pragma GCC unroll 4
        for (int n = 0; n < kDotColumns; ++n) {
            Vec column = {};
            if constexpr (Dot::kPair == 1)
                column = whole ? load(from[n] + j) : load(from[n] + j, k - j);
            else
                std::memcpy(&column, from[n] + j, whole ? sizeof(Vec) : (k - j) * sizeof(T));
#pragma GCC unroll 4
            for (int m = 0; m < kRows; ++m) {
                const Vec row = load((const float*)(a + m * a_row + j / Dot::kPair));
                acc[m][n] = Dot::multiply_add(row, column, acc[m][n]);
            }
        }
    };
    int64_t j = 0;
    for (; j + kStep <= k; j += kStep) step(j, std::true_type{});
    if (j < k) step(j, std::false_type{});
    for (int m = 0; m < kRows; ++m)
        for (int n = 0; n < kDotColumns && n < columns; ++n)
            c[m * kPanel + n] += reduce_add(acc[m][n]);
}

// One panel of C, for all m rows.
template <class Dot>
void dot_panel(const GemmTerm* terms, int count, const typename Dot::Element* a, int64_t m,
               int64_t n, int64_t panel, GemmSink sink) {
    const int64_t first = panel * kPanel, columns = std::min<int64_t>(kPanel, n - first);
    const int sources = terms[0].b_pair.data ? 2 : 1;
    alignas(64) float tile[2 * kTileSize];
    for (int64_t row = 0; row < m; row += kTileRows) {
        const int64_t rows = std::min<int64_t>(kTileRows, m - row);
        std::fill(tile, tile + 2 * kTileSize, 0.0f);
        const auto* packed = a;
        for (int t = 0; t < count; ++t) {
            const int64_t k = terms[t].k, a_row = padded_depth<Dot>(k);
            for (int s = 0; s < sources; ++s) {
                const GemmOperand& b = s ? terms[t].b_pair : terms[t].b;
                with_storage_of<Dot>(b.dtype, [&](auto type) {
                    for (int64_t j = 0; j < columns; j += kDotColumns) {
                        const auto from = (decltype(type))b.data + (first + j) * b.outer_stride;
                        float* to = tile + s * kTileSize + j;
                        int64_t i = 0;
                        const auto take = [&](auto height) {
                            for (; i + height <= rows; i += height)
                                dot_products<Dot, height>(packed + (row + i) * a_row, a_row, from,
                                                          b.outer_stride, columns - j, k,
                                                          to + i * kPanel);
                        };
                        take(std::integral_constant<int, 4>{});
                        take(std::integral_constant<int, 1>{});
                    }
                });
            }
            packed += m * a_row;
        }
        sink.take(sink.context, tile, row, rows, first, columns);
    }
}

template <class Dot>
void gemm_of_few_rows(const GemmTerm* terms, int count, int64_t m, int64_t n, GemmSink sink) {
    typedef typename Dot::Element Element;
    int64_t size = 0, weights = 0;
    for (int t = 0; t < count; ++t) {
        size += m * padded_depth<Dot>(terms[t].k);
        weights += n * terms[t].k;
    }
    Element* a = scratch<Element>(size, kSlotA);
    Element* to = a;
    for (int t = 0; t < count; ++t) {
        for (int64_t row = 0; row < m; ++row, to += padded_depth<Dot>(terms[t].k)) {
            std::memset((void*)to, 0, padded_depth<Dot>(terms[t].k) * sizeof(Element));
            pack_rows<Dot>(terms[t].a, row, 1, 0, terms[t].k, to);
        }
    }
    const int64_t panels = ceil_div(n, kPanel);
#pragma omp parallel for schedule(static) if (panels > 1 && weights > kSerialWeights)
    for (int64_t panel = 0; panel < panels; ++panel) {
        dot_panel<Dot>(terms, count, a, m, n, panel, sink);
    }
}

template <class Dot>
void gemm(const GemmTerm* terms, int count, int64_t m, int64_t n, GemmSink sink) {
    bool along_k = m <= kFewRows;
    for (int t = 0; t < count; ++t) along_k &= terms[t].a.k_stride == 1 && terms[t].b.k_stride == 1;
    if (along_k && terms[0].b_pair.data) along_k = terms[0].b_pair.k_stride == 1;
    if (along_k) return gemm_of_few_rows<Dot>(terms, count, m, n, sink);
    const int64_t threads = omp_get_max_threads();
    const int64_t panels = ceil_div(n, kPanel);
    double work = 0;
    for (int t = 0; t < count; ++t) work += double(m) * n * terms[t].k;
    // Enough items for every thread, also when one of them is slow.
    const bool one_block = count == 1 && terms[0].k <= kDepth * Dot::kPair && !terms[0].b_pair.data;
    int64_t row_parts = ceil_div(m, kItemRows<Dot>);
    int64_t step = Dot::kMatrix && one_block ? 2 * kItemPanels : kItemPanels;
    if (work > kSerialWork) {
        while (step > 2 && row_parts * ceil_div(panels, step) < 3 * threads) step /= 2;
        while (m / (row_parts + 1) >= kGroupRows / 2 &&
               row_parts * ceil_div(panels, step) < 2 * threads)
            ++row_parts;
    }
    const int64_t rows = round_up(ceil_div(m, row_parts), Dot::kRows);
    row_parts = ceil_div(m, rows);
    const int64_t items = row_parts * ceil_div(panels, step);
#pragma omp parallel for schedule(dynamic) if (items > 1 && work > kSerialWork)
    for (int64_t item = 0; item < items; ++item) {
        const int64_t m0 = item % row_parts * rows, panel = item / row_parts * step;
        [[maybe_unused]] Registers<Dot> registers;
        gemm_item<Dot>(terms, count, m0, std::min(rows, m - m0), m, n, panel,
                       std::min(step, panels - panel), sink);
    }
}
