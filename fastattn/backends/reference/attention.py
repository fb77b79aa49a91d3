"""Attention in plain PyTorch; memory is quadratic in the sequence length."""

import math

import torch
from torch import Tensor

from fastattn import philox
from fastattn.backends.reference import common


@common.without_autocast
def attention_fwd(problem, t, with_lse=True) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention (see `fastattn.attention`), lse in any case."""
    if not problem.packed:
        return _dense_fwd(problem, _unpaged(t), 0)
    out = t.q.new_zeros(*t.q.shape[:2], problem.head_dim_v, dtype=problem.out_dtype)
    lse = torch.full(t.q.shape[1::-1], -math.inf, dtype=common.accumulate_dtype(t.q.dtype))
    lse = lse.to(t.q.device)
    for index, (rows, _, sequence) in enumerate(_sequences(t)):
        one_out, one_lse = _dense_fwd(problem, sequence, index)
        out[rows] = one_out[0].transpose(0, 1)
        lse[:, rows] = one_lse[0]
    return out, lse


@common.without_autocast
def attention_bwd(problem, t, out, lse, dout, dlse) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, bias and sinks, absent ones None."""
    if not problem.packed:
        if not problem.page_size:
            return _dense_bwd(problem, t, dout, dlse, 0)
        paged = _dense_bwd(problem, _unpaged(t), dout, dlse, 0)
        return _paged_grads(t, *paged)
    dq, dk, dv = (torch.zeros_like(tensor) for tensor in t[:3])
    dsinks = None if t.sinks is None else torch.zeros_like(t.sinks)
    for index, (rows, columns, sequence) in enumerate(_sequences(t)):
        one_dlse = None if dlse is None else dlse[None, :, rows]
        grads = _dense_bwd(problem, sequence, _batched(dout[rows]), one_dlse, index)
        if columns is None:
            grads = _paged_grads(t._replace(block_table=t.block_table[index, None]), *grads)
            dk, dv = dk + grads[1], dv + grads[2]
        else:
            dk[columns], dv[columns] = (grad[0].transpose(0, 1) for grad in grads[1:3])
        dq[rows] = grads[0][0].transpose(0, 1)
        if dsinks is not None:
            dsinks += grads[4]
    return dq, dk, dv, None, dsinks


