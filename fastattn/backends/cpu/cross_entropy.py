"""Cross entropy on the native kernels."""

import torch
from torch import Tensor

from fastattn.backends.cpu import native

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`: there is no reason of their own."""
    return []


def logits_arguments(dtype, logits: Tensor) -> tuple:
    """The dtype, shape (outer, inner, columns), and address with strides of unit-strided rows."""
    if logits.dim() > 3:
        logits = logits.flatten(0, -3)
    shape, strides = logits.shape, logits.stride()
    missing = 3 - len(shape)
    return (
        native.DTYPES[dtype],
        (1,) * missing + shape,
        (logits.data_ptr(), (0,) * missing + strides[:-1]),
    )


def targets_arguments(problem, targets: Tensor) -> tuple:
    """What the kernels take of contiguous targets."""
    return (
        targets.data_ptr(),
        problem.ignore_index,
        problem.label_smoothing,
        REDUCTIONS[problem.reduction],
    )


def cross_entropy_fwd(problem, t) -> tuple[Tensor, Tensor, int]:
    """The loss, the rows' maxima and sums, the first invalid row or -1."""
    logits, targets = native.unit_last_stride(t.logits), t.targets.contiguous()
    shape = problem.shape[:-1] if problem.reduction == "none" else ()
    loss = torch.empty(shape, dtype=torch.float32)
    stats = torch.empty((targets.numel(), 2), dtype=torch.float32)
    invalid = native._C.cross_entropy_fwd(
        *logits_arguments(problem.dtype, logits),
        *targets_arguments(problem, targets),
        loss.data_ptr(),
        stats.data_ptr(),
    )
    return loss, stats, invalid


def cross_entropy_bwd(problem, t, stats, dloss) -> Tensor:
    """The gradient of the logits."""
    logits, targets = native.unit_last_stride(t.logits), t.targets.contiguous()
    dloss, stats = dloss.float().contiguous(), stats.contiguous()
    dlogits = logits.new_empty(problem.shape)
    native._C.cross_entropy_bwd(
        *logits_arguments(problem.dtype, logits),
        *targets_arguments(problem, targets),
        dloss.data_ptr(),
        stats.data_ptr(),
        dlogits.data_ptr(),
    )
    return dlogits
