"""CPU backend: the hand-written SIMD kernels of the native module ``fastattn._C``."""

from typing import Any

import torch
from torch import Tensor

try:
    from fastattn import _C

    _missing = None
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _missing = f"native module not available: {error}"

NAME = "cpu"

MAX_HEAD_DIM = 256
MAX_RANK = 9  # of softmax
_ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}

_DTYPES: dict[torch.dtype, Any] = {}
if _C is not None:
    _DTYPES = {
        torch.float32: _C.DType.float32,
        torch.float16: _C.DType.float16,
        torch.bfloat16: _C.DType.bfloat16,
    }
    _UNBOUNDED = _C.UNBOUNDED


def unsupported(problem) -> list[str]:
    """Every reason why this backend cannot run `problem`; empty if it can."""
    reasons = [] if _missing is None else [_missing]
    if problem.device != "cpu":
        reasons.append(f"device={problem.device}, only cpu")
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"dtype={problem.dtype}, only float32, float16 and bfloat16")
    if problem.op.startswith("attention"):
        for name in ("head_dim", "head_dim_v"):
            if getattr(problem, name) > MAX_HEAD_DIM:
                reasons.append(f"{name}={getattr(problem, name)} > {MAX_HEAD_DIM}")
        if problem.packed and problem.dropout_p:
            reasons.append("cu_seqlens_q: no dropout in packed sequences")
        if problem.page_size:
            reasons.append("block_table: no kernel for a paged cache")
        if problem.bias == torch.float64:
            reasons.append("bias dtype=torch.float64")
    if "ffn" in problem.op and 0 in (problem.d_model, problem.d_ff, problem.d_out):
        reasons.append("an empty d_model, d_ff or d_out")
    if problem.op.startswith("softmax"):
        if len(problem.shape) > MAX_RANK:
            reasons.append(f"rank={len(problem.shape)} > {MAX_RANK}")
        if problem.bias not in (None, problem.dtype, torch.float32):
            reasons.append(f"bias dtype={problem.bias}, only {problem.dtype} and float32")
    return reasons


def _unit_last_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


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
        _DTYPES[problem.dtype],
        tuple(problem[3:10]),
        (q.data_ptr(), q.stride()),
        (k.data_ptr(), k.stride()),
        (v.data_ptr(), v.stride()),
        problem.softmax_scale,
        problem.softcap,
        (
            _UNBOUNDED if left is None else left,
            _UNBOUNDED if right is None else right,
            problem.offset,
        ),
        _features(problem, t),
        problem.deterministic,
    )


def _features(problem, t):
    """The tensors of `t` beside q, k and v, as the native module takes them; None if none."""
    if t.mask is t.bias is t.alibi_slopes is t.sinks is t.seed is t.offset is t.seqlens_k is None:
        return None
    features = _C.AttentionFeatures()
    if t.mask is not None:
        features.mask = _broadcast_address(t.mask)
    if t.bias is not None:
        features.bias = _broadcast_address(t.bias)
        features.bias_dtype = _DTYPES[t.bias.dtype]
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
    q, k, v = _unit_last_stride(t.q), _unit_last_stride(t.k), _unit_last_stride(t.v)
    t = _contiguous_vectors(t)
    batch, heads, seqlen_q = problem.batch, problem.heads, problem.seqlen_q
    head_dim_v = problem.head_dim_v
    strides = (seqlen_q * heads * head_dim_v, head_dim_v, heads * head_dim_v, 1)
    out = torch.empty_strided((batch, heads, seqlen_q, head_dim_v), strides, dtype=problem.dtype)
    lse = torch.empty((batch, heads, seqlen_q))
    if lse.numel():
        _C.attention_fwd(*_call(problem, t, q, k, v), (out.data_ptr(), strides), lse.data_ptr())
    return out, lse


