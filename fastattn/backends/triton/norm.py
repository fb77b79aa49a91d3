"""Layer norm and RMS norm on the Triton kernels."""

import torch
from torch import Tensor

from fastattn.backends.triton.device import Kernels

_kernels = Kernels("norm")


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`: they run every one of a known dtype."""
    return []


def norm_fwd(problem, t) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The norm, the sum where there is a residual, and with `stats` each row's mean and rstd."""
    y = t.x.new_empty(t.x.shape)
    total = stats = None
    if problem.residual:
        total = t.x.new_empty(t.x.shape)
    if problem.stats:
        shape = (2 if problem.centered else 1, problem.rows)
        stats = t.x.new_empty(shape, dtype=torch.float32)
    _kernels.norm_fwd(
        _rows(problem, t.x), _rows(problem, t.residual), _contiguous(t.weight), _contiguous(t.bias),
        y, total, stats, eps=float(problem.eps), centered=problem.centered,
    )  # fmt: skip
    return y, total, stats


def norm_bwd(problem, t, stats, dy, ds) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, to which that of the sum is added, of weight and of bias."""
    x = _rows(problem, t.x)
    dx = x.new_empty(t.x.shape)
    dweight = dbias = partials = None
    if problem.parameter_grad and (problem.weight or problem.bias):
        dweight = None if t.weight is None else t.weight.new_empty(t.weight.shape)
        dbias = None if t.bias is None else t.bias.new_empty(t.bias.shape)
        shape = (problem.weight + problem.bias, _kernels.partials_bwd(x), problem.columns)
        partials = x.new_empty(shape, dtype=torch.float32)
    _kernels.norm_bwd(
        x, _rows(problem, dy), _rows(problem, ds), _contiguous(t.weight), stats, dx,
        partials, dweight, dbias, centered=problem.centered,
    )  # fmt: skip
    return dx, dweight, dbias


def _rows(problem, tensor: Tensor | None) -> Tensor | None:
    """(rows, columns), copied unless it is rows of one stride."""
    if tensor is None:
        return None
    tensor = tensor.reshape(problem.rows, problem.columns)
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
