// Included inside a target region.
#pragma once

// Memory of the calling thread, 64-byte aligned, kept from call to call. Slots are independent;
// a slot's former contents and address are lost when it is asked for again.
template <class T>
T* scratch(int64_t count, int slot = 0) {
    struct Slots {
        void* data[8] = {};
        size_t bytes[8] = {};
        ~Slots() {
            for (void* one : data) std::free(one);
        }
    };
    static thread_local Slots slots;
    const size_t wanted = (size_t(count) * sizeof(T) + 4095) / 4096 * 4096;
    if (slots.bytes[slot] < wanted) {
        std::free(slots.data[slot]);
        slots.data[slot] = nullptr, slots.bytes[slot] = 0;
        void* fresh = std::aligned_alloc(64, wanted);
        if (!fresh) throw std::bad_alloc();
        slots.data[slot] = fresh, slots.bytes[slot] = wanted;
    }
    return static_cast<T*>(slots.data[slot]);
}
