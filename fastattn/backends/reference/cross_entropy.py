"""Cross entropy in plain PyTorch."""

import math

import torch
from torch import Tensor

from fastattn.backends.reference import common


def first_invalid(targets: Tensor, vocabulary: int, ignore_index: int) -> int:
    """The first row whose target is neither a class nor ignored; -1 if there is none."""
    invalid = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    return int(invalid.nonzero()[0]) if invalid.any() else -1


@common.without_autocast
def cross_entropy_fwd(problem, t) -> tuple[Tensor, Tensor, int]:
    """The loss, the rows' maxima and sums, the first invalid row or -1."""
    vocabulary = problem.shape[-1]
    targets = t.targets.reshape(-1)
    x = rows_of(t.logits, vocabulary)
    seen = targets != problem.ignore_index
    stats = x.new_zeros((len(targets), 2))
    losses = x.new_zeros(len(targets))
    invalid = first_invalid(targets, vocabulary, problem.ignore_index)
    if invalid < 0 and vocabulary:
        losses, stats = row_losses(x, targets, seen, problem.label_smoothing)
    return reduce(problem, losses, seen, problem.shape[:-1]), stats, invalid


@common.without_autocast
def cross_entropy_bwd(problem, t, stats, dloss) -> Tensor:
    """The gradient of the logits."""
    targets = t.targets.reshape(-1)
    x = rows_of(t.logits, problem.shape[-1])
    seen = targets != problem.ignore_index
    factor = row_factors(problem, seen, dloss.to(x.dtype))
    dx = row_gradients(x, targets, seen, stats, problem.label_smoothing) * factor
    return dx.to(t.logits.dtype).reshape(problem.shape)


def rows_of(x: Tensor, columns: int) -> Tensor:
    """The tensor as (rows, columns) in the dtype that sums are kept in."""
    rows = math.prod(x.shape[:-1])
    return x.to(common.accumulate_dtype(x.dtype)).reshape(rows, columns)


def row_losses(x, targets, seen, label_smoothing) -> tuple[Tensor, Tensor]:
    """The loss of each row, and its maximum and sum; 0 for rows that take no part."""
    top = x.amax(-1)
    empty = torch.isneginf(top)
    shifted = x - top.masked_fill(empty, 0.0)[:, None]
    total = shifted.exp().sum(-1)
    log_sum = total.log()
    chosen = shifted.gather(-1, targets.masked_fill(~seen, 0)[:, None])[:, 0]
    losses = log_sum - chosen
    if label_smoothing:
        uniform = log_sum - shifted.mean(-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    losses = losses.masked_fill(empty, math.inf).masked_fill(~seen, 0.0)
    return losses, torch.stack([top, total], -1).masked_fill(~seen[:, None], 0.0)


def row_gradients(x, targets, seen, stats, label_smoothing) -> Tensor:
    """Of each row's own loss."""
    if not x.shape[-1]:
        return x
    top, total = stats.unbind(-1)
    seen = seen & ~torch.isneginf(top)
    p = (x - top[:, None]).exp() / total[:, None]
    smooth = label_smoothing / x.shape[-1]
    chosen = targets.masked_fill(~seen, 0)[:, None]
    hot = torch.zeros_like(x).scatter_(-1, chosen, 1 - label_smoothing)
    return (p - smooth - hot).masked_fill(~seen[:, None], 0.0)


def reduce(problem, losses, seen, shape) -> Tensor:
    """The loss from those of the rows."""
    if problem.reduction == "none":
        return losses.reshape(shape)
    return losses.sum() / (seen.sum().clamp(min=1) if problem.reduction == "mean" else 1)


def row_factors(problem, seen, dloss) -> Tensor:
    """(rows, 1) or one element: what multiplies the gradient of each row's own loss."""
    if problem.reduction == "none":
        return dloss.reshape(-1, 1)
    return dloss / (seen.sum().clamp(min=1) if problem.reduction == "mean" else 1)
