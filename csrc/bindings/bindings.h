// What the bindings share. One bind_<op> per op, defined in bindings/<op>.cpp and called by
// bindings.cpp; they are compiled together. Tuples of integers are read without the cost of
// Python's sequence protocol.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "cpu/cross_entropy.h"
#include "cpu/dropout.h"
#include "dtype.h"

namespace fastattn {

namespace py = pybind11;

template <size_t n>
struct Ints : std::array<int64_t, n> {};

// A tensor as (address, strides).
template <size_t rank>
struct Strided {
    uintptr_t address;
    Ints<rank> strides;
};

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// The address of a result. A large one is fresh from the system, and its page faults would cost
// more than the kernel: the system is asked for huge pages. glibc maps all from 32 MiB on anew.
template <class T>
T* result(uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (address && bytes >= 32 << 20) {
        static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
        const uintptr_t begin = address / page * page;
        madvise(reinterpret_cast<void*>(begin), address + uintptr_t(bytes) - begin, MADV_HUGEPAGE);
    }
#else
    (void)bytes;
#endif
    return pointer<T>(address);
}

inline Dropout read_dropout(double dropout_p, uintptr_t seed) {
    return make_dropout(dropout_p, dropout_p > 0 ? *pointer<uint64_t>(seed) : 0);
}

inline CrossEntropyTargets read_targets(uintptr_t targets, int64_t ignore_index, float smoothing,
                                        int reduction) {
    return {pointer<int64_t>(targets), ignore_index, smoothing, Reduction(reduction)};
}

void bind_attention(py::module_& m);
void bind_softmax(py::module_& m);
void bind_ffn(py::module_& m);
void bind_norm(py::module_& m);
void bind_cross_entropy(py::module_& m);
void bind_linear_cross_entropy(py::module_& m);
void bind_rotary(py::module_& m);

}  // namespace fastattn

namespace pybind11::detail {

template <>
struct type_caster<fastattn::DType> {
    PYBIND11_TYPE_CASTER(fastattn::DType, const_name("int"));

    bool load(handle source, bool) {
        if (!PyLong_Check(source.ptr())) return false;
        const long index = PyLong_AsLong(source.ptr());
        value = fastattn::DType(index);
        return index >= 0 && index <= long(fastattn::DType::bfloat16);
    }
};

template <size_t n>
struct type_caster<fastattn::Ints<n>> {
    PYBIND11_TYPE_CASTER(fastattn::Ints<n>, const_name("tuple[int, ...]"));

    bool load(handle source, bool) {
        if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != Py_ssize_t(n))
            return false;
        for (size_t i = 0; i < n; ++i) {
            value[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
            if (value[i] == -1 && PyErr_Occurred()) {
                PyErr_Clear();
                return false;
            }
        }
        return true;
    }
};

template <size_t rank>
struct type_caster<fastattn::Strided<rank>> {
    PYBIND11_TYPE_CASTER(fastattn::Strided<rank>, const_name("tuple[int, tuple[int, ...]]"));

    bool load(handle source, bool convert) {
        if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
        make_caster<uintptr_t> address;
        make_caster<fastattn::Ints<rank>> strides;
        if (!address.load(PyTuple_GET_ITEM(source.ptr(), 0), convert) ||
            !strides.load(PyTuple_GET_ITEM(source.ptr(), 1), convert))
            return false;
        value = {cast_op<uintptr_t>(address), cast_op<fastattn::Ints<rank>>(strides)};
        return true;
    }
};

}  // namespace pybind11::detail
