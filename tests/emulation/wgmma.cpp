#include "emulation/wgmma.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/float16.h"
#include "emulation/wgmma_operand.h"

namespace fastattn::emulation {

namespace {

constexpr int kM = 64, kK = 16, kMaxN = 256;

// What an accumulator's registers hold while a wgmma is pending: a NaN that nothing computes.
constexpr uint32_t kPending = 0x7fedcba9;

// The sums of pending wgmmas, until the last of them is waited for. They are computed at once, as
// nobody may change the operands before; the registers get them with the wait.
struct Accumulator {
    int n;
    float* registers[kWarpgroup];
    Time last = 0;  // the group of the latest wgmma
    Site site{};
    float sums[kM * kMaxN];

    float& sum(int thread, int i) {
        const Position at = wgmma_fragment(thread, i);
        return sums[at.row * n + at.column];
    }
    void take() {
        for (int t = 0; t < kWarpgroup; ++t)
            for (int i = 0; i < n / 2; ++i) {
                sum(t, i) = registers[t][i];
                registers[t][i] = std::bit_cast<float>(kPending);
            }
    }
    void give() {
        for (int t = 0; t < kWarpgroup; ++t)
            for (int i = 0; i < n / 2; ++i) registers[t][i] = sum(t, i);
    }
    bool untouched(int thread) const {
        return std::all_of(registers[thread], registers[thread] + n / 2,
                           [](float x) { return std::bit_cast<uint32_t>(x) == kPending; });
    }
};

// A's registers, which must keep their values until the wait.
struct RegisterOperand {
    const uint32_t* registers[kWarpgroup];
    uint32_t values[kWarpgroup][4];
    Time time;
    Site site;
};

struct Warpgroup {
    int agent = -1;
    bool fenced = false;
    std::vector<std::unique_ptr<Accumulator>> accumulators;
    std::vector<RegisterOperand> operands;

    void check_registers(int first) const;
    void land(int first, Time until);
};

struct Wgmmas {
    Warpgroup warpgroups[kMaxThreads / kWarpgroup];

