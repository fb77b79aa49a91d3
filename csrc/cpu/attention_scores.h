// What both directions of attention share: packed sequences, which keys a query sees, and the
// features of its scores.
// Included inside a target region.
#pragma once

#include "cpu/philox.h"
#include "cpu/tile.h"

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

constexpr int kPanel = kTileVectors * kLanes;  // keys or columns of a tile
// Scores of a tile are written up to a multiple of this.
template <class Dot>
constexpr int kKeyStep = Dot::kMatrix ? 2 * Dot::kDepthStep : kLanes;

// The arguments of sequence b of a packed call as those of a call whose sequences are all like it.
template <class Args>
Args one_sequence(const Args& a, int64_t b) {
    Args one = a;
    const int64_t first_q = a.cu_seqlens_q[b];
    const auto move = [&a](auto*& base, Strides3& strides, int64_t first) {
        base = (std::remove_reference_t<decltype(base)>)((const char*)base +
                                                         first * strides[2] * itemsize(a.dtype));
        strides[0] = 0;
    };
    one.seqlen_q = a.cu_seqlens_q[b + 1] - first_q;
    move(one.q, one.q_strides, first_q), move(one.out, one.out_strides, first_q);
    if (a.lse) one.lse += first_q;
    int64_t first_k = 0;
    if (a.cu_seqlens_k) {
        first_k = a.cu_seqlens_k[b];
        one.seqlen_k = a.cu_seqlens_k[b + 1] - first_k;
        move(one.k, one.k_strides, first_k), move(one.v, one.v_strides, first_k);
    }
    if constexpr (std::is_same_v<Args, AttentionBwdArgs>) {
        move(one.dout, one.dout_strides, first_q), move(one.dq, one.dq_strides, first_q);
        move(one.dk, one.dk_strides, first_k), move(one.dv, one.dv_strides, first_k);
        one.delta += first_q;
        if (a.dlse) one.dlse += first_q;
    }
    return one;
}

struct KeyRange {
    int64_t begin, end;
};

// The keys that query i of sequence b may see by the band and the lengths.
inline KeyRange visible_keys(const AttentionArgs& a, int64_t b, int64_t i) {
    const int64_t center = i + (a.offsets ? a.offsets[b] : a.offset);
    const int64_t seqlen_k =
        a.seqlens_k ? std::min<int64_t>(a.seqlens_k[b], a.seqlen_k) : a.seqlen_k;
    int64_t begin = 0, end = std::max<int64_t>(seqlen_k, 0);
    if (a.window_left < kUnbounded) begin = std::max(begin, center - a.window_left);
    if (a.window_right < kUnbounded) end = std::min(end, center + a.window_right + 1);
    return {begin, std::max(begin, end)};
}

// Whether scores need more than the scale before the softmax.
inline bool has_features(const AttentionArgs& a) {
    return a.softcap != 0 || a.mask || a.bias || a.alibi_slopes || !(a.softmax_scale > 0);
}

typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));

// All ones in the lanes whose key takes part.
FASTATTN_INLINE IntVec load_mask(const uint8_t* mask, int64_t stride, int64_t count) {
    ByteVec bytes = {};
    if (stride == 1 && count >= kLanes) {
        __builtin_memcpy(&bytes, mask, kLanes);
    } else {
        for (int64_t lane = 0; lane < std::min<int64_t>(count, kLanes); ++lane)
            bytes[lane] = mask[lane * stride];
    }
    return __builtin_convertvector(bytes, IntVec) != 0;
}

template <class T>
FASTATTN_INLINE Vec load_strided(const T* p, int64_t stride, int64_t count) {
    if (stride == 1) return load(p, count);
    if (stride == 0) return splat(to_float(*p));
    T gathered[kLanes] = {};
    for (int64_t lane = 0; lane < std::min<int64_t>(count, kLanes); ++lane)
        gathered[lane] = p[lane * stride];
    return load(gathered);
}

