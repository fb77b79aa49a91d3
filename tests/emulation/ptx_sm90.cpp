#include "emulation/ptx_sm90.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "emulation/global_memory.h"

namespace fastattn::emulation {

void fence_mbarrier_init() { mbarriers().release(block().thread()); }

void fence_proxy_async() {
    mbarriers().show(block().thread());
    block().clocks().fence_proxy_async(block().thread());
}

namespace {

void check_map(const cuda::TensorMap* map, const char* instruction, Site site) {
    if (map->signature != cuda::TensorMap::kSignature)
        block().fail(std::string(instruction) + ": no make_tensor_map has made this tensor map",
                     site);
}

int alignment(const cuda::TensorMap& map) { return map.tensor.swizzle ? 1024 : 128; }

// The copies out of shared memory that one thread has issued. Each reads when it is issued (who
// overwrites its source before the wait is reported), and writes as late as it may.
struct OutgoingCopies {
    struct Piece {
        uint8_t* to;
        std::vector<uint8_t> data;
        bool add;
    };
    int agent = -1;
    Time read = 0;  // up to which group shared memory is known to have been read
    std::vector<std::pair<Time, Piece>> pieces;
    const char* instruction;  // the latest
    Site site;

    void write(Time until) {
        size_t written = 0;
        for (; written < pieces.size() && pieces[written].first <= until; ++written) {
            const auto& [to, data, add] = pieces[written].second;
            if (!add) {
                std::memcpy(to, data.data(), data.size());
                continue;
            }
            for (size_t i = 0; i < data.size(); i += 4) {
                float sum, addend;
                std::memcpy(&sum, to + i, 4), std::memcpy(&addend, data.data() + i, 4);
                sum += addend;
                std::memcpy(to + i, &sum, 4);
            }
        }
        pieces.erase(pieces.begin(), pieces.begin() + written);
    }
};

struct CopyEngine {
    std::vector<OutgoingCopies> of_thread;

    CopyEngine() : of_thread(block().threads()) {
        block().at_end([this] {
            for (int t = 0; t < block().threads(); ++t) end(t, of_thread[t]);
        });
    }

