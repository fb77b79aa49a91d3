// What attention's kernels share: the extent of a sequence, the keys that a block of queries sees
// and the queries that see a block of keys, and a score from its product.
#pragma once

#include "cuda/attention.h"
#include "cuda/math.cuh"
#include "cuda/philox.cuh"
#include "cuda/tile.cuh"

namespace fastattn::cuda {

// One sequence of the batch: its first rows in q and k where they are packed (else 0), its lengths
// and the offset of its diagonal.
struct Sequence {
    int64_t start_q = 0, start_k = 0;
    int seqlen_q, seqlen_k, offset;
};

FASTATTN_DEVICE Sequence sequence_of(const AttentionArgs& a, int batch) {
    Sequence s{0, 0, a.seqlen_q, a.seqlen_k, a.offset};
    if (a.cu_seqlens_q) {
        s.start_q = ld_readonly(a.cu_seqlens_q + batch);
        s.seqlen_q = ld_readonly(a.cu_seqlens_q + batch + 1) - int(s.start_q);
    }
    if (a.cu_seqlens_k) {
        s.start_k = ld_readonly(a.cu_seqlens_k + batch);
        s.seqlen_k = ld_readonly(a.cu_seqlens_k + batch + 1) - int(s.start_k);
    }
    if (a.seqlens_k) s.seqlen_k = max(0, min(s.seqlen_k, ld_readonly(a.seqlens_k + batch)));
    if (a.offsets) s.offset = max(-kUnbounded, min(kUnbounded, ld_readonly(a.offsets + batch)));
    return s;
}

// Where the tensors of packed sequences have batch stride 0 by convention, this is the element that
// row `row` of a sequence begins at.
FASTATTN_DEVICE int64_t row_offset(const Strides& strides, bool packed, int batch, int head,
                                   int64_t start, int row) {
    return (packed ? 0 : batch * strides.batch) + head * strides.head + (start + row) * strides.row;
}

// The rows of keys or of values of one sequence and head, in one tensor or in the pages of a cache.
template <class T>
struct KeyRows {
    const AttentionArgs& args;
    const Strides& strides;
    int batch;
    const T* begin;  // row 0, or that of page 0

    FASTATTN_DEVICE KeyRows(const AttentionArgs& a, const void* tensor, const Strides& strides,
                            const Sequence& s, int batch, int head_kv)
        : args(a), strides(strides), batch(batch), begin(static_cast<const T*>(tensor)) {
        const bool unbatched = a.block_table || a.cu_seqlens_k;
        begin += row_offset(strides, unbatched, batch, head_kv, s.start_k, 0);
    }

    FASTATTN_DEVICE const T* row(int key) const {
        if (!args.block_table) return begin + key * strides.row;
        const unsigned page_size = args.page_size, page = key / page_size;
        const int32_t* pages = args.block_table + batch * args.block_table_stride;
        return begin + ld_readonly(pages + page) * strides.batch + key % page_size * strides.row;
    }

    // Into `tile` from row first_key on, a multiple of its rows, zeros from row `end` on; see
    // Tile::load.
    template <int kThreads, class KeyTile>
    FASTATTN_DEVICE void load(const KeyTile& tile, int first_key, int end, int columns,
                              int thread) const {
        const int rows = end - first_key;
        if (!args.block_table || args.page_size % KeyTile::kHeight == 0)
            tile.template load<kThreads>(row(first_key), strides.row, rows, columns, thread);
        else
            tile.template load_rows<kThreads>(
                [&](int local) { return row(min(first_key + local, end - 1)); }, rows, columns,
                thread);
    }
};

struct Range {
    int begin, end;
};

// The keys that some query of rows [first, last] sees, and those that each of them sees.
FASTATTN_DEVICE Range keys_seen(const AttentionArgs& a, const Sequence& s, int first, int last) {
    return {max(0, first + s.offset - a.window_left),
            min(s.seqlen_k, last + s.offset + a.window_right + 1)};
}
FASTATTN_DEVICE Range keys_seen_by_all(const AttentionArgs& a, const Sequence& s, int first,
                                       int last) {
    return {max(0, last + s.offset - a.window_left),
            min(s.seqlen_k, first + s.offset + a.window_right + 1)};
}
// The queries that see some key of [first, last], and those that see each of them.
FASTATTN_DEVICE Range queries_seeing(const AttentionArgs& a, const Sequence& s, int first,
                                     int last) {
    return {max(0, first - s.offset - a.window_right),
            min(s.seqlen_q, last - s.offset + a.window_left + 1)};
}
FASTATTN_DEVICE Range queries_seeing_all(const AttentionArgs& a, const Sequence& s, int first,
                                         int last) {
    return {max(0, last - s.offset - a.window_right),
            min(s.seqlen_q, first - s.offset + a.window_left + 1)};
}

FASTATTN_DEVICE bool visible(const AttentionArgs& a, const Sequence& s, int row, int key) {
    const int distance = key - row - s.offset;
    return key < s.seqlen_k && distance >= -a.window_left && distance <= a.window_right;
}

FASTATTN_DEVICE float alibi_slope(const AttentionArgs& a, int batch, int head) {
    return a.alibi_slopes ? ld_readonly(a.alibi_slopes + batch * a.alibi_batch_stride +
                                        head * a.alibi_head_stride)
                          : 0.0f;
}

}  // namespace fastattn::cuda
