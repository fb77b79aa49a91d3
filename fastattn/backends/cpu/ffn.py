"""Feed-forward networks on the native kernels."""

import torch
from torch import Tensor

from fastattn.backends.cpu import native

_ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    empty = 0 in (problem.d_model, problem.d_ff, problem.d_out)
    return ["an empty d_model, d_ff or d_out"] if empty else []


def _ffn_shape(problem) -> tuple:
    return (
        native.DTYPES[problem.dtype],
        _ACTIVATIONS[problem.activation],
        problem.rows,
        problem.d_model,
        problem.d_ff,
        problem.d_out,
    )


def ffn_fwd(problem, t) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output, and what `save` keeps of preact and hidden (see `fastattn.ffn`)."""
    rows, d_ff = problem.rows, problem.d_ff
    y = t.x.new_empty((rows, problem.d_out))
    preact = hidden = None
    if problem.save != "input":
        preact = t.x.new_empty((rows, d_ff) if t.w_up is None else (2, rows, d_ff))
    if problem.save == "all":
        hidden = t.x.new_empty((rows, d_ff))
    if rows:
        matrices = [native.matrix(matrix) for matrix in (t.x, t.w1, t.w_up, t.w2)]
        b1, b2 = native.contiguous(t.b1), native.contiguous(t.b2)
        native._C.ffn_fwd(
            _ffn_shape(problem),
            problem.dropout_p,
            native.pointer(t.seed),
            *(native.matrix_address(matrix) for matrix in matrices),
            native.pointer(b1),
            native.pointer(b2),
            y.data_ptr(),
            native.pointer(preact),
            native.pointer(hidden),
        )
    return y, preact, hidden


def ffn_bwd(problem, t, preact, hidden, dy) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w_up, w2 and b2, None where absent or not asked for."""
    inputs = (t.x, t.w1, t.b1, t.w_up, t.w2, t.b2)
    wanted = (problem.x_grad, *(problem.weight_grad,) * 5)
    make = torch.Tensor.new_empty if problem.rows else torch.Tensor.new_zeros
    grads = tuple(
        make(tensor, tensor.shape) if wants and tensor is not None else None
        for tensor, wants in zip(inputs, wanted, strict=True)
    )
    if problem.rows:
        matrices = [native.matrix(matrix) for matrix in (t.x, t.w1, t.w_up, t.w2)]
        b1 = native.contiguous(t.b1)
        dy = native.unit_last_stride(dy.to(problem.dtype))
        preact, hidden = native.contiguous(preact), native.contiguous(hidden)
        native._C.ffn_bwd(
            _ffn_shape(problem),
            problem.dropout_p,
            native.pointer(t.seed),
            *(native.matrix_address(matrix) for matrix in matrices),
            native.matrix_address(dy),
            native.pointer(b1),
            native.pointer(preact),
            native.pointer(hidden),
            *(native.pointer(grad) for grad in grads),
        )
    return grads
