// Included inside a target region. The blocked matrix product of the feed-forward network on the
// register tile (blocking after BLIS, Van Zee and van de Geijn, ACM TOMS 2015).
//
// C (m, n) = the sum over terms of A (m, k) B (k, n), handed tile by tile to a sink, which adds
// biases, applies activations, converts and stores. An item of work is a block of rows and some
// panels of columns: it packs its block of B, then takes kTileRows rows of A at a time over all its
// panels. An element's sum is formed in an order that depends on k alone, whichever item it is in.
#pragma once

#include "cpu/scratch.h"
#include "cpu/tile.h"

constexpr int kPanel = kTileVectors * kLanes;
constexpr int kTileSize = kTileRows * kPanel;
constexpr int64_t kDepth = 512;  // of a packed block, in elements of Dot
constexpr int64_t kRun = 256;
constexpr int64_t kItemRows = 768;
constexpr int64_t kFewRows = 16;               // of A: B is not packed for them if it can be read
constexpr int64_t kGroupRows = 8 * kTileRows;  // of A, packed at a time
constexpr int64_t kItemPanels = 16 / kTileVectors;
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

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

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

// All steps: to[step * width + outer].
template <class Dot, class T>
void pack_outer(const T* from, int64_t k_stride, int64_t k, int64_t count, int64_t width,
                typename Dot::Element* to) {
    for (int64_t step = 0; step < k; step += Dot::kPair, to += width)
        pack_step<Dot>(from + step * k_stride, k_stride, step + 1 == k, count, width, to);
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
            pack_transposed_pairs(from, b.outer_stride, columns, k, ceil_div(k, 2), (float*)to,
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

template <class Dot>
void pack_rows(const GemmOperand& a, int64_t m, int64_t rows, int64_t k0, int64_t k,
               typename Dot::Element* to) {
    with_storage_of<Dot>(a.dtype, [&](auto type) {
        const auto from = (decltype(type))a.data + m * a.outer_stride + k0;
        for (int64_t row = 0; row < rows; ++row) {
            auto source = from + row * a.outer_stride;
            auto* target = to + row * kRowStride;
            if constexpr (Dot::kPair == 1) {
                for (int64_t j = 0; j < k; j += kLanes) store(target + j, load(source + j, k - j));
            } else {
                target[(k - 1) / 2].bits = 0;
                std::memcpy(target, source, k * sizeof(*source));
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

// A whole tile of float32 rows is read where it lies.
template <class Dot>
bool in_place(const GemmOperand& a, int64_t rows) {
    return Dot::kPair == 1 && a.dtype == DType::float32 && a.k_stride == 1 && rows == kTileRows;
}

// A part of the next tile's rows, so that they come while this one's products are computed.
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

// In runs of kRun, each summed on its own: shorter chains of additions round less.
template <class Dot, int kRows>
void tile_product(const typename Dot::Element* a, PackedRows strides, Panel<Dot> b, int64_t k,
                  bool first, float* c) {
    for (int64_t start = 0; start < k; start += kRun, first = false) {
        Vec acc[kRows][kTileVectors];
        for_each_vector<kRows, kTileVectors>([&](int m, int n) { acc[m][n] = Vec{}; });
        tile<Dot, kRows, kTileVectors>(a + start * strides.k, strides.row, strides.k,
                                       b.at + start * b.k, b.k, std::min(kRun, k - start), acc);
        for_each_vector<kRows, kTileVectors>([&](int m, int n) {
            float* at = c + m * kPanel + n * kLanes;
            store(at, first ? acc[m][n] : acc[m][n] + load(at));
        });
    }
}

template <class Dot>
void product_of_rows(int64_t rows, const typename Dot::Element* a, PackedRows strides, Panel<Dot> b,
                     int64_t k, bool first, float* c) {
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
    const int sources = terms[0].b_pair.data ? 2 : 1;
    int64_t blocks = 0;
    for (int t = 0; t < count; ++t) blocks += ceil_div(terms[t].k, kDepth * Dot::kPair);
    const int64_t tiles = blocks > 1 ? ceil_div(rows, kTileRows) * panels : 1;
    Element* a = scratch<Element>(kGroupRows * kRowStride + kLanes, kSlotA);
    Element* b = scratch<Element>(panels * sources * kPanel * kDepth, kSlotB);
    float* c = scratch<float>(tiles * sources * kTileSize, kSlotC);
    Panel<Dot> panels_b[2 * kItemPanels];
    int64_t block = 0;
    for (int t = 0; t < count; ++t) {
        const GemmTerm& term = terms[t];
        const int64_t parts = ceil_div(term.k, kDepth * Dot::kPair);
        const int64_t step = ceil_div(ceil_div(term.k, parts), Dot::kPair) * Dot::kPair;
        for (int64_t k0 = 0; k0 < term.k; k0 += step, ++block) {
            const int64_t k = std::min(step, term.k - k0), depth = ceil_div(k, Dot::kPair);
            for (int64_t p = 0; p < panels; ++p) {
                const int64_t column = (panel + p) * kPanel;
                const int64_t columns = std::min<int64_t>(kPanel, n - column);
                for (int s = 0; s < sources; ++s)
                    panels_b[p * sources + s] =
                        panel_of<Dot>(s ? term.b_pair : term.b, column, columns, k0, k,
                                      outer <= kTileRows, b + (p * sources + s) * kPanel * kDepth);
            }
            float* tile = c;
            for (int64_t row = 0; row < rows; row += kTileRows) {
                const int64_t here = std::min<int64_t>(kTileRows, rows - row);
                const int64_t in_group = row % kGroupRows;
                const Element* tile_a = a;
                PackedRows strides{kRowStride, 1};
                if (term.a.k_stride != 1) {
                    if (in_group == 0)
                        pack_tiles<Dot>(term.a, m + row, std::min(kGroupRows, rows - row), outer,
                                        k0, k, a);
                    tile_a = a + in_group * kRowStride, strides = {1, kTileRows};
                } else if (in_place<Dot>(term.a, here)) {
                    strides.row = term.a.outer_stride;
                    tile_a = (const Element*)term.a.data + (m + row) * strides.row + k0;
                } else {
                    pack_rows<Dot>(term.a, m + row, here, k0, k, a);
                }
                const int64_t next = row + here;
                for (int64_t p = 0; p < panels; ++p) {
                    prefetch_rows(term.a, m + next, std::min<int64_t>(kTileRows, rows - next), k0,
                                  k, p, panels);
                    for (int s = 0; s < sources; ++s) {
                        product_of_rows<Dot>(here, tile_a, strides, panels_b[p * sources + s],
                                             depth, block == 0, tile + s * kTileSize);
                    }
                    if (block == blocks - 1) {
                        const int64_t column = (panel + p) * kPanel;
                        sink.take(sink.context, tile, m + row, here, column,
                                  std::min<int64_t>(kPanel, n - column));
                    }
                    if (tiles > 1) tile += sources * kTileSize;
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
    int64_t row_parts = ceil_div(m, kItemRows), step = kItemPanels;
    if (work > kSerialWork) {
        while (step > 2 && row_parts * ceil_div(panels, step) < 3 * threads) step /= 2;
        while (m / (row_parts + 1) >= 8 * kTileRows &&
               row_parts * ceil_div(panels, step) < 2 * threads)
            ++row_parts;
    }
    const int64_t rows = ceil_div(ceil_div(m, row_parts), kTileRows) * kTileRows;
    row_parts = ceil_div(m, rows);
    const int64_t items = row_parts * ceil_div(panels, step);
#pragma omp parallel for schedule(dynamic) if (items > 1 && work > kSerialWork)
    for (int64_t item = 0; item < items; ++item) {
        const int64_t m0 = item % row_parts * rows, panel = item / row_parts * step;
        gemm_item<Dot>(terms, count, m0, std::min(rows, m - m0), m, n, panel,
                       std::min(step, panels - panel), sink);
    }
}
