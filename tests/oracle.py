"""Straightforward float64 formulas, written apart from the package, that the ops are held to."""

import math

import torch
from torch import Tensor

from fastattn import philox


def attention(q, k, v, *, softmax_scale=None, causal=False, window=(None, None), offset=0,
              mask=None, bias=None, alibi_slopes=None, softcap=None, sinks=None, dropout_p=0.0,
              seed=None, seqlens_k=None, first_batch=0, **_):  # fmt: skip
    """(out, lse) of dense attention in the dtype of q, differentiable."""
    _, heads, seqlen_q, head_dim = q.shape
    group = heads // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = max(head_dim, 1) ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    rows = torch.arange(seqlen_q)[:, None]
    columns = torch.arange(k.shape[2])[None, :]
    if isinstance(offset, Tensor):
        offset = offset.long().view(-1, 1, 1, 1)
    center = rows + offset
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores).reshape(-1, heads, 1, 1)
        scores = scores - slopes * (center - columns).abs()
    seen = torch.ones_like(scores, dtype=torch.bool)
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    if left is not None:
        seen = seen & (columns >= center - left)
    if right is not None:
        seen = seen & (columns <= center + right)
    if mask is not None:
        seen = seen & mask
    if seqlens_k is not None:
        seen = seen & (columns < seqlens_k.long().view(-1, 1, 1, 1))
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores.masked_fill(empty, 0.0), -1)
    lse = lse.masked_fill(empty[..., 0], -math.inf)
    if sinks is not None:
        p = p[..., :-1]
    if dropout_p:
        p = p * dropout_factor(seed, dropout_p, p.shape, first_batch)
    return torch.einsum("bhij,bhjd->bhid", p.to(v.dtype), v), lse


def dropout_factor(seed: int, dropout_p: float, shape, first_batch: int = 0) -> Tensor:
    """Dropout's factor of each attention weight (batch, heads, seqlen_q, seqlen_k)."""
    batch, heads, seqlen_q, seqlen_k = shape
    keep = philox.keep_mask(
        torch.tensor([seed]),
        dropout_p,
        torch.arange(seqlen_q).view(1, 1, -1),
        seqlen_k,
        torch.arange(heads).view(1, -1, 1),
        torch.arange(first_batch, first_batch + batch).view(-1, 1, 1),
    )
    return keep.double() / (1 - dropout_p)


def matrix_dropout_factor(seed: int, dropout_p: float, shape) -> Tensor:
    """Dropout's factor of each element of a matrix (..., rows, columns)."""
    row = torch.arange(math.prod(shape[:-1]))
    keep = philox.keep_mask(torch.tensor([seed]), dropout_p, row, shape[-1], row * 0, row * 0)
    return keep.view(shape).double() / (1 - dropout_p)


