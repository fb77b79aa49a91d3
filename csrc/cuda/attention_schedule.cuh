// Which tiles of queries the blocks of a persistent kernel take, and which keys a tile needs.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "cuda/attention_scores.cuh"

namespace fastattn::cuda {

// The order of tiles. Heads go by sections whose keys and values fit in L2; in a section, blocks of
// queries one after the other, under a causal band the longest first, each of all heads.
struct Schedule {
    int tiles, blocks, heads, section;
    bool last_first;
};

// One tile: queries from first_row on, and the blocks of keys that they see.
struct Work {
    int batch, head, first_row;
    Sequence sequence;
    Range blocks;
};

// Host.
inline Schedule schedule_of(const AttentionArgs& args, int block_m) {
    // Bytes of keys and values that tiles running at a time should read, to find them in L2.
    constexpr int64_t kL2Bytes = 32 << 20;
    const bool causal = args.window_right != kUnbounded;
    const int blocks = (args.seqlen_q + block_m - 1) / block_m;
    const int64_t heads = int64_t(args.batch) * args.heads, tiles = blocks * heads;
    if (tiles > INT32_MAX / 2)
        throw std::invalid_argument("attention: more than 2^30 blocks of queries");
    const int64_t head_bytes = int64_t(args.seqlen_k) * (args.head_dim + args.head_dim_v) * 2;
    int64_t section = args.heads / args.heads_kv;
    if (causal) section *= std::max<int64_t>(kL2Bytes / std::max<int64_t>(head_bytes, 1), 1);
    return {int(tiles), blocks, int(heads), int(std::min(section, heads)), causal};
}

// Which tile this block takes in a round. Every other round runs backwards, so that no block gets
// the longest tile of each.
FASTATTN_DEVICE int tile_of_round(int round) {
    const int blocks = int(gridDim.x), block = int(blockIdx.x);
    return round * blocks + (round % 2 ? blocks - 1 - block : block);
}

template <int kBlockM, int kBlockN>
FASTATTN_DEVICE Work work_of(const AttentionArgs& args, const Schedule& schedule, int tile) {
    const int in_section = schedule.section * schedule.blocks;
    const int first_head = tile / in_section * schedule.section;
    const int heads_here = min(schedule.section, schedule.heads - first_head);
    const int block = tile % in_section / heads_here;
    const int head = first_head + tile % in_section % heads_here;
    Work w;
    w.batch = head / args.heads, w.head = head % args.heads;
    w.first_row = (schedule.last_first ? schedule.blocks - 1 - block : block) * kBlockM;
    w.sequence = sequence_of(args, w.batch);
    const int last_row = min(w.first_row + kBlockM, w.sequence.seqlen_q) - 1;
    const Range keys = keys_seen(args, w.sequence, w.first_row, last_row);
    w.blocks = {keys.begin / kBlockN, (keys.end + kBlockN - 1) / kBlockN};
    if (w.first_row > last_row || keys.begin >= keys.end) w.blocks = {0, 0};
    return w;
}

}  // namespace fastattn::cuda
