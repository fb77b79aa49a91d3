"""What the reference's ops share: the dtype that they compute in, and dropout."""

import functools

import torch
from torch import Tensor

from fastattn import philox


def without_autocast(fn):
    """Keep autocast from rounding the intermediate products of `fn`."""

    @functools.wraps(fn)
    def run(problem, *args):
        with torch.autocast(problem.device, enabled=False):
            return fn(problem, *args)

    return run


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dropout_factor(problem, seed: Tensor, matrix: Tensor) -> Tensor:
    """0 where an element of (..., columns) is dropped, else 1 / (1 - dropout_p)."""
    leading, columns = matrix.shape[:-1], matrix.shape[-1]
    row = torch.arange(leading.numel(), device=matrix.device)
    low, high = row & 0xFFFFFFFF, row >> 32
    keep = philox.keep_mask(seed, problem.dropout_p, low, columns, high, torch.zeros_like(row))
    return keep.view(matrix.shape).to(matrix.dtype) / (1 - problem.dropout_p)
