#include "isa.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <stdexcept>

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastattn {
namespace {

struct InstructionSet {
    const char* name;
    const Kernels* kernels;
    bool (*available)();
};

#ifdef __x86_64__

struct Cpuid {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;

    Cpuid(unsigned leaf, unsigned subleaf) {
        __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
    }
};

constexpr bool has(unsigned value, unsigned bits) { return (value & bits) == bits; }

// Which register states the operating system saves: bit 1 xmm, 2 ymm, 5 to 7 opmask and zmm.
unsigned saved_states() {
    constexpr unsigned kOsxsave = 1u << 27;
    if (!has(Cpuid(1, 0).ecx, kOsxsave)) return 0;
    unsigned eax, edx;
    __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return eax;
}

bool has_avx2() {
    constexpr unsigned kFma = 1u << 12, kF16c = 1u << 29, kBmi2 = 1u << 8, kAvx2 = 1u << 5;
    return has(saved_states(), 0x6) && has(Cpuid(1, 0).ecx, kFma | kF16c) &&
           has(Cpuid(7, 0).ebx, kAvx2 | kBmi2);
}

bool has_avx512() {
    constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
    return has_avx2() && has(saved_states(), 0xe6) && has(Cpuid(7, 0).ebx, kF | kDq | kBw | kVl);
}

bool has_avx512_bf16() {
    constexpr unsigned kBf16 = 1u << 5;
    return has_avx512() && has(Cpuid(7, 1).eax, kBf16);
}

// Linux lends a process the tile registers when it asks for them.
bool has_amx() {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return has_avx512_bf16() && has(saved_states(), 0x600e6) &&
           has(Cpuid(7, 0).edx, kBf16 | kTile) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Narrowest first.
constexpr std::array<InstructionSet, 5> kSets{{
    {"baseline", &baseline::kernels, [] { return true; }},
    {"avx2", &avx2::kernels, has_avx2},
    {"avx512", &avx512::kernels, has_avx512},
    {"avx512_bf16", &avx512_bf16::kernels, has_avx512_bf16},
    {"amx", &amx::kernels, has_amx},
}};

#else

constexpr std::array<InstructionSet, 1> kSets{{
    {"neon", &neon::kernels, [] { return true; }},
}};

#endif

std::string joined(std::span<const std::string> names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

const InstructionSet* find(const std::string& name, const std::string& argument) {
    for (const InstructionSet& set : kSets) {
        if (name != set.name) continue;
        if (set.available()) return &set;
        throw std::invalid_argument(argument + "=" + name +
                                    ": this processor does not run that instruction set; it runs " +
                                    joined(isas_available()));
    }
    throw std::invalid_argument(argument + " must be one of " + joined(isas()) + ", got '" + name +
                                "'");
}

const InstructionSet* choose() {
    const char* forced = std::getenv("FASTATTN_ISA");
    if (forced != nullptr && *forced != '\0') return find(forced, "FASTATTN_ISA");
    const InstructionSet* widest = &kSets.front();
    for (const InstructionSet& set : kSets) {
        if (set.available()) widest = &set;
    }
    return widest;
}

std::atomic<const InstructionSet*>& selected() {
    static std::atomic<const InstructionSet*> set{choose()};
    return set;
}

}  // namespace

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const InstructionSet& set : kSets) names.emplace_back(set.name);
    return names;
}

std::vector<std::string> isas_available() {
    std::vector<std::string> names;
    for (const InstructionSet& set : kSets) {
        if (set.available()) names.emplace_back(set.name);
    }
    return names;
}

std::string isa() { return selected().load(std::memory_order_relaxed)->name; }

void set_isa(const std::string& name) {
    selected().store(find(name, "isa"), std::memory_order_relaxed);
}

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed)->kernels; }

}  // namespace fastattn