def attention_bwd(problem, t, out, lse, dout, dlse) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, bias and sinks, absent ones None."""
    if problem.packed:
        return _packed_bwd(problem, t, out, lse, dout, dlse)
    dq, dk, dv = torch.empty_like(t.q), torch.empty_like(t.k), torch.empty_like(t.v)
    grads = [_unit_last_stride(grad) for grad in (dq, dk, dv)]
    q, k, v = _unit_last_stride(t.q), _unit_last_stride(t.k), _unit_last_stride(t.v)
    out, dout = _unit_last_stride(out), _unit_last_stride(dout)
    t = _contiguous_vectors(t)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    dbias = wide_dbias = None
    if problem.bias_grad:
        wide_dbias = torch.zeros(t.bias.shape)
        dbias = (*_broadcast_address(wide_dbias), wide_dbias.numel())
    if lse.numel() and problem.seqlen_k:
        _C.attention_bwd(
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


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _expanded(tensor: Tensor | None, shape) -> Tensor | None:
    """The tensor broadcast to `shape`, its last stride 0 or 1."""
    if tensor is None:
        return None
    if tensor.shape[-1] != 1 and tensor.stride(-1) not in (0, 1):
        tensor = tensor.contiguous()
    return tensor.expand(shape)


def softmax_fwd(problem, t) -> tuple[Tensor, Tensor | None]:
    """The softmax and, with dropout, the weights before it (see `fastattn.softmax`)."""
    shape = problem.shape
    x = _unit_last_stride(t.x)
    out = x.new_empty(shape)
    weights = x.new_empty(shape) if problem.dropout_p else None
    mask, bias = _expanded(t.mask, shape), _expanded(t.bias, shape)
    _C.softmax_fwd(
        _DTYPES[problem.dtype],
        shape,
        x.data_ptr(),
        x.stride(),
        _pointer(mask),
        () if mask is None else mask.stride(),
        _DTYPES[problem.bias or problem.dtype],
        _pointer(bias),
        () if bias is None else bias.stride(),
        problem.scale,
        problem.causal,
        problem.log,
        problem.dropout_p,
        _pointer(t.seed),
        out.data_ptr(),
        _pointer(weights),
    )
    return out, weights


def softmax_bwd(problem, t, p, dout) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and bias from the weights before dropout (from the result with log)."""
    shape = problem.shape
    p, dout = p.contiguous(), _unit_last_stride(dout.to(problem.dtype))
    dx = p.new_empty(shape)
    dbias = t.bias.new_empty(t.bias.shape) if problem.bias_grad else None
    _C.softmax_bwd(
        _DTYPES[problem.dtype],
        shape,
        p.data_ptr(),
        dout.data_ptr(),
        dout.stride(),
        problem.scale,
        problem.log,
        problem.dropout_p,
        _pointer(t.seed),
        dx.data_ptr(),
        _DTYPES[problem.bias or problem.dtype],
        () if dbias is None else dbias.shape,
        _pointer(dbias),
    )
    return dx, dbias


def _matrix(matrix: Tensor | None) -> Tensor | None:
    """The matrix, copied if neither stride is 1."""
    if matrix is None or 1 in matrix.stride() or 1 in matrix.shape:
        return matrix
    return matrix.contiguous()


def _matrix_address(matrix: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    if matrix is None:
        return None
    strides = matrix.stride()
    if 1 not in strides:
        # A stride over a single element may be anything.
        strides = tuple(1 if n == 1 else stride for n, stride in zip(matrix.shape, strides))
    return matrix.data_ptr(), strides


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _ffn_shape(problem) -> tuple:
    return (
        _DTYPES[problem.dtype],
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
        matrices = [_matrix(matrix) for matrix in (t.x, t.w1, t.w_up, t.w2)]
        b1, b2 = _contiguous(t.b1), _contiguous(t.b2)
        _C.ffn_fwd(
            _ffn_shape(problem),
            problem.dropout_p,
            _pointer(t.seed),
            *(_matrix_address(matrix) for matrix in matrices),
            _pointer(b1),
            _pointer(b2),
            y.data_ptr(),
            _pointer(preact),
            _pointer(hidden),
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
        matrices = [_matrix(matrix) for matrix in (t.x, t.w1, t.w_up, t.w2)]
        b1 = _contiguous(t.b1)
        dy = _unit_last_stride(dy.to(problem.dtype))
        preact, hidden = _contiguous(preact), _contiguous(hidden)
        _C.ffn_bwd(
            _ffn_shape(problem),
            problem.dropout_p,
            _pointer(t.seed),
            *(_matrix_address(matrix) for matrix in matrices),
            _matrix_address(dy),
            _pointer(b1),
            _pointer(preact),
            _pointer(hidden),
            *(_pointer(grad) for grad in grads),
        )
    return grads
