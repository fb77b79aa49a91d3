"""Softmax with scale, mask, bias and dropout: signature, validation, autograd, registration."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn import dispatch, philox
from fastattn.ops import common

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class SoftmaxProblem(NamedTuple):
    """What a backend needs to know of a call to accept or refuse it; no tensors."""

    op: str  # "softmax_fwd" or "softmax_bwd"
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    scale: float
    causal: bool
    dropout_p: float
    log: bool
    mask: bool
    bias: torch.dtype | None
    bias_grad: bool


class SoftmaxTensors(NamedTuple):
    """The tensors of a call, absent ones None. Mask and bias have the rank of x."""

    x: Tensor
    mask: Tensor | None
    bias: Tensor | None
    seed: Tensor | None


def softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    log: bool = False,
) -> Tensor:
    """Softmax of ``scale * x + bias`` over the last dim, where the mask allows it.

    A row with no visible element gives 0 (-inf with `log`) and gradient 0.

    Args:
        x: ``(..., rows, columns)``, float32, float16, bfloat16, or float64 on the reference
            backend. Any strides.
        scale: factor of `x`.
        mask: boolean, True = take part, broadcastable to `x`.
        bias: added after the scale, broadcastable to `x`; its gradient has its own shape.
        causal: element (i, j) of the last two dims takes part if ``j <= i``.
        dropout_p: probability of dropping a weight, 0 <= dropout_p < 1; not with `log`.
        seed: of the dropout, int or int64 tensor of one element; default drawn from torch's
            generator.
        log: return the logarithm of the softmax.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.
        fastattn.BackendError: a forced backend cannot run the call.
    """
    common.check_tensor("x", x)
    if dropout_p:
        common.check_dropout(dropout_p)
        seed = philox.new_seed(x.device) if seed is None else common.seed_tensor(seed, x.device)
    else:
        seed = None
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        bias = bias.to(x.dtype)
    args = (x, mask, bias, seed, float(scale), causal, dropout_p, log)
    if not common.is_plain(x, mask, bias) or x.is_meta:
        return torch.ops.fastattn.softmax_fwd(*args)[0]
    if common.needs_grad(x, bias):
        return _Softmax.apply(*args)
    return _fwd(*args)[0]


def _check(
    op: str,
    t: SoftmaxTensors,
    scale: float,
    causal: bool,
    dropout_p: float,
    log: bool,
    bias_grad: bool = False,
) -> SoftmaxProblem:
    x = t.x
    if x.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"x: expected one of {names}, got {x.dtype}")
    if x.dim() < (2 if causal else 1):
        raise ValueError(f"x: expected (..., rows, columns), got shape {tuple(x.shape)}")
    if log and dropout_p:
        raise ValueError(f"dropout_p: expected 0 with log=True, got {dropout_p}")
    if t.mask is not None and t.mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool (True = take part), got {t.mask.dtype}")
    for name, other in (("mask", t.mask), ("bias", t.bias), ("seed", t.seed)):
        if other is None:
            continue
        if other.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x, got {other.device}")
        if name != "seed":
            common.check_broadcast(name, other, tuple(x.shape))
    return SoftmaxProblem(
        op=op,
        device=x.device.type,
        dtype=x.dtype,
        shape=tuple(x.shape),
        scale=scale,
        causal=causal,
        dropout_p=dropout_p,
        log=log,
        mask=t.mask is not None,
        bias=None if t.bias is None else t.bias.dtype,
        bias_grad=bias_grad,
    )


def _fwd(
    x: Tensor,
    mask: Optional[Tensor],
    bias: Optional[Tensor],
    seed: Optional[Tensor],
    scale: float,
    causal: bool,
    dropout_p: float,
    log: bool,
) -> tuple[Tensor, Optional[Tensor]]:
    """The result and, with dropout, the weights before it (else None)."""
    t = SoftmaxTensors(x, mask, bias, seed)
    problem = _check("softmax_fwd", t, scale, causal, dropout_p, log)
    t = t._replace(mask=common.as_rank(mask, x.dim()), bias=common.as_rank(bias, x.dim()))
    return dispatch.select(problem).softmax_fwd(problem, t)


def _bwd(
    dout: Tensor,
    p: Tensor,
    x: Tensor,
    mask: Optional[Tensor],
    bias: Optional[Tensor],
    seed: Optional[Tensor],
    scale: float,
    causal: bool,
    dropout_p: float,
    log: bool,
    bias_grad: bool,
) -> tuple[Tensor, Optional[Tensor]]:
    t = SoftmaxTensors(x, mask, bias, seed)
    problem = _check("softmax_bwd", t, scale, causal, dropout_p, log, bias_grad)
    t = t._replace(mask=common.as_rank(mask, x.dim()), bias=common.as_rank(bias, x.dim()))
    dx, dbias = dispatch.select(problem).softmax_bwd(problem, t, p, dout)
    return dx, None if dbias is None else dbias.reshape(bias.shape)


def _fwd_library(*args):
    out, p = _fwd(*args)
    return out, args[0].new_empty(0) if p is None else p


def _fwd_meta(x, mask, bias, seed, scale, causal, dropout_p, log):
    _check("softmax_fwd", SoftmaxTensors(x, mask, bias, seed), scale, causal, dropout_p, log)
    shape = tuple(x.shape)
    return x.new_empty(shape), x.new_empty(shape if dropout_p else 0)


def _bwd_library(*args):
    dx, dbias = _bwd(*args)
    return dx, args[0].new_empty(0) if dbias is None else dbias


def _bwd_meta(dout, p, x, mask, bias, *scalars):
    dbias = torch.empty_like(bias) if scalars[-1] else x.new_empty(0)
    return x.new_empty(tuple(x.shape)), dbias


class _Softmax(torch.autograd.Function):
    """The eager call under autograd; `softmax_fwd` of torch.library is its traceable twin."""

    @staticmethod
    def forward(ctx, *args):
        out, p = _fwd(*args)
        ctx.save_for_backward(out if p is None else p, *args[:4])
        ctx.scalars = args[4:]
        ctx.forced_backend = dispatch.forced_backend()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        with dispatch.backward_backend(ctx.forced_backend):
            return _backward(ctx, dout, _bwd)


def _setup_context(ctx, inputs, output):
    out, p = output
    ctx.save_for_backward(p if inputs[6] else out, *inputs[:4])
    ctx.scalars = inputs[4:]


def _backward(ctx, dout, bwd):
    dx, dbias = bwd(dout, *ctx.saved_tensors, *ctx.scalars, ctx.needs_input_grad[2])
    return dx, None, dbias if ctx.needs_input_grad[2] else None, *(None,) * 5


def _library_backward(ctx, dout, _):
    return _backward(ctx, dout, torch.ops.fastattn.softmax_bwd)


_fwd_op = torch.library.custom_op(
    "fastattn::softmax_fwd",
    _fwd_library,
    mutates_args=(),
    schema=common.schema(_fwd, returns=2),
)
_fwd_op.register_fake(_fwd_meta)
_fwd_op.register_autograd(_library_backward, setup_context=_setup_context)
_bwd_op = torch.library.custom_op(
    "fastattn::softmax_bwd", _bwd_library, mutates_args=(), schema=common.schema(_bwd, returns=2)
)
_bwd_op.register_fake(_bwd_meta)