    void end(int thread, OutgoingCopies& copies) {
        if (copies.agent < 0 || copies.pieces.empty()) return;
        const Time latest = copies.pieces.back().first;
        if (latest == block().clocks().now(copies.agent))
            block().fail(thread,
                         std::string(copies.instruction) + ": not committed when the block ends",
                         copies.site);
        if (latest > copies.read)
            block().fail(thread,
                         std::string(copies.instruction) +
                             ": may still read shared memory when the block ends, a bulk_wait or "
                             "bulk_wait_read is missing",
                         copies.site);
        copies.write(latest);
    }
};

OutgoingCopies& outgoing(int thread) {
    OutgoingCopies& copies = block().state<CopyEngine>().of_thread[thread];
    if (copies.agent < 0)
        copies.agent =
            block().clocks().new_agent("a bulk copy of thread " + std::to_string(thread), true);
    return copies;
}

void issue(SharedAddress from, uint8_t* to, int bytes, bool add, const char* instruction,
           Site site) {
    const int thread = block().thread();
    OutgoingCopies& copies = outgoing(thread);
    copies.instruction = instruction, copies.site = site;
    // Words are what reads are checked by.
    const uint32_t begin = from & ~3u, end = (from + bytes + 3) & ~3u;
    const Access access = block().access_async(instruction, site, thread, copies.agent, true);
    const uint8_t* data =
        block().shared().read(begin, int(end - begin), 4, access) + (from - begin);
    copies.pieces.push_back({access.time, {to, {data, data + bytes}, add}});
}

// What all copies into shared memory have in common: room for their bytes.
IncomingCopy incoming(SharedAddress to, int64_t bytes, int alignment, Mbarrier& barrier,
                      const char* instruction, Site site, bool async_proxy = true) {
    const int thread = block().thread();
    barrier.require_shown(instruction, site);
    const Access access =
        block().access_async(instruction, site, thread, barrier.agent(), async_proxy);
    const int room = int(std::min<int64_t>(bytes, 1 << 30));
    return {
        block().shared().write(to, room, alignment, access), room, {}, instruction, thread, site};
}

}  // namespace

namespace {

void copy_box(SharedAddress to, const cuda::TensorMap& map, SharedAddress barrier,
              const int (&at)[4], const char* instruction, Site site) {
    Mbarrier& counting = mbarriers().at(barrier, instruction, site);
    IncomingCopy copy = incoming(to, box_bytes(map), alignment(map), counting, instruction, site);
    for_each_piece(map, at, to, [&](uint32_t shared, const uint8_t* global, int bytes) {
        check_global(global, bytes, 1, instruction, site);
        copy.pieces.push_back({copy.to + (shared - to), global, bytes});
    });
    counting.add(std::move(copy));
}

}  // namespace

SharedAddress address_in(int rank, SharedAddress address, const char* instruction, Site site) {
    block().require_block(rank, instruction, site);
    return address % kSharedWindow + rank * kSharedWindow;
}

void st_async(SharedAddress to, const void* value, int bytes, SharedAddress barrier, int rank,
              Site site) {
    constexpr const char* kName = "st_async_at";
    Mbarrier& counting = mbarriers().at(address_in(rank, barrier, kName, site), kName, site);
    IncomingCopy copy =
        incoming(address_in(rank, to, kName, site), bytes, bytes, counting, kName, site, false);
    const auto* from = static_cast<const uint8_t*>(value);
    copy.value.assign(from, from + bytes);
    copy.pieces.push_back({copy.to, copy.value.data(), bytes});
    counting.add(std::move(copy));
}

void tma_load(SharedAddress to, const cuda::TensorMap* map, SharedAddress barrier,
              const int (&at)[4], Site site) {
    constexpr const char* kName = "tma_load_4d";
    check_map(map, kName, site);
    copy_box(to, *map, barrier, at, kName, site);
}

void tma_multicast(SharedAddress to, const cuda::TensorMap* map, SharedAddress barrier,
                   const int (&at)[4], uint16_t blocks, Site site) {
    constexpr const char* kName = "tma_multicast_4d";
    check_map(map, kName, site);
    for (int rank = 0; rank < 16; ++rank)
        if (blocks >> rank & 1)
            copy_box(address_in(rank, to, kName, site), *map,
                     address_in(rank, barrier, kName, site), at, kName, site);
}

void tma_store(const cuda::TensorMap* map, SharedAddress from, const int (&at)[4], bool add,
               Site site) {
    const char* name = add ? "tma_reduce_add_4d" : "tma_store_4d";
    check_map(map, name, site);
    if (add && map->tensor.element != cuda::Element::float32)
        block().fail(std::string(name) + ": only float32 is emulated", site);
    if (from % alignment(*map) != 0)
        block().fail(std::string(name) + ": the source is misaligned: it wants a multiple of " +
                         std::to_string(alignment(*map)),
                     site);
    for_each_piece(*map, at, from, [&](uint32_t shared, uint8_t* global, int bytes) {
        check_global(global, bytes, 1, name, site);
        issue(shared, global, bytes, add, name, site);
    });
}

void prefetch_tensor_map(const cuda::TensorMap* map, Site site) {
    check_map(map, "prefetch_tensor_map", site);
}

void bulk_load(SharedAddress to, const void* from, uint32_t bytes, SharedAddress barrier,
               Site site) {
    constexpr const char* kName = "bulk_load";
    if (bytes == 0 || bytes % 16 != 0)
        block().fail(std::string(kName) + ": the bytes must be a multiple of 16", site);
    check_global(from, bytes, 16, kName, site);
    Mbarrier& counting = mbarriers().at(barrier, kName, site);
    IncomingCopy copy = incoming(to, bytes, 16, counting, kName, site);
    copy.pieces.push_back({copy.to, static_cast<const uint8_t*>(from), int(bytes)});
    counting.add(std::move(copy));
}

void bulk_reduce_add(float* to, SharedAddress from, uint32_t bytes, Site site) {
    constexpr const char* kName = "bulk_reduce_add";
    if (bytes == 0 || bytes % 16 != 0 || from % 16 != 0)
        block().fail(std::string(kName) + ": the bytes and the source must be multiples of 16",
                     site);
    check_global(to, bytes, 16, kName, site);
    issue(from, reinterpret_cast<uint8_t*>(to), int(bytes), true, kName, site);
}

void bulk_commit() { block().clocks().advance(outgoing(block().thread()).agent); }

void bulk_wait(int pending, bool only_read) {
    const int thread = block().thread();
    OutgoingCopies& copies = outgoing(thread);
    Clocks& clocks = block().clocks();
    copies.read = std::max(copies.read, clocks.now(copies.agent) - 1 - pending);
    clocks.learn(thread, copies.agent, copies.read);
    if (!only_read) copies.write(clocks.now(copies.agent) - 1 - pending);
}

// PTX ISA, "stmatrix": the matrices of ldmatrix, the other way.
void stmatrix(SharedAddress row, const uint32_t (&d)[4], Site site) {
    struct Lane {
        SharedAddress row;
        const uint32_t* d;
    } mine{row, d};
    block().meet(kWarp, "stmatrix_x4", site, mine, [=](Payloads<Lane> lanes) {
        const int first = block().thread() / kWarp * kWarp;
        for (int i = 0; i < kWarp; ++i) {
            uint32_t pairs[4];
            for (int p = 0; p < 4; ++p) pairs[p] = lanes[i % 8 * 4 + p]->d[i / 8];
            const Access access = block().access("stmatrix_x4", site, first + i);
            std::memcpy(block().shared().write(lanes[i]->row, 16, 16, access), pairs, 16);
        }
    });
}

namespace {

// The registers of a block, 65536 at most. They are shared out alike when it starts.
struct Registers {
    struct Warpgroup {
        int each;      // that a thread has
        bool granted;  // what it has asked for
    };
    Warpgroup warpgroups[kMaxThreads / kWarpgroup];
    int free[kMaxCluster] = {};  // of each block

    Registers() {
        const int each = std::min(256, 65536 / block().block_threads() / 8 * 8);
        for (Warpgroup& w : warpgroups) w = {each, true};
    }
};

}  // namespace

void set_registers(int registers, bool up, Site site) {
    const char* name = up ? "registers_up" : "registers_down";
    const int thread = block().thread();
    Registers& all = block().state<Registers>();
    int& free = all.free[block().rank()];
    Registers::Warpgroup& mine = all.warpgroups[thread / kWarpgroup];
    block().meet(kWarpgroup, name, site, registers, [&](Payloads<int>) {
        if (up ? registers < mine.each : registers > mine.each)
            block().fail(std::string(name) + ": to " + std::to_string(registers) + " from " +
                             std::to_string(mine.each),
                         site);
        mine.granted = false;
    });
    char instruction[100];
    block().wait_until(instruction, site, [&] {
        const int more = (registers - mine.each) * kWarpgroup;
        std::snprintf(instruction, sizeof instruction, "%s to %d, while %d registers are free",
                      name, registers, free);
        if (mine.granted) return true;
        if (more > free) return false;
        free -= more;
        mine = {registers, true};
        return true;
    });
}

}  // namespace fastattn::emulation
