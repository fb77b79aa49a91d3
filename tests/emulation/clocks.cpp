#include "emulation/clocks.h"

namespace fastattn::emulation {

void Clocks::start(int threads) {
    for (const Agent& agent : agents_) beginning_ = std::max(beginning_, agent.now);
    floor_ = beginning_;
    threads_ = threads;
    agents_.assign(threads, {"", beginning_ + 1, beginning_});
    fences_.assign(threads, -1);
    known_.resize(std::max(known_.size(), size_t(threads)));
    for (int t = 0; t < threads; ++t) known_[t].learn(t, now(t));
}

int Clocks::new_agent(std::string name, bool reads) {
    // Alone in its group of 32 (SharedMemory::note_read).
    while (reads && agents_.size() % 32 != 0) new_agent("");
    agents_.push_back({std::move(name), beginning_ + 1, beginning_});
    return agents() - 1;
}

void Clocks::synchronize(std::span<const int> threads, const VectorClock& arrived) {
    joined_ = arrived;
    Time latest = 0;
    for (const int t : threads) {
        joined_.join(known_[t]);
        latest = std::max(latest, now(t));
    }
    for (const int t : threads) {
        known_[t] = joined_;
        set_now(t, latest + 1);
    }
}

void Clocks::synchronize_all() {
    for (int t = 0; t < threads_; ++t) {
        floor_ = std::max(floor_, now(t));
        for (int a = threads_; a < agents(); ++a)
            agents_[a].floor = std::max(agents_[a].floor, known_[t][a]);
    }
    for (int t = 0; t < threads_; ++t) set_now(t, floor_ + 1);
}

void Clocks::fence_proxy_async(int thread) {
    if (fences_[thread] < 0) fences_[thread] = new_agent("fence.proxy.async");
    known_[thread].learn(fences_[thread], now(thread));
    set_now(thread, now(thread) + 1);
}

}  // namespace fastattn::emulation
