"""Cross entropy on the Triton kernels.

Nothing is read back from a GPU: there a row whose target is no class is not refused, its loss and
gradient are NaN.
"""

import torch
from torch import Tensor

from fastattn.backends.triton.device import Kernels
from fastattn.backends.triton.layout import four_dims

_kernels = Kernels("cross_entropy")


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`: they run every one of a known dtype."""
    return []


def cross_entropy_fwd(problem, t) -> tuple[Tensor, Tensor, int]:
    """The loss, the rows' maxima and sums, the first invalid row or -1."""
    targets = t.targets.reshape(-1).contiguous()
    losses = t.logits.new_empty(problem.shape[:-1], dtype=torch.float32)
    stats = t.logits.new_empty((len(targets), 2), dtype=torch.float32)
    _kernels.cross_entropy_fwd(
        *four_dims(t.logits), targets, losses, stats,
        ignore_index=problem.ignore_index, label_smoothing=problem.label_smoothing,
    )  # fmt: skip
    invalid = first_invalid(targets, problem.shape[-1], problem.ignore_index)
    return reduced(problem, losses, targets), stats, invalid


def cross_entropy_bwd(problem, t, stats, dloss) -> Tensor:
    """The gradient of the logits."""
    targets = t.targets.reshape(-1).contiguous()
    dlogits = t.logits.new_empty(problem.shape)
    _kernels.cross_entropy_bwd(
        *four_dims(t.logits), targets, stats.contiguous(), row_factors(problem, targets, dloss),
        dlogits, ignore_index=problem.ignore_index, label_smoothing=problem.label_smoothing,
    )  # fmt: skip
    return dlogits


def first_invalid(targets: Tensor, vocabulary: int, ignore_index: int) -> int:
    """The first row whose target is neither a class nor ignored; -1 if none is, or on a GPU."""
    if targets.device.type != "cpu":
        return -1
    invalid = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    return int(invalid.nonzero()[0]) if invalid.any() else -1


def reduced(problem, losses: Tensor, targets: Tensor) -> Tensor:
    """The loss from those of the rows."""
    if problem.reduction == "none":
        return losses
    loss = losses.sum()
    return loss / _count(problem, targets) if problem.reduction == "mean" else loss


def row_factors(problem, targets: Tensor, dloss: Tensor) -> Tensor:
    """(rows,) or one element, float32: what multiplies the gradient of each row's own loss."""
    factor = dloss.float().reshape(-1)
    return factor / _count(problem, targets) if problem.reduction == "mean" else factor


def _count(problem, targets: Tensor) -> Tensor:
    """How many rows a mean is over, at least 1."""
    return (targets != problem.ignore_index).sum().clamp(min=1)
