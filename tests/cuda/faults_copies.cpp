// Small kernels of mbarriers and of the copy engine, each sound or with one planted fault that the
// emulation must report.
#include "faults_sm90.h"

namespace fastattn::cuda {
namespace {

template <bool fault>
void mbarrier_without_init(const TensorMap&, float*) {
    if (!fault) start(256);
    mbarrier_arrive(empty());
}

template <bool fault>
void mbarrier_init_without_barrier(const TensorMap&, float*) {
    if (threadIdx.x == 0) mbarrier_init(full(0), 256);
    if (!fault) barrier();
    mbarrier_arrive(full(0));
}

template <bool fault>
void mbarrier_init_without_fence(const TensorMap& map, float*) {
    if (threadIdx.x == 0) {
        mbarrier_init(full(0), 1);
        if (!fault) fence_mbarrier_init();
    }
    barrier();
    if (threadIdx.x == 32) load(map, 0);
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void mbarrier_fence_after_barrier(const TensorMap& map, float*) {
    if (threadIdx.x == 0) mbarrier_init(full(0), 1);
    if (fault) barrier();
    if (threadIdx.x == 0) fence_mbarrier_init();
    if (!fault) barrier();
    if (threadIdx.x == 32) load(map, 0);
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void mbarrier_init_twice(const TensorMap&, float*) {
    if (threadIdx.x == 0)
        for (int i = 0; i < 2; ++i) mbarrier_init(full(fault ? 0 : i), 1);
}

template <bool fault>
void too_many_arrivals(const TensorMap&, float*) {
    start();
    // The phase cannot end before the bytes land.
    if (threadIdx.x == 0) mbarrier_arrive_expect(full(0), 16);
    if (threadIdx.x == 0 && fault) mbarrier_arrive(full(0));
}

template <bool fault>
void too_few_arrivals(const TensorMap&, float*) {
    start(256);
    if (!fault || threadIdx.x % 32 != 7) mbarrier_arrive(empty());
    mbarrier_wait(empty(), 0);
}

template <bool fault>
void wrong_byte_count(const TensorMap& map, float*) {
    start();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(full(0), fault ? 2 * kTile : kTile);
        tma_load_4d(tile(0), &map, full(0), 0, 0, 0, 0);
    }
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void bytes_not_announced(const TensorMap& map, float*) {
    start();
    if (threadIdx.x == 0) {
        tma_load_4d(tile(0), &map, full(0), 0, 0, 0, 0);
        mbarrier_arrive_expect(full(0), fault ? 0 : kTile);
    }
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void wrong_parity(const TensorMap& map, float*) {
    start();
    if (threadIdx.x == 0) load(map, 0);
    mbarrier_wait(full(0), fault ? 1 : 0);
    ld_shared<float>(word(threadIdx.x));
    if (fault) mbarrier_wait(full(0), 0);
}

template <bool fault>
void phase_missed(const TensorMap&, float*) {
    start(32);
    if (threadIdx.x >= 32 && threadIdx.x < 64)
        for (int i = 0; i < (fault ? 2 : 1); ++i) mbarrier_arrive(empty());
    if (threadIdx.x == 0) mbarrier_wait(empty(), 0);
}

// A release to those who wait, not to those who have arrived.
template <bool fault>
void read_without_wait(const TensorMap&, float*) {
    start(256);
    st_shared(word(threadIdx.x), 1.0f);
    mbarrier_arrive(empty());
    if (!fault) mbarrier_wait(empty(), 0);
    ld_shared<float>(word((threadIdx.x + 32) % 256));
    if (fault) mbarrier_wait(empty(), 0);
}

// Copies into shared memory

template <bool fault>
void read_before_landing(const TensorMap& map, float*) {
    start();
    if (threadIdx.x == 0) load(map, 0);
    if (!fault) mbarrier_wait(full(0), 0);
    barrier();
    ld_shared<float>(word(threadIdx.x));
}

// The wait for one mbarrier says nothing of another's copies.
template <bool fault>
void wait_for_another_copy(const TensorMap& map, float*) {
    start();
    if (threadIdx.x == 0) {
        load(map, 0, 0);
        load(map, 1, 1);
        if (fault) mbarrier_wait(full(0), 0);
    }
    mbarrier_wait(full(1), 0);
    if (!fault) mbarrier_wait(full(0), 0);
    ld_shared<float>(word(threadIdx.x));
}

template <bool fault>
void load_over_what_is_read(const TensorMap& map, float*) {
    start(256);
    for (int step = 0; step < 2; ++step) {
        if (threadIdx.x == 0) {
            if (!fault) mbarrier_wait(empty(), step ^ 1);
            load(map, 0, step);
        }
        mbarrier_wait(full(step), 0);
        ld_shared<float>(word(threadIdx.x));
        mbarrier_arrive(empty());
    }
}

template <bool fault>
void two_loads_to_one_place(const TensorMap& map, float*) {
    start();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(full(0), 2 * kTile);
        for (int i = 0; i < 2; ++i) tma_load_4d(tile(fault ? 0 : i), &map, full(0), 0, 0, 0, 0);
    }
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void load_over_stores_without_fence(const TensorMap& map, float*) {
    start();
    st_shared(word(threadIdx.x), 1.0f);
    if (!fault) fence_proxy_async();
    barrier();
    if (threadIdx.x == 0) load(map, 0);
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void load_in_flight_at_the_end(const TensorMap& map, float*) {
    start();
    if (threadIdx.x == 0) load(map, 0);
    if (!fault) mbarrier_wait(full(0), 0);
}

template <bool fault>
void load_within_a_pattern(const TensorMap& map, float*) {
    start();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(full(0), kTile);
        tma_load_4d(tile(0) + (fault ? 128 : 0), &map, full(0), 0, 0, 0, 0);
    }
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void load_beyond_shared_memory(const TensorMap& map, float*) {
    start();
    if (threadIdx.x == 0) load(map, fault ? 4 : 3);
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void load_beyond_the_buffer(const TensorMap& map, float*) {
    start();
    TensorMap other = map;
    if (fault) other.tensor.sizes[1] = kRows + 1;
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(full(0), kTile);
        tma_load_4d(tile(0), &other, full(0), 0, 1, 0, 0);
    }
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void map_of_nothing(const TensorMap& map, float*) {
    const TensorMap nothing{};
    prefetch_tensor_map(fault ? &nothing : &map);
}

template <bool fault>
void bulk_load_of_some_bytes(const TensorMap&, float* x) {
    start();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(full(0), 32);
        bulk_load(tile(0), x, fault ? 24 : 32, full(0));
    }
    mbarrier_wait(full(0), 0);
}

// Copies out of shared memory

// Thread 0 stores tile 0, which all have written.
void store(const TensorMap& map) {
    tma_store_4d(&map, tile(0), 0, 0, 0, 0);
    bulk_commit();
}

void fill_tile() {
    for (int i = threadIdx.x; i < kTile / 4; i += 256) st_shared(word(i), 0.0f);
}

template <bool fault>
void store_without_fence(const TensorMap& map, float*) {
    fill_tile();
    if (!fault) fence_proxy_async();
    barrier();
    if (threadIdx.x == 0) store(map), bulk_wait_read<0>();
}

// Each thread must fence what it has written itself.
template <bool fault>
void store_fenced_by_one(const TensorMap& map, float*) {
    fill_tile();
    if (!fault) fence_proxy_async();
    barrier();
    fence_proxy_async();
    if (threadIdx.x == 0) store(map), bulk_wait_read<0>();
}

template <bool fault>
void store_without_barrier(const TensorMap& map, float*) {
    fill_tile();
    fence_proxy_async();
    if (!fault) barrier();
    if (threadIdx.x == 0) store(map), bulk_wait_read<0>();
}

template <bool fault>
void overwrite_before_wait_read(const TensorMap& map, float*) {
    fill_tile();
    fence_proxy_async();
    barrier();
    if (threadIdx.x == 0) {
        store(map);
        if (!fault) bulk_wait_read<0>();
    }
    barrier();
    st_shared(word(threadIdx.x), 1.0f);
    if (threadIdx.x == 0) bulk_wait_read<0>();
}

// A wait is for the thread's own copies.
template <bool fault>
void wait_read_by_another(const TensorMap& map, float*) {
    fill_tile();
    fence_proxy_async();
    barrier();
    if (threadIdx.x == 0) store(map);
    if (threadIdx.x == (fault ? 1 : 0)) bulk_wait_read<0>();
    barrier();
    st_shared(word(threadIdx.x), 1.0f);
    if (threadIdx.x == 0) bulk_wait_read<0>();
}

template <bool fault>
void wait_read_for_an_older_store(const TensorMap& map, float*) {
    fill_tile();
    fence_proxy_async();
    barrier();
    if (threadIdx.x == 0) {
        store(map), store(map);
        bulk_wait_read<fault ? 1 : 0>();
        st_shared(word(0), 1.0f);
        bulk_wait_read<0>();
    }
}

template <bool fault>
void store_not_waited_for(const TensorMap& map, float*) {
    fill_tile();
    fence_proxy_async();
    barrier();
    if (threadIdx.x == 0) store(map);
    if (threadIdx.x == 0 && !fault) bulk_wait_read<0>();
}

template <bool fault>
void store_not_committed(const TensorMap& map, float*) {
    fill_tile();
    fence_proxy_async();
    barrier();
    if (threadIdx.x == 0) {
        tma_store_4d(&map, tile(0), 0, 0, 0, 0);
        if (!fault) bulk_commit();
        bulk_wait_read<0>();
    }
}

template <bool fault>
void store_of_nothing_written(const TensorMap& map, float*) {
    if (!fault) fill_tile();
    fence_proxy_async();
    barrier();
    if (threadIdx.x == 0) store(map), bulk_wait_read<0>();
}

template <bool fault>
void reduce_beyond_the_buffer(const TensorMap&, float* x) {
    fill_tile();
    fence_proxy_async();
    barrier();
    if (threadIdx.x == 0) {
        bulk_reduce_add(x, tile(0), kTile + (fault ? 16 : 0));
        bulk_commit();
        bulk_wait_read<0>();
    }
}

#define FASTATTN_CASE(name) #name, name<false>, name<true>
constexpr Case kCases[] = {
    {FASTATTN_CASE(mbarrier_without_init)},
    {FASTATTN_CASE(mbarrier_init_without_barrier)},
    {FASTATTN_CASE(mbarrier_init_without_fence)},
    {FASTATTN_CASE(mbarrier_fence_after_barrier)},
    {FASTATTN_CASE(mbarrier_init_twice)},
    {FASTATTN_CASE(too_many_arrivals)},
    {FASTATTN_CASE(too_few_arrivals)},
    {FASTATTN_CASE(wrong_byte_count)},
    {FASTATTN_CASE(bytes_not_announced)},
    {FASTATTN_CASE(wrong_parity)},
    {FASTATTN_CASE(phase_missed)},
    {FASTATTN_CASE(read_without_wait)},
    {FASTATTN_CASE(read_before_landing)},
    {FASTATTN_CASE(wait_for_another_copy)},
    {FASTATTN_CASE(load_over_what_is_read)},
    {FASTATTN_CASE(two_loads_to_one_place)},
    {FASTATTN_CASE(load_over_stores_without_fence)},
    {FASTATTN_CASE(load_in_flight_at_the_end)},
    {FASTATTN_CASE(load_within_a_pattern)},
    {FASTATTN_CASE(load_beyond_shared_memory)},
    {FASTATTN_CASE(load_beyond_the_buffer)},
    {FASTATTN_CASE(map_of_nothing)},
    {FASTATTN_CASE(bulk_load_of_some_bytes)},
    {FASTATTN_CASE(store_without_fence)},
    {FASTATTN_CASE(store_fenced_by_one)},
    {FASTATTN_CASE(store_without_barrier)},
    {FASTATTN_CASE(overwrite_before_wait_read)},
    {FASTATTN_CASE(wait_read_by_another)},
    {FASTATTN_CASE(wait_read_for_an_older_store)},
    {FASTATTN_CASE(store_not_waited_for)},
    {FASTATTN_CASE(store_not_committed)},
    {FASTATTN_CASE(store_of_nothing_written)},
    {FASTATTN_CASE(reduce_beyond_the_buffer)},
};
#undef FASTATTN_CASE

}  // namespace
}  // namespace fastattn::cuda

FASTATTN_EXPORT void fault_of_copies(const char* name, bool planted, char* report, size_t size) {
    using namespace fastattn::cuda;
    std::strncpy(report, report_of(kCases, name, planted).c_str(), size - 1);
}
