"""Feed-forward networks in plain PyTorch."""

import math

import torch
from torch import Tensor

from fastattn.backends.reference import common


@common.without_autocast
def ffn_fwd(problem, t) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output, and what `save` keeps of preact and hidden (see `fastattn.ffn`)."""
    dtype = common.accumulate_dtype(t.x.dtype)
    preact = _preact(t, dtype)
    hidden = _hidden(problem, t, preact)
    y = hidden @ t.w2.to(dtype).T
    if t.b2 is not None:
        y = y + t.b2.to(dtype)
    return (
        y.to(t.x.dtype),
        None if problem.save == "input" else preact.to(t.x.dtype),
        hidden.to(t.x.dtype) if problem.save == "all" else None,
    )


@common.without_autocast
def ffn_bwd(problem, t, preact, hidden, dy) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w_up, w2 and b2, None where absent or not asked for."""
    dtype = common.accumulate_dtype(t.x.dtype)
    x, dy = t.x.to(dtype), dy.to(dtype)
    preact = _preact(t, dtype) if preact is None else preact.to(dtype)
    hidden = _hidden(problem, t, preact) if hidden is None else hidden.to(dtype)
    dhidden = dy @ t.w2.to(dtype)
    if problem.dropout_p:
        dhidden = dhidden * common.dropout_factor(problem, t.seed, dhidden)
    dup = None
    if t.w_up is None:
        dgate = dhidden * _activation_slope(problem.activation, preact)
    else:
        gate, up = preact
        dgate = dhidden * up * _activation_slope(problem.activation, gate)
        dup = dhidden * _activate(problem.activation, gate)
    dx = dw1 = db1 = dw_up = dw2 = db2 = None
    if problem.x_grad:
        dx = dgate @ t.w1.to(dtype)
        if dup is not None:
            dx = dx + dup @ t.w_up.to(dtype)
    if problem.weight_grad:
        dw1, dw2 = dgate.T @ x, dy.T @ hidden
        db1 = None if t.b1 is None else dgate.sum(0)
        db2 = None if t.b2 is None else dy.sum(0)
        dw_up = None if dup is None else dup.T @ x
    grads = (dx, dw1, db1, dw_up, dw2, db2)
    return tuple(None if grad is None else grad.to(t.x.dtype) for grad in grads)


def _preact(t, dtype: torch.dtype) -> Tensor:
    """(rows, d_ff), or (2, rows, d_ff) with the gate's and the up product's in the gated form."""
    preact = t.x.to(dtype) @ t.w1.to(dtype).T
    if t.b1 is not None:
        preact = preact + t.b1.to(dtype)
    if t.w_up is not None:
        preact = torch.stack([preact, t.x.to(dtype) @ t.w_up.to(dtype).T])
    return preact


def _hidden(problem, t, preact: Tensor) -> Tensor:
    if t.w_up is not None:
        return _activate(problem.activation, preact[0]) * preact[1]
    hidden = _activate(problem.activation, preact)
    return hidden * common.dropout_factor(problem, t.seed, hidden) if problem.dropout_p else hidden


def _activate(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return x.relu()
    if name == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _activation_slope(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return (x > 0).to(x.dtype)
    if name == "silu":
        sigmoid = torch.sigmoid(x)
        return sigmoid * (1 + x * (1 - sigmoid))
    if name == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    c = math.sqrt(2 / math.pi)
    tanh = torch.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * c * (1 + 3 * 0.044715 * x * x)
