#include "bindings/bindings.h"
#include "isa.h"

namespace fastattn {
namespace {

RotaryTable read_table(const Strided<3>& table) {
    return {pointer<void>(table.address), table.strides[0], table.strides[1]};
}

RotaryStrides leading_strides(const Ints<4>& strides) {
    return {strides[0], strides[1], strides[2]};
}

int64_t rotary(DType dtype, DType table_dtype, const Ints<6>& shape, const Strided<4>& x,
               const Strided<3>& cos, const Strided<3>& sin, int64_t offset, uintptr_t offsets,
               bool interleaved, bool inverse, const Strided<4>& out) {
    const RotaryArgs args{
        .dtype = dtype,
        .table_dtype = table_dtype,
        .shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]},
        .x = pointer<void>(x.address),
        .x_strides = leading_strides(x.strides),
        .cos = read_table(cos),
        .sin = read_table(sin),
        .offset = offset,
        .offsets = pointer<int64_t>(offsets),
        .interleaved = interleaved,
        .inverse = inverse,
        .out = pointer<void>(out.address),
        .out_strides = leading_strides(out.strides),
    };
    py::gil_scoped_release release;
    return kernels().rotary(args);
}

}  // namespace

void bind_rotary(py::module_& m) {
    m.def("rotary", &rotary,
          "Shape is (batch, heads, seqlen, head_dim, rotary_dim, seqlen_max). Returns the first "
          "sequence whose offset is wrong, or -1.");
}

}  // namespace fastattn
