// Included inside a target region. Matrices as operands of gemm.h, and what its sinks do with
// tiles, sums of columns.
#pragma once

#include "cpu/gemm.h"

inline GemmOperand rows_of(const MatrixView& v, DType dtype) {
    return {v.data, v.row_stride, v.column_stride, dtype};
}
inline GemmOperand columns_of(const MatrixView& v, DType dtype) {
    return {v.data, v.column_stride, v.row_stride, dtype};
}
// A contiguous (rows, width) matrix from its row `row` on.
inline MatrixView contiguous(const void* data, int64_t width, DType dtype, int64_t row = 0) {
    return {(const char*)data + row * width * itemsize(dtype), width, 1};
}

// to[m.., n..] of a (., width) matrix = tile.
inline void write_tile(DType dtype, void* to, int64_t width, int64_t m, int64_t rows, int64_t n,
                       int64_t columns, const float* tile) {
    with_storage(dtype, [&](auto type) {
        auto at = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(type)>>*>(
                      (decltype(type))to) +
                  m * width + n;
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t j = 0; j < columns; j += kLanes)
                store(at + row * width + j, load(tile + row * kPanel + j), columns - j);
    });
}

inline void read_tile(DType dtype, const void* from, int64_t width, int64_t m, int64_t rows,
                      int64_t n, int64_t columns, float* tile) {
    with_storage(dtype, [&](auto type) {
        const auto at = (decltype(type))from + m * width + n;
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t j = 0; j < kPanel; j += kLanes)
                store(tile + row * kPanel + j,
                      j < columns ? load(at + row * width + j, columns - j) : Vec{});
    });
}

inline void add_bias(DType dtype, const void* bias, int64_t rows, int64_t n, int64_t columns,
                     float* tile) {
    if (!bias) return;
    alignas(64) float values[kPanel];
    read_tile(dtype, bias, 0, 0, 1, n, columns, values);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < kPanel; j += kLanes)
            store(tile + row * kPanel + j, load(tile + row * kPanel + j) + load(values + j));
}

// to[n] = or, to add, += the sum of a (rows, columns) matrix's column n, in runs of rows.
inline void sum_columns(DType from_dtype, const MatrixView& matrix, int64_t rows, int64_t columns,
                        DType to_dtype, void* to, bool add = false) {
    constexpr int64_t kBlock = 8 * kLanes, kRun = 32;
#pragma omp parallel for if (rows * columns > 65536)
    for (int64_t n = 0; n < columns; n += kBlock) {
        with_storage(from_dtype, [&](auto type) {
            const int64_t width = std::min(kBlock, columns - n);
            const auto from = (decltype(type))matrix.data + n;
            Vec total[8] = {};
            for (int64_t start = 0; start < rows; start += kRun) {
                Vec sums[8] = {};
                for (int64_t row = start; row < std::min(rows, start + kRun); ++row)
                    for (int j = 0; j * kLanes < width; ++j)
                        sums[j] +=
                            load(from + row * matrix.row_stride + j * kLanes, width - j * kLanes);
                for (int j = 0; j < 8; ++j) total[j] += sums[j];
            }
            with_storage(to_dtype, [&](auto to_type) {
                auto at = (std::remove_const_t<std::remove_pointer_t<decltype(to_type)>>*)to + n;
                for (int j = 0; j * kLanes < width; ++j) {
                    const int64_t count = width - j * kLanes;
                    if (add) total[j] += load(at + j * kLanes, count);
                    store(at + j * kLanes, total[j], count);
                }
            });
        });
    }
}
