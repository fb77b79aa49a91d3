// A block's shared memory, which knows of each 4-byte word who wrote it last and who has read it
// since, so that it refuses accesses out of bounds or misaligned, reads of what nothing has
// written, and accesses that race.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulation/clocks.h"
#include "emulation/site.h"

namespace fastattn::emulation {

class Block;
using SharedAddress = uint32_t;

// Where the dynamic shared memory begins: not at 0, which a kernel must not take for granted. The
// next block's of the cluster lies kSharedWindow further.
constexpr SharedAddress kSharedBegin = 1024, kSharedWindow = 1 << 18;

// The byte of its block's shared memory that an address names.
constexpr int64_t shared_byte(SharedAddress address) {
    return int64_t(address % kSharedWindow) - kSharedBegin;
}

// Who accesses memory, by which instruction.
struct Access {
    int thread;  // what it knows must cover what others did to the words
    int agent;   // in whose name the access is noted, at its time: the thread's own, or a stream's
    Time time;
    bool async_proxy;  // ordinary stores are seen only after fence_proxy_async
    const char* instruction;
    Site site;
};

class SharedMemory {
  public:
    explicit SharedMemory(const Block& block) : block_(block) {}

    // `bytes` of each block.
    void start(size_t bytes, int blocks);
    // Drops what is known of earlier blocks, when their times begin anew.
    void forget();
    size_t bytes() const { return size_; }

    // Checks and notes the access of `bytes` bytes, a multiple of 4, from an address aligned to
    // `alignment`; the pointer is to them.
    const uint8_t* read(SharedAddress from, int bytes, int alignment, const Access& access);
    uint8_t* write(SharedAddress to, int bytes, int alignment, const Access& access);

  private:
    struct Write {
        Time time = 0;
        uint16_t agent, line;
        const char* file;
    };
    // The agents of one group of 32 that have read a word at a time.
    struct Reads {
        Time time = 0;
        uint32_t agents;
    };
    struct Readers {
        Time latest = 0;
        std::vector<Reads> words;
    };

    size_t first_word(SharedAddress address, int bytes, int alignment, const Access& access) const;
    bool sees(const Access& access, const Write& write) const;
    static void note_read(Readers& readers, size_t word, const Access& access);
    void check_readers(size_t first, size_t end, const Access& access) const;

    std::string at(size_t word, const char* verb, const Access& access) const;
    std::string who_wrote(const Write& write, const Access& access) const;
    [[noreturn]] void fail_read(size_t word, const Access& access) const;
    [[noreturn]] void fail_overwrite(size_t word, const Access& access) const;
    [[noreturn]] void fail_write(size_t word, int reader, const Access& access) const;

    const Block& block_;
    size_t size_ = 0, block_words_ = 0;
    int blocks_ = 0;
    std::unique_ptr<uint8_t[]> memory_;
    std::vector<Write> writes_;     // of each word
    std::vector<Readers> readers_;  // by group of 32 agents
};

}  // namespace fastattn::emulation
