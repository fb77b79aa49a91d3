#include "emulation/shared_memory.h"

#include <bit>

#include "emulation/engine.h"

namespace fastattn::emulation {

void SharedMemory::start(size_t bytes, int blocks) {
    size_ = bytes, blocks_ = blocks, block_words_ = (bytes + 3) / 4;
    const size_t words = blocks * block_words_;
    if (words <= writes_.size()) return;
    memory_ = std::make_unique<uint8_t[]>(4 * words);
    writes_.assign(words, {});
    readers_.clear();
}

void SharedMemory::forget() {
    writes_.clear();
    readers_.clear();
}

inline size_t SharedMemory::first_word(SharedAddress address, int bytes, int alignment,
                                       const Access& access) const {
    const int64_t offset = shared_byte(address), block = address / kSharedWindow;
    if (offset < 0 || offset + bytes > int64_t(size_) || block >= blocks_)
        block_.fail(access.thread,
                    std::string(access.instruction) + " of " + std::to_string(bytes) +
                        " bytes at byte " + std::to_string(offset) +
                        " of shared memory is out of bounds: the block has " +
                        std::to_string(size_) + " bytes",
                    access.site);
    if (address % alignment != 0)
        block_.fail(access.thread,
                    std::string(access.instruction) + " of " + std::to_string(bytes) +
                        " bytes at byte " + std::to_string(offset) +
                        " of shared memory is misaligned: it wants a multiple of " +
                        std::to_string(alignment),
                    access.site);
    return block * block_words_ + offset / 4;
}

inline bool SharedMemory::sees(const Access& access, const Write& write) const {
    const Clocks& clocks = block_.clocks();
    return access.async_proxy ? clocks.knows_shown(access.thread, write.agent, write.time)
                              : clocks.knows(access.thread, write.agent, write.time);
}

// Of reads that no barrier orders, those of one group and one time are kept; an older one of the
// group may be forgotten.
inline void SharedMemory::note_read(Readers& readers, size_t word, const Access& access) {
    Reads& reads = readers.words[word];
    const uint32_t agent = 1u << access.agent % 32;
    if (reads.time == access.time)
        reads.agents |= agent;
    else if (reads.time < access.time)
        reads = {access.time, agent};
}

const uint8_t* SharedMemory::read(SharedAddress from, int bytes, int alignment,
                                  const Access& access) {
    const size_t first = first_word(from, bytes, alignment, access), end = first + bytes / 4;
    const size_t group = access.agent / 32;
    if (group >= readers_.size()) readers_.resize(group + 1);
    Readers& readers = readers_[group];
    if (readers.words.empty()) readers.words.resize(writes_.size());
    readers.latest = std::max(readers.latest, access.time);
    const Time beginning = block_.clocks().beginning();
    for (size_t word = first; word < end; ++word) {
        const Write& write = writes_[word];
        if (write.time <= beginning || !sees(access, write)) fail_read(word, access);
        note_read(readers, word, access);
    }
    return &memory_[4 * first];
}

uint8_t* SharedMemory::write(SharedAddress to, int bytes, int alignment, const Access& access) {
    const size_t first = first_word(to, bytes, alignment, access), end = first + bytes / 4;
    const Time beginning = block_.clocks().beginning();
    check_readers(first, end, access);
    for (size_t word = first; word < end; ++word) {
        Write& write = writes_[word];
        if (write.time > beginning && !sees(access, write)) fail_overwrite(word, access);
        write = {access.time, uint16_t(access.agent), uint16_t(access.site.line), access.site.file};
    }
    return &memory_[4 * first];
}

void SharedMemory::check_readers(size_t first, size_t end, const Access& access) const {
    const Clocks& clocks = block_.clocks();
    for (size_t group = 0; group < readers_.size(); ++group) {
        const Readers& readers = readers_[group];
        const bool threads = int(32 * group) < clocks.threads();
        const Time known = threads ? clocks.floor() : clocks.beginning();
        if (readers.latest <= known) continue;
        for (size_t word = first; word < end; ++word) {
            const Reads& reads = readers.words[word];
            if (reads.time <= known) continue;
            for (uint32_t left = reads.agents; left != 0; left &= left - 1) {
                const int agent = int(32 * group) + std::countr_zero(left);
                if (!clocks.knows(access.thread, agent, reads.time))
                    fail_write(word, agent, access);
            }
        }
    }
}

std::string SharedMemory::at(size_t word, const char* verb, const Access& access) const {
    return std::string(access.instruction) + " " + verb + " byte " +
           std::to_string(4 * (word % block_words_)) + " of shared memory, which ";
}

void SharedMemory::fail_read(size_t word, const Access& access) const {
    const Clocks& clocks = block_.clocks();
    const Write& write = writes_[word];
    const std::string start = at(word, "reads", access);
    if (write.time <= clocks.beginning())
        block_.fail(access.thread, start + "nothing has written yet", access.site);
    block_.fail(access.thread, start + who_wrote(write, access), access.site);
}

void SharedMemory::fail_overwrite(size_t word, const Access& access) const {
    block_.fail(access.thread, at(word, "writes", access) + who_wrote(writes_[word], access),
                access.site);
}

std::string SharedMemory::who_wrote(const Write& write, const Access& access) const {
    const Clocks& clocks = block_.clocks();
    const std::string where = " (" + Site{write.file, write.line}.str() + ")";
    const bool stream = write.agent >= clocks.threads();
    const std::string who =
        stream ? clocks.name(write.agent) : "thread " + std::to_string(write.agent);
    if (clocks.knows(access.thread, write.agent, write.time))
        return who + " wrote" + where + " without fence_proxy_async before the barrier";
    if (stream)
        return who + where + " may still be writing: a wait, or a barrier after it, is missing";
    return who + " wrote" + where + " with no barrier in between: a race";
}

void SharedMemory::fail_write(size_t word, int reader, const Access& access) const {
    const Clocks& clocks = block_.clocks();
    const std::string who =
        reader < clocks.threads()
            ? "thread " + std::to_string(reader) + " reads with no barrier in between: a race"
            : clocks.name(reader) +
                  " may still be reading: a wait, or a barrier after it, is missing";
    block_.fail(access.thread, at(word, "writes", access) + who, access.site);
}

}  // namespace fastattn::emulation
