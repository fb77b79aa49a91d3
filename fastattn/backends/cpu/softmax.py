"""Softmax on the native kernels."""

import torch
from torch import Tensor

from fastattn.backends.cpu import native

MAX_RANK = 9


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    reasons = []
    if len(problem.shape) > MAX_RANK:
        reasons.append(f"rank={len(problem.shape)} > {MAX_RANK}")
    if problem.bias not in (None, problem.dtype, torch.float32):
        reasons.append(f"bias dtype={problem.bias}, only {problem.dtype} and float32")
    return reasons


def _expanded(tensor: Tensor | None, shape) -> Tensor | None:
    """The tensor broadcast to `shape`, its last stride 0 or 1."""
    if tensor is None:
        return None
    if tensor.shape[-1] != 1 and tensor.stride(-1) not in (0, 1):
        tensor = tensor.contiguous()
    return tensor.expand(shape)


def softmax_fwd(problem, t) -> tuple[Tensor, Tensor | None]:
    """The softmax and, with dropout, the weights before it (see `fastattn.softmax`)."""
    shape = problem.shape
    x = native.unit_last_stride(t.x)
    out = x.new_empty(shape)
    weights = x.new_empty(shape) if problem.dropout_p else None
    mask, bias = _expanded(t.mask, shape), _expanded(t.bias, shape)
    native._C.softmax_fwd(
        native.DTYPES[problem.dtype],
        shape,
        x.data_ptr(),
        x.stride(),
        native.pointer(mask),
        () if mask is None else mask.stride(),
        native.DTYPES[problem.bias or problem.dtype],
        native.pointer(bias),
        () if bias is None else bias.stride(),
        problem.scale,
        problem.causal,
        problem.log,
        problem.dropout_p,
        native.pointer(t.seed),
        out.data_ptr(),
        native.pointer(weights),
    )
    return out, weights


def softmax_bwd(problem, t, p, dout) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and bias from the weights before dropout (from the result with log)."""
    shape = problem.shape
    p, dout = p.contiguous(), native.unit_last_stride(dout.to(problem.dtype))
    dx = p.new_empty(shape)
    dbias = t.bias.new_empty(t.bias.shape) if problem.bias_grad else None
    native._C.softmax_bwd(
        native.DTYPES[problem.dtype],
        shape,
        p.data_ptr(),
        dout.data_ptr(),
        dout.stride(),
        problem.scale,
        problem.log,
        problem.dropout_p,
        native.pointer(t.seed),
        dx.data_ptr(),
        native.DTYPES[problem.bias or problem.dtype],
        () if dbias is None else dbias.shape,
        native.pointer(dbias),
    )
    return dx, dbias
