// One bind_<op> per op, defined in bindings/<op>.cpp and called by bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fastattn {

namespace py = pybind11;

void bind_attention(py::module_& m);
void bind_softmax(py::module_& m);
void bind_ffn(py::module_& m);

}  // namespace fastattn
