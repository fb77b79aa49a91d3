// What sm_90a adds: mbarriers, bulk copies (TMA), proxies, registers moved between warpgroups.
// Of the matrix units: wgmma.cuh.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/tensor_map.h"

#ifdef FASTATTN_EMULATION
#include "emulation/ptx_sm90.h"
#else

namespace fastattn::cuda {

// mbarrier: 8 bytes, 8-byte aligned. A phase ends when `arrivals` threads have arrived and the
// bytes that they expect have landed. A wait for `parity` returns once the phase of that parity has
// ended: the first phase is 0, and waiting for 1 on a fresh barrier returns at once.
FASTATTN_DEVICE void mbarrier_init(SharedAddress barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}
// Shows the initialised barriers to the copy engine; a barrier() of the block must follow.
FASTATTN_DEVICE void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FASTATTN_DEVICE void mbarrier_arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
FASTATTN_DEVICE void mbarrier_arrive_expect(SharedAddress barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
FASTATTN_DEVICE void mbarrier_wait(SharedAddress barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ended;\n"
        "bra again;\n"
        "ended:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Blocks of a cluster: this one's number, how many there are, and a barrier of all their threads.
FASTATTN_DEVICE int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
FASTATTN_DEVICE int cluster_size() {
    int size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
FASTATTN_DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The barrier in halves, without the fence of the device that release costs: it tells that all
// blocks have begun, and of their mbarriers after fence_mbarrier_init, but of no stores.
FASTATTN_DEVICE void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
FASTATTN_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Stores 4 or 8 bytes, asynchronously, to what block `rank` has at the address, and has them count
// at the mbarrier that it has at the address of `barrier`.
template <class T>
FASTATTN_DEVICE void st_async_at(SharedAddress to, T value, SharedAddress barrier, int rank) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    union {
        T value;
        uint32_t words[sizeof(T) / 4];
    } u{value};
    if constexpr (sizeof(T) == 4)
        asm volatile(
            "{\n"
            ".reg .b32 there, counting;\n"
            "mapa.shared::cluster.u32 there, %0, %2;\n"
            "mapa.shared::cluster.u32 counting, %1, %2;\n"
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, "
            "[counting];\n"
            "}\n" ::"r"(to),
            "r"(barrier), "r"(rank), "r"(u.words[0])
            : "memory");
    else
        asm volatile(
            "{\n"
            ".reg .b32 there, counting;\n"
            "mapa.shared::cluster.u32 there, %0, %2;\n"
            "mapa.shared::cluster.u32 counting, %1, %2;\n"
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [there], "
            "{%3, %4}, [counting];\n"
            "}\n" ::"r"(to),
            "r"(barrier), "r"(rank), "r"(u.words[0]), "r"(u.words[1])
            : "memory");
}

// Arrives at what block `rank` has at the address of `barrier`. It tells that block of what wgmma
// and the copy engine have done, but of no ordinary stores: that would cost a fence of the device.
FASTATTN_DEVICE void mbarrier_arrive_at(SharedAddress barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// One thread copies the box of `map` that begins at element (c0 innermost, c1, c2, c3), zeros
// beyond the tensor's edges, and has its bytes count at `barrier`. `to`: 128-byte aligned,
// 1024-byte with the 128-byte swizzle.
FASTATTN_DEVICE void tma_load_4d(SharedAddress to, const TensorMap* map, SharedAddress barrier,
                                 int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// The same to each block of the cluster that has a bit in `blocks`: `to` and `barrier` are
// addresses in each.
FASTATTN_DEVICE void tma_multicast_4d(SharedAddress to, const TensorMap* map, SharedAddress barrier,
                                      int c0, int c1, int c2, int c3, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks)
        : "memory");
}
// tma_load_4d the other way; what lies beyond the tensor's edges is not written. In this thread's
// current bulk group.
FASTATTN_DEVICE void tma_store_4d(const TensorMap* map, SharedAddress from, int c0, int c1, int c2,
                                  int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            map),
        "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// Adds, float32, where tma_store_4d overwrites.
FASTATTN_DEVICE void tma_reduce_add_4d(const TensorMap* map, SharedAddress from, int c0, int c1,
                                       int c2, int c3) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group "
        "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
        "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// Contiguous bytes, a multiple of 16, both ends 16-byte aligned.
FASTATTN_DEVICE void bulk_load(SharedAddress to, const void* from, uint32_t bytes,
                               SharedAddress barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
        : "memory");
}
// Adds contiguous float32 to global memory. In this thread's current bulk group.
FASTATTN_DEVICE void bulk_reduce_add(float* to, SharedAddress from, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                     __cvta_generic_to_global(to)),
                 "r"(from), "r"(bytes)
                 : "memory");
}
FASTATTN_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the newest `pending` groups of this thread are done; `_read`: have read their
// shared memory, so that it may be written again.
template <int pending>
FASTATTN_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}
template <int pending>
FASTATTN_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
FASTATTN_DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Orders this thread's accesses of shared memory before what wgmma and the copy engine read and
// write there (they are another proxy); a barrier between the threads comes after it.
FASTATTN_DEVICE void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Stores four 8x8 matrices of 16-bit elements, the inverse of ldmatrix_x4.
FASTATTN_DEVICE void stmatrix_x4(SharedAddress row, const uint32_t (&d)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])
                 : "memory");
}

// The registers of each thread of this warpgroup from here on; all its warps must pass.
template <int registers>
FASTATTN_DEVICE void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
FASTATTN_DEVICE void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

}  // namespace fastattn::cuda

#endif
