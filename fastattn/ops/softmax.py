"""Softmax with scale, mask, bias and dropout: signature, validation, autograd, registration."""

from typing import NamedTuple

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


class SoftmaxScalars(NamedTuple):
    """What a call says beside its tensors."""

    scale: float
    causal: bool
    dropout_p: float
    log: bool


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
    t = SoftmaxTensors(x, mask, bias, seed)
    scalars = SoftmaxScalars(float(scale), causal, dropout_p, log)
    if not common.is_plain(x, mask, bias) or x.is_meta:
        return torch.ops.fastattn.softmax_fwd(*t, *scalars)[0]
    if common.needs_grad(x, bias):
        return _Softmax.apply(x, bias, (t, scalars))
    return _fwd(t, scalars)[0]


def _check(
    op: str, t: SoftmaxTensors, scalars: SoftmaxScalars, bias_grad: bool = False
) -> SoftmaxProblem:
    x = t.x
    if x.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"x: expected one of {names}, got {x.dtype}")
    if x.dim() < (2 if scalars.causal else 1):
        raise ValueError(f"x: expected (..., rows, columns), got shape {tuple(x.shape)}")
    if scalars.log and scalars.dropout_p:
        raise ValueError(f"dropout_p: expected 0 with log=True, got {scalars.dropout_p}")
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
        scale=scalars.scale,
        causal=scalars.causal,
        dropout_p=scalars.dropout_p,
        log=scalars.log,
        mask=t.mask is not None,
        bias=None if t.bias is None else t.bias.dtype,
        bias_grad=bias_grad,
    )


_problem = common.remembered(_check)


def _with_rank_of_x(t: SoftmaxTensors) -> SoftmaxTensors:
    if t.mask is None and t.bias is None:
        return t
    rank = t.x.dim()
    return t._replace(mask=common.as_rank(t.mask, rank), bias=common.as_rank(t.bias, rank))


def _fwd(t: SoftmaxTensors, scalars: SoftmaxScalars) -> tuple[Tensor, Tensor | None]:
    """The result and, with dropout, the weights before it (else None)."""
    problem = _problem("softmax_fwd", t, scalars)
    return dispatch.select(problem).softmax_fwd(problem, _with_rank_of_x(t))


def _bwd(
    dout: Tensor, p: Tensor, t: SoftmaxTensors, scalars: SoftmaxScalars, bias_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and, if asked for, of the bias."""
    problem = _problem("softmax_bwd", t, scalars, bias_grad)
    dx, dbias = dispatch.select(problem).softmax_bwd(problem, _with_rank_of_x(t), p, dout)
    return dx, None if dbias is None else dbias.reshape(t.bias.shape)


class _Softmax(torch.autograd.Function):
    """The eager call under autograd; `softmax_fwd` of torch.library is its traceable twin."""

    @staticmethod
    def forward(ctx, x, bias, call):
        t, scalars = call
        out, p = _fwd(t, scalars)
        ctx.save_for_backward(out if p is None else p, *t)
        ctx.scalars = scalars
        ctx.forced_backend = dispatch.forced_backend()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        p, *tensors = ctx.saved_tensors
        with dispatch.backward_backend(ctx.forced_backend):
            t = SoftmaxTensors(*tensors)
            return *_bwd(dout, p, t, ctx.scalars, ctx.needs_input_grad[1]), None


_TENSORS = len(SoftmaxTensors._fields)


def _split(args) -> tuple[SoftmaxTensors, SoftmaxScalars]:
    return SoftmaxTensors(*args[:_TENSORS]), SoftmaxScalars(*args[_TENSORS:])


def _fwd_library(*args):
    out, p = _fwd(*_split(args))
    return out, out.new_empty(0) if p is None else p


def _fwd_meta(*args):
    t, scalars = _split(args)
    _check("softmax_fwd", t, scalars)
    shape = tuple(t.x.shape)
    return t.x.new_empty(shape), t.x.new_empty(shape if scalars.dropout_p else 0)


def _bwd_library(dout, p, *args):
    dx, dbias = _bwd(dout, p, *_split(args[:-1]), args[-1])
    return dx, dx.new_empty(0) if dbias is None else dbias


def _bwd_meta(dout, p, *args):
    t, _ = _split(args[:-1])
    dbias = torch.empty_like(t.bias) if args[-1] else t.x.new_empty(0)
    return t.x.new_empty(tuple(t.x.shape)), dbias


def _library_setup(ctx, inputs, output):
    t, ctx.scalars = _split(inputs)
    out, p = output
    ctx.save_for_backward(p if ctx.scalars.dropout_p else out, *t)


def _library_backward(ctx, dout, _):
    needs = ctx.needs_input_grad[2]
    p, *t = ctx.saved_tensors
    dx, dbias = torch.ops.fastattn.softmax_bwd(dout, p, *t, *ctx.scalars, needs)
    return dx, None, dbias if needs else None, *(None,) * 5


_CALL = common.schema_of(SoftmaxTensors, SoftmaxScalars)
_fwd_op = torch.library.custom_op(
    "fastattn::softmax_fwd", _fwd_library, mutates_args=(), schema=f"({_CALL}) -> (Tensor, Tensor)"
)
_fwd_op.register_fake(_fwd_meta)
_fwd_op.register_autograd(_library_backward, setup_context=_library_setup)
_bwd_op = torch.library.custom_op(
    "fastattn::softmax_bwd",
    _bwd_library,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor p, {_CALL}, bool bias_grad) -> (Tensor, Tensor)",
)
_bwd_op.register_fake(_bwd_meta)
