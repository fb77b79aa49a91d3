"""The metadata and the tensors of an attention call, and the checks that all of them pass."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops import common

_FLOAT8 = torch.float8_e4m3fn
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, _FLOAT8)


class AttentionProblem(NamedTuple):
    """What a backend needs to know of a call to accept or refuse it; no tensors."""

    op: str  # "attention_fwd" or "attention_bwd"
    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int  # of the longest sequence in a packed call
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    softmax_scale: float
    window_left: int | None
    window_right: int | None
    offset: int
    softcap: float
    dropout_p: float
    deterministic: bool
    offset_tensor: bool
    mask: bool
    bias: torch.dtype | None
    bias_grad: bool
    alibi: bool
    sinks: bool
    seqlens_k: bool
    packed: bool
    page_size: int  # 0: not paged
    plain: bool  # no tensors but q, k and v

    @property
    def out_dtype(self) -> torch.dtype:
        """That of the output."""
        return out_dtype(self.dtype)


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of attention's output for q, k and v of `dtype`."""
    return torch.bfloat16 if dtype == _FLOAT8 else dtype


class AttentionTensors(NamedTuple):
    """The tensors of a call, absent ones None. Mask and bias are 4-D, each dim full or 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    offsets: Tensor | None
    seqlens_k: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    block_table: Tensor | None


class AttentionScalars(NamedTuple):
    """What a call says beside its tensors; `causal` is in the window, defaults are filled in."""

    softmax_scale: float
    window_left: int | None
    window_right: int | None
    offset: int  # 0 where it is a tensor
    softcap: float  # 0: none
    dropout_p: float
    max_seqlen_q: int  # 0: not packed
    max_seqlen_k: int
    deterministic: bool


def _is_plain(t: AttentionTensors) -> bool:
    # Written out: every eager call passes here.
    features = t.mask is t.bias is t.alibi_slopes is t.sinks is t.seed is t.offsets is None
    return features and t.seqlens_k is t.cu_seqlens_q is t.cu_seqlens_k is t.block_table is None


def check(
    op: str, t: AttentionTensors, scalars: AttentionScalars, bias_grad: bool = False
) -> AttentionProblem:
    """The problem of a call; raises ValueError or TypeError, naming the argument that is wrong."""
    q, k, v = t.q, t.k, t.v
    packed = t.cu_seqlens_q is not None
    paged = t.block_table is not None
    _check_dtype_and_device(op, t)
    if packed:
        if t.cu_seqlens_k is None and not paged:
            raise ValueError("cu_seqlens_k: expected a tensor beside cu_seqlens_q, got None")
        _check_dims("q", q, 3, "(total_q, heads, head_dim)")
        batch = t.cu_seqlens_q.shape[0] - 1
        heads, seqlen_q = q.shape[1], scalars.max_seqlen_q
    else:
        if t.cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_q: expected a tensor beside cu_seqlens_k, got None")
        _check_dims("q", q, 4, "(batch, heads, seqlen_q, head_dim)")
        batch, heads, seqlen_q = q.shape[:3]
    page_size = 0
    if paged:
        if t.seqlens_k is None:
            raise ValueError("seqlens_k: expected a tensor beside block_table, got None")
        layout = "(num_pages, page_size, heads_kv, head_dim)"
        _check_dims("k", k, 4, layout)
        _check_dims("v", v, 4, layout)
        _check_vector("block_table", t.block_table, torch.int32, (batch, t.block_table.shape[-1]))
        page_size, heads_kv = k.shape[1:3]
        seqlen_k = t.block_table.shape[1] * page_size
    elif packed:
        _check_dims("k", k, 3, "(total_k, heads_kv, head_dim)")
        _check_dims("v", v, 3, "(total_k, heads_kv, head_dim_v)")
        heads_kv, seqlen_k = k.shape[1], scalars.max_seqlen_k
    else:
        _check_dims("k", k, 4, "(batch, heads_kv, seqlen_k, head_dim)")
        _check_dims("v", v, 4, "(batch, heads_kv, seqlen_k, head_dim_v)")
        heads_kv, seqlen_k = k.shape[1:3]
        if k.shape[0] != batch:
            raise ValueError(f"k: expected batch {batch} as in q, got {k.shape[0]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected head_dim {q.shape[-1]} as in q, got {k.shape[-1]}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v: expected {tuple(k.shape[:-1])} before head_dim_v as in k, "
            f"got {tuple(v.shape[:-1])}"
        )
    if heads and (not heads_kv or heads % heads_kv):
        raise ValueError(f"k: expected heads_kv to divide the {heads} heads of q, got {heads_kv}")
    for name, cu_seqlens in (("cu_seqlens_q", t.cu_seqlens_q), ("cu_seqlens_k", t.cu_seqlens_k)):
        if cu_seqlens is not None:
            _check_vector(name, cu_seqlens, torch.int32, (batch + 1,))
    for name, lengths in (("seqlens_k", t.seqlens_k), ("offset", t.offsets)):
        if lengths is not None:
            _check_vector(name, lengths, torch.int32, (batch,))
    bounds = (scalars.window_left, scalars.window_right, scalars.offset)
    for name, bound in zip(("window", "window", "offset"), bounds, strict=True):
        if bound is not None and not isinstance(bound, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected int, got {type(bound).__name__}")
    if scalars.softcap < 0:
        raise ValueError(f"softcap: expected a positive number, got {scalars.softcap}")
    if t.sinks is not None:
        _check_vector("sinks", t.sinks, None, (heads,))
    if t.alibi_slopes is not None:
        shape = (heads,) if t.alibi_slopes.dim() == 1 else (batch, heads)
        _check_vector("alibi_slopes", t.alibi_slopes, torch.float32, shape)
    full = (batch, heads, seqlen_q, seqlen_k)
    for name, tensor in (("mask", t.mask), ("bias", t.bias)):
        if packed and tensor is not None:
            raise ValueError(f"{name}: not possible with cu_seqlens_q; mask by lengths and window")
    if t.mask is not None:
        if t.mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool (True = take part), got {t.mask.dtype}")
        common.check_broadcast("mask", t.mask, full)
    if t.bias is not None:
        common.check_broadcast("bias", t.bias, full)
    return AttentionProblem(
        op=op,
        device=q.device.type,
        dtype=q.dtype,
        batch=batch,
        heads=heads,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        softmax_scale=scalars.softmax_scale,
        window_left=scalars.window_left,
        window_right=scalars.window_right,
        offset=scalars.offset,
        softcap=scalars.softcap,
        dropout_p=scalars.dropout_p,
        deterministic=scalars.deterministic,
        offset_tensor=t.offsets is not None,
        mask=t.mask is not None,
        bias=None if t.bias is None else t.bias.dtype,
        bias_grad=bias_grad,
        alibi=t.alibi_slopes is not None,
        sinks=t.sinks is not None,
        seqlens_k=t.seqlens_k is not None,
        packed=packed,
        page_size=page_size,
        plain=_is_plain(t),
    )


problem = common.remembered(check)


def check_values(t: AttentionTensors, problem: AttentionProblem) -> None:
    """Raise where packed or paged sequences reach beyond their tensors.

    Of tensors on the CPU only: reading others would wait for their device.
    """
    if not (problem.packed or problem.page_size) or problem.device != "cpu":
        return
    packed = (
        ("q", t.cu_seqlens_q, t.q, problem.seqlen_q),
        ("k", t.cu_seqlens_k, t.k, problem.seqlen_k),
    )
    for name, cu_seqlens, rows, longest in packed:
        if cu_seqlens is None:
            continue
        starts = cu_seqlens.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        if starts[0] != 0 or starts[-1] > rows.shape[0] or min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens_{name}: expected to rise from 0 to at most {rows.shape[0]}, "
                f"got {starts}"
            )
        if max(lengths, default=0) > longest:
            raise ValueError(f"max_seqlen_{name}: expected at least {max(lengths)}, got {longest}")
    if t.block_table is None:
        return
    used = torch.arange(t.block_table.shape[1]) * problem.page_size < t.seqlens_k[:, None]
    pages = t.block_table[used]
    if pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < t.k.shape[0]:
        raise ValueError(
            f"block_table: expected pages from 0 to {t.k.shape[0] - 1} up to seqlens_k, "
            f"got {int(pages.min())} to {int(pages.max())}"
        )


def _check_dtype_and_device(op: str, t: AttentionTensors) -> None:
    dtypes = _DTYPES if op == "attention_fwd" else _DTYPES[:-1]
    if t.q.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        where = "" if op == "attention_fwd" else " where a gradient is needed"
        raise TypeError(f"q: expected one of {names}{where}, got {t.q.dtype}")
    for name in ("k", "v"):
        dtype = getattr(t, name).dtype
        if dtype != t.q.dtype:
            raise TypeError(f"{name}: expected {t.q.dtype} as in q, got {dtype}")
    for name, tensor in zip(t._fields, t, strict=True):
        if tensor is not None and tensor.device != t.q.device:
            name = "offset" if name == "offsets" else name
            raise ValueError(f"{name}: expected device {t.q.device} as q, got {tensor.device}")


def _check_dims(name: str, tensor: Tensor, dims: int, layout: str) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(tensor.shape)}")


def _check_vector(
    name: str, tensor: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> None:
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
