"""Rotary position embedding: signature, validation, autograd, registration."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.ops import common

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class RotaryProblem(NamedTuple):
    """What a backend needs to know of a call to accept or refuse it; no tensors.

    An offset that is an int is no part of it: decoding would make a new problem at every step.
    """

    op: str  # "rotary_fwd" or "rotary_bwd"
    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    seqlen: int
    head_dim: int
    rotary_dim: int
    seqlen_max: int  # rows of cos and sin
    table: torch.dtype  # of cos and sin
    table_batch: bool  # cos and sin of each sequence
    offsets: bool  # one of each sequence
    interleaved: bool


class RotaryTensors(NamedTuple):
    """The tensors of a call, absent ones None."""

    x: Tensor  # (batch, heads, seqlen, head_dim); dout in the backward
    cos: Tensor  # (seqlen_max, rotary_dim / 2) or (batch, seqlen_max, rotary_dim / 2)
    sin: Tensor  # as cos
    offsets: Tensor | None  # (batch,)


class RotaryScalars(NamedTuple):
    """What a call says beside its tensors."""

    interleaved: bool
    offset: int  # 0 where it is a tensor


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offset: int | Tensor = 0,
) -> Tensor:
    """Rotary position embedding (Su et al. 2021, "RoFormer", section 3.2.2).

    Rotates each pair of elements (a, b) of token i to ``(a * cos - b * sin, b * cos + a * sin)``
    with the pair's column of row ``offset + i`` of `cos` and `sin`. The elements from
    ``rotary_dim`` on are copied unchanged.

    Args:
        x: ``(batch, heads, seqlen, head_dim)``, float32, float16, bfloat16, or float64 on the
            reference backend. Any strides; copied first only where the last one is not 1.
        cos: ``(seqlen_max, rotary_dim / 2)``, or ``(batch, seqlen_max, rotary_dim / 2)`` for each
            sequence its own; in the dtype of `x` or float32. ``rotary_dim <= head_dim``. Not
            differentiable.
        sin: in the shape and dtype of `cos`. Not differentiable.
        interleaved: pairs are elements ``(2 i, 2 i + 1)`` (GPT-J), instead of
            ``(i, i + rotary_dim / 2)`` (GPT-NeoX, Llama).
        offset: row of `cos` and `sin` of the first token: the length of the cache. An int64
            tensor ``(batch,)`` gives each sequence its own.

    Returns:
        Tensor of the shape and dtype of `x`, dense, with its dims in memory in the order of those
        of `x` (as ``torch.empty_like``): of a transposed ``(batch, seqlen, heads, head_dim)`` the
        result is one too. Contiguous where head_dim is not the innermost dim of `x`.

    Products are float32 in every dtype and rounded once; autocast changes nothing here.
    Differentiable any number of times.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, `cos` or `sin`
            requires a gradient, `cos` has fewer than ``offset + seqlen`` rows (values of a tensor
            are read on the CPU only).
        fastattn.BackendError: a forced backend cannot run the call.
    """
    if not (isinstance(x, Tensor) and isinstance(cos, Tensor) and isinstance(sin, Tensor)):
        for name, value in (("x", x), ("cos", cos), ("sin", sin)):
            common.check_tensor(name, value)
    if cos.requires_grad or sin.requires_grad:
        name = "cos" if cos.requires_grad else "sin"
        raise ValueError(f"{name}: no gradient is computed for it, got one that requires grad")
    offsets = None
    if isinstance(offset, Tensor):
        offset, offsets = 0, offset
    elif not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"offset: expected an int or a tensor, got {type(offset).__name__}")
    t = RotaryTensors(x, cos, sin, offsets)
    scalars = RotaryScalars(interleaved, offset)
    if not common.is_plain(x, cos, sin, offsets) or x.is_meta:
        return torch.ops.fastattn.rotary_fwd(*t, *scalars)
    return _rotate("rotary_fwd", t, scalars)


def _rotate(op: str, t: RotaryTensors, scalars: RotaryScalars) -> Tensor:
    """The eager call of either direction."""
    if common.needs_grad(t.x):
        return _Rotary.apply(t.x, (op, t, scalars))
    return _run(op, t, scalars)


def _check(op: str, t: RotaryTensors, interleaved: bool) -> RotaryProblem:
    x, cos = t.x, t.cos
    if x.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"x: expected one of {names}, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(
            f"x: expected (batch, heads, seqlen, head_dim), got shape {tuple(x.shape)}"
        )
    batch, heads, seqlen, head_dim = x.shape
    if cos.dim() not in (2, 3):
        raise ValueError(
            "cos: expected (seqlen_max, rotary_dim / 2) or (batch, seqlen_max, rotary_dim / 2), "
            f"got shape {tuple(cos.shape)}"
        )
    if cos.dim() == 3 and cos.shape[0] != batch:
        raise ValueError(
            f"cos: expected shape ({batch}, seqlen_max, rotary_dim / 2) for the batch of x, "
            f"got {tuple(cos.shape)}"
        )
    if 2 * cos.shape[-1] > head_dim:
        raise ValueError(
            f"cos: expected at most {head_dim // 2} columns, half of the head_dim {head_dim} of x, "
            f"got {cos.shape[-1]}"
        )
    if cos.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"cos: expected {x.dtype} as x or float32, got {cos.dtype}")
    if t.sin.shape != cos.shape:
        raise ValueError(f"sin: expected shape {tuple(cos.shape)} as cos, got {tuple(t.sin.shape)}")
    if t.sin.dtype != cos.dtype:
        raise TypeError(f"sin: expected {cos.dtype} as cos, got {t.sin.dtype}")
    if t.offsets is not None:
        if t.offsets.dtype != torch.int64:
            raise TypeError(f"offset: expected torch.int64, got {t.offsets.dtype}")
        if t.offsets.shape != (batch,):
            raise ValueError(
                f"offset: expected shape ({batch},) for the batch of x, "
                f"got {tuple(t.offsets.shape)}"
            )
    for name, other in (("cos", cos), ("sin", t.sin), ("offset", t.offsets)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x, got {other.device}")
    return RotaryProblem(
        op=op,
        device=x.device.type,
        dtype=x.dtype,
        batch=batch,
        heads=heads,
        seqlen=seqlen,
        head_dim=head_dim,
        rotary_dim=2 * cos.shape[-1],
        seqlen_max=cos.shape[-2],
        table=cos.dtype,
        table_batch=cos.dim() == 3,
        offsets=t.offsets is not None,
        interleaved=interleaved,
    )


_problem = common.remembered(_check)


def _check_offset(problem: RotaryProblem, offset: int, sequence: int | None = None) -> None:
    of = "" if sequence is None else f" of sequence {sequence}"
    if offset < 0:
        raise ValueError(f"offset: expected 0 <= offset, got {offset}{of}")
    if offset + problem.seqlen > problem.seqlen_max:
        raise ValueError(
            f"cos: expected offset + seqlen = {offset} + {problem.seqlen} rows at least{of}, "
            f"got {problem.seqlen_max}"
        )


def _empty_result(x: Tensor) -> Tensor:
    """Uninitialised, in the layout of x; contiguous where its last stride would not be 1."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else x.new_empty(x.shape)