FASTATTN_INLINE Vec load_bias(const AttentionArgs& a, int64_t at, int64_t count) {
    const int64_t stride = a.bias_strides[3];
    if (a.bias_dtype == DType::float32)
        return load_strided((const float*)a.bias + at, stride, count);
    if (a.bias_dtype == DType::float16) return load_strided((const F16*)a.bias + at, stride, count);
    return load_strided((const BF16*)a.bias + at, stride, count);
}

// Fetches the bias of query (b, h, i) and keys [j, j + count) while the products are computed.
inline void prefetch_bias(const AttentionArgs& a, int64_t b, int64_t h, int64_t i, int64_t j,
                          int64_t count) {
    const Strides4& strides = a.bias_strides;
    if (!a.bias || strides[3] != 1) return;
    const int64_t size = itemsize(a.bias_dtype);
    const char* row =
        (const char*)a.bias + (b * strides[0] + h * strides[1] + i * strides[2] + j) * size;
    for (int64_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch(row + byte);
}

// Turns q.k of query (b, h, i) and keys [j, j + count) into scores in units of log2, -inf where
// the mask hides a key. `capped` receives tanh of the softcap if there is one (else untouched).
inline void apply_features(const AttentionArgs& a, int64_t b, int64_t h, int64_t i, int64_t j,
                           int64_t count, float* scores, float* capped) {
    const int64_t center = i + (a.offsets ? a.offsets[b] : a.offset);
    const uint8_t* mask = nullptr;
    if (a.mask)
        mask = a.mask + b * a.mask_strides[0] + h * a.mask_strides[1] + i * a.mask_strides[2] +
               j * a.mask_strides[3];
    const int64_t bias_at = b * a.bias_strides[0] + h * a.bias_strides[1] + i * a.bias_strides[2] +
                            j * a.bias_strides[3];
    const float slope =
        a.alibi_slopes ? a.alibi_slopes[b * a.alibi_strides[0] + h * a.alibi_strides[1]] : 0.0f;
    const Vec lanes = __builtin_convertvector(lane_index(), Vec);
    if (a.bias && !a.mask && !a.alibi_slopes && a.softcap == 0) {
        for (int64_t n = 0; n < count; n += kLanes) {
            Vec bias = load_bias(a, bias_at + n * a.bias_strides[3], count - n) * kLog2E;
            store(scores + n, load(scores + n) * (a.softmax_scale * kLog2E) + bias);
        }
        return;
    }
    for (int64_t n = 0; n < count; n += kLanes) {
        Vec s = load(scores + n) * a.softmax_scale;
        if (a.softcap != 0) {
            Vec t = tanh(s / a.softcap);
            if (capped) store(capped + n, t);
            s = t * a.softcap;
        }
        if (a.bias) s = s + load_bias(a, bias_at + n * a.bias_strides[3], count - n);
        if (a.alibi_slopes) s = s - slope * abs(lanes + float(j + n - center));
        s = s * kLog2E;
        if (mask)
            s = select(load_mask(mask + n * a.mask_strides[3], a.mask_strides[3], count - n), s,
                       splat(-INFINITY));
        store(scores + n, s);
    }
}

// Multiplies weights of keys [j, j + count) by dropout's factor; both are multiples of kLanes.
inline void apply_dropout(const AttentionArgs& a, int64_t b, int64_t h, int64_t i, int64_t j,
                          int64_t count, float* weights) {
    alignas(64) uint32_t words[64];
    const UintVec threshold = UintVec{} + a.dropout.threshold;
    for (int64_t block = j / 64; block * 64 < j + count; ++block) {
        philox_words(a.dropout.seed, block, uint32_t(i), uint32_t(h), uint32_t(b), words);
        const int64_t begin = std::max(j, block * 64), end = std::min(j + count, block * 64 + 64);
        for (int64_t at = begin; at < end; at += kLanes) {
            UintVec word;
            __builtin_memcpy(&word, words + at - block * 64, sizeof word);
            const Vec kept = load(weights + at - j) * a.dropout.scale;
            store(weights + at - j, select((IntVec)(word >= threshold), kept, Vec{}));
        }
    }
}
