"""Feed-forward networks on the Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from fastattn import philox
from fastattn.backends.triton.device import Kernels

_kernels = Kernels("ffn")
_gemm = Kernels("gemm")


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    sizes = {name: getattr(problem, name) for name in ("d_model", "d_ff", "d_out")}
    return [f"{name}=0, at least 1" for name, size in sizes.items() if not size]


def ffn_fwd(problem, t) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output, and what `save` keeps of preact and hidden (see `fastattn.ffn`)."""
    y = t.x.new_empty((problem.rows, problem.d_out))
    preact = None if problem.save == "input" else _new_preact(problem, t)
    hidden = t.x.new_empty((problem.rows, problem.d_ff))
    if problem.rows:
        b1, b2 = (None if bias is None else bias.contiguous() for bias in (t.b1, t.b2))
        _kernels.hidden_fwd(t.x, t.w1, t.w_up, b1, t.seed, preact, hidden, **_scalars(problem))
        _gemm.gemm(hidden, t.w2.T, y, bias=b2)
    return y, preact, hidden if problem.save == "all" else None


def ffn_bwd(problem, t, preact, hidden, dy) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w_up, w2 and b2, None where absent or not asked for."""
    inputs = (t.x, t.w1, t.b1, t.w_up, t.w2, t.b2)
    wanted = (problem.x_grad, *(problem.weight_grad,) * 5)
    make = torch.Tensor.new_empty if problem.rows else torch.Tensor.new_zeros
    grads = tuple(
        make(tensor, tensor.shape) if wants and tensor is not None else None
        for tensor, wants in zip(inputs, wanted, strict=True)
    )
    dx, dw1, db1, dw_up, dw2, db2 = grads
    if not problem.rows:
        return grads
    dy = dy.to(problem.dtype)
    if preact is None:
        preact = dpreact = _preact_again(problem, t)  # a tile is read before it is written
    else:
        preact = preact.contiguous()
        dpreact = torch.empty_like(preact)
    again = None
    if dw2 is not None and hidden is None:
        hidden = again = t.x.new_empty((problem.rows, problem.d_ff))
    _kernels.preact_bwd(dy, t.w2, preact, t.seed, dpreact, again, db1, **_scalars(problem))
    dgate, dup = (dpreact, None) if t.w_up is None else dpreact
    if dw2 is not None:
        _gemm.gemm(dy.T, hidden, dw2)
    if dw1 is not None:
        _gemm.gemm(dgate.T, t.x, dw1)
    if dw_up is not None:
        _gemm.gemm(dup.T, t.x, dw_up)
    if db2 is not None:
        _kernels.column_sums(dy, db2)
    if dx is not None:
        _gemm.gemm(dgate, t.w1, dx, more_a=dup, more_b=t.w_up)
    return grads


def _new_preact(problem, t) -> Tensor:
    matrices = () if t.w_up is None else (2,)
    return t.x.new_empty((*matrices, problem.rows, problem.d_ff))


def _preact_again(problem, t) -> Tensor:
    """What the forward did not keep."""
    preact = _new_preact(problem, t)
    b1 = None if t.b1 is None else t.b1.contiguous()
    gate, up = (preact, None) if t.w_up is None else preact
    _gemm.gemm(t.x, t.w1.T, gate, bias=b1)
    if t.w_up is not None:
        _gemm.gemm(t.x, t.w_up.T, up)
    return preact


def _scalars(problem) -> dict[str, Any]:
    dropout_p = problem.dropout_p
    return dict(
        activation=problem.activation,
        threshold=philox.threshold(dropout_p),
        keep_scale=1.0 / (1.0 - dropout_p),
    )
