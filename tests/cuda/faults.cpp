// Small kernels, each sound or with one planted fault that the emulation must report.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 64, kFloats = 256;

// Word `index` of shared memory.
SharedAddress word(int index) { return dynamic_shared() + 4 * index; }

template <bool fault>
void shared_out_of_bounds(float*) {
    st_shared(word(threadIdx.x + (fault ? kFloats - kThreads + 1 : 0)), 1.0f);
}

template <bool fault>
void shared_misaligned(float*) {
    st_shared(word(4 * threadIdx.x + (fault ? 2 : 0)), float4{});
}

template <bool fault>
void global_out_of_bounds(float* x) {
    st_global(x + threadIdx.x + (fault ? kFloats - kThreads + 1 : 0), 1.0f);
}

template <bool fault>
void global_misaligned(float* x) {
    ld_global(reinterpret_cast<const float2*>(x + 2 * threadIdx.x + (fault ? 1 : 0)));
}

template <bool fault>
void global_copy_out_of_bounds(float* x) {
    const int row = threadIdx.x + 1;
    cp_async_16(word(4 * threadIdx.x), x + 4 * row, fault || row < kFloats / 4);
}

template <bool fault>
void uninitialised_read(float*) {
    st_shared(word(threadIdx.x), 1.0f);
    ld_shared<float>(word(threadIdx.x + (fault ? kThreads : 0)));
}

// Rows of 16 bytes, of which the last 4 are padding.
template <bool fault>
void uninitialised_ldmatrix(float*) {
    for (int i = 0; i < (fault ? 3 : 4); ++i) st_shared(word(4 * threadIdx.x + i), 1.0f);
    warp_sync();
    uint32_t d[4];
    ldmatrix_x4(d, word(4 * threadIdx.x));
}

template <bool fault>
void read_without_barrier(float*) {
    st_shared(word(threadIdx.x), 1.0f);
    if (!fault) barrier();
    if (threadIdx.x >= 32) ld_shared<float>(word(threadIdx.x - 32));
}

template <bool fault>
void overwrite_without_barrier(float*) {
    st_shared(word(threadIdx.x), 1.0f);
    barrier();
    if (threadIdx.x >= 32) ld_shared<float>(word(threadIdx.x - 32));
    if (!fault) barrier();
    if (threadIdx.x < 32) st_shared(word(threadIdx.x), 2.0f);
}

template <bool fault>
void read_without_warp_sync(float*) {
    st_shared(word(threadIdx.x), 1.0f);
    // A shuffle brings the lanes together, but orders no memory.
    shuffle_xor(1, 1);
    if (!fault) warp_sync();
    ld_shared<float>(word(threadIdx.x ^ 1));
}

template <bool fault>
void same_word_twice(float*) {
    st_shared(word(fault ? 0 : threadIdx.x), 1.0f);
}

template <bool fault>
void read_before_wait(float* x) {
    cp_async_16(word(4 * threadIdx.x), x + 4 * threadIdx.x, true);
    cp_async_commit();
    if (!fault) cp_async_wait<0>();
    ld_shared<float>(word(4 * threadIdx.x));
}

template <bool fault>
void wait_for_an_older_group(float* x) {
    if (threadIdx.x < kThreads / 2) {
        for (int i = 0; i < 2; ++i) {
            cp_async_16(word(8 * threadIdx.x + 4 * i), x + 4 * threadIdx.x, true);
            cp_async_commit();
        }
        cp_async_wait<fault ? 1 : 0>();
    }
    barrier();
    ld_shared<float>(word(4 * threadIdx.x));
}

template <bool fault>
void wait_without_commit(float* x) {
    cp_async_16(word(4 * threadIdx.x), x + 4 * threadIdx.x, true);
    if (!fault) cp_async_commit();
    cp_async_wait<0>();
    ld_shared<float>(word(4 * threadIdx.x));
}

// A wait is for the thread's own copies: others need the barrier after it.
template <bool fault>
void barrier_before_wait(float* x) {
    cp_async_16(word(4 * threadIdx.x), x + 4 * threadIdx.x, true);
    cp_async_commit();
    if (fault) barrier();
    cp_async_wait<0>();
    if (!fault) barrier();
    ld_shared<float>(word(4 * (threadIdx.x ^ 32)));
}

template <bool fault>
void copy_over_what_is_read(float* x) {
    for (int step = 0; step < 2; ++step) {
        if (threadIdx.x < 32) cp_async_16(word(4 * threadIdx.x), x + 4 * threadIdx.x, true);
        cp_async_commit();
        cp_async_wait<0>();
        barrier();
        uint32_t d[4];
        if (threadIdx.x >= 32) ldmatrix_x4(d, word(4 * (threadIdx.x - 32)));
        if (!fault) barrier();
    }
}

