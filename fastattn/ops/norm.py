"""Layer norm and RMS norm, alone or after a residual add: signatures, autograd, registration."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn import dispatch
from fastattn.ops import common

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class NormProblem(NamedTuple):
    """What a backend needs to know of a call to accept or refuse it; no tensors."""

    op: str  # "layer_norm_fwd", "layer_norm_bwd", "rms_norm_fwd" or "rms_norm_bwd"
    device: str
    dtype: torch.dtype
    rows: int
    columns: int
    parameters: torch.dtype  # of weight and bias, that of x where there is neither
    weight: bool
    bias: bool
    residual: bool
    eps: float
    centered: bool  # subtract the mean: layer norm
    stats: bool  # forward: also return what the backward needs
    parameter_grad: bool


class NormTensors(NamedTuple):
    """The tensors of a call, absent ones None."""

    x: Tensor  # (..., columns)
    residual: Tensor | None  # as x
    weight: Tensor | None  # (columns,)
    bias: Tensor | None  # (columns,)


class NormScalars(NamedTuple):
    """What a call says beside its tensors."""

    eps: float
    centered: bool


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``(s - mean(s)) / sqrt(var(s) + eps) * weight + bias`` over the last dim (Ba et al. 2016).

    `s` is `x`, or ``x + residual`` rounded to the dtype of `x`.

    Args:
        x: ``(..., columns)``, float32, float16, bfloat16, or float64 on the reference backend.
            Any strides.
        weight: ``(columns,)`` or None, in the dtype of `x` or float32.
        bias: ``(columns,)`` or None, in the dtype of `weight`.
        eps: added to the variance, which is that of the row, not an estimate (divided by columns).
        residual: in the shape and dtype of `x`. Under autocast it may be of another dtype: both
            are then promoted, as an addition would.

    Returns:
        Tensor of the shape and dtype of `x`; with `residual`, ``(norm, s)``, of which `s` is the
        next residual. Both are differentiable.

    Sums are float32 in every dtype. So autocast changes nothing else here, as with
    `torch.nn.functional.layer_norm` on a CPU: `x` keeps its dtype.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.
        fastattn.BackendError: a forced backend cannot run the call.
    """
    return _call(x, residual, weight, bias, NormScalars(eps, True))


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``s / sqrt(mean(s * s) + eps) * weight`` over the last dim (Zhang and Sennrich 2019).

    `s` is `x`, or ``x + residual`` rounded to the dtype of `x`. The result is rounded once.

    Args:
        x: ``(..., columns)``, float32, float16, bfloat16, or float64 on the reference backend.
            Any strides.
        weight: ``(columns,)`` or None, in the dtype of `x` or float32.
        eps: added to the mean square.
        residual: as in `layer_norm`.

    Returns:
        As `layer_norm`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.
        fastattn.BackendError: a forced backend cannot run the call.
    """
    return _call(x, residual, weight, None, NormScalars(eps, False))


def _call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scalars: NormScalars,
) -> Tensor | tuple[Tensor, Tensor]:
    if not isinstance(x, Tensor):
        common.check_tensor("x", x)
    unlike = residual is not None and residual.dtype != x.dtype
    if unlike and common.autocast_enabled(x.device.type):
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)
    t = NormTensors(x, residual, weight, bias)
    if not common.is_plain(x, residual, weight, bias) or x.is_meta:
        y, s, _ = torch.ops.fastattn.norm_fwd(*t, *scalars)
        return y if residual is None else (y, s)
    if common.needs_grad(x, residual, weight, bias):
        return _Norm.apply(x, residual, weight, bias, scalars)
    y, s, _ = _fwd(t, scalars, False)
    return y if s is None else (y, s)


def _check(
    op: str, t: NormTensors, scalars: NormScalars, stats: bool, parameter_grad: bool
) -> NormProblem:
    x = t.x
    if x.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"x: expected one of {names}, got {x.dtype}")
    if not x.dim():
        raise ValueError("x: expected (..., columns), got a tensor without dims")
    parameters = [p for p in (t.weight, t.bias) if p is not None]
    for name, other in zip(t._fields[1:], t[1:], strict=True):
        if other is None:
            continue
        if other.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x, got {other.device}")
        shape = x.shape if name == "residual" else x.shape[-1:]
        if other.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(other.shape)}")
        if other.dtype == x.dtype:
            continue
        if name == "residual":
            raise TypeError(f"residual: expected {x.dtype} as x, got {other.dtype}")
        if other.dtype != torch.float32:
            raise TypeError(f"{name}: expected {x.dtype} as x or float32, got {other.dtype}")
    if len(parameters) == 2 and parameters[0].dtype != parameters[1].dtype:
        raise TypeError(f"bias: expected {t.weight.dtype} as weight, got {t.bias.dtype}")
    if not isinstance(scalars.eps, (float, int)):
        raise TypeError(f"eps: expected a float, got {type(scalars.eps).__name__}")
    return NormProblem(
        op=op,
        device=x.device.type,
        dtype=x.dtype,
        rows=math.prod(x.shape[:-1]),
        columns=x.shape[-1],
        parameters=parameters[0].dtype if parameters else x.dtype,
        weight=t.weight is not None,
        bias=t.bias is not None,
        residual=t.residual is not None,
        eps=scalars.eps,
        centered=scalars.centered,
        stats=stats,
        parameter_grad=parameter_grad,
    )


_problem = common.remembered(_check)


def _fwd(
    t: NormTensors, scalars: NormScalars, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The norm, the sum where there is a residual, and with `stats` each row's mean and rstd.

    These are (2, rows) in float32 (float64 for itself); RMS norm has (1, rows), its rstd.
    """
    op = "layer_norm_fwd" if scalars.centered else "rms_norm_fwd"
    problem = _problem(op, t, scalars, stats, False)
    return dispatch.select(problem).norm_fwd(problem, t)


