"""torch's attention masks (True = hidden, floats are added) as a mask and a bias of fastattn."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_and_bias(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    extra_keys: int,
) -> tuple[Tensor | None, Tensor | None]:
    """The boolean mask (True = visible) and the additive bias that two masks of torch amount to.

    Args:
        attn_mask: ``(seqlen_q, seqlen_k)`` or ``(batch * heads, seqlen_q, seqlen_k)``.
        key_padding_mask: ``(batch, seqlen_k)``.
        extra_keys: keys behind the last one that no mask hides (of add_bias_kv, add_zero_attn).

    Returns:
        Each None or broadcastable to ``(batch, heads, seqlen_q, seqlen_k + extra_keys)``, as
        small as the masks are: nothing is expanded.

    Raises:
        ValueError, TypeError: a mask has the wrong shape or dtype.
    """
    hidden = bias = None
    if attn_mask is not None:
        attn_mask = _four_dims(attn_mask, batch, heads, seqlen_q, seqlen_k)
        if extra_keys:
            attn_mask = F.pad(attn_mask, (0, extra_keys))
        if attn_mask.dtype == torch.bool:
            hidden = attn_mask
        else:
            bias = _floating("attn_mask", attn_mask)
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (batch, seqlen_k):
            raise ValueError(
                f"key_padding_mask: expected shape {(batch, seqlen_k)}, "
                f"got {tuple(key_padding_mask.shape)}"
            )
        padding = key_padding_mask[:, None, None]
        if extra_keys:
            padding = F.pad(padding, (0, extra_keys))
        if padding.dtype == torch.bool:
            hidden = padding if hidden is None else hidden | padding
        else:
            padding = _floating("key_padding_mask", padding)
            bias = padding if bias is None else bias + padding
    return None if hidden is None else ~hidden, bias


def _four_dims(attn_mask: Tensor, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    shape = tuple(attn_mask.shape)
    if shape == (seqlen_q, seqlen_k):
        return attn_mask[None, None]
    if shape == (batch * heads, seqlen_q, seqlen_k):
        return attn_mask.unflatten(0, (batch, heads))
    raise ValueError(
        f"attn_mask: expected shape {(seqlen_q, seqlen_k)} or "
        f"{(batch * heads, seqlen_q, seqlen_k)}, got {shape}"
    )


def _floating(name: str, mask: Tensor) -> Tensor:
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected bool (True = hidden) or floating, got {mask.dtype}")
    return mask
