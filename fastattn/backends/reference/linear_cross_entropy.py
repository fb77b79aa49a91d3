"""The last linear layer and cross entropy in plain PyTorch, a chunk of rows at a time."""

import torch
from torch import Tensor

from fastattn.backends.reference import common, cross_entropy

_CHUNK_ROWS = 256


@common.without_autocast
def linear_cross_entropy_fwd(problem, t) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...], int]:
    """The loss, the rows' statistics, the gradients for dloss 1, the first invalid row or -1."""
    dtype = common.accumulate_dtype(problem.dtype)
    losses = t.x.new_zeros(problem.rows, dtype=dtype)
    stats = t.x.new_zeros((problem.rows, 2), dtype=dtype)
    seen = t.targets != problem.ignore_index
    gradients = _zeros(problem, t, dtype)
    invalid = cross_entropy.first_invalid(t.targets, problem.vocabulary, problem.ignore_index)
    if invalid < 0:
        factor = cross_entropy.row_factors(problem, seen, losses.new_ones(()))
        for chunk in _chunks(seen):
            targets, smoothing = t.targets[chunk], problem.label_smoothing
            logits = _logits(t, chunk, dtype)
            here = seen[chunk]
            losses[chunk], stats[chunk] = cross_entropy.row_losses(logits, targets, here, smoothing)
            if any(one is not None for one in gradients):
                dlogits = cross_entropy.row_gradients(
                    logits, targets, here, stats[chunk], smoothing
                )
                _add_gradients(t, chunk, dlogits * factor, gradients)
    loss = cross_entropy.reduce(problem, losses, seen, (problem.rows,))
    return loss, stats, gradients, invalid


@common.without_autocast
def linear_cross_entropy_bwd(problem, t, stats, dloss) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, None where not asked for."""
    dtype = common.accumulate_dtype(problem.dtype)
    gradients = _zeros(problem, t, dtype)
    seen = t.targets != problem.ignore_index
    factor = cross_entropy.row_factors(problem, seen, dloss.to(dtype)).expand(problem.rows, 1)
    for chunk in _chunks(seen):
        dlogits = cross_entropy.row_gradients(
            _logits(t, chunk, dtype),
            t.targets[chunk],
            seen[chunk],
            stats[chunk],
            problem.label_smoothing,
        )
        _add_gradients(t, chunk, dlogits * factor[chunk], gradients)
    return tuple(None if one is None else one.to(problem.dtype) for one in gradients)


def _chunks(seen: Tensor) -> tuple[Tensor, ...]:
    """Indices of the rows that take part, some at a time."""
    rows = seen.nonzero()[:, 0]
    return rows.split(_CHUNK_ROWS) if len(rows) else ()


def _zeros(problem, t, dtype) -> tuple[Tensor | None, ...]:
    wanted = (problem.x_grad, problem.weight_grad, problem.bias_grad)
    return tuple(
        torch.zeros_like(one, dtype=dtype, memory_format=torch.contiguous_format) if want else None
        for one, want in zip(t[:3], wanted, strict=True)
    )


def _logits(t, chunk: Tensor, dtype: torch.dtype) -> Tensor:
    bias = None if t.bias is None else t.bias.to(dtype)
    return torch.nn.functional.linear(t.x[chunk].to(dtype), t.weight.to(dtype), bias)


def _add_gradients(t, chunk: Tensor, dlogits: Tensor, gradients) -> None:
    dx, dweight, dbias = gradients
    if dx is not None:
        dx[chunk] = dlogits @ t.weight.to(dlogits.dtype)
    if dweight is not None:
        dweight += dlogits.T @ t.x[chunk].to(dlogits.dtype)
    if dbias is not None:
        dbias += dlogits.sum(0)
