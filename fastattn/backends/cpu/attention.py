"""Attention on the native kernels."""

from typing import Any

import torch
from torch import Tensor

from fastattn.backends.cpu import native

MAX_HEAD_DIM = 256


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    reasons = [
        f"{name}={getattr(problem, name)} > {MAX_HEAD_DIM}"
        for name in ("head_dim", "head_dim_v")
        if getattr(problem, name) > MAX_HEAD_DIM
    ]
    if problem.page_size and problem.op == "attention_bwd":
        reasons.append("block_table: no kernel for the gradient of a paged cache")
    if problem.bias == torch.float64:
        reasons.append("bias dtype=torch.float64")
    return reasons


def _address(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


def _broadcast_address(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """As `_address`, with stride 0 in dims of size 1, over which a mask or bias is broadcast."""
    strides = zip(tensor.shape, tensor.stride())
    return tensor.data_ptr(), tuple(0 if size == 1 else stride for size, stride in strides)


def _rows_last(packed: Tensor) -> Tensor:
    """Packed (total, heads, head_dim) as (1, heads, total, head_dim), the layout of kernels."""
    return packed.transpose(0, 1)[None]


def _call(problem, t, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """The arguments that both directions of attention share."""
    left, right = problem.window_left, problem.window_right
    unbounded = native._C.UNBOUNDED
    return (
        native.DTYPES[problem.dtype],
        problem[3:10],
        (q.data_ptr(), q.stride()),
        (k.data_ptr(), k.stride()),
        (v.data_ptr(), v.stride()),
        problem.softmax_scale,
        problem.softcap,
        (
            unbounded if left is None else left,
            unbounded if right is None else right,
            problem.offset,
        ),
        None if problem.plain else _features(problem, t),
        problem.deterministic,
    )


def _features(problem, t):
    """The tensors of `t` beside q, k and v, as the native module takes them."""
    features = native._C.AttentionFeatures()
    if t.mask is not None:
        features.mask = _broadcast_address(t.mask)
    if t.bias is not None:
        features.bias = _broadcast_address(t.bias)
        features.bias_dtype = native.DTYPES[t.bias.dtype]
    if t.alibi_slopes is not None:
        strides = t.alibi_slopes.stride()
        features.alibi_slopes = (
            t.alibi_slopes.data_ptr(),
            strides if len(strides) == 2 else (0, *strides),
        )
    for name, tensor in (("sinks", t.sinks), ("offsets", t.offsets), ("seqlens_k", t.seqlens_k)):
        if tensor is not None:
            setattr(features, name, tensor.data_ptr())
    if t.seed is not None:
        features.dropout_p, features.seed = problem.dropout_p, int(t.seed)
    if t.cu_seqlens_q is not None:
        features.cu_seqlens_q, features.total_q = t.cu_seqlens_q.data_ptr(), t.q.shape[2]
    if t.cu_seqlens_k is not None:
        features.cu_seqlens_k = t.cu_seqlens_k.data_ptr()
    if t.block_table is not None:
        features.block_table, features.page_size = _address(t.block_table), problem.page_size
    return features


def _hides(problem) -> bool:
    """Whether some scores may never be computed."""
    band = problem.window_left is not None or problem.window_right is not None
    return band or problem.mask or problem.seqlens_k


_VECTORS = ("sinks", "offsets", "seqlens_k", "cu_seqlens_q", "cu_seqlens_k", "block_table")


def _in_kernels_layout(problem, t):
    """The tensors as kernels read them: q, k and v 4-D with rows next to last, vectors dense."""
    if problem.packed:
        t = t._replace(q=_rows_last(t.q))
        if not problem.page_size:
            t = t._replace(k=_rows_last(t.k), v=_rows_last(t.v))
    if problem.page_size:
        t = t._replace(k=t.k.transpose(1, 2), v=t.v.transpose(1, 2))
    return t._replace(**{name: native.contiguous(getattr(t, name)) for name in _VECTORS})


def attention_fwd(problem, t, with_lse=True) -> tuple[Tensor, Tensor | None]:
    """Output and, with_lse, the log-sum-exp of attention (see `fastattn.attention`)."""
    batch, heads, seqlen_q = problem.batch, problem.heads, problem.seqlen_q
    head_dim_v = problem.head_dim_v
    if problem.packed:
        batch, seqlen_q = 1, t.q.shape[0]
    strides = (seqlen_q * heads * head_dim_v, head_dim_v, heads * head_dim_v, 1)
    out = torch.empty_strided((batch, heads, seqlen_q, head_dim_v), strides, dtype=problem.dtype)
    lse = torch.empty((batch, heads, seqlen_q)) if with_lse else None
    if batch and heads and seqlen_q:
        call = t if problem.plain else _in_kernels_layout(problem, t)
        q, k, v = map(native.unit_last_stride, call[:3])
        native._C.attention_fwd(
            *_call(problem, call, q, k, v), (out.data_ptr(), strides), native.pointer(lse)
        )
    if problem.packed:
        return out[0].transpose(0, 1), None if lse is None else lse[0]
    return out, lse


def attention_bwd(problem, t, out, lse, dout, dlse) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, bias and sinks, absent ones None."""
    dq, dk, dv = (torch.empty_like(x) for x in t[:3])
    grads = [dq, dk, dv]
    call = t if problem.plain else _in_kernels_layout(problem, t)
    if problem.packed:
        out, dout = _rows_last(out), _rows_last(dout)
        grads = [_rows_last(grad) for grad in grads]
    grads_in_place = grads
    grads = [native.unit_last_stride(grad) for grad in grads]
    q, k, v, out, dout = map(native.unit_last_stride, (*call[:3], out, dout))
    lse, dlse = lse.contiguous(), native.contiguous(dlse)
    delta = torch.empty_like(lse)
    dbias = None
    if problem.bias_grad:
        full = (problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k)
        make = torch.empty if t.bias.shape == full and not _hides(problem) else torch.zeros
        dbias = make(t.bias.shape)
    if lse.numel() and problem.seqlen_k:
        native._C.attention_bwd(
            *_call(problem, call, q, k, v),
            _address(out),
            lse.data_ptr(),
            _address(dout),
            native.pointer(dlse),
            delta.data_ptr(),
            *map(_address, grads),
            None if dbias is None else _broadcast_address(dbias),
        )
    else:
        for grad in grads:
            grad.zero_()
        delta = torch.zeros_like(lse) if dlse is None else -dlse
    for grad, in_place in zip(grads, grads_in_place):
        if grad is not in_place:
            in_place.copy_(grad)
    dsinks = None
    if t.sinks is not None:
        weight = torch.where(lse.isneginf(), 0.0, torch.exp(t.sinks.view(-1, 1) - lse))
        dsinks = -(weight * delta).sum(-1)
        dsinks = dsinks if problem.packed else dsinks.sum(0)
    return dq, dk, dv, None if dbias is None else dbias.to(t.bias.dtype), dsinks
