"""Scaled dot-product attention: signature, autograd and torch.library registration."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn import dispatch, philox
from fastattn.ops import attention_problem, common
from fastattn.ops.attention_problem import (
    AttentionProblem,
    AttentionScalars,
    AttentionTensors,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    offset: int | Tensor = 0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    seqlens_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused scaled dot-product attention (Vaswani et al. 2017, section 3.2.1).

    The score of query i and key j is ``softmax_scale * q_i . k_j``, soft-capped, plus bias and
    ALiBi; key j is visible to query i when
    ``i + offset - window[0] <= j <= i + offset + window[1]`` and the mask and the lengths allow
    it. A query that sees no key gets output 0, lse -inf and gradient 0.

    Args:
        q: ``(batch, heads, seqlen_q, head_dim)``, or packed ``(total_q, heads, head_dim)``;
            float32, float16, bfloat16, or float64 on the reference backend. Any strides. Without
            gradients also float8_e4m3fn, with output in bfloat16: scales of q and k go into
            `softmax_scale`, that of v onto the output.
        k: ``(batch, heads_kv, seqlen_k, head_dim)``, packed ``(total_k, heads_kv, head_dim)``, or
            paged ``(num_pages, page_size, heads_kv, head_dim)``. `heads` is a multiple of
            `heads_kv` (grouped-query attention, Ainslie et al. 2023).
        v: as `k`, with ``head_dim_v`` in place of ``head_dim``.
        softmax_scale: factor of the scores; default ``1 / sqrt(head_dim)``.
        causal: hide the keys right of the diagonal: ``window[1]`` is at most 0.
        window: inclusive bounds (left, right) of the visible band, None for no bound (not -1, which
            would be a band that ends left of the diagonal).
        offset: diagonal of the band: 0 aligns top left as PyTorch does,
            ``seqlen_k - seqlen_q`` bottom right as flash-attention does. An int32 tensor
            ``(batch,)`` gives each sequence its own.
        mask: boolean, True = take part, broadcastable to ``(batch, heads, seqlen_q, seqlen_k)``.
        bias: added to the scores, broadcastable alike; its gradient has its own shape.
        alibi_slopes: float32 ``(heads,)`` or ``(batch, heads)``: adds
            ``-slope * |i + offset - j|`` (Press et al. 2022). Not differentiable.
        softcap: ``softcap * tanh(score / softcap)`` before bias and mask (Gemma 2).
        sinks: ``(heads,)``, one extra logit a head in the softmax's denominator
            (Xiao et al. 2024).
        dropout_p: probability of dropping an attention weight, 0 <= dropout_p < 1.
        seed: of the dropout, int or int64 tensor of one element; default drawn from torch's
            generator. The same seed drops the same weights on every backend.
        seqlens_k: int32 ``(batch,)``, number of valid keys of each sequence.
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)``, where each packed sequence begins.
        max_seqlen_q, max_seqlen_k: longest packed sequence; computed if not given, for which the
            host waits for the device.
        block_table: int32 ``(batch, max_pages)``, the pages of each sequence's cache; needs
            `seqlens_k`.
        return_lse: return ``(out, lse)``.
        deterministic: the same bits also across thread counts and batch sizes. Equal calls always
            give them, but for the gradient of q of the CUDA backend, which needs it for that.

    Returns:
        out ``(batch, heads, seqlen_q, head_dim_v)`` in the dtype of `q`, stored with heads inside
        seqlen (``out.transpose(1, 2)`` is contiguous); packed ``(total_q, heads, head_dim_v)``.
        With `return_lse` also the log-sum-exp of the scores, float32, natural logarithm,
        ``(batch, heads, seqlen_q)``, packed ``(heads, total_q)``; differentiable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.
        fastattn.BackendError: a forced backend cannot run the call.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor):
            common.check_tensor(name, value)
    device_type = q.device.type
    if common.autocast_enabled(device_type):
        q, k, v = common.autocast(device_type, q, k, v)  # type: ignore[assignment]
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(f"window: expected (left, right), got {window!r}") from None
    if causal:
        right = 0 if right is None else min(right, 0)
    offset_tensor = None
    if isinstance(offset, Tensor):
        offset, offset_tensor = 0, offset
    if dropout_p:
        common.check_dropout(dropout_p)
        seed = philox.new_seed(q.device) if seed is None else common.seed_tensor(seed, q.device)
    else:
        seed = None
    if bias is not None and bias.dtype not in (q.dtype, torch.float32):
        bias = bias.to(attention_problem.out_dtype(q.dtype))
    if sinks is not None:
        sinks = sinks.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes: no gradient is computed for it; detach it, or use bias")
    if cu_seqlens_q is not None:
        max_seqlen_q, max_seqlen_k = _longest(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        )
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
    t = AttentionTensors(
        q, k, v, mask, bias, alibi_slopes, sinks, seed, offset_tensor, seqlens_k,
        cu_seqlens_q, cu_seqlens_k, block_table,
    )  # fmt: skip
    scalars = AttentionScalars(
        softmax_scale, left, right, offset, softcap or 0.0, dropout_p,
        max_seqlen_q or 0, max_seqlen_k or 0,
        deterministic or torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    if not common.is_plain(q, k, v, mask, bias, sinks) or q.is_meta:
        out, lse = torch.ops.fastattn.attention_fwd(*t, *scalars)
    elif common.needs_grad(q, k, v, bias, sinks):
        if q.dtype == torch.float8_e4m3fn:
            raise TypeError("q: no gradient is computed for torch.float8_e4m3fn; use torch.no_grad")
        out, lse = _Attention.apply(q, k, v, bias, sinks, (t, scalars))
    else:
        out, lse = _fwd(t, scalars, return_lse)
    return (out, lse) if return_lse else out


def _longest(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[int, int | None]:
    if max_seqlen_q is None:
        max_seqlen_q = int(cu_seqlens_q.diff().max()) if cu_seqlens_q.numel() > 1 else 0
    if max_seqlen_k is None and cu_seqlens_k is not None:
        max_seqlen_k = int(cu_seqlens_k.diff().max()) if cu_seqlens_k.numel() > 1 else 0
    return max_seqlen_q, max_seqlen_k


def _empty_outputs(t: AttentionTensors) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse in the layout that every backend gives them."""
    q, head_dim_v = t.q, t.v.shape[-1]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtype = attention_problem.out_dtype(q.dtype)
    if t.cu_seqlens_q is not None:
        total_q, heads, _ = q.shape
        return (
            q.new_empty((total_q, heads, head_dim_v), dtype=dtype),
            q.new_empty((heads, total_q), dtype=lse_dtype),
        )
    batch, heads, seqlen_q, _ = q.shape
    out = q.new_empty((batch, seqlen_q, heads, head_dim_v), dtype=dtype).transpose(1, 2)
    return out, q.new_empty((batch, heads, seqlen_q), dtype=lse_dtype)


