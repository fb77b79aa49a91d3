"""Rotary position embedding in plain PyTorch."""

import torch
from torch import Tensor

from fastattn.backends.reference import common


def rotary_fwd(problem, t, offset, out) -> int:
    """Writes the rotated x to `out`; the first sequence with a wrong offset, or -1."""
    return _rotate(problem, t, offset, t.sin, out)


def rotary_bwd(problem, t, offset, dx) -> int:
    """As `rotary_fwd`, by the negative angle: of dout, the gradient of x."""
    return _rotate(problem, t, offset, -t.sin, dx)


def _rotate(problem, t, offset, sin, out) -> int:
    invalid = _first_invalid(problem, t.offsets)
    if invalid >= 0:
        return invalid
    half, rotary_dim = problem.rotary_dim // 2, problem.rotary_dim
    if problem.interleaved:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    else:
        first, second = slice(0, half), slice(half, rotary_dim)
    dtype = common.accumulate_dtype(problem.dtype)
    cos, sin = (_rows(problem, table, offset, t.offsets).to(dtype) for table in (t.cos, sin))
    a, b = t.x[..., first].to(dtype), t.x[..., second].to(dtype)
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    out[..., rotary_dim:] = t.x[..., rotary_dim:]
    return -1


def _first_invalid(problem, offsets: Tensor | None) -> int:
    # Reading another device's values would wait for it.
    if offsets is None or problem.device != "cpu":
        return -1
    invalid = (offsets < 0) | (offsets + problem.seqlen > problem.seqlen_max)
    return int(invalid.nonzero()[0]) if invalid.any() else -1


def _rows(problem, table: Tensor, offset: int, offsets: Tensor | None) -> Tensor:
    """The rows of cos or sin that the tokens take, broadcastable to (batch, heads, seqlen, -1)."""
    if offsets is None:
        rows = table[..., offset : offset + problem.seqlen, :]
        return rows[:, None] if problem.table_batch else rows
    index = offsets[:, None] + torch.arange(problem.seqlen, device=offsets.device)
    if not problem.table_batch:
        return table[index][:, None]
    sequence = torch.arange(problem.batch, device=offsets.device)
    return table[sequence[:, None], index][:, None]
