"""Attention on the Triton kernels."""

import math

import torch
from torch import Tensor

from fastattn import philox
from fastattn.backends.triton.device import Kernels
from fastattn.backends.triton.layout import unit_last_stride

_kernels = Kernels("attention")
_backward = Kernels("attention_backward")
_scores = Kernels("attention_scores")

MAX_HEAD_DIM = 256
FARTHEST = 1 << 27  # so that bounds beyond `UNBOUNDED` hide nothing
_VECTORS = ("sinks", "offsets", "seqlens_k", "cu_seqlens_q", "cu_seqlens_k", "block_table")


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    limits = dict.fromkeys(("head_dim", "head_dim_v"), MAX_HEAD_DIM)
    limits |= dict.fromkeys(("seqlen_q", "seqlen_k"), FARTHEST)
    reasons = [
        f"{name}={getattr(problem, name)} > {most}"
        for name, most in limits.items()
        if getattr(problem, name) > most
    ]
    if abs(problem.offset) > FARTHEST:
        reasons.append(f"offset={problem.offset}, only -{FARTHEST} to {FARTHEST}")
    if problem.page_size and problem.op == "attention_bwd":
        reasons.append("block_table: no kernel for the gradient of a paged cache")
    return reasons


def _rows_last(packed: Tensor) -> Tensor:
    """Packed (total, heads, head_dim) as (1, heads, total, head_dim), the layout of kernels."""
    return packed.transpose(0, 1)[None]


def _in_kernels_layout(problem, t):
    """The tensors as kernels read them: q, k and v 4-D with rows next to last, vectors dense."""
    if problem.plain:
        return t._replace(**{name: unit_last_stride(getattr(t, name)) for name in "qkv"})
    q, k, v = t.q, t.k, t.v
    if problem.packed:
        q = _rows_last(q)
        if not problem.page_size:
            k, v = _rows_last(k), _rows_last(v)
    if problem.page_size:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    vectors = {name: getattr(t, name) for name in _VECTORS}
    return t._replace(
        **{name: unit_last_stride(x) for name, x in (("q", q), ("k", k), ("v", v))},
        **{name: None if x is None else x.contiguous() for name, x in vectors.items()},
    )


def _clamped(bound: int | None) -> int | None:
    """A bound in 32 bits, still beyond any sequence."""
    unbounded = _scores.UNBOUNDED
    return None if bound is None else max(-unbounded, min(unbounded, bound))


def _call(problem, t):
    """The call as kernels take it; `t` is in their layout."""
    alibi = t.alibi_slopes
    if alibi is not None:
        strides = (0, alibi.stride(0)) if alibi.dim() == 1 else alibi.stride()
        alibi = _scores.Broadcast(alibi, *strides, 0, 0)
    return _scores.Call(
        heads=problem.heads,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        softmax_scale=problem.softmax_scale,
        softcap=problem.softcap or None,
        window_left=_clamped(problem.window_left),
        window_right=_clamped(problem.window_right),
        offset=problem.offset,
        offsets=t.offsets,
        seqlens_k=t.seqlens_k,
        cu_seqlens_q=t.cu_seqlens_q,
        cu_seqlens_k=t.cu_seqlens_k,
        mask=_scores.broadcast_of(t.mask),
        bias=_scores.broadcast_of(t.bias),
        alibi=alibi,
        sinks=t.sinks,
        seed=t.seed,
        threshold=philox.threshold(problem.dropout_p),
        keep_scale=1.0 / (1.0 - problem.dropout_p),
        block_table=t.block_table,
        max_pages=0 if t.block_table is None else t.block_table.shape[1],
        page_size=problem.page_size,
    )


def attention_fwd(problem, t, with_lse=True) -> tuple[Tensor, Tensor | None]:
    """Output and, with_lse, the log-sum-exp of attention (see `fastattn.attention`)."""
    t = _in_kernels_layout(problem, t)
    batch, heads, seqlen_q, _ = t.q.shape
    shape = (batch, seqlen_q, heads, problem.head_dim_v)
    out = t.q.new_empty(shape, dtype=problem.out_dtype).transpose(1, 2)
    lse = t.q.new_empty((batch, heads, seqlen_q), dtype=torch.float32) if with_lse else None
    if problem.packed:  # rows that belong to no sequence
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
    _kernels.attention_fwd(
        t.q, t.k, t.v, out, lse, _call(problem, t), problem.batch,
        deterministic=problem.deterministic,
    )  # fmt: skip
    if problem.packed:
        return out[0].transpose(0, 1), None if lse is None else lse[0]
    return out, lse


def attention_bwd(problem, t, out, lse, dout, dlse) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, bias and sinks, absent ones None."""
    whole = lse.numel() and not (problem.packed or problem.seqlens_k)
    grads = [torch.empty_like(x) if whole else torch.zeros_like(x) for x in t[:3]]
    written = [unit_last_stride(grad) for grad in grads]
    lse = lse.contiguous()
    delta = torch.zeros_like(lse) if problem.packed else torch.empty_like(lse)
    by_head = [lse, None if dlse is None else dlse.contiguous(), delta]
    by_row = [out, dout, *written]
    if problem.packed:
        by_head = [None if x is None else x[None] for x in by_head]
        by_row = [_rows_last(x) for x in by_row]
    dbias = t.bias.new_empty(t.bias.shape) if problem.bias_grad else None
    call = _in_kernels_layout(problem, t)
    out, dout, *in_layout = map(unit_last_stride, by_row)
    _backward.attention_bwd(
        call.q, call.k, call.v, out, dout, *by_head, *in_layout, dbias,
        _call(problem, call), problem.batch,
    )  # fmt: skip
    for grad, one in zip(grads, written):
        if one is not grad:
            grad.copy_(one)
    dsinks = None
    if t.sinks is not None:
        # The sink's weight is exp(sink - lse), its value 0.
        weighted = torch.exp(t.sinks.view(-1, 1) - lse) * delta
        dsinks = -torch.where(lse.isneginf(), 0.0, weighted).sum(-1)
        dsinks = dsinks if problem.packed else dsinks.sum(0)
    return *grads, dbias, dsinks
