"""Position-wise feed-forward networks, plain and gated: signatures, autograd, registration."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn import dispatch, philox
from fastattn.ops import common

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
SAVES = ("all", "preact", "input")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class FFNProblem(NamedTuple):
    """What a backend needs to know of a call to accept or refuse it; no tensors."""

    op: str  # "ffn_fwd", "ffn_bwd", "gated_ffn_fwd" or "gated_ffn_bwd"
    device: str
    dtype: torch.dtype
    rows: int
    d_model: int
    d_ff: int
    d_out: int
    activation: str
    dropout_p: float
    save: str
    biases: tuple[bool, bool]
    x_grad: bool
    weight_grad: bool


class FFNTensors(NamedTuple):
    """The tensors of a call, absent ones None; the gated form's weights are w1, w_up and w2."""

    x: Tensor  # (rows, d_model)
    w1: Tensor  # (d_ff, d_model), the gate's in the gated form
    b1: Tensor | None
    w_up: Tensor | None  # (d_ff, d_model), gated form only
    w2: Tensor  # (d_out, d_ff)
    b2: Tensor | None
    seed: Tensor | None


class FFNScalars(NamedTuple):
    """What a call says beside its tensors."""

    activation: str
    dropout_p: float
    save: str


def ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "relu",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    save: str = "preact",
) -> Tensor:
    """``dropout(act(x W1^T + b1)) W2^T + b2`` (Vaswani et al. 2017, section 3.3).

    Args:
        x: ``(..., d_model)``, float32, float16, bfloat16, or float64 on the reference backend.
        w1: ``(d_ff, d_model)``, as ``torch.nn.Linear`` keeps it. `b1`: ``(d_ff,)`` or None.
        w2: ``(d_out, d_ff)``. `b2`: ``(d_out,)`` or None.
        activation: "relu", "gelu" (by erf), "gelu_tanh" or "silu".
        dropout_p: probability of dropping a hidden element, 0 <= dropout_p < 1.
        seed: of the dropout, int or int64 tensor of one element; default drawn from torch's
            generator.
        save: what the backward keeps besides the arguments: "all" (pre-activation and hidden
            layer), "preact" (pre-activation), "input" (nothing: the first product is computed
            again). Less memory, more arithmetic.

    Returns:
        ``(..., d_out)`` in the dtype of `x`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.
        fastattn.BackendError: a forced backend cannot run the call.
    """
    return _call(x, w1, b1, None, w2, b2, activation, dropout_p, seed, save)


def gated_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "silu",
    save: str = "preact",
) -> Tensor:
    """``(act(x Wg^T) * (x Wu^T)) Wd^T``, the gated linear unit (Shazeer 2020, "GLU variants").

    Args:
        x: ``(..., d_model)``, float32, float16, bfloat16, or float64 on the reference backend.
        w_gate, w_up: ``(d_ff, d_model)``.
        w_down: ``(d_out, d_ff)``.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), or "relu" (ReGLU).
        save: as in `ffn`; the pre-activation is that of both products.

    Returns:
        ``(..., d_out)`` in the dtype of `x`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.
        fastattn.BackendError: a forced backend cannot run the call.
    """
    common.check_tensor("w_up", w_up)
    return _call(x, w_gate, None, w_up, w_down, None, activation, 0.0, None, save)


def _call(x, w1, b1, w_up, w2, b2, activation, dropout_p, seed, save) -> Tensor:
    gated = w_up is not None
    names = ("x", "w_gate", "w_down") if gated else ("x", "w1", "w2")
    for name, value in zip(names, (x, w1, w2), strict=True):
        common.check_tensor(name, value)
    if save not in SAVES:
        raise ValueError(f"save: expected one of {', '.join(SAVES)}, got {save!r}")
    device_type = x.device.type
    if common.autocast_enabled(device_type):
        x, w1, b1, w_up, w2, b2 = common.autocast(device_type, x, w1, b1, w_up, w2, b2)
    if dropout_p:
        common.check_dropout(dropout_p)
        seed = philox.new_seed(x.device) if seed is None else common.seed_tensor(seed, x.device)
    else:
        seed = None
    leading = x.shape[:-1]
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    t = FFNTensors(x, w1, b1, w_up, w2, b2, seed)
    scalars = FFNScalars(activation, dropout_p, save)
    if not common.is_plain(*t) or x.is_meta:
        y = torch.ops.fastattn.ffn_fwd(*t, *scalars)[0]
    elif common.needs_grad(*t):
        y = _FFN.apply(x, w1, b1, w_up, w2, b2, (t, scalars))
    else:
        y = _fwd(t, scalars._replace(save="input"))[0]
    return y if len(leading) == 1 else y.view(*leading, y.shape[-1])


