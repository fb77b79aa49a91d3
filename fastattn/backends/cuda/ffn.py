"""Feed-forward networks on the CUDA kernels."""

import torch
from torch import Tensor

from fastattn.backends.cuda import device

_ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}  # of csrc/activation.h


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    reasons = device.multiples_of_8(problem, "d_model", "d_ff", "d_out")
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype={problem.dtype}, only float16 and bfloat16")
    return reasons


def _call(problem, t) -> tuple:
    """What both directions are told first; the tensors are aligned."""
    return (
        device.where(t.x),
        device.DTYPES[problem.dtype],
        _ACTIVATIONS[problem.activation],
        (problem.rows, problem.d_model, problem.d_ff, problem.d_out),
        *(device.address(matrix) for matrix in (t.x, t.w1, t.w_up, t.w2)),
        device.pointer(t.b1),
        device.dropout(problem, t.seed),
    )


def _aligned(t):
    """The tensors as kernels read them; the seed stays."""
    return t._replace(**{name: device.aligned(getattr(t, name)) for name in t._fields[:-1]})


@device.on_device_of_tensors
def ffn_fwd(problem, t) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output, and what `save` keeps of preact and hidden (see `fastattn.ffn`)."""
    rows, d_ff = problem.rows, problem.d_ff
    y = t.x.new_empty((rows, problem.d_out))
    preact = None
    if problem.save != "input":
        preact = t.x.new_empty((rows, d_ff) if t.w_up is None else (2, rows, d_ff))
    hidden = t.x.new_empty((rows, d_ff))
    if rows:
        t = _aligned(t)
        call = device.kernels.FFNFwdCall(
            *_call(problem, t), *map(device.pointer, (t.b2, y, preact, hidden))
        )
        scratch = y.new_empty(device.kernels.ffn_fwd_scratch(call), dtype=torch.uint8)
        device.kernels.ffn_fwd(call, device.pointer(scratch))
    return y, preact, hidden if problem.save == "all" else None


@device.on_device_of_tensors
def ffn_bwd(problem, t, preact, hidden, dy) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w_up, w2 and b2, None where absent or not asked for."""
    inputs = (t.x, t.w1, t.b1, t.w_up, t.w2, t.b2)
    wanted = (problem.x_grad, *(problem.weight_grad,) * 5)
    make = torch.Tensor.new_empty if problem.rows else torch.Tensor.new_zeros
    grads = tuple(
        make(tensor, tensor.shape) if wants and tensor is not None else None
        for tensor, wants in zip(inputs, wanted, strict=True)
    )
    if problem.rows:
        t, dy = _aligned(t), device.aligned(dy.to(problem.dtype))
        preact, hidden = device.contiguous(preact), device.contiguous(hidden)
        call = device.kernels.FFNBwdCall(
            *_call(problem, t),
            device.address(dy),
            *map(device.pointer, (preact, hidden, *grads)),
        )
        scratch = dy.new_empty(device.kernels.ffn_bwd_scratch(call), dtype=torch.uint8)
        device.kernels.ffn_bwd(call, device.pointer(scratch))
    return grads
