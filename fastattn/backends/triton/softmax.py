"""Softmax on the Triton kernels."""

import torch
from torch import Tensor

from fastattn import philox
from fastattn.backends.triton.device import Kernels
from fastattn.backends.triton.layout import four_dims

_kernels = Kernels("softmax")


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`: they run every one of a known dtype."""
    return []


def softmax_fwd(problem, t) -> tuple[Tensor, Tensor | None]:
    """The softmax and, with dropout, the weights before it (see `fastattn.softmax`)."""
    out = t.x.new_empty(problem.shape)
    weights = t.x.new_empty(problem.shape) if problem.dropout_p else None
    mask = None if t.mask is None else t.mask.expand(problem.shape)
    bias = None if t.bias is None else t.bias.expand(problem.shape)
    x, mask, bias = four_dims(t.x, mask, bias)
    _kernels.softmax_fwd(
        x, mask, bias, t.seed, out, weights,
        causal_rows=problem.shape[-2] if problem.causal else 0, scale=problem.scale,
        log=problem.log, **_dropout(problem),
    )  # fmt: skip
    return out, weights


def softmax_bwd(problem, t, p, dout) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and bias from the weights before dropout (from the result with log)."""
    dx = p.new_empty(problem.shape)
    dscores = dbias = None
    if problem.bias_grad:
        whole = tuple(t.bias.shape) == problem.shape
        dscores = p.new_empty(problem.shape, dtype=t.bias.dtype if whole else torch.float32)
    (dout,) = four_dims(dout)
    _kernels.softmax_bwd(
        p.contiguous(), dout, t.seed, dx, dscores,
        scale=problem.scale, log=problem.log, **_dropout(problem),
    )  # fmt: skip
    if problem.bias_grad:
        dbias = dscores.sum_to_size(*t.bias.shape).to(t.bias.dtype)
    return dx, dbias


def _dropout(problem) -> dict[str, float]:
    dropout_p = problem.dropout_p
    return dict(threshold=philox.threshold(dropout_p), keep_scale=1.0 / (1.0 - dropout_p))
