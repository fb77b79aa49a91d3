#include "emulation/ptx.h"

#include <bit>
#include <string>
#include <utility>
#include <vector>

namespace fastattn::emulation {

namespace {

// Of each thread, the stream of its cp.async groups, or -1.
struct CopyGroups {
    std::vector<int> agents = std::vector<int>(block().threads(), -1);
};

int64_t conflicts = 0;

int copy_groups_of(int thread) {
    int& agent = block().state<CopyGroups>().agents[thread];
    if (agent < 0)
        agent = block().clocks().new_generic_agent(
            thread, "cp_async_16 of thread " + std::to_string(thread));
    return agent;
}

}  // namespace

// The bytes arrive at once, but nobody may look before the group has been waited for.
void cp_async(SharedAddress to, const void* from, bool valid, Site site) {
    if (valid) check_global(from, 16, 16, "cp_async_16", site);
    const int thread = block().thread();
    const Access access =
        block().access_async("cp_async_16", site, thread, copy_groups_of(thread), false);
    uint8_t* target = block().shared().write(to, 16, 16, access);
    if (valid)
        std::memcpy(target, from, 16);
    else
        std::memset(target, 0, 16);
}

void cp_async_commit() { block().clocks().advance(copy_groups_of(block().thread())); }

void cp_async_wait(int pending) {
    Clocks& clocks = block().clocks();
    const int thread = block().thread(), agent = copy_groups_of(thread);
    clocks.learn(thread, agent, clocks.now(agent) - 1 - pending);
}

void ldmatrix(uint32_t (&d)[4], SharedAddress row, bool transposed, Site site) {
    struct Lane {
        uint32_t* d;
        SharedAddress row;
    } mine{d, row};
    const char* name = transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4";
    block().meet(kWarp, name, site, mine, [=](Payloads<Lane> lanes) {
        const int first = block().thread() / kWarp * kWarp;
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t elements[8][8];
            unsigned banks = 0;  // a bit for each 16 of the 128 bytes that banks serve at once
            for (int r = 0; r < 8; ++r) {
                const int lane = 8 * matrix + r;
                banks |= 1u << lanes[lane]->row / 16 % 8;
                const Access access = block().access(name, site, first + lane);
                std::memcpy(elements[r], block().shared().read(lanes[lane]->row, 16, 16, access),
                            16);
            }
            conflicts += 8 - std::popcount(banks);
            for (int lane = 0; lane < kWarp; ++lane) {
                const int r = lane / 4, c = 2 * (lane % 4);
                const uint32_t low = transposed ? elements[c][r] : elements[r][c];
                const uint32_t high = transposed ? elements[c + 1][r] : elements[r][c + 1];
                lanes[lane]->d[matrix] = low | high << 16;
            }
        }
    });
}

int64_t take_ldmatrix_conflicts() { return std::exchange(conflicts, 0); }

namespace {

// What a lane brings to mma_m16n8k16.
struct MmaLane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

template <float (*widen)(uint16_t)>
void multiply(Payloads<MmaLane> lanes) {
    using Quad = float __attribute__((vector_size(16)));
    float a[16][16];
    Quad b[16][2], d[16][2];
    for (int lane = 0; lane < kWarp; ++lane) {
        const MmaLane& from = *lanes[lane];
        const int g = lane / 4, c = 2 * (lane % 4);
        for (int i = 0; i < 4; ++i) {
            float* pair = &a[g + i % 2 * 8][c + i / 2 * 8];
            pair[0] = widen(uint16_t(from.a[i])), pair[1] = widen(uint16_t(from.a[i] >> 16));
        }
        for (int i = 0; i < 2; ++i) {
            b[c + 8 * i][g / 4][g % 4] = widen(uint16_t(from.b[i]));
            b[c + 8 * i + 1][g / 4][g % 4] = widen(uint16_t(from.b[i] >> 16));
        }
        for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][c / 4][c % 4 + i % 2] = from.d[i];
    }
    for (int m = 0; m < 16; ++m) {
        Quad left = d[m][0], right = d[m][1];
        for (int k = 0; k < 16; ++k) left += a[m][k] * b[k][0], right += a[m][k] * b[k][1];
        d[m][0] = left, d[m][1] = right;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, c = 2 * (lane % 4);
        for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[g + i / 2 * 8][c / 4][c % 4 + i % 2];
    }
}

}  // namespace

void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16,
         Site site) {
    MmaLane mine{d, a, {b0, b1}};
    block().meet(kWarp, "mma_m16n8k16", site, mine,
                 bfloat16 ? multiply<widen_bfloat16> : multiply<widen_float16>);
}

}  // namespace fastattn::emulation
