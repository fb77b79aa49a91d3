"""Layer norm and RMS norm in plain PyTorch."""

import torch
from torch import Tensor

from fastattn.backends.reference import common


@common.without_autocast
def norm_fwd(problem, t) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The norm, the sum where there is a residual, and with `stats` each row's mean and rstd."""
    dtype = common.accumulate_dtype(t.x.dtype)
    s = None if t.residual is None else t.x + t.residual
    x = (t.x if s is None else s).to(dtype)
    mean = x.mean(-1, keepdim=True) if problem.centered else None
    if mean is not None:
        x = x - mean
    rstd = (x.square().mean(-1, keepdim=True) + problem.eps).rsqrt()
    y = x * rstd
    if t.weight is not None:
        y = y * t.weight.to(dtype)
    if t.bias is not None:
        y = y + t.bias.to(dtype)
    y = y.to(t.x.dtype, copy=True).contiguous()
    if s is not None:
        s = s.contiguous()
    if not problem.stats:
        return y, s, None
    stats = [rstd] if mean is None else [mean, rstd]
    return y, s, torch.stack([one.flatten() for one in stats])


@common.without_autocast
def norm_bwd(problem, t, stats, dy, ds) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, to which that of the sum is added, of weight and of bias."""
    dtype = common.accumulate_dtype(t.x.dtype)
    column = (*t.x.shape[:-1], 1)
    x, dy, rstd = t.x.to(dtype), dy.to(dtype), stats[-1].view(column)
    normed = (x - stats[0].view(column) if problem.centered else x) * rstd
    g = dy if t.weight is None else dy * t.weight.to(dtype)
    dx = g - normed * (g * normed).mean(-1, keepdim=True)
    if problem.centered:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd
    if ds is not None:
        dx = dx + ds.to(dtype)
    dweight = dbias = None
    if problem.parameter_grad:
        leading = tuple(range(dy.dim() - 1))
        if t.weight is not None:
            dweight = _sum(dy * normed, leading).to(t.weight.dtype)
        if t.bias is not None:
            dbias = _sum(dy, leading).to(t.bias.dtype)
    return dx.to(t.x.dtype).contiguous(), dweight, dbias


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    # Without dims, sum would take them all.
    return x.sum(dims) if dims else x.clone()
