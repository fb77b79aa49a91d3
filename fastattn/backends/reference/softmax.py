"""Softmax in plain PyTorch."""

import math

import torch
from torch import Tensor

from fastattn.backends.reference import common


@common.without_autocast
def softmax_fwd(problem, t) -> tuple[Tensor, Tensor | None]:
    """The softmax and, with dropout, the weights before it (see `fastattn.softmax`)."""
    dtype = common.accumulate_dtype(t.x.dtype)
    scores = t.x.to(dtype) * problem.scale
    if t.bias is not None:
        scores = scores + t.bias.to(dtype)
    visible = t.mask
    if problem.causal:
        lower = torch.ones(t.x.shape[-2:], dtype=torch.bool, device=t.x.device).tril()
        visible = lower if visible is None else visible & lower
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    if problem.log:
        return torch.where(empty, -math.inf, torch.log_softmax(scores, -1)).to(t.x.dtype), None
    p = torch.where(empty, 0.0, torch.softmax(scores, -1))
    if not problem.dropout_p:
        return p.to(t.x.dtype), None
    return (p * common.dropout_factor(problem, t.seed, p)).to(t.x.dtype), p.to(t.x.dtype)


@common.without_autocast
def softmax_bwd(problem, t, p, dout) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and bias from the weights before dropout (from the result with log)."""
    dtype = common.accumulate_dtype(t.x.dtype)
    p, dout = p.to(dtype), dout.to(dtype)
    if problem.dropout_p:
        dout = dout * common.dropout_factor(problem, t.seed, p)
    if problem.log:
        visible = ~torch.isneginf(p)
        dout = dout * visible
        dscores = (dout - p.exp() * dout.sum(-1, keepdim=True)) * visible
    else:
        dscores = p * (dout - (p * dout).sum(-1, keepdim=True))
    dbias = None
    if problem.bias_grad:
        dbias = dscores.sum_to_size(*t.bias.shape).to(t.bias.dtype)
    return (dscores * problem.scale).to(t.x.dtype), dbias
