// The instructions of csrc/cuda/ptx_sm90.cuh, which documents them, on the host.
#pragma once

#include <cstdint>

#include "cuda/tensor_map.h"
#include "emulation/engine.h"
#include "emulation/mbarrier.h"

namespace fastattn::emulation {

void fence_mbarrier_init();
void fence_proxy_async();

// What block `rank` of the cluster has at the address.
SharedAddress address_in(int rank, SharedAddress address, const char* instruction, Site site);

void tma_load(SharedAddress to, const cuda::TensorMap* map, SharedAddress barrier,
              const int (&at)[4], Site site);
void st_async(SharedAddress to, const void* value, int bytes, SharedAddress barrier, int rank,
              Site site);
void tma_multicast(SharedAddress to, const cuda::TensorMap* map, SharedAddress barrier,
                   const int (&at)[4], uint16_t blocks, Site site);
void tma_store(const cuda::TensorMap* map, SharedAddress from, const int (&at)[4], bool add,
               Site site);
void prefetch_tensor_map(const cuda::TensorMap* map, Site site);
void bulk_load(SharedAddress to, const void* from, uint32_t bytes, SharedAddress barrier,
               Site site);
void bulk_reduce_add(float* to, SharedAddress from, uint32_t bytes, Site site);
void bulk_commit();
void bulk_wait(int pending, bool only_read);

void stmatrix(SharedAddress row, const uint32_t (&d)[4], Site site);
void set_registers(int registers, bool up, Site site);

}  // namespace fastattn::emulation

namespace fastattn::cuda {

using emulation::SharedAddress, emulation::Site;

inline void mbarrier_init(SharedAddress barrier, uint32_t arrivals, Site site = Site::here()) {
    emulation::mbarriers().init(barrier, arrivals, site);
}
inline void fence_mbarrier_init() { emulation::fence_mbarrier_init(); }
inline void mbarrier_arrive(SharedAddress barrier, Site site = Site::here()) {
    emulation::mbarriers().at(barrier, "mbarrier_arrive", site).arrive(0, "mbarrier_arrive", site);
}
inline void mbarrier_arrive_expect(SharedAddress barrier, uint32_t bytes,
                                   Site site = Site::here()) {
    constexpr const char* kName = "mbarrier_arrive_expect";
    emulation::mbarriers().at(barrier, kName, site).arrive(bytes, kName, site);
}
inline void mbarrier_wait(SharedAddress barrier, uint32_t parity, Site site = Site::here()) {
    emulation::mbarriers().at(barrier, "mbarrier_wait", site).wait(parity, site);
}

inline int cluster_rank() { return emulation::block().rank(); }
inline int cluster_size() { return emulation::block().blocks(); }
inline void cluster_barrier(Site site = Site::here()) {
    emulation::block().cluster_arrive("cluster_barrier", site);
    emulation::block().cluster_wait("cluster_barrier", site);
}
inline void cluster_arrive(Site site = Site::here()) {
    emulation::Block& block = emulation::block();
    block.cluster_arrive("cluster_arrive", site, &emulation::mbarriers().released(block.thread()));
}
inline void cluster_wait(Site site = Site::here()) {
    emulation::block().cluster_wait("cluster_wait", site);
}
template <class T>
void st_async_at(SharedAddress to, T value, SharedAddress barrier, int rank,
                 Site site = Site::here()) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    emulation::st_async(to, &value, sizeof(T), barrier, rank, site);
}
inline void mbarrier_arrive_at(SharedAddress barrier, int rank, Site site = Site::here()) {
    constexpr const char* kName = "mbarrier_arrive_at";
    const SharedAddress there = emulation::address_in(rank, barrier, kName, site);
    emulation::block().keep_block(rank, kName, site);
    emulation::mbarriers().at(there, kName, site).arrive(0, kName, site);
}

inline void tma_multicast_4d(SharedAddress to, const TensorMap* map, SharedAddress barrier, int c0,
                             int c1, int c2, int c3, uint16_t blocks, Site site = Site::here()) {
    emulation::tma_multicast(to, map, barrier, {c0, c1, c2, c3}, blocks, site);
}
inline void tma_load_4d(SharedAddress to, const TensorMap* map, SharedAddress barrier, int c0,
                        int c1, int c2, int c3, Site site = Site::here()) {
    emulation::tma_load(to, map, barrier, {c0, c1, c2, c3}, site);
}
inline void tma_store_4d(const TensorMap* map, SharedAddress from, int c0, int c1, int c2, int c3,
                         Site site = Site::here()) {
    emulation::tma_store(map, from, {c0, c1, c2, c3}, false, site);
}
inline void tma_reduce_add_4d(const TensorMap* map, SharedAddress from, int c0, int c1, int c2,
                              int c3, Site site = Site::here()) {
    emulation::tma_store(map, from, {c0, c1, c2, c3}, true, site);
}
inline void bulk_load(SharedAddress to, const void* from, uint32_t bytes, SharedAddress barrier,
                      Site site = Site::here()) {
    emulation::bulk_load(to, from, bytes, barrier, site);
}
inline void bulk_reduce_add(float* to, SharedAddress from, uint32_t bytes,
                            Site site = Site::here()) {
    emulation::bulk_reduce_add(to, from, bytes, site);
}
inline void bulk_commit() { emulation::bulk_commit(); }
template <int pending>
void bulk_wait() {
    emulation::bulk_wait(pending, false);
}
template <int pending>
void bulk_wait_read() {
    emulation::bulk_wait(pending, true);
}
inline void prefetch_tensor_map(const TensorMap* map, Site site = Site::here()) {
    emulation::prefetch_tensor_map(map, site);
}

inline void fence_proxy_async() { emulation::fence_proxy_async(); }

inline void stmatrix_x4(SharedAddress row, const uint32_t (&d)[4], Site site = Site::here()) {
    emulation::stmatrix(row, d, site);
}

// PTX ISA, "setmaxnreg": 24 to 256, a multiple of 8.
template <int registers>
void registers_up(Site site = Site::here()) {
    static_assert(24 <= registers && registers <= 256 && registers % 8 == 0);
    emulation::set_registers(registers, true, site);
}
template <int registers>
void registers_down(Site site = Site::here()) {
    static_assert(24 <= registers && registers <= 256 && registers % 8 == 0);
    emulation::set_registers(registers, false, site);
}

}  // namespace fastattn::cuda
