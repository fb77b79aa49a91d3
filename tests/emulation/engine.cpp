#include "emulation/engine.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace fastattn::emulation {

namespace {

// So many times in a row may all that can run poll memory.
constexpr int kMaxPolls = 100'000;

bool always(void*) { return true; }

int capability = 80;

}  // namespace

void set_emulated_capability(int value) { capability = value; }
int emulated_capability() { return capability; }

std::string Site::str() const {
    std::string_view name = file ? file : "?";
    const size_t folder = name.find("csrc/");
    name.remove_prefix(folder != name.npos ? folder : name.rfind('/') + 1);
    return std::string(name) + ":" + std::to_string(line);
}

std::string Block::place() const {
    return kernel + ", block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
           ", " + std::to_string(blockIdx.z) + ")";
}

void Block::fail(int thread, const std::string& what, Site site) const {
    throw std::runtime_error(place() + ", thread " + std::to_string(thread) + ": " + what + " (" +
                             site.str() + ")");
}

void Block::run(int blocks, int threads, size_t shared, void (*body)(const void*),
                const void* context) {
    if (clocks_.beginning() > 1 << 30) {
        clocks_ = {};
        shared_.forget();
    }
    threads_ = blocks * threads, block_threads_ = threads, first_block_ = blockIdx.x;
    for (int b = 0; b < blocks; ++b) left_[b] = threads;
    body_ = body, context_ = context;
    polls_ = 0;
    fault_ = nullptr;
    clocks_.start(threads_);
    begin_ = clocks_.new_agent("the cluster");
    shared_.start(shared, blocks);
    checks_.clear();
    states_.clear();
    for (Meeting& meeting : meetings_) meeting.arrived = 0;
    for (int b = 0; b < blocks; ++b)
        for (Barrier& barrier : barriers_[b]) barrier = {};
    cluster_ = {};
    cluster_.open.resize(threads_);
    reaches_.clear();
    for (int t = 0; t < threads_; ++t) waits_[t] = {}, exited_[t] = false;
    for (int w = 0; w < threads_ / kWarp; ++w) ready_[w] = ~0u;
    fibers_.start(threads_, thread_main);

    running = this;
    current_ = 0;
    find_ready();
    fibers_.enter(current_);
    if (fault_) std::rethrow_exception(std::exchange(fault_, nullptr));
    check_reaches();
    for (const auto& check : checks_) check();
    blockIdx.x = first_block_;
}

void Block::thread_main(int thread) {
    Block& self = block();
    try {
        self.body_(self.context_);
        self.exit();
    } catch (...) {
        self.fault_ = std::current_exception();
    }
    self.fibers_.leave(thread);
}

void Block::require_block(int rank, const char* instruction, Site site) const {
    if (rank < 0 || rank >= blocks())
        fail(std::string(instruction) + ": the cluster has no block " + std::to_string(rank), site);
    if (left_[rank] == 0)
        fail(std::string(instruction) + ": block " + std::to_string(rank) +
                 " of the cluster has exited",
             site);
    if (rank != this->rank() && !has_begun(rank))
        fail(std::string(instruction) + ": block " + std::to_string(rank) +
                 " of the cluster may not have begun: no barrier of the cluster comes before this",
             site);
}

// Whether this thread has met all, or has learned anything of that block's threads.
bool Block::has_begun(int rank) const {
    if (clocks_.knows(current_, begin_, clocks_.now(begin_))) return true;
    for (int t = rank * block_threads_; t < (rank + 1) * block_threads_; ++t)
        if (clocks_.knows(current_, t, clocks_.beginning() + 1)) return true;
    return false;
}

void Block::keep_block(int rank, const char* instruction, Site site) {
    if (rank != this->rank())
        reaches_[{rank, current_}] = {clocks_.now(current_), instruction, site};
}