template <bool fault>
void barrier_after_exit(float*) {
    if (fault && threadIdx.x == 40) return;
    barrier();
}

template <bool fault>
void barrier_of_too_many(float*) {
    if (threadIdx.x < 32) barrier_sync(2, fault ? 64 : 32);
}

template <bool fault>
void barriers_of_different_sizes(float*) {
    barrier_sync(1, fault && threadIdx.x >= 32 ? 32 : 64);
}

template <bool fault>
void barrier_of_half_warps(float*) {
    if (!fault || threadIdx.x % 32 < 16) barrier_sync(1, fault ? 32 : 64);
}

// A barrier orders those who meet there, not the others.
template <bool fault>
void barrier_of_others(float*) {
    if (threadIdx.x < 32) st_shared(word(threadIdx.x), 1.0f);
    if (threadIdx.x < 32 || !fault) barrier_sync(1, fault ? 32 : 64);
    if (threadIdx.x >= 32) ld_shared<float>(word(threadIdx.x - 32));
}

template <bool fault>
void divergent_shuffle(float*) {
    if (fault && threadIdx.x % 32 < 8)
        shuffle(1, 0);
    else
        shuffle_xor(1, 1);
}

template <bool fault>
void shuffle_of_some(float*) {
    if (!fault || threadIdx.x != 5) shuffle(1, 0);
}

template <bool fault>
void poll_without_end(float* x) {
    int* turn = reinterpret_cast<int*>(x);
    if (threadIdx.x == 0) *turn = 0;
    if (threadIdx.x == 63) add_release(turn, fault ? 2 : 1);
    if (threadIdx.x == 1)
        while (ld_acquire(turn) != 1) continue;
}

struct Case {
    const char* name;
    void (*sound)(float*);
    void (*faulty)(float*);
};

#define FASTATTN_CASE(name) {#name, name<false>, name<true>}
constexpr Case kCases[] = {
    FASTATTN_CASE(shared_out_of_bounds),
    FASTATTN_CASE(shared_misaligned),
    FASTATTN_CASE(global_out_of_bounds),
    FASTATTN_CASE(global_misaligned),
    FASTATTN_CASE(global_copy_out_of_bounds),
    FASTATTN_CASE(uninitialised_read),
    FASTATTN_CASE(uninitialised_ldmatrix),
    FASTATTN_CASE(read_without_barrier),
    FASTATTN_CASE(overwrite_without_barrier),
    FASTATTN_CASE(read_without_warp_sync),
    FASTATTN_CASE(same_word_twice),
    FASTATTN_CASE(read_before_wait),
    FASTATTN_CASE(wait_for_an_older_group),
    FASTATTN_CASE(wait_without_commit),
    FASTATTN_CASE(barrier_before_wait),
    FASTATTN_CASE(copy_over_what_is_read),
    FASTATTN_CASE(barrier_after_exit),
    FASTATTN_CASE(barrier_of_too_many),
    FASTATTN_CASE(barriers_of_different_sizes),
    FASTATTN_CASE(barrier_of_half_warps),
    FASTATTN_CASE(barrier_of_others),
    FASTATTN_CASE(divergent_shuffle),
    FASTATTN_CASE(shuffle_of_some),
    FASTATTN_CASE(poll_without_end),
};
#undef FASTATTN_CASE

}  // namespace

// What is reported of the case: nothing if all is well.
std::string report_of(const std::string& name, bool fault) {
    for (const Case& one : kCases) {
        if (name != one.name) continue;
        alignas(16) float buffer[kFloats] = {};
        float* const x = buffer;
        emulation::GlobalBuffers buffers;
        buffers.add(buffer, sizeof buffer);
        try {
            launch(fault ? one.faulty : one.sound, 2, kThreads, 4 * kFloats, nullptr, x);
        } catch (const std::runtime_error& error) {
            return error.what();
        }
        return "";
    }
    return "no such case";
}

std::string report_of_launch(int blocks, int threads, int shared) {
    try {
        launch(+[] {}, blocks, threads, shared, nullptr);
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

}  // namespace fastattn::cuda

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

FASTATTN_EXPORT void fault(const char* name, bool planted, char* report, size_t size) {
    std::strncpy(report, fastattn::cuda::report_of(name, planted).c_str(), size - 1);
}
FASTATTN_EXPORT void fault_of_launch(int blocks, int threads, int shared, char* report,
                                     size_t size) {
    const std::string text = fastattn::cuda::report_of_launch(blocks, threads, shared);
    std::strncpy(report, text.c_str(), size - 1);
}
