"""The last linear layer and cross entropy: signature, validation, autograd, registration."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn import dispatch
from fastattn.ops import common
from fastattn.ops.loss import (
    CrossEntropyScalars,
    check_scalars,
    check_targets,
    loss_dtype,
    raise_invalid,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class LinearCrossEntropyProblem(NamedTuple):
    """What a backend needs to know of a call to accept or refuse it; no tensors."""

    op: str  # "linear_cross_entropy_fwd" or "linear_cross_entropy_bwd"
    device: str
    dtype: torch.dtype
    rows: int
    d_model: int
    vocabulary: int
    bias: bool
    ignore_index: int
    label_smoothing: float
    reduction: str
    x_grad: bool
    weight_grad: bool
    bias_grad: bool


class LinearCrossEntropyTensors(NamedTuple):
    """The tensors of a call."""

    x: Tensor  # (rows, d_model)
    weight: Tensor  # (vocabulary, d_model)
    bias: Tensor | None  # (vocabulary,)
    targets: Tensor  # (rows,)


class LinearCrossEntropyGrads(NamedTuple):
    """Which gradients are wanted."""

    x_grad: bool
    weight_grad: bool
    bias_grad: bool


_NO_GRADS = LinearCrossEntropyGrads(False, False, False)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """``cross_entropy(x W^T + b, targets)``, whose logits are never whole in memory.

    Where a gradient is needed of a "mean" or "sum", the forward computes it with the loss, a chunk
    of rows at a time, and the backward scales it (after Liger, Hsu et al. 2024). With "none" the
    backward computes the logits again. Of large logits some hundred rows, or an eighth, are
    in memory at a time.

    Args:
        x: ``(..., d_model)``, float32, float16, bfloat16, or float64 on the reference backend.
        weight: ``(vocabulary, d_model)``, as ``torch.nn.Linear`` keeps it.
        targets: ``(...)``, int64, each a class or `ignore_index`.
        bias: ``(vocabulary,)`` or None.
        ignore_index, label_smoothing, reduction: as in `cross_entropy`. Rows that are ignored cost
            nothing on a CPU.

    Returns:
        The loss, ``(...)`` or one element, as of `cross_entropy`: float32, float64 for float64.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or a target is
            no class (on a GPU, which is not waited for, its loss is NaN instead).
        fastattn.BackendError: a forced backend cannot run the call.
    """
    for name, value in (("x", x), ("weight", weight), ("targets", targets)):
        common.check_tensor(name, value)
    if x.dim() < 1:
        raise ValueError("x: expected (..., d_model), got shape ()")
    leading = x.shape[:-1]
    check_targets(targets, tuple(leading), "x", x.device)
    device_type = x.device.type
    if common.autocast_enabled(device_type):
        x, weight, bias = common.autocast(device_type, x, weight, bias)  # type: ignore[assignment]
    if len(leading) != 1:
        x = x.reshape(targets.numel(), x.shape[-1])
        targets = targets.reshape(-1)
    t = LinearCrossEntropyTensors(x, weight, bias, targets)
    scalars = CrossEntropyScalars(ignore_index, float(label_smoothing), reduction)
    if not common.is_plain(*t) or x.is_meta:
        grads = _wanted_in_forward(scalars, (_needs_grad(one) for one in t[:3]))
        loss = torch.ops.fastattn.linear_cross_entropy_fwd(*t, *scalars, *grads)[0]
    elif common.needs_grad(*t):
        loss = _LinearCrossEntropy.apply(x, weight, bias, (t, scalars))
    else:
        loss = _fwd(t, scalars, _NO_GRADS)[0]
    return loss.view(leading) if reduction == "none" and len(leading) != 1 else loss


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and common.needs_grad(tensor)


def _wanted_in_forward(scalars, needed) -> LinearCrossEntropyGrads:
    """A row's gradient is known with its loss, unless each row has a dloss of its own."""
    return _NO_GRADS if scalars.reduction == "none" else LinearCrossEntropyGrads(*needed)


