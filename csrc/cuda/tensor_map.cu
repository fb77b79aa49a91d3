// Tensor maps by the driver, whose function is looked up at run time: nothing links libcuda.
#include "cuda/tensor_map.h"

#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"

namespace fastattn::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
    constexpr const char* kName = "cuTensorMapEncodeTiled";
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    constexpr unsigned kSince = 12000;
    check(cudaGetDriverEntryPointByVersion(kName, &found, kSince, cudaEnableDefault, &result),
          kName);
#else
    check(cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result), kName);
#endif
    if (result != cudaDriverEntryPointSuccess || !found)
        throw std::runtime_error("the NVIDIA driver has no tensor maps: it is older than CUDA 12");
    return reinterpret_cast<Encode>(found);
}

CUtensorMapDataType data_type(Element element) {
    switch (element) {
        case Element::float16:
            return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        case Element::bfloat16:
            return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        default:
            return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    }
}

}  // namespace

TensorMap make_tensor_map(const Tiled& tensor) {
    static const Encode encode = find_encode();
    const cuuint64_t bytes = tensor.element == Element::float32 ? 4 : 2;
    cuuint64_t sizes[4], strides[3];
    cuuint32_t box[4], steps[4];
    for (int d = 0; d < 4; ++d) {
        sizes[d] = cuuint64_t(tensor.sizes[d]), box[d] = cuuint32_t(tensor.box[d]), steps[d] = 1;
        if (d > 0) strides[d - 1] = cuuint64_t(tensor.strides[d]) * bytes;
    }
    TensorMap map;
    const CUresult result =
        encode(&map, data_type(tensor.element), 4, const_cast<void*>(tensor.address), sizes,
               strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               tensor.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("the NVIDIA driver refuses a tensor map: error " +
                                 std::to_string(int(result)));
    return map;
}

}  // namespace fastattn::cuda
