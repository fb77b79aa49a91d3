#include "emulation/clocks.h"

namespace fastattn::emulation {

void Clocks::start(int threads) {
    for (const Agent& agent : agents_) beginning_ = std::max(beginning_, agent.now);
    floor_ = beginning_;
    threads_ = threads;
    agents_.assign(threads, {"", beginning_ + 1, beginning_, true});
    generic_.assign(threads, {});
    known_.resize(std::max(known_.size(), size_t(threads)));
}

int Clocks::new_agent(std::string name, bool reads) {
    // Alone in its group of 32 (SharedMemory::note_read).
    while (reads && agents_.size() % 32 != 0) new_agent("");
    agents_.push_back({std::move(name), beginning_ + 1, beginning_});
    return agents() - 1;
}

int Clocks::new_generic_agent(int thread, std::string name) {
    const int agent = new_agent(std::move(name));
    agents_[agent].generic = true;
    generic_[thread].push_back(agent);
    return agent;
}

void Clocks::synchronize(std::span<const int> threads, const VectorClock& arrived) {
    joined_ = arrived;
    Time latest = 0;
    for (const int t : threads) {
        joined_.join(known_[t]);
        joined_.learn(t, now(t));
        latest = std::max(latest, now(t));
    }
    for (const int t : threads) {
        known_[t] = joined_;
        agents_[t].now = latest + 1;
    }
}

void Clocks::synchronize_all() {
    for (int t = 0; t < threads_; ++t) {
        floor_ = std::max(floor_, now(t));
        for (int a = threads_; a < agents(); ++a)
            agents_[a].floor = std::max(agents_[a].floor, known_[t][a]);
    }
    for (int t = 0; t < threads_; ++t) agents_[t].now = floor_ + 1;
}

void Clocks::fence_proxy_async(int thread) {
    show(thread, thread, now(thread));
    for (const int agent : generic_[thread]) show(thread, agent, known_[thread][agent]);
    ++agents_[thread].now;
}

void Clocks::show(int thread, int writer, Time until) {
    if (agents_[writer].shown < 0) {
        const int shown = new_agent("fence_proxy_async");
        agents_[writer].shown = shown;
    }
    known_[thread].learn(agents_[writer].shown, until);
}

}  // namespace fastattn::emulation
