// The products of the feed-forward networks for sm_90: what ffn.cu launches, compiled.
#include "cuda/gemm_sm90.cuh"

namespace fastattn::cuda {

#define FASTATTN_GEMM(A, B, ...)                                                                  \
    template void gemm_sm90<Major::A, Major::B, __VA_ARGS__>(const GemmArgs&, const __VA_ARGS__&, \
                                                             TileSize, void*);
#define FASTATTN_GEMMS(T)                          \
    FASTATTN_GEMM(k, k, HiddenEpilogue<T, false>)  \
    FASTATTN_GEMM(k, k, HiddenEpilogue<T, true>)   \
    FASTATTN_GEMM(k, k, OutEpilogue<T>)            \
    FASTATTN_GEMM(k, mn, PreactEpilogue<T, false>) \
    FASTATTN_GEMM(k, mn, PreactEpilogue<T, true>)  \
    FASTATTN_GEMM(k, mn, OutEpilogue<T>)           \
    FASTATTN_GEMM(mn, mn, OutEpilogue<T>)

FASTATTN_GEMMS(float16)
FASTATTN_GEMMS(bfloat16)

#undef FASTATTN_GEMMS
#undef FASTATTN_GEMM

}  // namespace fastattn::cuda
