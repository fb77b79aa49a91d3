#include "cuda/wgmma.cuh"

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

void widen(const uint16_t (&bits)[8], bool bfloat16, float (&values)[8]) {
    if (bfloat16)
        for (int i = 0; i < 8; ++i) values[i] = widen_bfloat16(bits[i]);
    else
        for (int i = 0; i < 8; ++i) values[i] = widen_float16(bits[i]);
}

// Calls take(mn, k, values) for each chunk of 8 elements of an operand in shared memory, of rows
// [begin, end) of A or columns of B: along mn from (mn, k) on if it is MN-major, else along k.
//
// `warp` of the warpgroup reads: what it knows of others' writes counts, and that they were shown
// to the asynchronous proxy. Warps of a warpgroup do not wait for each other, so that each answers
// for all of B, but only for its own rows of A.
template <class Take>
void read(const WgmmaOperand& operand, int begin, int end, int warp, const Warpgroup& w,
          bool bfloat16, Site site, Take take) {
    const Access access =
        block().access_async("wgmma", site, first_thread() + warp * kWarp, w.agent, true);
    const int mn_step = operand.mn_major ? 8 : 1, k_step = operand.mn_major ? 1 : 8;
    for (int mn = begin; mn < end; mn += mn_step)
        for (int k = 0; k < kK; k += k_step) {
            const uint32_t chunk =
                operand.mn_major ? operand.chunk_of_column(mn, k) : operand.chunk_of_row(mn, k / 8);
            uint16_t bits[8];
            std::memcpy(bits, block().shared().read(chunk, 16, 16, access), 16);
            float values[8];
            widen(bits, bfloat16, values);
            take(mn, k, values);
        }
}

// Descriptors leave out the bits of an address that tell the block.
WgmmaOperand operand_of(uint64_t descriptor, bool mn_major, int extent) {
    WgmmaOperand operand = decode_wgmma_operand(descriptor, mn_major, extent);
    operand.start += block().rank() * kSharedWindow;
    return operand;
}

void read_a(const Warpgroup& w, const WgmmaCall& call, float (&a)[kM][kK], Site site) {
    const WgmmaOperand operand = operand_of(call.a_descriptor, call.trans_a, kM);
    for (int warp = 0; warp < kWarpgroup / kWarp; ++warp)
        read(operand, 16 * warp, 16 * warp + 16, warp, w, call.bfloat16, site,
             [&](int m, int k, const float (&values)[8]) {
                 for (int i = 0; i < 8; ++i) (call.trans_a ? a[m + i][k] : a[m][k + i]) = values[i];
             });
}

void read_b(const Warpgroup& w, const WgmmaCall& call, float (&b)[kK][kMaxN], Site site) {
    const WgmmaOperand operand = operand_of(call.b_descriptor, call.trans_b, call.n);
    read(operand, 0, call.n, 0, w, call.bfloat16, site,
         [&](int n, int k, const float (&values)[8]) {
             for (int i = 0; i < 8; ++i) (call.trans_b ? b[k][n + i] : b[k + i][n]) = values[i];
         });
    for (int warp = 1; warp < kWarpgroup / kWarp; ++warp)
        read(operand, 0, call.n, warp, w, call.bfloat16, site, [](int, int, const float (&)[8]) {});
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

// sums (64, n) += a (64, 16) b (16, n), in tiles of 2 rows and 16 columns.
void multiply(float* sums, int n, const float (&a)[kM][kK], const float (&b)[kK][kMaxN]) {
    using Quad = float __attribute__((vector_size(16)));
    for (int j = 0; j < n; j += 16)
        for (int m = 0; m < kM; m += 2) {
            Quad upper[4], lower[4], row[4];
            std::memcpy(upper, sums + m * n + j, 64), std::memcpy(lower, sums + m * n + n + j, 64);
            for (int k = 0; k < kK; ++k) {
                std::memcpy(row, &b[k][j], 64);
#pragma GCC unroll 4
                for (int q = 0; q < 4; ++q)
                    upper[q] += a[m][k] * row[q], lower[q] += a[m + 1][k] * row[q];
            }
            std::memcpy(sums + m * n + j, upper, 64), std::memcpy(sums + m * n + n + j, lower, 64);
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
    try {
        call.a ? take_a(w, calls, a, site) : read_a(w, call, a, site);
        read_b(w, call, b, site);
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