// Of what a thread has done to another block, one of that block's threads must know when it exits:
// whatever the order, the block was then still there.
void Block::check_reaches() {
    for (const auto& [who, reach] : reaches_) {
        const auto& [rank, thread] = who;
        bool known = false;
        for (int t = rank * block_threads_; !known && t < (rank + 1) * block_threads_; ++t)
            known = clocks_.knows(t, thread, reach.time);
        if (known) continue;
        blockIdx.x = first_block_ + thread / block_threads_;
        fail(thread,
             std::string(reach.instruction) + ": block " + std::to_string(rank) +
                 " of the cluster may have exited: it waits for no barrier that comes after this",
             reach.site);
    }
}

void Block::exit() {
    exited_[current_] = true;
    --left_[rank()];
    if (std::any_of(left_, left_ + blocks(), [](int left) { return left != 0; })) switch_to_next();
}

void Block::park(const Wait& wait) {
    const int thread = current_;
    waits_[thread] = wait;
    switch_to_next();
    waits_[thread].instruction = nullptr;
}

// A warp runs until it must wait, before the next one does.
bool Block::find_ready() {
    const int warps = threads_ / kWarp;
    int warp = current_ / kWarp;
    for (int i = 0; i < warps; ++i, warp = warp + 1 == warps ? 0 : warp + 1) {
        if (ready_[warp] == 0) continue;
        const int lane = std::countr_zero(ready_[warp]);
        ready_[warp] &= ready_[warp] - 1;
        current_ = kWarp * warp + lane;
        threadIdx.x = current_ % block_threads_, blockIdx.x = first_block_ + rank();
        return true;
    }
    return false;
}

void Block::switch_to_next() {
    const int from = current_;
    if (!find_ready()) {
        ask_waiting();
        if (!find_ready()) fail_standstill("deadlock");
    }
    if (current_ != from) fibers_.switch_to(from, current_);
}

void Block::ask_waiting() {
    bool only_polls = true;
    for (int t = 0; t < threads_; ++t) {
        const Wait& wait = waits_[t];
        if (exited_[t] || !wait.instruction || !wait.ready || !wait.ready(wait.context)) continue;
        only_polls &= wait.ready == always;
        wake(t);
    }
    polls_ = only_polls ? polls_ + 1 : 0;
    if (polls_ > kMaxPolls) fail_standstill("polling without end");
}

void Block::poll(const char* instruction, Site site) { park({instruction, site, always, nullptr}); }

void Block::fail_divergence(const Meeting& meeting, const char* instruction, Site site) const {
    fail(std::string("divergence: it is at ") + instruction + ", others that should be there at " +
             meeting.instruction + " (" + meeting.site.str() + ")",
         site);
}

void Block::leave(int size) {
    polls_ = 0;
    const int first = current_ / size * size / kWarp;
    for (int warp = first; warp < first + size / kWarp; ++warp) ready_[warp] = ~0u;
    ready_[current_ / kWarp] &= ~(1u << current_ % kWarp);
}

void Block::barrier(int number, int threads, bool waits, const char* instruction, Site site) {
    const std::string name = "barrier " + std::to_string(number);
    if (number < 0 || number >= kBarriers) fail(name + " is none of 0 to 15", site);
    if (threads <= 0 || threads % kWarp != 0 || threads > block_threads_)
        fail("a barrier of " + std::to_string(threads) + " threads in a block of " +
                 std::to_string(block_threads_) + ": it wants a multiple of 32",
             site);
    Barrier& barrier = barriers_[rank()][number];
    if (barrier.arrived != 0 && barrier.expected != threads)
        fail(name + " is met with " + std::to_string(threads) +
                 " threads, but others met it with " + std::to_string(barrier.expected),
             site);
    uint32_t& lanes = barrier.lanes[current_ % block_threads_ / kWarp];
    if (lanes >> lane() & 1) fail(name + " is met again before it was complete", site);
    lanes |= 1u << lane();
    barrier.expected = threads;
    ++barrier.arrived;
    if (waits)
        barrier.waiting.push_back(current_);
    else
        clocks_.release(current_, barrier.released);
    if (barrier.arrived == barrier.expected)
        complete(barrier, instruction, site);
    else if (waits)
        park({instruction, site});
}