    Wgmmas() {
        block().at_end([this] {
            for (const Warpgroup& warpgroup : warpgroups)
                for (const auto& accumulator : warpgroup.accumulators)
                    fail_unfinished(int(&warpgroup - warpgroups), *accumulator);
        });
    }
    [[noreturn]] void fail_unfinished(int number, const Accumulator& accumulator) const {
        const bool open = accumulator.last == block().clocks().now(warpgroups[number].agent);
        block().fail(number * kWarpgroup,
                     std::string("wgmma: not ") + (open ? "committed" : "waited for") +
                         " when the block ends",
                     accumulator.site);
    }
};

// Of the thread that runs, whose warpgroup must be whole.
Warpgroup& warpgroup(const char* instruction, Site site) {
    const int number = block().thread() / kWarpgroup;
    if ((number + 1) * kWarpgroup > block().threads())
        block().fail(std::string(instruction) + ": the block ends within the warpgroup", site);
    Warpgroup& w = block().state<Wgmmas>().warpgroups[number];
    if (w.agent < 0)
        w.agent =
            block().clocks().new_agent("a wgmma of warpgroup " + std::to_string(number), true);
    return w;
}

int first_thread() { return block().thread() / kWarpgroup * kWarpgroup; }

void Warpgroup::check_registers(int first) const {
    for (int t = 0; t < kWarpgroup; ++t) {
        for (const auto& accumulator : accumulators)
            if (!accumulator->untouched(t))
                block().fail(first + t,
                             "an accumulator was written before wgmma_wait for the wgmma that "
                             "writes it",
                             accumulator->site);
        for (const RegisterOperand& a : operands)
            if (std::memcmp(a.registers[t], a.values[t], sizeof a.values[t]) != 0)
                block().fail(first + t,
                             "registers of A were written before wgmma_wait for the wgmma that "
                             "reads them",
                             a.site);
    }
}

void Warpgroup::land(int first, Time until) {
    check_registers(first);
    std::erase_if(operands, [=](const RegisterOperand& a) { return a.time <= until; });
    std::erase_if(accumulators, [=](const std::unique_ptr<Accumulator>& accumulator) {
        if (accumulator->last > until) return false;
        accumulator->give();
        return true;
    });
    for (int t = first; t < first + kWarpgroup; ++t) block().clocks().learn(t, agent, until);
}

using Calls = Payloads<WgmmaCall>;

void check_alike(Calls calls, int first, Site site) {
    const WgmmaCall& one = *calls[0];
    for (int t = 1; t < kWarpgroup; ++t) {
        const WgmmaCall& other = *calls[t];
        if (other.a_descriptor != one.a_descriptor || other.b_descriptor != one.b_descriptor)
            block().fail(first + t,
                         "wgmma: its descriptors are not those of thread " + std::to_string(first),
                         site);
        if (other.n != one.n || other.bfloat16 != one.bfloat16 || other.trans_a != one.trans_a ||
            other.trans_b != one.trans_b || other.accumulate != one.accumulate ||
            !other.a != !one.a)
            block().fail(
                first + t,
                "wgmma: its type, shape or flags are not those of thread " + std::to_string(first),
                site);
    }
}

// The accumulator in the registers that `calls` name, pending already or taken over now.
Accumulator& accumulator_of(Warpgroup& w, Calls calls, int first, Site site) {
    const int n = calls[0]->n;
    for (const auto& pending : w.accumulators) {
        int same = 0;
        for (int t = 0; t < kWarpgroup; ++t) {
            const float *d = calls[t]->d, *other = pending->registers[t];
            if (d == other && n == pending->n)
                ++same;
            else if (d < other + pending->n / 2 && other < d + n / 2)
                block().fail(first + t,
                             "wgmma: its accumulator is part of one of another shape, which is "
                             "pending",
                             site);
        }
        if (same != 0 && same != kWarpgroup)
            block().fail("wgmma: the threads name different accumulators", site);
        if (same != 0) return *pending;
    }
    Accumulator& fresh = *w.accumulators.emplace_back(std::make_unique<Accumulator>());
    fresh.n = n;
    for (int t = 0; t < kWarpgroup; ++t) fresh.registers[t] = calls[t]->d;
    fresh.take();
    return fresh;
}

// Reads operands from shared memory, as a warp sees it: which of the others' writes it knows of,
// and that they were shown to the asynchronous proxy. Warps of a warpgroup do not wait for each
// other, so each answers for what it reads: all of B, and its own rows of A.
struct Reader {
    int first;
    const Warpgroup& warpgroup;
    const WgmmaCall& call;
    Site site;

