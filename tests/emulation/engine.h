// Runs kernels on the host, thread by thread, and checks what they do.
//
// Blocks run one after the other, those of a cluster together. The threads of a block are fibers:
// one runs until it waits for others, at a barrier or at an instruction of the whole warp. Whatever
// the order, accesses to shared memory that no barrier orders are found by vector clocks
// (clocks.h). Every fault is thrown by `launch` as a std::runtime_error that names the kernel, the
// block and the thread.
//
// An instruction is written against `block()`, in the name of the thread that runs:
//   block().meet(...)        the threads of a warp or of a warpgroup act together
//   block().wait_until(...)  the thread stands still until a condition holds
//   block().barrier(...)     bar.sync, bar.arrive
//   block().clocks()         release and acquire order, streams of asynchronous operations
//   block().shared()         checked access to shared memory, by the thread or by such a stream
//   block().fail(...)        reports a fault
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulation/clocks.h"
#include "emulation/cuda.h"
#include "emulation/fiber.h"
#include "emulation/shared_memory.h"
#include "emulation/site.h"

namespace fastattn::emulation {

constexpr int kWarp = 32, kWarpgroup = 128;
constexpr int kMaxBlockThreads = 1024, kMaxCluster = 8;
constexpr int kMaxThreads = kMaxCluster * kMaxBlockThreads;

// What the threads of a meeting brought along.
template <class Payload>
struct Payloads {
    void* const* each;
    Payload* operator[](int i) const { return static_cast<Payload*>(each[i]); }
};

// One block at a time, or the blocks of a cluster: all their threads, where they meet, and their
// shared memory.
class Block {
  public:
    // The thread that runs, and the number of its block within the cluster.
    int thread() const { return current_; }
    int lane() const { return current_ % kWarp; }
    int rank() const { return current_ / block_threads_; }
    // Of all blocks of the cluster, and of each.
    int threads() const { return threads_; }
    int block_threads() const { return block_threads_; }
    int blocks() const { return threads_ / block_threads_; }
    // Block `rank` of the cluster must be there to be reached, and must stay until what this thread
    // does there is done.
    void require_block(int rank, const char* instruction, Site site) const;
    void keep_block(int rank, const char* instruction, Site site);

    Clocks& clocks() { return clocks_; }
    const Clocks& clocks() const { return clocks_; }
    SharedMemory& shared() { return shared_; }

    // An ordinary access by the thread that runs, or by `thread`, of the same warp.
    Access access(const char* instruction, Site site) const {
        return access(instruction, site, current_);
    }
    Access access(const char* instruction, Site site, int thread) const {
        return {thread, thread, clocks_.now(thread), false, instruction, site};
    }
    // An access that a stream of asynchronous operations makes after what `thread` has done so far.
    Access access_async(const char* instruction, Site site, int thread, int agent,
                        bool async_proxy) const {
        return {thread, agent, clocks_.now(agent), async_proxy, instruction, site};
    }

    // The `size` threads of this warp (32) or warpgroup (128) meet, all at this instruction; the
    // last one runs act(payloads), payloads[i] pointing to the `mine` of their i-th; then all go
    // on. It orders no memory.
    template <class Payload, class Act>
    void meet(int size, const char* instruction, Site site, Payload& mine, Act act) {
        Meeting& meeting = meetings_[size == kWarp ? current_ / kWarp
                                                   : kMaxThreads / kWarp + current_ / kWarpgroup];
        meeting.payloads[current_ % size] = &mine;
        if (meeting.arrived == 0)
            meeting.instruction = instruction, meeting.site = site;
        else if (meeting.site != site || meeting.instruction != instruction)
            fail_divergence(meeting, instruction, site);
        if (++meeting.arrived < size) return park({instruction, site});
        meeting.arrived = 0;
        act(Payloads<Payload>{meeting.payloads});
        leave(size);
    }

    // The thread stands still until ready() holds, which is asked when nobody else can run, so that
    // it must stay true once it is.
    template <class Ready>
    void wait_until(const char* instruction, Site site, Ready ready) {
        if (ready()) return;
        park(
            {instruction, site, [](void* f) { return bool((*static_cast<Ready*>(f))()); }, &ready});
    }
    // Lets others run: one step of a loop that polls memory.
    void poll(const char* instruction, Site site);

