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
    if problem.packed and problem.dropout_p:
        reasons.append("cu_seqlens_q: no dropout in packed sequences")
    if problem.page_size:
        reasons.append("block_table: no kernel for a paged cache")
    if problem.bias == torch.float64:
        reasons.append("bias dtype=torch.float64")
    return reasons


def _address(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


def _broadcast_address(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """As `_address`, with stride 0 in dims of size 1, over which a mask or bias is broadcast."""
    strides = zip(tensor.shape, tensor.stride())
    return tensor.data_ptr(), tuple(0 if size == 1 else stride for size, stride in strides)


def _call(problem, t, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """The arguments that both directions of attention share."""
    left, right = problem.window_left, problem.window_right
    return (
        native.DTYPES[problem.dtype],
        tuple(problem[3:10]),
        (q.data_ptr(), q.stride()),
        (k.data_ptr(), k.stride()),
        (v.data_ptr(), v.stride()),
        problem.softmax_scale,
        problem.softcap,
        (
            native._C.UNBOUNDED if left is None else left,
            native._C.UNBOUNDED if right is None else right,
            problem.offset,
        ),
        _features(problem, t),
        problem.deterministic,
    )


def _features(problem, t):
    """The tensors of `t` beside q, k and v, as the native module takes them; None if none."""
    if t.mask is t.bias is t.alibi_slopes is t.sinks is t.seed is t.offset is t.seqlens_k is None:
        return None
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
    for name, tensor in (("sinks", t.sinks), ("offsets", t.offset), ("seqlens_k", t.seqlens_k)):
        if tensor is not None:
            setattr(features, name, tensor.data_ptr())
    if t.seed is not None:
        features.dropout_p, features.seed = problem.dropout_p, int(t.seed)
    return features


def _contiguous_vectors(t):
    """The tensors with those that kernels read as plain arrays made contiguous."""
    if t.sinks is t.offset is t.seqlens_k is None:
        return t
    return t._replace(
        sinks=None if t.sinks is None else t.sinks.contiguous(),
        offset=None if t.offset is None else t.offset.contiguous(),
        seqlens_k=None if t.seqlens_k is None else t.seqlens_k.contiguous(),
    )


def _sequences(problem, t):
    """Of each packed sequence its rows of q and of k, and its own call."""
    starts_q, starts_k = t.cu_seqlens_q.tolist(), t.cu_seqlens_k.tolist()
    for b in range(problem.batch):
        rows = slice(starts_q[b], starts_q[b + 1])
        columns = slice(starts_k[b], starts_k[b + 1])
        one = t._replace(
            q=t.q[rows].transpose(0, 1)[None],
            k=t.k[columns].transpose(0, 1)[None],
            v=t.v[columns].transpose(0, 1)[None],
            offset=None if t.offset is None else t.offset[b, None],
            seqlens_k=None if t.seqlens_k is None else t.seqlens_k[b, None],
        )
        if t.alibi_slopes is not None and t.alibi_slopes.dim() == 2:
            one = one._replace(alibi_slopes=t.alibi_slopes[b, None])
        lengths = {"seqlen_q": one.q.shape[2], "seqlen_k": one.k.shape[2]}
        yield rows, columns, problem._replace(packed=False, batch=1, **lengths), one


def _packed_fwd(problem, t) -> tuple[Tensor, Tensor]:
    out = t.q.new_empty((*t.q.shape[:2], problem.head_dim_v))
    lse = torch.empty(t.q.shape[1::-1])
    for rows, _, problem_of_one, one in _sequences(problem, t):
        out_of_one, lse_of_one = attention_fwd(problem_of_one, one)
        out[rows], lse[:, rows] = out_of_one[0].transpose(0, 1), lse_of_one[0]
    return out, lse


def _packed_bwd(problem, t, out, lse, dout, dlse) -> tuple[Tensor | None, ...]:
    dq, dk, dv = (torch.empty_like(tensor) for tensor in t[:3])
    dsinks = None if t.sinks is None else torch.zeros_like(t.sinks)
    for rows, columns, problem_of_one, one in _sequences(problem, t):
        results = (out[rows].transpose(0, 1)[None], lse[None, :, rows])
        cotangents = (
            dout[rows].transpose(0, 1)[None],
            None if dlse is None else dlse[None, :, rows],
        )
        grads: Any = attention_bwd(problem_of_one, one, *results, *cotangents)
        for whole, part, grad in zip((dq, dk, dv), (rows, columns, columns), grads):
            whole[part] = grad[0].transpose(0, 1)
        if dsinks is not None:
            dsinks += grads[4]
    return dq, dk, dv, None, dsinks


def attention_fwd(problem, t) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention (see `fastattn.attention`)."""
    if problem.packed:
        return _packed_fwd(problem, t)
    q, k, v = (
        native.unit_last_stride(t.q),
        native.unit_last_stride(t.k),
        native.unit_last_stride(t.v),
    )
    t = _contiguous_vectors(t)
    batch, heads, seqlen_q = problem.batch, problem.heads, problem.seqlen_q
    head_dim_v = problem.head_dim_v
    strides = (seqlen_q * heads * head_dim_v, head_dim_v, heads * head_dim_v, 1)
    out = torch.empty_strided((batch, heads, seqlen_q, head_dim_v), strides, dtype=problem.dtype)
    lse = torch.empty((batch, heads, seqlen_q))
    if lse.numel():
        native._C.attention_fwd(
            *_call(problem, t, q, k, v), (out.data_ptr(), strides), lse.data_ptr()
        )
    return out, lse


def attention_bwd(problem, t, out, lse, dout, dlse) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, bias and sinks, absent ones None."""
    if problem.packed:
        return _packed_bwd(problem, t, out, lse, dout, dlse)
    dq, dk, dv = torch.empty_like(t.q), torch.empty_like(t.k), torch.empty_like(t.v)
    grads = [native.unit_last_stride(grad) for grad in (dq, dk, dv)]
    q, k, v = (
        native.unit_last_stride(t.q),
        native.unit_last_stride(t.k),
        native.unit_last_stride(t.v),
    )
    out, dout = native.unit_last_stride(out), native.unit_last_stride(dout)
    t = _contiguous_vectors(t)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    dbias = wide_dbias = None
    if problem.bias_grad:
        wide_dbias = torch.zeros(t.bias.shape)
        dbias = (*_broadcast_address(wide_dbias), wide_dbias.numel())
    if lse.numel() and problem.seqlen_k:
        native._C.attention_bwd(
            *_call(problem, t, q, k, v),
            _address(out),
            lse.data_ptr(),
            _address(dout),
            0 if dlse is None else (dlse := dlse.contiguous()).data_ptr(),
            delta.data_ptr(),
            *map(_address, grads),
            dbias,
        )
    else:
        for grad in grads:
            grad.zero_()
        delta = torch.zeros_like(lse) if dlse is None else -dlse
    for grad, strided in zip((dq, dk, dv), grads):
        if grad is not strided:
            grad.copy_(strided)
    dsinks = None
    if t.sinks is not None:
        weight = torch.where(lse.isneginf(), 0.0, torch.exp(t.sinks.view(1, -1, 1) - lse))
        dsinks = -(weight * delta).sum((0, 2))
    return dq, dk, dv, None if wide_dbias is None else wide_dbias.to(t.bias.dtype), dsinks
