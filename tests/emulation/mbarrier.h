// mbarriers of sm_90: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "emulation/engine.h"

namespace fastattn::emulation {

// A copy into shared memory that one mbarrier counts. It is checked when it is issued, but its
// bytes move only when a thread waits for the mbarrier.
struct IncomingCopy {
    struct Piece {
        uint8_t* to;
        const uint8_t* from;
        int bytes;
    };
    uint8_t* to;
    int bytes;  // zeros where no piece lies
    std::vector<Piece> pieces;
    const char* instruction;
    int thread;
    Site site;
    std::vector<uint8_t> value = {};  // that was in registers
};

// A phase ends when all arrivals have come and all bytes that they announced have landed. Waiting
// for it acquires what the arriving threads have released, and the copies' writes.
class Mbarrier {
  public:
    // `initialised`: the stream of the initialisations by a thread.
    Mbarrier(SharedAddress address, uint32_t arrivals, int initialised);

    void arrive(uint32_t bytes, const char* instruction, Site site);
    void wait(uint32_t parity, Site site);

    // The stream that the copies which are counted here belong to.
    int agent() const { return agent_; }
    void add(IncomingCopy copy) { copies_.push_back(std::move(copy)); }

    // Whoever initialised it shows it to the copy engine.
    void show(int initialised, Time time);
    void require_shown(const char* instruction, Site site) const;
    void require_empty() const;

  private:
    void land();
    void describe_wait();
    void end_phase_if_complete(int thread, Site site);
    std::string str() const;

    SharedAddress address_;
    int64_t arrivals_, missing_, bytes_ = 0;
    uint32_t phase_ = 0;  // how many have ended
    int agent_, initialised_;
    Time shown_ = -1;  // when it was shown
    VectorClock arriving_, ended_;
    std::vector<IncomingCopy> copies_;  // in flight
    char what_waits_[200];              // of the phase and what it missed when last asked
    int64_t said_[3] = {-1, -1, -1};
};

// Of a block, by address.
class Mbarriers {
  public:
    Mbarriers();
    void init(SharedAddress address, uint32_t arrivals, Site site);
    Mbarrier& at(SharedAddress address, const char* instruction, Site site);
    // What the thread has initialised, it shows to the copy engine; release: to all who meet its
    // next cluster_arrive, too.
    void show(int thread);
    void release(int thread);
    const VectorClock& released(int thread) { return released_[thread]; }

  private:
    std::map<SharedAddress, Mbarrier> barriers_;
    std::map<int, int> initialised_;  // the streams, by thread
    std::map<int, VectorClock> released_;
};

inline Mbarriers& mbarriers() { return block().state<Mbarriers>(); }

}  // namespace fastattn::emulation
