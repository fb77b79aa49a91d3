"""Softmax on the CUDA kernels."""

import math

import torch
from torch import Tensor

from fastattn.backends.cuda import device

MAX_COLUMNS = 2**30


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    reasons = []
    if problem.dtype not in device.DTYPES:
        reasons.append(f"dtype={problem.dtype}, only float32, float16 and bfloat16")
    if problem.shape[-1] > MAX_COLUMNS:
        reasons.append(f"columns={problem.shape[-1]} > {MAX_COLUMNS}")
    return reasons


def _four_dims(tensor: Tensor | None, shape) -> Tensor | None:
    """The tensor broadcast to `shape`, as (., ., ., columns)."""
    if tensor is None:
        return None
    tensor = tensor.expand(shape)
    if tensor.dim() > 4:
        tensor = tensor.reshape(-1, *tensor.shape[-3:])
    return tensor[(None,) * (4 - tensor.dim())]


def _call(problem, on: Tensor, seed: Tensor | None) -> tuple:
    """What both directions are told first."""
    leading = (1, 1, *problem.shape[:-1])
    return (
        device.where(on),
        device.DTYPES[problem.dtype],
        (math.prod(leading[:-2]), *leading[-2:], problem.shape[-1]),
        problem.scale,
        problem.log,
        device.dropout(problem, seed),
    )


@device.on_device_of_tensors
def softmax_fwd(problem, t) -> tuple[Tensor, Tensor | None]:
    """The softmax and, with dropout, the weights before it (see `fastattn.softmax`)."""
    out = t.x.new_empty(problem.shape)
    weights = t.x.new_empty(problem.shape) if problem.dropout_p else None
    if out.numel():
        x, mask, bias = (_four_dims(tensor, problem.shape) for tensor in t[:3])
        device.kernels.softmax_fwd(
            *_call(problem, out, t.seed),
            device.address(x),
            device.address(mask),
            device.address(bias),
            device.DTYPES[problem.bias or problem.dtype],
            problem.shape[-2] if problem.causal else 0,
            device.pointer(out),
            device.pointer(weights),
        )
    return out, weights


@device.on_device_of_tensors
def softmax_bwd(problem, t, p, dout) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and bias from the weights before dropout (from the result with log)."""
    dx = p.new_empty(problem.shape)
    dscores = dbias = None
    if problem.bias_grad:
        whole = tuple(t.bias.shape) == problem.shape
        dscores = p.new_empty(problem.shape, dtype=t.bias.dtype if whole else torch.float32)
    if dx.numel():
        p, dout = p.contiguous(), _four_dims(dout.to(problem.dtype), problem.shape)
        device.kernels.softmax_bwd(
            *_call(problem, p, t.seed),
            device.pointer(p),
            device.address(dout),
            device.pointer(dx),
            device.pointer(dscores),
            device.DTYPES[problem.dtype if dscores is None else dscores.dtype],
        )
    if problem.bias_grad:
        dbias = dscores.sum_to_size(*t.bias.shape).to(t.bias.dtype)
    return dx, dbias