def _problem(
    op: str, t: AttentionTensors, scalars: AttentionScalars, bias_grad: bool = False
) -> tuple[AttentionProblem, AttentionTensors]:
    """The call's problem, and its tensors with mask and bias 4-D."""
    problem = attention_problem.problem(op, t, scalars, bias_grad)
    if t.mask is not None or t.bias is not None:
        t = t._replace(mask=common.as_rank(t.mask, 4), bias=common.as_rank(t.bias, 4))
    return problem, t


def _fwd(
    t: AttentionTensors, scalars: AttentionScalars, with_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    problem, t = _problem("attention_fwd", t, scalars)
    attention_problem.check_values(t, problem)
    return dispatch.select(problem).attention_fwd(problem, t, with_lse)


def _bwd(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    t: AttentionTensors,
    scalars: AttentionScalars,
    bias_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, bias and sinks, None where absent or, of the bias, not asked for."""
    problem, four_dims = _problem("attention_bwd", t, scalars, bias_grad)
    backend = dispatch.select(problem)
    dq, dk, dv, dbias, dsinks = backend.attention_bwd(problem, four_dims, out, lse, dout, dlse)
    if dbias is not None:
        dbias = dbias.reshape(t.bias.shape)
    return dq, dk, dv, dbias, dsinks


class _Attention(torch.autograd.Function):
    """The eager call under autograd; `attention_fwd` of torch.library is its traceable twin.

    Only what may need a gradient is an argument of its own: each argument costs time.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, call):
        t, scalars = call
        out, lse = _fwd(t, scalars)
        _save(ctx, t, scalars, out, lse)
        ctx.forced_backend = dispatch.forced_backend()
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        with dispatch.backward_backend(ctx.forced_backend):
            grads = _backward(ctx, dout, dlse, ctx.needs_input_grad[3], _bwd)
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return *(grad if needs else None for grad, needs in needed), None


def _save(ctx, t, scalars, out, lse):
    ctx.save_for_backward(out, lse, *t)
    ctx.scalars = scalars
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, bias_grad, bwd):
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * 5
        dout = torch.zeros_like(out)
    return bwd(dout, dlse, out, lse, AttentionTensors(*tensors), ctx.scalars, bias_grad)


