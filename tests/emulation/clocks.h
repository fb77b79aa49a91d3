// What happened before what, in vector clocks (Fidge 1988; Mattern 1988; FastTrack, Flanagan and
// Freund, PLDI 2009).
//
// An agent is whatever accesses memory: agents 0 to threads - 1 are the block's threads, the others
// streams of asynchronous operations that complete in order (the cp.async groups of one thread, the
// copies that one mbarrier counts, the wgmma groups of one warpgroup). An access is stamped with
// its agent and the agent's time. Thread t may touch what agent a touched at time c once t has
// learned of a's times up to c: from itself, or through barriers and the like.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace fastattn::emulation {

using Time = int32_t;

// Of each agent, up to which time its accesses are known to have happened. Clocks that say the same
// share it until one of them learns more: the threads of a large cluster have met at one barrier.
class VectorClock {
  public:
    Time operator[](int agent) const { return size_t(agent) < size() ? (*times_)[agent] : 0; }

    void learn(int agent, Time time) {
        if ((*this)[agent] >= time) return;
        std::vector<Time>& mine = own();
        if (size_t(agent) >= mine.size()) mine.resize((agent + 32) / 32 * 32);
        mine[agent] = time;
    }

    void join(const VectorClock& other) {
        if (other.times_ == times_ || other.size() == 0) return;
        if (covered_by(other)) {
            times_ = other.times_;
            return;
        }
        std::vector<Time>& all = own();
        if (other.size() > all.size()) all.resize(other.size());
        Time* mine = all.data();
        const Time* theirs = other.times_->data();
        const size_t size = other.size();
        for (size_t i = 0; i < size; ++i) mine[i] = mine[i] < theirs[i] ? theirs[i] : mine[i];
    }

    void clear() { times_.reset(); }

  private:
    size_t size() const { return times_ ? times_->size() : 0; }

    bool covered_by(const VectorClock& other) const {
        return size() <= other.size() &&
               (size() == 0 || std::equal(times_->begin(), times_->end(), other.times_->begin(),
                                          [](Time a, Time b) { return a <= b; }));
    }

    std::vector<Time>& own() {
        if (!times_ || times_.use_count() > 1)
            times_ = times_ ? std::make_shared<std::vector<Time>>(*times_)
                            : std::make_shared<std::vector<Time>>();
        return *times_;
    }

    std::shared_ptr<std::vector<Time>> times_;
};

// The clocks of one block's threads. Times grow from block to block, so that nothing has to be
// cleared between them.
class Clocks {
  public:
    void start(int threads);

    // The time that the block began after: what is stamped so or earlier belongs to another block.
    Time beginning() const { return beginning_; }
    // Everything that threads did up to then is known to all.
    Time floor() const { return floor_; }
    int threads() const { return threads_; }
    int agents() const { return int(agents_.size()); }

    Time now(int agent) const { return agents_[agent].now; }
    bool knows(int thread, int agent, Time time) const {
        return agent == thread || time <= (agent < threads_ ? floor_ : agents_[agent].floor) ||
               time <= known_[thread][agent];
    }

    // A stream of asynchronous operations. Its accesses are stamped now(agent) until advance().
    // `reads`: of shared memory, beside other streams, none of whose reads may be forgotten.
    int new_agent(std::string name, bool reads = false);
    // One of `thread` whose writes, as its ordinary stores, the asynchronous proxy sees after a
    // fence.
    int new_generic_agent(int thread, std::string name);
    const std::string& name(int agent) const { return agents_[agent].name; }
    // Closes the group of operations that is being issued, and returns its time.
    Time advance(int agent) { return agents_[agent].now++; }
    // The thread has waited for `agent`'s operations up to `time`.
    void learn(int thread, int agent, Time time) { known_[thread].learn(agent, time); }

    // Whoever acquires `object` knows what the thread has done and known until now.
    void release(int thread, VectorClock& object) {
        object.join(known_[thread]);
        object.learn(thread, agents_[thread].now++);
    }
    void acquire(int thread, const VectorClock& object) { known_[thread].join(object); }

    // A barrier: every one of `threads` acquires what each released, and what `arrived` holds.
    void synchronize(std::span<const int> threads, const VectorClock& arrived);
    // A barrier of all threads of the block.
    void synchronize_all();

    // What the thread has written until now, by ordinary stores or copies that it has waited for,
    // it has shown to the asynchronous proxy.
    void fence_proxy_async(int thread);
    // Whether `thread` knows that what `writer` wrote at `time` was shown to that proxy, if it had
    // to be.
    bool knows_shown(int thread, int writer, Time time) const {
        const Agent& agent = agents_[writer];
        return agent.generic ? agent.shown >= 0 && knows(thread, agent.shown, time)
                             : knows(thread, writer, time);
    }

  private:
    struct Agent {
        std::string name;
        Time now, floor;
        bool generic = false;  // its writes must be shown
        int shown = -1;        // the agent whose times say up to when they were, once there is one
    };

    void show(int thread, int writer, Time until);

    int threads_ = 0;
    Time beginning_ = 0, floor_ = 0;
    std::vector<Agent> agents_;
    std::vector<VectorClock> known_;         // by each thread, of others than itself
    std::vector<std::vector<int>> generic_;  // of each thread, such agents but itself
    VectorClock joined_;
};

}  // namespace fastattn::emulation
