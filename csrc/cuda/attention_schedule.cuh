// Which tiles of queries the blocks of a persistent kernel take, one after the other, and which
// keys a tile needs.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "cuda/attention_scores.cuh"

namespace fastattn::cuda {

// Heads follow one another, so that tiles that run at a time read the same keys. Under a causal
// band the queries' blocks of a head go in pairs, the longest and the shortest, the next ones, and
// so on: the same work for all. The last two rounds of pairs and what is left of them are taken
// apart, longer blocks of all heads first, lest some multiprocessors have a pair more than others.
// Where lengths differ within the batch, each tile is a block of the grid, for the hardware to
// place.
struct Schedule {
    unsigned grid;
    int blocks, heads;  // of queries; of the whole batch
    int pair_rounds;    // -1: no pairs
    bool last_first;
};

// Host.
inline Schedule schedule_of(const AttentionArgs& args, int block_m, int processors) {
    const bool causal = args.window_right != kUnbounded;
    const bool uneven = args.cu_seqlens_q || args.cu_seqlens_k || args.seqlens_k || args.offsets;
    const int blocks = (args.seqlen_q + block_m - 1) / block_m;
    const int64_t heads = int64_t(args.batch) * args.heads, tiles = blocks * heads;
    if (tiles >= 1 << 30) throw std::invalid_argument("attention: 2^30 blocks of queries or more");
    const int64_t grid = uneven ? tiles : std::min<int64_t>(tiles, processors);
    int pair_rounds = -1;
    if (causal && !uneven && tiles > 0)
        pair_rounds = std::max(0, int((blocks + 1) / 2 * heads / grid) - 2);
    return {unsigned(grid), blocks, int(heads), pair_rounds, causal};
}

// A block of a head's queries; none where head is negative.
struct Place {
    int head, block;
};

// What this block takes in a step. It may be a block beyond the last: the one in the middle is a
// pair by itself.
FASTATTN_DEVICE Place place_of(const Schedule& s, unsigned step) {
    const unsigned grid = gridDim.x, self = blockIdx.x;
    const unsigned blocks = opaque(s.blocks), heads = opaque(s.heads);
    if (s.pair_rounds < 0) {
        const unsigned tile = step * grid + self, head = tile / blocks, block = tile % blocks;
        return {head < heads ? int(head) : -1, int(s.last_first ? blocks - 1 - block : block)};
    }
    const unsigned pairs = (blocks + 1) / 2, pair_rounds = s.pair_rounds;
    unsigned head, pair;
    bool longer;
    if (step < 2 * pair_rounds) {
        const unsigned index = step / 2 * grid + self;
        head = index / pairs, pair = index % pairs, longer = step % 2 == 0;
    } else {
        const unsigned taken = pair_rounds * grid, left = pairs * heads - taken;
        // Every other round runs backwards, so that no block gets the longest of each.
        const unsigned round = step - 2 * pair_rounds;
        const unsigned index = round * grid + (round % 2 ? grid - 1 - self : self);
        if (index >= 2 * left) return {-1, 0};
        longer = index < left;
        const unsigned rank = longer ? index : 2 * left - 1 - index;
        // Of the first head some pairs are taken; the heads after it have them all.
        const unsigned first_head = taken / pairs, first_pair = taken % pairs;
        const unsigned after = heads - 1 - first_head, ranks = first_pair * after;
        if (rank < ranks) {
            pair = rank / after, head = first_head + 1 + rank % after;
        } else {
            pair = first_pair + (rank - ranks) / (after + 1);
            head = first_head + (rank - ranks) % (after + 1);
        }
    }
    const unsigned block = longer ? blocks - 1 - pair : pair;
    return {int(head), int(!longer && 2 * pair + 1 == blocks ? blocks : block)};
}

// A tile: the queries from first_row on, and the blocks of keys that they see.
struct Work {
    int batch, head, first_row;
    Sequence sequence;
    Range blocks;
};

template <int kBlockM, int kBlockN>
FASTATTN_DEVICE Work work_at(const AttentionArgs& args, Place place) {
    const unsigned heads = opaque(args.heads), head = place.head;
    Work w;
    w.batch = head / heads, w.head = head % heads;
    w.first_row = place.block * kBlockM;
    w.sequence = sequence_of(args, w.batch);
    const int last_row = min(w.first_row + kBlockM, w.sequence.seqlen_q) - 1;
    const Range keys = keys_seen(args, w.sequence, w.first_row, last_row);
    w.blocks = {keys.begin / kBlockN, (keys.end + kBlockN - 1) / kBlockN};
    if (w.first_row > last_row || keys.begin >= keys.end) w.blocks = {0, 0};
    return w;
}

}  // namespace fastattn::cuda