def _dense_fwd(problem, t, first_batch: int) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(problem, t)
    p, _, lse = _softmax(problem, t, scores)
    if problem.dropout_p:
        p = p * _attention_dropout(problem, t, p, first_batch)
    out = p @ _per_query_head(t.v, problem.heads, scores.dtype)
    return out.to(problem.out_dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def _dense_bwd(problem, t, dout, dlse, first_batch: int) -> tuple[Tensor | None, ...]:
    scores, cap_slope = _scores(problem, t)
    dtype, heads = scores.dtype, problem.heads
    # Not exp(scores - lse): lse is rounded at the size of the scores, which may be large.
    p, p_sink, _ = _softmax(problem, t, scores)
    keep = _attention_dropout(problem, t, p, first_batch) if problem.dropout_p else None
    dout = dout.to(dtype)
    dp = dout @ _per_query_head(t.v, heads, dtype).mT
    p_kept = p
    if keep is not None:
        dp, p_kept = dp * keep, p * keep
    delta = (p * dp).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dscores = p * (dp - delta[..., None])
    dbias = dsinks = None
    if problem.bias_grad:
        dbias = dscores.sum_to_size(*t.bias.shape).to(t.bias.dtype)
    if t.sinks is not None:
        dsinks = -(p_sink * delta).sum((0, 2)).to(t.sinks.dtype)
    if cap_slope is not None:
        dscores = dscores * cap_slope
    dscores = dscores * problem.softmax_scale
    dq = dscores @ _per_query_head(t.k, heads, dtype)
    dk = _per_kv_head(dscores.mT @ t.q.to(dtype), problem.heads_kv)
    dv = _per_kv_head(p_kept.mT @ dout, problem.heads_kv)
    return _like(dq, t.q), _like(dk, t.k), _like(dv, t.v), dbias, dsinks


def _batched(packed: Tensor) -> Tensor:
    """(seqlen, heads, head_dim) of one packed sequence as (1, heads, seqlen, head_dim)."""
    return packed.transpose(0, 1)[None]


def _sequences(t):
    """Of each packed sequence: its rows of q, its rows of k (None if paged), its tensors."""
    starts_q = t.cu_seqlens_q.tolist()
    starts_k = None if t.cu_seqlens_k is None else t.cu_seqlens_k.tolist()
    for index in range(len(starts_q) - 1):
        rows = slice(starts_q[index], starts_q[index + 1])
        one = t._replace(
            q=_batched(t.q[rows]),
            offsets=None if t.offsets is None else t.offsets[index, None],
            seqlens_k=None if t.seqlens_k is None else t.seqlens_k[index, None],
        )
        if t.alibi_slopes is not None and t.alibi_slopes.dim() == 2:
            one = one._replace(alibi_slopes=t.alibi_slopes[index])
        if t.block_table is not None:
            columns = None
            one = _unpaged(one._replace(block_table=t.block_table[index, None]))
        else:
            columns = slice(starts_k[index], starts_k[index + 1])
            one = one._replace(k=_batched(t.k[columns]), v=_batched(t.v[columns]))
        yield rows, columns, one


def _unpaged(t):
    """The tensors with the pages of each sequence gathered into (batch, heads_kv, seqlen_k, .)."""
    if t.block_table is None:
        return t
    pages = t.block_table.long().clamp(min=0)
    k, v = (cache[pages].flatten(1, 2).transpose(1, 2) for cache in (t.k, t.v))
    return t._replace(k=k, v=v)


def _paged_grads(t, dq, dk, dv, dbias, dsinks):
    """Adds the gradients of gathered keys and values back into their pages."""
    pages = t.block_table.long().clamp(min=0)
    scattered = []
    for cache, grad in ((t.k, dk), (t.v, dv)):
        grad = grad.transpose(1, 2).reshape(*pages.shape, *cache.shape[1:])
        scattered.append(torch.zeros_like(cache).index_put_((pages,), grad, accumulate=True))
    return dq, *scattered, dbias, dsinks


def _like(grad: Tensor, tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor).copy_(grad)


def _per_query_head(kv: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return kv.to(dtype).repeat_interleave(heads // max(kv.shape[1], 1), dim=1)


def _per_kv_head(grad: Tensor, heads_kv: int) -> Tensor:
    batch, heads, rows, columns = grad.shape
    return grad.view(batch, heads_kv, heads // max(heads_kv, 1), rows, columns).sum(2)


def _scores(problem, t) -> tuple[Tensor, Tensor | None]:
    """Scores, -inf where hidden, and the derivative of the softcap at each (None without)."""
    dtype = common.accumulate_dtype(t.q.dtype)
    scores = t.q.to(dtype) @ _per_query_head(t.k, problem.heads, dtype).mT
    scores = scores * problem.softmax_scale
    cap_slope = None
    if problem.softcap:
        capped = torch.tanh(scores / problem.softcap)
        scores, cap_slope = capped * problem.softcap, 1 - capped * capped
    if t.bias is not None:
        scores = scores + t.bias.to(dtype)
    distance = _distance(problem, t)
    if t.alibi_slopes is not None:
        slopes = t.alibi_slopes.to(dtype)
        slopes = slopes.view(-1, problem.heads, 1, 1)
        scores = scores - slopes * distance.abs()
    visible = _visible(problem, t, distance)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores, cap_slope


def _distance(problem, t) -> Tensor:
    """j - (i + offset), of shape (1 or batch, 1, seqlen_q, seqlen_k)."""
    i = torch.arange(t.q.shape[2], device=t.q.device)[:, None]
    j = torch.arange(t.k.shape[2], device=t.q.device)
    offset = problem.offset if t.offsets is None else t.offsets.long().view(-1, 1, 1, 1)
    return (j - i).view(1, 1, i.shape[0], j.shape[0]) - offset


def _visible(problem, t, distance: Tensor) -> Tensor | None:
    """Which keys each query may see, broadcastable to the scores; None if all."""
    visible = t.mask
    if problem.window_left is not None:
        band = distance >= -problem.window_left
        visible = band if visible is None else visible & band
    if problem.window_right is not None:
        band = distance <= problem.window_right
        visible = band if visible is None else visible & band
    if t.seqlens_k is not None:
        within = torch.arange(t.k.shape[2], device=t.q.device) < t.seqlens_k.view(-1, 1, 1, 1)
        visible = within if visible is None else visible & within
    return visible


def _softmax(problem, t, scores: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights of the keys and of the sink (None without), 0 in rows that see none, and lse."""
    if t.sinks is not None:
        sinks = t.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    lse = torch.logsumexp(scores, -1)
    p = torch.where(torch.isneginf(lse)[..., None], 0.0, torch.softmax(scores, -1))
    if t.sinks is None:
        return p, None, lse
    return p[..., :-1], p[..., -1], lse


def _attention_dropout(problem, t, p: Tensor, first_batch: int) -> Tensor:
    """0 where a weight is dropped, else 1 / (1 - dropout_p)."""
    batch, heads, seqlen_q, seqlen_k = p.shape
    device = p.device
    keep = philox.keep_mask(
        t.seed,
        problem.dropout_p,
        torch.arange(seqlen_q, device=device).view(1, 1, -1),
        seqlen_k,
        torch.arange(heads, device=device).view(1, -1, 1),
        torch.arange(first_batch, first_batch + batch, device=device).view(-1, 1, 1),
    )
    return keep.to(p.dtype) / (1 - problem.dropout_p)
