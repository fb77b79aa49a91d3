"""Attention on the CUDA kernels."""

import math

import torch
from torch import Tensor

from fastattn.backends.cuda import device

MAX_HEAD_DIM = 256
UNBOUNDED = 1 << 28  # of csrc/cuda/attention.h: beyond any sequence and offset
FARTHEST = UNBOUNDED // 2


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    reasons = device.multiples_of_8(problem, "head_dim", "head_dim_v")
    for name, most in (
        ("head_dim", MAX_HEAD_DIM),
        ("head_dim_v", MAX_HEAD_DIM),
        ("seqlen_q", FARTHEST),
        ("seqlen_k", FARTHEST),
    ):
        if getattr(problem, name) > most:
            reasons.append(f"{name}={getattr(problem, name)} > {most}")
    if abs(problem.offset) > FARTHEST:
        reasons.append(f"offset={problem.offset}, only -{FARTHEST} to {FARTHEST}")
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype={problem.dtype}, only float16 and bfloat16")
    if problem.mask:
        reasons.append("mask: no CUDA C++ kernel takes one")
    if problem.bias is not None:
        reasons.append("bias: no CUDA C++ kernel takes one")
    if not problem.softmax_scale > 0:
        reasons.append(f"softmax_scale={problem.softmax_scale}, only positive ones")
    if problem.page_size and problem.op == "attention_bwd":
        reasons.append("block_table: no kernel for the gradient of a paged cache")
    return reasons


def _rows_last(packed: Tensor) -> Tensor:
    """Packed (total, heads, head_dim) as (1, heads, total, head_dim), the layout of kernels."""
    return packed.transpose(0, 1)[None]


_VECTORS = ("alibi_slopes", "sinks", "offsets", "seqlens_k", "cu_seqlens_q", "cu_seqlens_k")


def _in_kernels_layout(problem, t):
    """The tensors as kernels read them: q, k and v 4-D with rows next to last, vectors dense."""
    q, k, v = t.q, t.k, t.v
    if problem.packed:
        q = _rows_last(q)
        if not problem.page_size:
            k, v = _rows_last(k), _rows_last(v)
    if problem.page_size:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    t = t._replace(q=device.aligned(q), k=device.aligned(k), v=device.aligned(v))
    if problem.plain:
        return t
    vectors = {name: device.contiguous(getattr(t, name)) for name in _VECTORS}
    return t._replace(block_table=device.contiguous(t.block_table), **vectors)


def _call(problem, t):
    """The call as kernels take it, but for its results; `t` is in their layout."""
    left, right = problem.window_left, problem.window_right
    call = device.kernels.AttentionCall(
        device.where(t.q),
        device.DTYPES[problem.dtype],
        problem[3:10],
        device.address(t.q),
        device.address(t.k),
        device.address(t.v),
        problem.softmax_scale,
        problem.softcap,
        (
            UNBOUNDED if left is None else left,
            UNBOUNDED if right is None else right,
            problem.offset,
        ),
    )
    if problem.plain:
        return call
    if t.offsets is not None:
        call.set_offsets(device.pointer(t.offsets))
    if t.seqlens_k is not None:
        call.set_seqlens_k(device.pointer(t.seqlens_k))
    if t.sinks is not None:
        call.set_sinks(device.pointer(t.sinks))
    if t.alibi_slopes is not None:
        slopes = t.alibi_slopes
        call.set_alibi_slopes(device.address(slopes if slopes.dim() == 2 else slopes[None]))
    if t.seed is not None:
        call.set_dropout(device.dropout(problem, t.seed))
    if problem.packed:
        starts = (device.pointer(x) for x in (t.cu_seqlens_q, t.cu_seqlens_k))
        call.set_packed(*starts, t.q.shape[2], 0 if problem.page_size else t.k.shape[2])
    if problem.page_size:
        call.set_paged(device.address(t.block_table), problem.page_size)
    return call


@device.on_device_of_tensors
def attention_fwd(problem, t, with_lse=True) -> tuple[Tensor, Tensor | None]:
    """Output and, with_lse, the log-sum-exp of attention (see `fastattn.attention`)."""
    t = _in_kernels_layout(problem, t)
    batch, heads, seqlen_q, _ = t.q.shape
    out = t.q.new_empty((batch, seqlen_q, heads, problem.head_dim_v)).transpose(1, 2)
    lse = t.q.new_empty((batch, heads, seqlen_q), dtype=torch.float32) if with_lse else None
    if problem.packed:  # rows that belong to no sequence
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
    if out.numel() and problem.seqlen_q:
        call = _call(problem, t)
        splits = 1 if problem.deterministic else device.kernels.attention_splits(call)
        partial_out = partial_lse = None
        if splits > 1:
            shape = (splits, problem.batch, heads, problem.seqlen_q)
            partial_lse = t.q.new_empty(shape, dtype=torch.float32)
            partial_out = t.q.new_empty((*shape, problem.head_dim_v), dtype=torch.float32)
        device.kernels.attention_fwd(
            call,
            device.address(out),
            device.pointer(lse),
            splits,
            device.pointer(partial_out),
            device.pointer(partial_lse),
        )
    if problem.packed:
        return out[0].transpose(0, 1), None if lse is None else lse[0]
    return out, lse


@device.on_device_of_tensors
def attention_bwd(problem, t, out, lse, dout, dlse) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, bias and sinks, absent ones None."""
    runs = lse.numel() and problem.seqlen_q and problem.seqlen_k
    whole = runs and not (problem.packed or problem.seqlens_k)
    grads = [torch.empty_like(x) if whole else torch.zeros_like(x) for x in t[:3]]
    lse, dlse = lse.contiguous(), device.contiguous(dlse)
    delta = torch.zeros_like(lse) if problem.packed or not runs else torch.empty_like(lse)
    if runs:
        written = [device.aligned(grad) for grad in grads]
        by_row = [out, dout, *written]
        if problem.packed:
            by_row = [_rows_last(x) for x in by_row]
        out, dout, *in_layout = map(device.aligned, by_row)
        t = _in_kernels_layout(problem, t)
        call = _call(problem, t)
        sums = device.kernels.attention_dq_sum(call, problem.deterministic)
        dq_sum = t.q.new_zeros(sums, dtype=torch.float32) if sums else None
        device.kernels.attention_bwd(
            call,
            device.address(out),
            device.pointer(lse),
            device.address(dout),
            device.pointer(dlse),
            device.pointer(delta),
            *map(device.address, in_layout),
            device.pointer(dq_sum),
            problem.deterministic,
        )
        for grad, one in zip(grads, written):
            if one is not grad:
                grad.copy_(one)
    elif dlse is not None:
        delta = -dlse
    dsinks = None
    if t.sinks is not None:
        # The sink's weight is exp(sink - lse), its value 0.
        weighted = torch.exp(t.sinks.view(-1, 1) - lse) * delta
        dsinks = -torch.where(lse.isneginf(), 0.0, weighted).sum(-1)
        dsinks = dsinks if problem.packed else dsinks.sum(0)
    return *grads, None, dsinks