def softmax(x, *, scale=1.0, mask=None, bias=None, causal=False, dropout_p=0.0, seed=None,
            log=False):  # fmt: skip
    """Softmax in the dtype of x, differentiable."""
    scores = x * scale
    if bias is not None:
        scores = scores + bias
    seen = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        seen = seen & torch.ones(x.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        seen = seen & mask
    scores = scores.masked_fill(~seen, -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    filled = scores.masked_fill(empty, 0.0)
    if log:
        return torch.log_softmax(filled, -1).masked_fill(empty | ~seen, -math.inf)
    p = torch.softmax(filled, -1).masked_fill(empty, 0.0)
    return p * matrix_dropout_factor(seed, dropout_p, x.shape).to(p) if dropout_p else p


ACTIVATIONS = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def ffn(x, w1, b1, w2, b2, *, activation="relu", dropout_p=0.0, seed=None, **_):
    """The plain feed-forward network in the dtype of x, differentiable."""
    hidden = ACTIVATIONS[activation](torch.nn.functional.linear(x, w1, b1))
    if dropout_p:
        hidden = hidden * matrix_dropout_factor(seed, dropout_p, hidden.shape).to(hidden)
    return torch.nn.functional.linear(hidden, w2, b2)


def gated_ffn(x, w_gate, w_up, w_down, *, activation="silu", **_):
    """The gated feed-forward network in the dtype of x, differentiable."""
    linear = torch.nn.functional.linear
    return linear(ACTIVATIONS[activation](linear(x, w_gate)) * linear(x, w_up), w_down)


def layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None):
    """Layer norm in the dtype of x, with a residual the sum too; differentiable."""
    s = x if residual is None else x + residual
    d = s - s.mean(-1, keepdim=True)
    y = d / (d.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.to(y)
    y = y if bias is None else y + bias.to(y)
    return y if residual is None else (y, s)


def rms_norm(x, weight, *, eps=1e-6, residual=None):
    """RMS norm in the dtype of x, with a residual the sum too; differentiable."""
    s = x if residual is None else x + residual
    y = s / (s.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.to(y)
    return y if residual is None else (y, s)


def cross_entropy(logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """Cross entropy with class indices in the dtype of the logits, differentiable."""
    seen = targets != ignore_index
    empty = torch.isneginf(logits).all(-1)
    log_p = torch.log_softmax(logits.masked_fill((empty | ~seen)[..., None], 0.0), -1)
    losses = -log_p.gather(-1, targets.masked_fill(~seen, 0)[..., None])[..., 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(-1)
    losses = losses.masked_fill(empty, math.inf).masked_fill(~seen, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / (max(int(seen.sum()), 1) if reduction == "mean" else 1)


def linear_cross_entropy(x, weight, bias, targets, **kwargs):
    """Cross entropy of a linear layer in the dtype of x, differentiable."""
    # Ignored rows of x may be NaN; -inf in the bias hides a class.
    seen = (targets != kwargs.get("ignore_index", -100))[..., None]
    logits = x.masked_fill(~seen, 0.0) @ weight.T
    return cross_entropy(logits if bias is None else logits + bias, targets, **kwargs)


def rotary(x, cos, sin, *, interleaved=False, offset=0):
    """Rotary position embedding in the dtype of x, differentiable."""
    batch, _, seqlen, _ = x.shape
    offsets = offset.tolist() if isinstance(offset, Tensor) else [offset] * batch
    tables = []
    for table in (cos, sin):
        own = table.expand(batch, *table.shape[-2:])
        rows = torch.stack([own[b, start : start + seqlen] for b, start in enumerate(offsets)])
        rows = rows.repeat_interleave(2, -1) if interleaved else torch.cat([rows, rows], -1)
        tables.append(rows[:, None].to(x.dtype))
    cos, sin = tables
    x, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    else:
        turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    return torch.cat([x * cos + turned * sin, rest], -1)


def check_close(name, got, exact, rounded, dtype, slack=2.0):
    """`got` is no further from `exact` (float64) than `slack` times the same formula rounded.

    `rounded` is a plain PyTorch evaluation in `dtype`; where it happens to be (nearly) exact, a
    few units in the last place of the largest element are allowed.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)} != {tuple(exact.shape)}"
    got, exact, rounded = got.detach().double(), exact.detach(), rounded.detach().double()
    infinite = torch.isinf(exact)
    assert torch.equal(got[infinite], exact[infinite]), f"{name}: infinities differ"
    assert not torch.isnan(got).any(), f"{name}: NaN"
    finite = ~infinite
    if not finite.any():
        return
    got, exact, rounded = got[finite], exact[finite], rounded[finite]
    error = (got - exact).abs().max().item()
    own = (rounded - exact).abs().nan_to_num(0.0).max().item()
    # 6 units: a sum in another order.
    # 4e-6: float32 intermediates of size 1, where the result itself is (nearly) 0.
    floor = 6 * torch.finfo(dtype).eps * exact.abs().max().item() + 4e-6
    assert error <= slack * own + floor, f"{name}: error {error:.3g}, rounded {own:.3g}"