_TENSORS = len(AttentionTensors._fields)


def _fwd_library(*args):
    return _fwd(AttentionTensors(*args[:_TENSORS]), AttentionScalars(*args[_TENSORS:]))


def _fwd_meta(*args):
    t = AttentionTensors(*args[:_TENSORS])
    attention_problem.check("attention_fwd", t, AttentionScalars(*args[_TENSORS:]))
    return _empty_outputs(t)


def _bwd_library(dout, dlse, out, lse, *args):
    t, scalars = AttentionTensors(*args[:_TENSORS]), AttentionScalars(*args[_TENSORS:-1])
    grads = _bwd(dout, dlse, out, lse, t, scalars, args[-1])
    return tuple(dout.new_empty(0) if grad is None else grad for grad in grads)


def _bwd_meta(dout, dlse, out, lse, *args):
    t = AttentionTensors(*args[:_TENSORS])
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (t.q, t.k, t.v))
    dbias, dsinks = (
        dout.new_empty(0) if tensor is None else tensor.new_empty(tuple(tensor.shape))
        for tensor in (t.bias if args[-1] else None, t.sinks)
    )
    return dq, dk, dv, dbias, dsinks


def _library_setup(ctx, inputs, output):
    t, scalars = AttentionTensors(*inputs[:_TENSORS]), AttentionScalars(*inputs[_TENSORS:])
    _save(ctx, t, scalars, *output)


def _library_backward(ctx, dout, dlse):
    needs = AttentionTensors(*ctx.needs_input_grad[:_TENSORS])

    def bwd(dout, dlse, out, lse, t, scalars, bias_grad):
        return torch.ops.fastattn.attention_bwd(dout, dlse, out, lse, *t, *scalars, bias_grad)

    dq, dk, dv, dbias, dsinks = _backward(ctx, dout, dlse, needs.bias, bwd)
    grads = dict(q=dq, k=dk, v=dv, bias=dbias, sinks=dsinks)
    by_tensor = (grads.get(name) if need else None for name, need in needs._asdict().items())
    return *by_tensor, *(None,) * len(AttentionScalars._fields)


_CALL = common.schema_of(AttentionTensors, AttentionScalars)
_fwd_op = torch.library.custom_op(
    "fastattn::attention_fwd",
    _fwd_library,
    mutates_args=(),
    schema=f"({_CALL}) -> (Tensor, Tensor)",
)
_fwd_op.register_fake(_fwd_meta)
_fwd_op.register_autograd(_library_backward, setup_context=_library_setup)
_bwd_op = torch.library.custom_op(
    "fastattn::attention_bwd",
    _bwd_library,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_CALL}, bool bias_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_bwd_op.register_fake(_bwd_meta)
