#include "emulation/mbarrier.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace fastattn::emulation {

namespace {

// What an mbarrier can count: PTX ISA, "Contents of the mbarrier object".
constexpr int64_t kMaxCount = (1 << 20) - 1;

std::string name_of(SharedAddress address) {
    return "the mbarrier at byte " + std::to_string(shared_byte(address));
}

}  // namespace

Mbarrier::Mbarrier(SharedAddress address, uint32_t arrivals, int initialised)
    : address_(address),
      arrivals_(arrivals),
      missing_(arrivals),
      agent_(block().clocks().new_agent("a copy that " + name_of(address) + " counts")),
      initialised_(initialised) {}

std::string Mbarrier::str() const {
    return name_of(address_) + " (phase " + std::to_string(phase_) + ": " +
           std::to_string(missing_) + " of " + std::to_string(arrivals_) + " arrivals and " +
           std::to_string(bytes_) + " bytes missing)";
}

void Mbarrier::arrive(uint32_t bytes, const char* instruction, Site site) {
    const int thread = block().thread();
    if (missing_ == 0)
        block().fail(std::string(instruction) + ": more arrivals than the phase has at " + str(),
                     site);
    bytes_ += bytes;
    if (bytes_ > kMaxCount)
        block().fail(std::string(instruction) + ": more bytes than a phase can count at " + str(),
                     site);
    --missing_;
    block().clocks().release(thread, arriving_);
    end_phase_if_complete(thread, site);
}

void Mbarrier::end_phase_if_complete(int thread, Site site) {
    if (missing_ != 0 || bytes_ != 0) return;
    if (!copies_.empty())
        block().fail(thread,
                     "the phase ends without the bytes of " + std::string(copies_[0].instruction) +
                         " (" + copies_[0].site.str() + "), which nobody announced, at " + str(),
                     site);
    arriving_.learn(agent_, block().clocks().advance(agent_));
    std::swap(ended_, arriving_);
    arriving_.clear();
    missing_ = arrivals_;
    ++phase_;
}

void Mbarrier::land() {
    const std::vector<IncomingCopy> landing = std::exchange(copies_, {});
    for (const IncomingCopy& copy : landing) {
        std::memset(copy.to, 0, copy.bytes);
        for (const auto& piece : copy.pieces) std::memcpy(piece.to, piece.from, piece.bytes);
        bytes_ -= copy.bytes;
    }
    if (!landing.empty()) end_phase_if_complete(landing[0].thread, landing[0].site);
}

void Mbarrier::wait(uint32_t parity, Site site) {
    if (parity > 1) block().fail("mbarrier_wait: a parity is 0 or 1", site);
    const int thread = block().thread();
    const uint32_t phase = phase_;
    if (phase % 2 == parity) {
        block().wait_until(what_waits_, site, [&] {
            if (phase_ == phase) land();
            if (phase_ == phase) describe_wait();
            return phase_ != phase;
        });
        if (phase_ != phase + 1)
            block().fail(thread,
                         "mbarrier_wait: the phase after the awaited one has ended too, so that "
                         "the parity is wrong for who comes late, at " +
                             str(),
                         site);
    }
    block().clocks().acquire(thread, ended_);
}

// Keeps what_waits_, which a report of a deadlock quotes, true.
void Mbarrier::describe_wait() {
    const int64_t now[] = {phase_, missing_, bytes_};
    if (std::equal(now, now + 3, said_)) return;
    std::copy(now, now + 3, said_);
    std::snprintf(what_waits_, sizeof what_waits_, "mbarrier_wait of parity %u at %s", phase_ % 2,
                  str().c_str());
}

void Mbarrier::show(int initialised, Time time) {
    if (initialised == initialised_ && shown_ < 0) shown_ = time;
}

void Mbarrier::require_shown(const char* instruction, Site site) const {
    if (shown_ >= 0 && block().clocks().knows(block().thread(), initialised_, shown_)) return;
    block().fail(std::string(instruction) + ": no fence_mbarrier_init and barrier between the " +
                     "mbarrier_init of " + name_of(address_) + " and this",
                 site);
}

void Mbarrier::require_empty() const {
    if (copies_.empty()) return;
    const IncomingCopy& copy = copies_[0];
    block().fail(copy.thread,
                 std::string(copy.instruction) + ": still in flight when the block ends, nobody " +
                     "has waited for " + str(),
                 copy.site);
}

Mbarriers::Mbarriers() {
    block().at_end([this] {
        for (const auto& [address, barrier] : barriers_) barrier.require_empty();
    });
}

void Mbarriers::init(SharedAddress address, uint32_t arrivals, Site site) {
    Clocks& clocks = block().clocks();
    const int thread = block().thread();
    const auto [found, first] = initialised_.try_emplace(thread);
    if (first)
        found->second = clocks.new_agent("mbarrier_init of thread " + std::to_string(thread));
    const int stream = found->second;
    block().shared().write(address, 8, 8,
                           block().access_async("mbarrier_init", site, thread, stream, false));
    clocks.learn(thread, stream, clocks.advance(stream));
    if (arrivals == 0 || arrivals > kMaxCount)
        block().fail("mbarrier_init: " + std::to_string(arrivals) +
                         " arrivals; 1 to 2^20 - 1 can "
                         "be counted",
                     site);
    if (!barriers_.try_emplace(address, address, arrivals, stream).second)
        block().fail("mbarrier_init: " + name_of(address) + " is initialised already", site);
}

Mbarrier& Mbarriers::at(SharedAddress address, const char* instruction, Site site) {
    const auto found = barriers_.find(address);
    if (found == barriers_.end())
        block().fail(
            std::string(instruction) + ": " + name_of(address) + " has not been initialised", site);
    // Fails where no barrier orders this after mbarrier_init.
    block().shared().read(address, 8, 8, block().access(instruction, site));
    return found->second;
}

void Mbarriers::show(int thread) {
    const auto found = initialised_.find(thread);
    if (found == initialised_.end()) return;
    Clocks& clocks = block().clocks();
    const Time time = clocks.advance(found->second);
    clocks.learn(thread, found->second, time);
    for (auto& [address, barrier] : barriers_) barrier.show(found->second, time);
}

void Mbarriers::release(int thread) {
    show(thread);
    if (const auto found = initialised_.find(thread); found != initialised_.end())
        released_[thread].learn(found->second, block().clocks().now(found->second) - 1);
}

}  // namespace fastattn::emulation