def _bwd(
    dy: Tensor,
    ds: Tensor | None,
    stats: Tensor,
    t: NormTensors,
    scalars: NormScalars,
    parameter_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the sum (`t.x` here), and if asked for of weight and bias."""
    op = "layer_norm_bwd" if scalars.centered else "rms_norm_bwd"
    problem = _problem(op, t, scalars, False, parameter_grad)
    return dispatch.select(problem).norm_bwd(problem, t, stats, dy, ds)


class _Norm(torch.autograd.Function):
    """The eager call under autograd; `norm_fwd` of torch.library is its traceable twin."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, scalars):
        y, s, stats = _fwd(NormTensors(x, residual, weight, bias), scalars, True)
        _save(ctx, x if s is None else s, weight, bias, stats, scalars)
        ctx.forced_backend = dispatch.forced_backend()
        return y if s is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds=None):
        with dispatch.backward_backend(ctx.forced_backend):
            return *_backward(ctx, dy, ds, _bwd), None


def _save(ctx, s, weight, bias, stats, scalars):
    ctx.save_for_backward(s, weight, bias, stats)
    ctx.scalars = scalars
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, ds, bwd):
    if dy is None:
        return ds, ds, None, None
    needs = ctx.needs_input_grad
    s, weight, bias, stats = ctx.saved_tensors
    t = NormTensors(s, None, weight, bias)
    dx, dweight, dbias = bwd(dy, ds, stats, t, ctx.scalars, needs[2] or needs[3])
    return (
        dx if needs[0] else None,
        dx if needs[1] else None,
        dweight if needs[2] else None,
        dbias if needs[3] else None,
    )


_TENSORS = len(NormTensors._fields)


def _split(args) -> tuple[NormTensors, NormScalars]:
    return NormTensors(*args[:_TENSORS]), NormScalars(*args[_TENSORS:])


def _fwd_library(*args):
    return tuple(args[0].new_empty(0) if one is None else one for one in _fwd(*_split(args), True))


def _fwd_meta(*args):
    t, scalars = _split(args)
    x, rows = t.x, _check("layer_norm_fwd", t, scalars, True, False).rows
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if t.residual is None else x.shape),
        x.new_empty((2 if scalars.centered else 1, rows), dtype=wide),
    )


def _bwd_library(dy, ds, stats, *args):
    grads = _bwd(dy, ds, stats, *_split(args[:-1]), args[-1])
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _bwd_meta(dy, ds, stats, *args):
    t, _ = _split(args[:-1])
    return (
        t.x.new_empty(t.x.shape),
        *(
            t.x.new_empty(0) if p is None or not args[-1] else p.new_empty(p.shape)
            for p in (t.weight, t.bias)
        ),
    )


def _library_setup(ctx, inputs, output):
    t, scalars = _split(inputs)
    _, s, stats = output
    _save(ctx, t.x if t.residual is None else s, t.weight, t.bias, stats, scalars)


def _library_backward(ctx, dy, ds, *_):
    def bwd(dy, ds, stats, t, scalars, parameter_grad):
        return torch.ops.fastattn.norm_bwd(dy, ds, stats, *t, *scalars, parameter_grad)

    return *_backward(ctx, dy, ds, bwd), None, None


_CALL = common.schema_of(NormTensors, NormScalars)
_fwd_op = torch.library.custom_op(
    "fastattn::norm_fwd",
    _fwd_library,
    mutates_args=(),
    schema=f"({_CALL}) -> (Tensor, Tensor, Tensor)",
)
_fwd_op.register_fake(_fwd_meta)
_fwd_op.register_autograd(_library_backward, setup_context=_library_setup)
_bwd_op = torch.library.custom_op(
    "fastattn::norm_bwd",
    _bwd_library,
    mutates_args=(),
    schema="(Tensor dy, Tensor? ds, Tensor stats, "
    f"{_CALL}, bool parameter_grad) -> (Tensor, Tensor, Tensor)",
)
_bwd_op.register_fake(_bwd_meta)
