// Tensor maps as the emulation keeps them: the tensor itself. Included by csrc/cuda/tensor_map.h,
// which declares Tiled before.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastattn::cuda {

struct alignas(64) TensorMap {
    Tiled tensor;
    uint64_t signature;  // kSignature where make_tensor_map wrote it

    static constexpr uint64_t kSignature = 0x7e5a0f3a9c0ffee1;
};

}  // namespace fastattn::cuda

namespace fastattn::emulation {

inline int element_bytes(const cuda::TensorMap& map) {
    return map.tensor.element == cuda::Element::float32 ? 4 : 2;
}

inline int64_t box_bytes(const cuda::TensorMap& map) {
    const int* box = map.tensor.box;
    return int64_t(box[0]) * box[1] * box[2] * box[3] * element_bytes(map);
}

// The 128-byte swizzle, of TMA and of wgmma alike: bits 7 to 9 of the shared memory address, the
// row of 128 bytes in a pattern of 1024, are added without carry to bits 4 to 6, the 16-byte chunk.
// PTX ISA, "Tensor swizzling modes".
constexpr uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Calls piece(shared, global, bytes) for each run of bytes of the box that begins at element `at`
// of the tensor and at `base` in shared memory, wherever it lies within the tensor. Boxes are dense
// in shared memory, the innermost dim first.
template <class Piece>
void for_each_piece(const cuda::TensorMap& map, const int (&at)[4], uint32_t base, Piece piece) {
    const cuda::Tiled& t = map.tensor;
    const int element = element_bytes(map);
    const int64_t first = std::max<int64_t>(0, -int64_t(at[0]));
    const int64_t last = std::min<int64_t>(t.box[0], t.sizes[0] - at[0]);
    if (first >= last) return;
    const auto inside = [&](int d, int i) {
        return 0 <= at[d] + int64_t(i) && at[d] + int64_t(i) < t.sizes[d];
    };
    uint32_t row = base;
    for (int i3 = 0; i3 < t.box[3]; ++i3)
        for (int i2 = 0; i2 < t.box[2]; ++i2)
            for (int i1 = 0; i1 < t.box[1]; ++i1, row += t.box[0] * element) {
                if (!inside(1, i1) || !inside(2, i2) || !inside(3, i3)) continue;
                const int64_t offset = at[0] + first + (at[1] + int64_t(i1)) * t.strides[1] +
                                       (at[2] + int64_t(i2)) * t.strides[2] +
                                       (at[3] + int64_t(i3)) * t.strides[3];
                auto* global =
                    static_cast<uint8_t*>(const_cast<void*>(t.address)) + offset * element;
                uint32_t from = row + uint32_t(first) * element;
                const uint32_t end = row + uint32_t(last) * element;
                // Swizzled, 16-byte chunks stay whole.
                while (from < end) {
                    const uint32_t next = t.swizzle ? std::min(end, from / 16 * 16 + 16) : end;
                    piece(t.swizzle ? swizzled(from) : from, global, int(next - from));
                    global += next - from, from = next;
                }
            }
}

}  // namespace fastattn::emulation

namespace fastattn::cuda {

// Refuses what cuTensorMapEncodeTiled refuses (CUDA Driver API, "Tensor Map Object Management").
inline TensorMap make_tensor_map(const Tiled& tensor) {
    const TensorMap map{tensor, TensorMap::kSignature};
    const int element = emulation::element_bytes(map);
    const auto require = [](bool met, const std::string& rule, int64_t found) {
        if (!met)
            throw std::runtime_error("tensor map: " + rule + ", not " + std::to_string(found));
    };
    require(uintptr_t(tensor.address) % 16 == 0, "the address must be a multiple of 16",
            int64_t(uintptr_t(tensor.address)));
    for (int d = 0; d < 4; ++d) {
        const std::string of_dim = " of dim " + std::to_string(d);
        const int64_t size = tensor.sizes[d], box = tensor.box[d];
        require(1 <= size && size <= int64_t(1) << 32, "the size" + of_dim + " must be 1 to 2^32",
                size);
        require(1 <= box && box <= 256, "the box" + of_dim + " must be 1 to 256", box);
        if (d == 0) {
            require(tensor.strides[0] == 1, "the innermost stride must be 1", tensor.strides[0]);
            continue;
        }
        const int64_t stride = tensor.strides[d] * element;
        require(stride % 16 == 0, "the stride in bytes" + of_dim + " must be a multiple of 16",
                stride);
        require(0 <= stride && stride < int64_t(1) << 40,
                "the stride in bytes" + of_dim + " must be 0 to 2^40", stride);
    }
    const int row = tensor.box[0] * element;
    require(row % 16 == 0, "the box's rows must be multiples of 16 bytes", row);
    require(!tensor.swizzle || row == 128, "the box's rows must be 128 bytes to be swizzled", row);
    return map;
}

}  // namespace fastattn::cuda