def _check(
    direction: str,
    t: FFNTensors,
    scalars: FFNScalars,
    x_grad: bool = False,
    weight_grad: bool = False,
) -> FFNProblem:
    gated = t.w_up is not None
    names = ("x", "w_gate", "b1", "w_up", "w_down", "b2") if gated else FFNTensors._fields[:6]
    x = t.x
    if x.dtype not in _DTYPES:
        supported = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"x: expected one of {supported}, got {x.dtype}")
    d_model, d_ff, d_out = x.shape[-1], t.w1.shape[0], t.w2.shape[0]
    shapes = ((x.shape[0], d_model), (d_ff, d_model), (d_ff,), (d_ff, d_model), (d_out, d_ff))
    for name, tensor, shape in zip(names, t[:6], (*shapes, (d_out,)), strict=True):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} as x, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x, got {tensor.device}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if scalars.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {scalars.activation!r}"
        )
    return FFNProblem(
        op=("gated_ffn_" if gated else "ffn_") + direction,
        device=x.device.type,
        dtype=x.dtype,
        rows=x.shape[0],
        d_model=d_model,
        d_ff=d_ff,
        d_out=d_out,
        activation=scalars.activation,
        dropout_p=scalars.dropout_p,
        save=scalars.save,
        biases=(t.b1 is not None, t.b2 is not None),
        x_grad=x_grad,
        weight_grad=weight_grad,
    )


_problem = common.remembered(_check)


def _fwd(t: FFNTensors, scalars: FFNScalars) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output (rows, d_out), and what `save` keeps.

    That is preact (rows, d_ff) or, gated, (2, rows, d_ff); hidden (rows, d_ff), after the
    activation and the dropout.
    """
    problem = _problem("fwd", t, scalars)
    return dispatch.select(problem).ffn_fwd(problem, t)


def _bwd(
    dy: Tensor,
    preact: Tensor | None,
    hidden: Tensor | None,
    t: FFNTensors,
    scalars: FFNScalars,
    x_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w_up, w2, b2; None where absent or not asked for."""
    problem = _problem("bwd", t, scalars, x_grad, weight_grad)
    return dispatch.select(problem).ffn_bwd(problem, t, preact, hidden, dy)


class _FFN(torch.autograd.Function):
    """The eager call under autograd; `ffn_fwd` of torch.library is its traceable twin."""

    @staticmethod
    def forward(ctx, x, w1, b1, w_up, w2, b2, call):
        t, scalars = call
        y, preact, hidden = _fwd(t, scalars)
        _save(ctx, t, scalars, preact, hidden)
        ctx.forced_backend = dispatch.forced_backend()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with dispatch.backward_backend(ctx.forced_backend):
            return *_backward(ctx, dy, _bwd), None


def _save(ctx, t, scalars, preact, hidden):
    preact = None if scalars.save == "input" else preact
    hidden = hidden if scalars.save == "all" else None
    ctx.save_for_backward(preact, hidden, *t)
    ctx.scalars = scalars


def _backward(ctx, dy, bwd):
    needs = ctx.needs_input_grad[:6]
    preact, hidden, *t = ctx.saved_tensors
    grads = bwd(dy, preact, hidden, FFNTensors(*t), ctx.scalars, needs[0], any(needs[1:]))
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


_TENSORS = len(FFNTensors._fields)


def _split(args) -> tuple[FFNTensors, FFNScalars]:
    return FFNTensors(*args[:_TENSORS]), FFNScalars(*args[_TENSORS:])


def _fwd_library(*args):
    return tuple(args[0].new_empty(0) if one is None else one for one in _fwd(*_split(args)))


def _fwd_meta(*args):
    t, scalars = _split(args)
    problem = _check("fwd", t, scalars)
    preact: tuple[int, ...] = (problem.rows, problem.d_ff)
    if t.w_up is not None:
        preact = (2, *preact)
    return (
        t.x.new_empty((problem.rows, problem.d_out)),
        t.x.new_empty(0 if problem.save == "input" else preact),
        t.x.new_empty((problem.rows, problem.d_ff) if problem.save == "all" else 0),
    )


def _bwd_library(dy, preact, hidden, *args):
    grads = _bwd(dy, preact, hidden, *_split(args[:-2]), *args[-2:])
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _bwd_meta(dy, preact, hidden, *args):
    t, _ = _split(args[:-2])
    x_grad, weight_grad = args[-2:]
    weights = (t.w1, t.b1, t.w_up, t.w2, t.b2)
    wanted = (x_grad, *(weight_grad and w is not None for w in weights))
    return tuple(
        w.new_empty(tuple(w.shape)) if wants else dy.new_empty(0)
        for w, wants in zip((t.x, *weights), wanted, strict=True)
    )


def _library_setup(ctx, inputs, output):
    _save(ctx, *_split(inputs), *output[1:])


def _library_backward(ctx, dy, *_):
    def bwd(dy, preact, hidden, t, scalars, x_grad, weight_grad):
        args = (*t, *scalars, x_grad, weight_grad)
        return torch.ops.fastattn.ffn_bwd(dy, preact, hidden, *args)

    return *_backward(ctx, dy, bwd), *(None,) * 4


_CALL = common.schema_of(FFNTensors, FFNScalars)
_fwd_op = torch.library.custom_op(
    "fastattn::ffn_fwd",
    _fwd_library,
    mutates_args=(),
    schema=f"({_CALL}) -> (Tensor, Tensor, Tensor)",
)
_fwd_op.register_fake(_fwd_meta)
_fwd_op.register_autograd(_library_backward, setup_context=_library_setup)
_bwd_op = torch.library.custom_op(
    "fastattn::ffn_bwd",
    _bwd_library,
    mutates_args=(),
    schema="(Tensor dy, Tensor? preact, Tensor? hidden, "
    f"{_CALL}, bool x_grad, bool weight_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_bwd_op.register_fake(_bwd_meta)