    // The block's barrier `number` of `threads` threads: waits for them, or only arrives.
    void barrier(int number, int threads, bool waits, const char* instruction, Site site);
    // Of the block's threads.
    void barrier(const char* instruction, Site site) {
        barrier(0, block_threads_, true, instruction, site);
    }
    // The two halves of the barrier of the cluster's threads. It tells the others all that the
    // thread knows and has done, or `told` alone.
    void cluster_arrive(const char* instruction, Site site, const VectorClock* told = nullptr);
    void cluster_wait(const char* instruction, Site site);
    void warp_sync(Site site);

    // A default-constructed State that lasts as long as the block: what other headers keep of it.
    template <class State>
    State& state() {
        static constexpr char key = 0;
        std::shared_ptr<void>& found = states_[&key];
        if (!found) found = std::make_shared<State>();
        return *static_cast<State*>(found.get());
    }

    // A check to make once all threads have exited, before the states end.
    void at_end(std::function<void()> check) { checks_.push_back(std::move(check)); }

    // "<kernel>, block (x, y, z), thread t: <what> (file:line)".
    [[noreturn]] void fail(int thread, const std::string& what, Site site) const;
    [[noreturn]] void fail(const std::string& what, Site site) const { fail(current_, what, site); }

    // Runs a cluster of `blocks` blocks from blockIdx on, each of `threads` threads; each thread
    // calls body(context).
    void run(int blocks, int threads, size_t shared, void (*body)(const void*),
             const void* context);
    std::string kernel;  // how reports name it

  private:
    // Why a thread stands still; `ready`, if there is one, is asked whether it may go on.
    struct Wait {
        const char* instruction = nullptr;
        Site site{};
        bool (*ready)(void*) = nullptr;
        void* context = nullptr;
    };
    struct Meeting {
        int arrived;
        const char* instruction;
        Site site;
        void* payloads[kWarpgroup];
    };
    struct Barrier {
        int expected = 0, arrived = 0;
        uint32_t lanes[kMaxBlockThreads / kWarp] = {};  // that arrived, by warp
        std::vector<int> waiting;
        VectorClock released;  // by those that only arrive
    };
    struct ClusterBarrier {
        int arrived = 0;
        uint32_t phase = 0;          // how many have ended
        std::vector<uint32_t> open;  // of each thread, the phase that it has yet to wait for, or 0
        std::vector<int> waiting;
        VectorClock arriving, ended;
    };
    // When a thread has touched another block's shared memory.
    struct Reach {
        Time time;
        const char* instruction;
        Site site;
    };

    [[noreturn]] void fail_divergence(const Meeting& meeting, const char* instruction,
                                      Site site) const;
    void leave(int size);
    void complete(Barrier& barrier, const char* instruction, Site site);
    void park(const Wait& wait);
    void wake(int thread) { ready_[thread / kWarp] |= 1u << thread % kWarp; }
    void switch_to_next();
    bool find_ready();
    void ask_waiting();
    bool has_begun(int rank) const;
    void check_reaches();
    void exit();
    std::string what_it_waits_for(int thread) const;
    [[noreturn]] void fail_standstill(const char* how) const;
    std::string place() const;
    static void thread_main(int thread);

    static constexpr int kBarriers = 16;  // of each block

    int threads_ = 0, block_threads_ = 1, current_ = 0, polls_ = 0;
    int begin_ = 0;  // the stream of the blocks' begin, which the cluster's barrier tells of
    int left_[kMaxCluster] = {};  // threads of each block that have not exited
    unsigned first_block_ = 0;
    uint32_t ready_[kMaxThreads / kWarp] = {};  // by warp, a bit a lane
    Wait waits_[kMaxThreads];
    bool exited_[kMaxThreads] = {};
    Meeting meetings_[kMaxThreads / kWarp + kMaxThreads / kWarpgroup] = {};
    Barrier barriers_[kMaxCluster][kBarriers];
    ClusterBarrier cluster_;
    std::map<std::pair<int, int>, Reach> reaches_;  // the latest, by rank and thread
    std::map<const void*, std::shared_ptr<void>> states_;
    std::vector<std::function<void()>> checks_;
    void (*body_)(const void*) = nullptr;
    const void* context_ = nullptr;
    std::exception_ptr fault_;
    Fibers fibers_;
    Clocks clocks_;
    SharedMemory shared_{*this};
};

// The block that runs.
inline Block* running = nullptr;
inline Block& block() { return *running; }

// The compute capability that current_device() reports, as 10 * major + minor: 80 unless set.
void set_emulated_capability(int capability);
int emulated_capability();

}  // namespace fastattn::emulation