def _check(
    op: str,
    t: LinearCrossEntropyTensors,
    scalars: CrossEntropyScalars,
    grads: LinearCrossEntropyGrads,
) -> LinearCrossEntropyProblem:
    x = t.x
    if x.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"x: expected one of {names}, got {x.dtype}")
    rows, d_model = x.shape
    vocabulary = t.weight.shape[0] if t.weight.dim() else 0
    for name, tensor, shape in (
        ("weight", t.weight, (vocabulary, d_model)),
        ("bias", t.bias, (vocabulary,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} as x, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x, got {tensor.device}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    check_targets(t.targets, (rows,), "x", x.device)
    check_scalars(scalars)
    return LinearCrossEntropyProblem(
        op=op,
        device=x.device.type,
        dtype=x.dtype,
        rows=rows,
        d_model=d_model,
        vocabulary=vocabulary,
        bias=t.bias is not None,
        ignore_index=scalars.ignore_index,
        label_smoothing=scalars.label_smoothing,
        reduction=scalars.reduction,
        x_grad=grads.x_grad,
        weight_grad=grads.weight_grad,
        bias_grad=grads.bias_grad and t.bias is not None,
    )


_problem = common.remembered(_check)


def _fwd(t, scalars, grads) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """The loss, the statistics as of `cross_entropy`, and the gradients of x, weight and bias.

    Those are for dloss 1 and of the loss's dtype, so that a loss scale still meets all digits;
    None where not asked for.
    """
    problem = _problem("linear_cross_entropy_fwd", t, scalars, grads)
    backend = dispatch.select(problem)
    loss, stats, gradients, invalid = backend.linear_cross_entropy_fwd(problem, t)
    if invalid >= 0:
        raise_invalid(t.targets, invalid, problem.vocabulary, scalars.ignore_index)
    return loss, stats, gradients


def _bwd(dloss, stats, t, scalars, grads) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias in their dtype, None where not asked for."""
    problem = _problem("linear_cross_entropy_bwd", t, scalars, grads)
    return dispatch.select(problem).linear_cross_entropy_bwd(problem, t, stats, dloss)


class _LinearCrossEntropy(torch.autograd.Function):
    """The eager call under autograd; `linear_cross_entropy_fwd` of torch.library is its twin."""

    @staticmethod
    def forward(ctx, x, weight, bias, call):
        t, scalars = call
        grads = _wanted_in_forward(scalars, ctx.needs_input_grad[:3])
        loss, stats, gradients = _fwd(t, scalars, grads)
        ctx.save_for_backward(stats, *t)
        ctx.gradients = gradients if any(grads) else None
        ctx.scalars = scalars
        ctx.forced_backend = dispatch.forced_backend()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        stats, *t = ctx.saved_tensors
        # They are scaled in place: a second backward computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            dtype = t[0].dtype
            return *(None if one is None else one.mul_(dloss).to(dtype) for one in gradients), None
        grads = LinearCrossEntropyGrads(*ctx.needs_input_grad[:3])
        with dispatch.backward_backend(ctx.forced_backend):
            return *_bwd(dloss, stats, LinearCrossEntropyTensors(*t), ctx.scalars, grads), None


def _split(args) -> tuple:
    return (
        LinearCrossEntropyTensors(*args[:4]),
        CrossEntropyScalars(*args[4:7]),
        LinearCrossEntropyGrads(*args[7:]),
    )


def _filled(gradients, like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one for None."""
    return tuple(like.new_empty(0) if one is None else one for one in gradients)


def _fwd_library(*args):
    loss, stats, gradients = _fwd(*_split(args))
    return loss, stats, *_filled(gradients, loss)


def _meta_gradients(problem, t, dtype) -> tuple[Tensor, ...]:
    wanted = (problem.x_grad, problem.weight_grad, problem.bias_grad)
    return tuple(
        t.x.new_empty(tuple(one.shape) if want else (0,), dtype=dtype)
        for one, want in zip(t[:3], wanted, strict=True)
    )


def _fwd_meta(*args):
    t, scalars, grads = _split(args)
    problem = _check("linear_cross_entropy_fwd", t, scalars, grads)
    dtype = loss_dtype(problem.dtype)
    loss = t.x.new_empty((problem.rows,) if scalars.reduction == "none" else (), dtype=dtype)
    stats = t.x.new_empty((problem.rows, 2), dtype=dtype)
    return loss, stats, *_meta_gradients(problem, t, dtype)


def _bwd_library(dloss, stats, *args):
    t, scalars, grads = _split(args)
    return _filled(_bwd(dloss, stats, t, scalars, grads), t.x)


def _bwd_meta(dloss, stats, *args):
    t, scalars, grads = _split(args)
    problem = _check("linear_cross_entropy_bwd", t, scalars, grads)
    return _meta_gradients(problem, t, problem.dtype)


def _library_setup(ctx, inputs, output):
    t, ctx.scalars, ctx.grads = _split(inputs)
    ctx.save_for_backward(*output[1:], *t)


def _library_backward(ctx, dloss, *_):
    stats, *gradients = ctx.saved_tensors[:4]
    t = ctx.saved_tensors[4:]
    needs = ctx.needs_input_grad[:3]
    if all(have or not need for have, need in zip(ctx.grads, needs, strict=True)):
        gradients = [(one * dloss).to(t[0].dtype) for one in gradients]
    else:
        bwd = torch.ops.fastattn.linear_cross_entropy_bwd
        gradients = bwd(dloss, stats, *t, *ctx.scalars, *needs)
    wanted = (one if need else None for one, need in zip(gradients, needs, strict=True))
    return *wanted, *(None,) * 7


_CALL = common.schema_of(LinearCrossEntropyTensors, CrossEntropyScalars, LinearCrossEntropyGrads)
_fwd_op = torch.library.custom_op(
    "fastattn::linear_cross_entropy_fwd",
    _fwd_library,
    mutates_args=(),
    schema=f"({_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_fwd_op.register_fake(_fwd_meta)
_fwd_op.register_autograd(_library_backward, setup_context=_library_setup)
_bwd_op = torch.library.custom_op(
    "fastattn::linear_cross_entropy_bwd",
    _bwd_library,
    mutates_args=(),
    schema=f"(Tensor dloss, Tensor stats, {_CALL}) -> (Tensor, Tensor, Tensor)",
)
_bwd_op.register_fake(_bwd_meta)