def _run(op: str, t: RotaryTensors, scalars: RotaryScalars) -> Tensor:
    """The rotated x."""
    problem = _problem(op, t, scalars.interleaved)
    if t.offsets is None:
        _check_offset(problem, scalars.offset)
    out = _empty_result(t.x)
    backend = dispatch.select(problem)
    rotate = backend.rotary_fwd if op == "rotary_fwd" else backend.rotary_bwd
    invalid = rotate(problem, t, scalars.offset, out)
    if invalid >= 0:
        _check_offset(problem, int(t.offsets[invalid]), invalid)
    return out


# The rotation by an angle and that by its negative are each other's gradient.
_OTHER = {"rotary_fwd": "rotary_bwd", "rotary_bwd": "rotary_fwd"}


class _Rotary(torch.autograd.Function):
    """The eager call under autograd; torch.library's two operators are its traceable twin."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.op, t, ctx.scalars = call
        ctx.save_for_backward(*t[1:])
        ctx.forced_backend = dispatch.forced_backend()
        return _run(*call)

    @staticmethod
    def backward(ctx, dout):
        t = RotaryTensors(dout, *ctx.saved_tensors)
        with dispatch.backward_backend(ctx.forced_backend):
            return _rotate(_OTHER[ctx.op], t, ctx.scalars), None


_TENSORS = len(RotaryTensors._fields)


def _split(args) -> tuple[RotaryTensors, RotaryScalars]:
    return RotaryTensors(*args[:_TENSORS]), RotaryScalars(*args[_TENSORS:])


def _meta(*args):
    t, scalars = _split(args)
    problem = _check("rotary_fwd", t, scalars.interleaved)
    if t.offsets is None:
        _check_offset(problem, scalars.offset)
    return _empty_result(t.x)


def _setup(ctx, inputs, output):
    t, ctx.scalars = _split(inputs)
    ctx.save_for_backward(*t[1:])


def _register(op: str) -> None:
    def run(*args):
        return _run(op, *_split(args))

    def backward(ctx, dout):
        other = getattr(torch.ops.fastattn, _OTHER[op])
        return other(dout, *ctx.saved_tensors, *ctx.scalars), *(None,) * 5

    schema = f"({common.schema_of(RotaryTensors, RotaryScalars)}) -> Tensor"
    registered = torch.library.custom_op(f"fastattn::{op}", run, mutates_args=(), schema=schema)
    registered.register_fake(_meta)
    registered.register_autograd(backward, setup_context=_setup)


_register("rotary_fwd")
_register("rotary_bwd")
