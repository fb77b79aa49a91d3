"""Layer norm and RMS norm on the native kernels."""

import torch
from torch import Tensor

from fastattn.backends.cpu import native


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`: they run every one of a known dtype."""
    return []


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor, copied unless it is rows of one stride, and that stride."""
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    sizes, strides = tensor.shape, tensor.stride()
    leading = range(tensor.dim() - 2)
    if (
        strides[-1] != 1
        or len(sizes) < 2
        or any(strides[dim] != strides[dim + 1] * sizes[dim + 1] for dim in leading)
    ):
        return tensor.contiguous(), sizes[-1]
    return tensor, strides[-2]


def _shape(problem) -> tuple[int, ...]:
    dtypes = native.DTYPES[problem.dtype], native.DTYPES[problem.parameters]
    return *dtypes, problem.rows, problem.columns, problem.centered


def norm_fwd(problem, t) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The norm, the sum where there is a residual, and with `stats` each row's mean and rstd."""
    x, x_stride = _rows(t.x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    s = stats = residual = None
    residual_stride = 0
    if problem.residual:
        residual, residual_stride = _rows(t.residual)
        s = torch.empty_like(y)
    if problem.stats:
        stats = torch.empty((2 if problem.centered else 1, problem.rows), dtype=torch.float32)
    weight, bias = native.contiguous(t.weight), native.contiguous(t.bias)
    native._C.norm_fwd(
        _shape(problem),
        problem.eps,
        x.data_ptr(),
        x_stride,
        native.pointer(residual),
        residual_stride,
        native.pointer(weight),
        native.pointer(bias),
        y.data_ptr(),
        native.pointer(s),
        native.pointer(stats),
    )
    return y, s, stats


def norm_bwd(problem, t, stats, dy, ds) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, to which that of the sum is added, of weight and of bias."""
    x, x_stride = _rows(t.x)
    dy, dy_stride = _rows(dy)
    ds_stride = 0
    if ds is not None:
        ds, ds_stride = _rows(ds)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = dbias = None
    if problem.parameter_grad:
        dweight = None if t.weight is None else torch.empty_like(t.weight)
        dbias = None if t.bias is None else torch.empty_like(t.bias)
    weight = native.contiguous(t.weight)
    native._C.norm_bwd(
        _shape(problem),
        x.data_ptr(),
        x_stride,
        dy.data_ptr(),
        dy_stride,
        native.pointer(ds),
        ds_stride,
        native.pointer(weight),
        stats.data_ptr(),
        dx.data_ptr(),
        native.pointer(dweight),
        native.pointer(dbias),
    )
    return dx, dweight, dbias
