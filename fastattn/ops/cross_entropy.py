"""Cross entropy with class indices: signature, validation, autograd, registration."""

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


class CrossEntropyProblem(NamedTuple):
    """What a backend needs to know of a call to accept or refuse it; no tensors."""

    op: str  # "cross_entropy_fwd" or "cross_entropy_bwd"
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    ignore_index: int
    label_smoothing: float
    reduction: str


class CrossEntropyTensors(NamedTuple):
    """The tensors of a call."""

    logits: Tensor  # (..., vocabulary)
    targets: Tensor  # (...)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of the softmax of `logits` over the last dim and class indices.

    As ``torch.nn.functional.cross_entropy``, but the classes come last, and two results differ:
    where every target is ignored the mean is 0, not NaN, and the gradient 0; a row of -inf only
    has loss inf and gradient 0.

    Args:
        logits: ``(..., vocabulary)``, float32, float16, bfloat16, or float64 on the reference
            backend. Any strides.
        targets: ``(...)``, int64, each a class or `ignore_index`.
        ignore_index: rows of this target have loss 0 and gradient 0, and the mean leaves them out.
        label_smoothing: weight of the uniform distribution in the target's, 0 to 1.
        reduction: "none" (a loss for each row), "mean" or "sum".

    Returns:
        The loss, ``(...)`` or one element: float32 also for half-precision logits, whose digits
        would not hold a mean; float64 for float64.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or a target is
            no class (on a GPU, which is not waited for, its loss is NaN instead).
        fastattn.BackendError: a forced backend cannot run the call.
    """
    common.check_tensor("logits", logits)
    common.check_tensor("targets", targets)
    t = CrossEntropyTensors(logits, targets)
    scalars = CrossEntropyScalars(ignore_index, float(label_smoothing), reduction)
    if not common.is_plain(logits, targets) or logits.is_meta:
        return torch.ops.fastattn.cross_entropy_fwd(*t, *scalars)[0]
    if common.needs_grad(logits):
        return _CrossEntropy.apply(logits, (t, scalars))
    return _fwd(t, scalars)[0]


def _check(op: str, t: CrossEntropyTensors, scalars: CrossEntropyScalars) -> CrossEntropyProblem:
    logits = t.logits
    if logits.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"logits: expected one of {names}, got {logits.dtype}")
    if logits.dim() < 1:
        raise ValueError("logits: expected (..., vocabulary), got shape ()")
    check_targets(t.targets, tuple(logits.shape[:-1]), "logits", logits.device)
    check_scalars(scalars)
    return CrossEntropyProblem(
        op=op,
        device=logits.device.type,
        dtype=logits.dtype,
        shape=tuple(logits.shape),
        ignore_index=scalars.ignore_index,
        label_smoothing=scalars.label_smoothing,
        reduction=scalars.reduction,
    )


_problem = common.remembered(_check)


def _fwd(t: CrossEntropyTensors, scalars: CrossEntropyScalars) -> tuple[Tensor, Tensor]:
    """The loss, and each row's maximum and sum of exp(logit - maximum), (rows, 2)."""
    problem = _problem("cross_entropy_fwd", t, scalars)
    loss, stats, invalid = dispatch.select(problem).cross_entropy_fwd(problem, t)
    if invalid >= 0:
        raise_invalid(t.targets, invalid, problem.shape[-1], scalars.ignore_index)
    return loss, stats


def _bwd(
    dloss: Tensor, stats: Tensor, t: CrossEntropyTensors, scalars: CrossEntropyScalars
) -> Tensor:
    """The gradient of the logits."""
    problem = _problem("cross_entropy_bwd", t, scalars)
    return dispatch.select(problem).cross_entropy_bwd(problem, t, stats, dloss)


class _CrossEntropy(torch.autograd.Function):
    """The eager call under autograd; `cross_entropy_fwd` of torch.library is its traceable twin."""

    @staticmethod
    def forward(ctx, logits, call):
        t, scalars = call
        loss, stats = _fwd(t, scalars)
        ctx.save_for_backward(stats, *t)
        ctx.scalars = scalars
        ctx.forced_backend = dispatch.forced_backend()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        stats, *t = ctx.saved_tensors
        with dispatch.backward_backend(ctx.forced_backend):
            return _bwd(dloss, stats, CrossEntropyTensors(*t), ctx.scalars), None


def _split(args) -> tuple[CrossEntropyTensors, CrossEntropyScalars]:
    return CrossEntropyTensors(*args[:2]), CrossEntropyScalars(*args[2:])


def _fwd_library(*args):
    return _fwd(*_split(args))


def _fwd_meta(*args):
    t, scalars = _split(args)
    problem = _check("cross_entropy_fwd", t, scalars)
    dtype = loss_dtype(problem.dtype)
    shape = problem.shape[:-1] if scalars.reduction == "none" else ()
    rows = t.targets.numel()
    return t.logits.new_empty(shape, dtype=dtype), t.logits.new_empty((rows, 2), dtype=dtype)


def _bwd_library(dloss, stats, *args):
    return _bwd(dloss, stats, *_split(args))


def _bwd_meta(dloss, stats, *args):
    return args[0].new_empty(tuple(args[0].shape))


def _library_setup(ctx, inputs, output):
    t, ctx.scalars = _split(inputs)
    ctx.save_for_backward(output[1], *t)


def _library_backward(ctx, dloss, _):
    stats, *t = ctx.saved_tensors
    dlogits = torch.ops.fastattn.cross_entropy_bwd(dloss, stats, *t, *ctx.scalars)
    return dlogits, *(None,) * 4


_CALL = common.schema_of(CrossEntropyTensors, CrossEntropyScalars)
_fwd_op = torch.library.custom_op(
    "fastattn::cross_entropy_fwd",
    _fwd_library,
    mutates_args=(),
    schema=f"({_CALL}) -> (Tensor, Tensor)",
)
_fwd_op.register_fake(_fwd_meta)
_fwd_op.register_autograd(_library_backward, setup_context=_library_setup)
_bwd_op = torch.library.custom_op(
    "fastattn::cross_entropy_bwd",
    _bwd_library,
    mutates_args=(),
    schema=f"(Tensor dloss, Tensor stats, {_CALL}) -> Tensor",
)
_bwd_op.register_fake(_bwd_meta)
