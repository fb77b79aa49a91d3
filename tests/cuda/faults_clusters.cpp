// Small kernels of clusters of two blocks, each sound or with one planted fault that the emulation
// must report.
#include "faults_sm90.h"

namespace fastattn::cuda {
namespace {

constexpr int kBlocks = 2;
constexpr uint16_t kBoth = 0b11;

// As `start`; then the blocks may reach each other's mbarriers.
void start_cluster(uint32_t arrivals) {
    start(arrivals);
    cluster_barrier();
}

// Each block's tile, to both.
void multicast(const TensorMap& map) {
    tma_multicast_4d(tile(cluster_rank()), &map, full(0), 0, 0, 0, 0, kBoth);
}

template <bool fault>
void multicast_before_others_read(const TensorMap& map, float*) {
    start_cluster(kBlocks);
    for (uint32_t turn = 0; turn < 2; ++turn) {
        if (threadIdx.x == 0) {
            if (turn == 1) mbarrier_wait(empty(), 0);
            mbarrier_arrive_expect(full(0), kBlocks * kTile);
            multicast(map);
        }
        mbarrier_wait(full(0), turn);
        ld_shared<float>(word(threadIdx.x));
        barrier();
        // The other block's reads count as well as one's own.
        if (turn == 0 && threadIdx.x < kBlocks)
            mbarrier_arrive_at(empty(), fault ? cluster_rank() : threadIdx.x);
    }
    cluster_barrier();
}

template <bool fault>
void multicast_of_others_not_announced(const TensorMap& map, float*) {
    start_cluster(1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(full(0), fault && cluster_rank() == 1 ? kTile : kBlocks * kTile);
        multicast(map);
    }
    mbarrier_wait(full(0), 0);
    cluster_barrier();
}

template <bool fault>
void arrival_at_what_is_not_there(const TensorMap&, float*) {
    fault ? start(kBlocks) : start_cluster(kBlocks);
    if (threadIdx.x < kBlocks) mbarrier_arrive_at(empty(), threadIdx.x);
    mbarrier_wait(empty(), 0);
    cluster_barrier();
}

template <bool fault>
void arrival_at_an_exited_block(const TensorMap&, float*) {
    start_cluster(1);
    if (cluster_rank() == 0) {
        if (threadIdx.x == 0) mbarrier_wait(full(1), 0);
        if (threadIdx.x == 0) mbarrier_arrive_at(empty(), 1);
    } else {
        if (threadIdx.x == 0) mbarrier_arrive_at(full(1), 0);
        if (!fault) mbarrier_wait(empty(), 0);
    }
}

template <bool fault>
void arrival_beyond_the_cluster(const TensorMap&, float*) {
    start_cluster(1);
    if (threadIdx.x == 0) mbarrier_arrive_at(empty(), fault ? 2 : 1 - cluster_rank());
    cluster_barrier();
}

template <bool fault>
void cluster_barrier_of_one_block(const TensorMap&, float*) {
    if (!fault || cluster_rank() == 0) cluster_barrier();
}

template <bool fault>
void arrival_at_a_block_that_may_not_have_begun(const TensorMap&, float*) {
    fault ? start(kBlocks) : start_cluster(kBlocks);
    if (threadIdx.x == 0) mbarrier_arrive_at(empty(), 1 - cluster_rank());
    cluster_barrier();
}

template <bool fault>
void arrival_at_a_block_that_may_have_exited(const TensorMap&, float*) {
    start_cluster(1);
    if (threadIdx.x == 0 && cluster_rank() == 0) mbarrier_arrive_at(empty(), 1);
    if (!fault && threadIdx.x == 0 && cluster_rank() == 1) mbarrier_wait(empty(), 0);
}

// Blocks tell each other a word, the one at `to`, which full(0) counts.
void tell(int to, int rank) {
    if (threadIdx.x == 0) st_async_at(word(to), 1.0f, full(0), rank);
}
void expect_told(uint32_t bytes = 4) {
    if (threadIdx.x == 0) mbarrier_arrive_expect(full(0), bytes);
}
int other_block() { return 1 - cluster_rank(); }

template <bool fault>
void store_beyond_the_cluster(const TensorMap&, float*) {
    start_cluster(1);
    expect_told();
    tell(0, fault ? kBlocks : other_block());
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void store_beyond_the_shared_memory_of_another(const TensorMap&, float*) {
    start_cluster(1);
    expect_told();
    tell((kShared - 1024) / 4 - (fault ? 0 : 1), other_block());
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void store_misaligned_to_another(const TensorMap&, float*) {
    start_cluster(1);
    expect_told(8);
    if (threadIdx.x == 0)
        st_async_at(word(fault ? 1 : 2), float2{1.0f, 2.0f}, full(0), other_block());
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void store_to_a_block_that_may_not_have_begun(const TensorMap&, float*) {
    fault ? start() : start_cluster(1);
    expect_told();
    tell(0, other_block());
    mbarrier_wait(full(0), 0);
}

// What a relaxed arrival tells of.
template <bool fault>
void mbarrier_init_not_fenced_before_the_arrival(const TensorMap&, float*) {
    if (threadIdx.x == 0) {
        mbarrier_init(full(0), 1);
        if (!fault) fence_mbarrier_init();
    }
    cluster_arrive();
    cluster_wait();
    expect_told();
    tell(0, other_block());
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void store_not_told_by_a_relaxed_arrival(const TensorMap&, float*) {
    if (threadIdx.x == 0) st_shared(word(0), 1.0f);
    if (fault)
        cluster_arrive(), cluster_wait();
    else
        cluster_barrier();
    if (threadIdx.x == 32) ld_shared<float>(word(0));
}

template <bool fault>
void store_to_a_block_that_waits_for_none(const TensorMap&, float*) {
    start_cluster(1);
    expect_told();
    tell(0, other_block());
    if (!fault || cluster_rank() == 0) mbarrier_wait(full(0), 0);
    if (fault) cluster_barrier();
}

template <bool fault>
void store_to_an_exited_block(const TensorMap&, float*) {
    start_cluster(1);
    if (cluster_rank() == 1) tell(0, 0);
    if (fault || cluster_rank() == 1) return;
    expect_told();
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void store_of_another_read_without_wait(const TensorMap&, float*) {
    start_cluster(1);
    expect_told();
    tell(0, other_block());
    cluster_barrier();
    if (fault) ld_shared<float>(word(0));
    mbarrier_wait(full(0), 0);
    ld_shared<float>(word(0));
}

template <bool fault>
void store_over_what_another_reads(const TensorMap&, float*) {
    start_cluster(1);
    st_shared(word(threadIdx.x), 1.0f);
    cluster_barrier();
    ld_shared<float>(word(threadIdx.x));
    // A barrier of the block tells the other block nothing.
    fault ? barrier() : cluster_barrier();
    expect_told();
    tell(40, other_block());
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void stores_of_two_blocks_to_one_word(const TensorMap&, float*) {
    start_cluster(1);
    expect_told(8);
    for (int rank = 0; rank < kBlocks; ++rank) tell(fault ? 0 : cluster_rank(), rank);
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void store_of_another_not_announced(const TensorMap&, float*) {
    start_cluster(1);
    expect_told(fault ? 4 : 8);
    for (int rank = 0; rank < kBlocks; ++rank) tell(cluster_rank(), rank);
    cluster_barrier();
    mbarrier_wait(full(0), 0);
}

template <bool fault>
void cluster_wait_without_arrival(const TensorMap&, float*) {
    if (!fault || threadIdx.x != 40) cluster_arrive();
    cluster_wait();
}

template <bool fault>
void cluster_arrival_twice(const TensorMap&, float*) {
    cluster_arrive();
    if (fault && threadIdx.x == 40) cluster_arrive();
    cluster_wait();
}

#define FASTATTN_CASE(name) #name, name<false>, name<true>, 256, kBlocks
constexpr Case kCases[] = {
    {FASTATTN_CASE(multicast_before_others_read)},
    {FASTATTN_CASE(multicast_of_others_not_announced)},
    {FASTATTN_CASE(arrival_at_what_is_not_there)},
    {FASTATTN_CASE(arrival_at_an_exited_block)},
    {FASTATTN_CASE(arrival_beyond_the_cluster)},
    {FASTATTN_CASE(cluster_barrier_of_one_block)},
    {FASTATTN_CASE(arrival_at_a_block_that_may_not_have_begun)},
    {FASTATTN_CASE(arrival_at_a_block_that_may_have_exited)},
    {FASTATTN_CASE(store_beyond_the_cluster)},
    {FASTATTN_CASE(store_beyond_the_shared_memory_of_another)},
    {FASTATTN_CASE(store_misaligned_to_another)},
    {FASTATTN_CASE(store_to_a_block_that_may_not_have_begun)},
    {FASTATTN_CASE(mbarrier_init_not_fenced_before_the_arrival)},
    {FASTATTN_CASE(store_not_told_by_a_relaxed_arrival)},
    {FASTATTN_CASE(store_to_a_block_that_waits_for_none)},
    {FASTATTN_CASE(store_to_an_exited_block)},
    {FASTATTN_CASE(store_of_another_read_without_wait)},
    {FASTATTN_CASE(store_over_what_another_reads)},
    {FASTATTN_CASE(stores_of_two_blocks_to_one_word)},
    {FASTATTN_CASE(store_of_another_not_announced)},
    {FASTATTN_CASE(cluster_wait_without_arrival)},
    {FASTATTN_CASE(cluster_arrival_twice)},
};
#undef FASTATTN_CASE

}  // namespace
}  // namespace fastattn::cuda

FASTATTN_EXPORT void fault_of_clusters(const char* name, bool planted, char* report, size_t size) {
    using namespace fastattn::cuda;
    std::strncpy(report, report_of(kCases, name, planted).c_str(), size - 1);
}