    template <class Element>
    void read(int warp, SharedAddress chunk, Element element) const {
        const Access access =
            block().access_async("wgmma", site, first + warp * kWarp, warpgroup.agent, true);
        uint16_t values[8];
        std::memcpy(values, block().shared().read(chunk, 16, 16, access), 16);
        for (int i = 0; i < 8; ++i)
            element(i) = call.bfloat16 ? widen_bfloat16(values[i]) : widen_float16(values[i]);
    }
};

void read_a(const Reader& reader, float (&a)[kM][kK]) {
    const WgmmaOperand operand =
        decode_wgmma_operand(reader.call.a_descriptor, reader.call.trans_a, kM);
    for (int warp = 0; warp < kWarpgroup / kWarp; ++warp)
        for (int m = 16 * warp; m < 16 * warp + 16; m += operand.mn_major ? 8 : 1)
            for (int step = 0; step < (operand.mn_major ? kK : 2); ++step)
                if (operand.mn_major)
                    reader.read(warp, operand.chunk_of_column(m, step),
                                [&](int i) -> float& { return a[m + i][step]; });
                else
                    reader.read(warp, operand.chunk_of_row(m, step),
                                [&](int i) -> float& { return a[m][8 * step + i]; });
}

void read_b(const Reader& reader, float (&b)[kK][kMaxN]) {
    const int n = reader.call.n;
    const WgmmaOperand operand =
        decode_wgmma_operand(reader.call.b_descriptor, reader.call.trans_b, n);
    for (int warp = 0; warp < kWarpgroup / kWarp; ++warp)
        for (int j = 0; j < n; j += operand.mn_major ? 8 : 1)
            for (int step = 0; step < (operand.mn_major ? kK : 2); ++step)
                if (operand.mn_major)
                    reader.read(warp, operand.chunk_of_column(j, step),
                                [&](int i) -> float& { return b[step][j + i]; });
                else
                    reader.read(warp, operand.chunk_of_row(j, step),
                                [&](int i) -> float& { return b[8 * step + i][j]; });
}

void take_a(Warpgroup& w, Calls calls, float (&a)[kM][kK], Site site) {
    RegisterOperand& kept = w.operands.emplace_back();
    kept.time = block().clocks().now(w.agent), kept.site = site;
    for (int t = 0; t < kWarpgroup; ++t) {
        kept.registers[t] = calls[t]->a;
        std::memcpy(kept.values[t], calls[t]->a, sizeof kept.values[t]);
        for (int i = 0; i < 8; ++i) {
            const Position at = wgmma_fragment(t, i);
            const uint16_t bits = uint16_t(kept.values[t][i / 2] >> 16 * (i % 2));
            a[at.row][at.column] = calls[0]->bfloat16 ? widen_bfloat16(bits) : widen_float16(bits);
        }
    }
}

void multiply(float* sums, int n, const float (&a)[kM][kK], const float (&b)[kK][kMaxN]) {
    using Row = float __attribute__((vector_size(64)));
    for (int j = 0; j < n; j += 16)
        for (int m = 0; m < kM; ++m) {
            Row sum, column;
            std::memcpy(&sum, sums + m * n + j, sizeof sum);
            for (int k = 0; k < kK; ++k) {
                std::memcpy(&column, &b[k][j], sizeof column);
                sum += a[m][k] * column;
            }
            std::memcpy(sums + m * n + j, &sum, sizeof sum);
        }
}

void run(Warpgroup& w, Calls calls, Site site) {
    const int first = first_thread();
    const WgmmaCall& call = *calls[0];
    check_alike(calls, first, site);
    if (!w.fenced)
        block().fail(
            "wgmma: no wgmma_fence since the last wgmma_commit, which must come before "
            "the first wgmma of a group",
            site);
    w.check_registers(first);

    float a[kM][kK], b[kK][kMaxN];
    const Reader reader{first, w, call, site};
    try {
        call.a ? take_a(w, calls, a, site) : read_a(reader, a);
        read_b(reader, b);
    } catch (const InvalidOperand& fault) {
        block().fail(fault.what(), site);
    }
    Accumulator& accumulator = accumulator_of(w, calls, first, site);
    accumulator.last = block().clocks().now(w.agent);
    accumulator.site = site;
    if (!call.accumulate) std::fill_n(accumulator.sums, kM * call.n, 0.0f);
    multiply(accumulator.sums, call.n, a, b);
}

}  // namespace

void wgmma(WgmmaCall call, Site site) {
    Warpgroup& w = warpgroup("wgmma", site);
    block().meet(kWarpgroup, "wgmma", site, call, [&](Calls calls) { run(w, calls, site); });
}

void wgmma_fence(Site site) {
    Warpgroup& w = warpgroup("wgmma_fence", site);
    int nothing = 0;
    block().meet(kWarpgroup, "wgmma_fence", site, nothing, [&](Payloads<int>) { w.fenced = true; });
}

void wgmma_commit(Site site) {
    Warpgroup& w = warpgroup("wgmma_commit", site);
    int nothing = 0;
    block().meet(kWarpgroup, "wgmma_commit", site, nothing, [&](Payloads<int>) {
        w.fenced = false;
        block().clocks().advance(w.agent);
    });
}

void wgmma_wait(int pending, Site site) {
    Warpgroup& w = warpgroup("wgmma_wait", site);
    block().meet(kWarpgroup, "wgmma_wait", site, pending, [&](Payloads<int> pendings) {
        for (int t = 0; t < kWarpgroup; ++t)
            if (*pendings[t] != pending)
                block().fail(first_thread() + t, "wgmma_wait: for other groups than its warpgroup",
                             site);
        w.land(first_thread(), block().clocks().now(w.agent) - 1 - pending);
    });
}

void wgmma_landed(const float* d, int count, Site site) {
    Warpgroup& w = warpgroup("wgmma_landed", site);
    for (const auto& pending : w.accumulators) {
        const float* other = pending->registers[block().thread() % kWarpgroup];
        if (d < other + pending->n / 2 && other < d + count)
            block().fail("wgmma_landed: of an accumulator that no wgmma_wait has waited for", site);
    }
}

}  // namespace fastattn::emulation