void Block::complete(Barrier& barrier, const char* instruction, Site site) {
    for (const uint32_t& lanes : barrier.lanes)
        if (lanes != 0 && lanes != ~0u)
            fail(std::string(instruction) + ": of warp " + std::to_string(&lanes - barrier.lanes) +
                     " only some lanes came, but whole warps meet",
                 site);
    if (int(barrier.waiting.size()) == threads_)
        clocks_.synchronize_all();
    else
        clocks_.synchronize(barrier.waiting, barrier.released);
    for (const int t : barrier.waiting)
        if (t != current_) wake(t);
    polls_ = 0;
    barrier.arrived = 0;
    barrier.waiting.clear();
    barrier.released.clear();
    for (uint32_t& lanes : barrier.lanes) lanes = 0;
}

void Block::cluster_arrive(const char* instruction, Site site, const VectorClock* told) {
    if (cluster_.open[current_] != 0)
        fail(std::string(instruction) + ": no cluster_wait since this thread's last arrival", site);
    cluster_.open[current_] = cluster_.phase + 1;
    if (told)
        cluster_.arriving.join(*told);
    else
        clocks_.release(current_, cluster_.arriving);
    if (++cluster_.arrived < threads_) return;
    cluster_.arrived = 0;
    cluster_.ended = std::exchange(cluster_.arriving, {});
    cluster_.ended.learn(begin_, clocks_.now(begin_));
    ++cluster_.phase;
    for (const int t : std::exchange(cluster_.waiting, {})) wake(t);
    polls_ = 0;
}

void Block::cluster_wait(const char* instruction, Site site) {
    if (cluster_.open[current_] == 0)
        fail(std::string(instruction) + ": this thread has not arrived", site);
    if (cluster_.open[current_] > cluster_.phase) {
        cluster_.waiting.push_back(current_);
        park({instruction, site});
    }
    cluster_.open[current_] = 0;
    clocks_.acquire(current_, cluster_.ended);
}

void Block::warp_sync(Site site) {
    int mine = 0;
    meet(kWarp, "warp_sync", site, mine, [&](Payloads<int>) {
        int lanes[kWarp];
        for (int i = 0; i < kWarp; ++i) lanes[i] = current_ / kWarp * kWarp + i;
        clocks_.synchronize(lanes, {});
    });
}

std::string Block::what_it_waits_for(int thread) const {
    if (exited_[thread]) return "exited";
    const Wait& wait = waits_[thread];
    std::string at = wait.instruction ? wait.instruction : "?";
    const auto came = [](int arrived, int expected) {
        return ", where " + std::to_string(arrived) + " of " + std::to_string(expected) + " came";
    };
    for (int i = 0; i < kBarriers; ++i) {
        const Barrier& barrier = barriers_[thread / block_threads_][i];
        if (std::ranges::count(barrier.waiting, thread) != 0)
            at += " " + std::to_string(i) + came(barrier.arrived, barrier.expected);
    }
    if (std::ranges::count(cluster_.waiting, thread) != 0) at += came(cluster_.arrived, threads_);
    return "at " + at + " (" + wait.site.str() + ")";
}

// "...; at barrier 1, where 32 of 64 came (file:line): threads 0-31; exited: threads 32-63"
void Block::fail_standstill(const char* how) const {
    std::map<std::string, std::string> threads;
    for (int first = 0, next; first < threads_; first = next) {
        const std::string place = what_it_waits_for(first);
        for (next = first + 1; next < threads_ && what_it_waits_for(next) == place;) ++next;
        std::string& list = threads[place];
        list += (list.empty() ? "" : ", ") + std::to_string(first);
        if (next != first + 1) list += "-" + std::to_string(next - 1);
    }
    std::string text = place() + ": " + how;
    for (const auto& [place, list] : threads) text += "; " + place + ": threads " + list;
    throw std::runtime_error(text);
}

}  // namespace fastattn::emulation
