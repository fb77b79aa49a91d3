"""The attention function and the mask function that transformers calls."""

from typing import Any

import torch
from torch import Tensor

from fastattn.integrations.transformers.band import band
from fastattn.ops import attention

NAME = "fastattn"
# What models pass along that says nothing of attention, or only what the mask says too.
_HARMLESS = (
    "cache_position",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it.

    Args:
        module: whose ``is_causal`` holds where the argument is None.
        query: ``(batch, heads, seqlen_q, head_dim)``.
        key, value: ``(batch, heads_kv, seqlen_k, head_dim)``, of fewer heads as they are.
        attention_mask: ``(batch, 1 or heads, seqlen_q, seqlen_k or more)``, boolean (True = take
            part) or floating point, added to the scores; it says all that is hidden. A boolean one
            that is a band, the same for all sequences, cut at a length of each, is not read by the
            kernel, which skips what it hides. None: causal, if it is so; a single query is the
            newest token.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores.
        is_causal: see above.
        sliding_window: how many tokens each sees, itself included; in the mask if there is one,
            as there must be where attention is not causal.
        softcap: of the scores.
        s_aux: sinks, ``(heads,)``.
        position_bias: added to the scores, with its gradient.
        cu_seq_lens_q, cu_seq_lens_k: int32 ``(n + 1,)``, where each packed sequence begins, in a
            batch of one. Fewer queries than keys are the last ones. Beside a mask, it holds within
            the sequences.
        kwargs: others, which may not change the result.

    Returns:
        ``(batch, seqlen_q, heads, head_dim)``, contiguous, and None in place of the weights.

    Raises:
        TypeError: an argument that is not known.
        ValueError, TypeError: an argument has the wrong shape or dtype.
    """
    _check_kwargs(kwargs)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options: dict[str, Any] = dict(
        softmax_scale=scaling, softcap=softcap, sinks=s_aux, dropout_p=dropout
    )
    if attention_mask is None:
        options |= dict(causal=causal, window=_window(sliding_window, causal, seqlen_k))
        if cu_seq_lens_q is not None:
            return _packed(
                query, key, value, position_bias, cu_seq_lens_q, cu_seq_lens_k, kwargs, options
            )
        if causal and seqlen_q == 1:
            options["offset"] = seqlen_k - 1
        options["bias"] = position_bias
    else:
        mask = _checked_mask(attention_mask, seqlen_k)
        hidden = None
        if cu_seq_lens_q is not None:
            mask = _within_sequences(mask, cu_seq_lens_q, cu_seq_lens_k)
        elif mask.dtype == torch.bool and mask.shape[2:] == (seqlen_q, seqlen_k):
            hidden = band(attention_mask, seqlen_k)
        if hidden is not None:
            options |= hidden | dict(bias=position_bias)
            if "seqlens_k" in hidden:
                options["seqlens_k"] = hidden["seqlens_k"].expand(query.shape[0]).contiguous()
        elif mask.dtype == torch.bool:
            options |= dict(mask=mask, bias=position_bias)
        else:
            options["bias"] = mask if position_bias is None else mask + position_bias
    out: Any = attention(query, key, value, **options)
    return out.transpose(1, 2).contiguous(), None


def _window(
    sliding_window: int | None, causal: bool, seqlen_k: int
) -> tuple[int | None, int | None]:
    """The visible band that `sliding_window` says, where there is no mask."""
    if sliding_window is None or seqlen_k <= sliding_window:
        return None, None
    if not causal:
        raise ValueError("sliding_window: expected a mask beside it, as attention is not causal")
    return sliding_window - 1, None


def _checked_mask(mask: Tensor, seqlen_k: int) -> Tensor:
    if mask.dim() != 4:
        raise ValueError(
            "attention_mask: expected (batch, 1 or heads, seqlen_q, seqlen_k), got shape "
            f"{tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"attention_mask: expected torch.bool or a floating point dtype, got {mask.dtype}"
        )
    # Some models mask for the whole length of a cache.
    return mask[..., :seqlen_k] if mask.shape[-1] > seqlen_k else mask


def _within_sequences(mask: Tensor, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor | None) -> Tensor:
    """The mask that also hides the other packed sequences."""
    cu_seq_lens_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    of_query, of_key = (
        torch.searchsorted(
            cu_seq_lens,
            torch.arange(length, device=mask.device, dtype=cu_seq_lens.dtype),
            right=True,
        )
        for cu_seq_lens, length in zip((cu_seq_lens_q, cu_seq_lens_k), mask.shape[2:], strict=True)
    )
    own = of_query[:, None] == of_key
    return mask & own if mask.dtype == torch.bool else mask.masked_fill(~own, -torch.inf)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_bias: Tensor | None,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | None,
    kwargs: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    if query.shape[0] != 1:
        raise ValueError(f"query: expected a batch of 1 beside cu_seq_lens_q, got {query.shape[0]}")
    if position_bias is not None:
        raise ValueError("position_bias: expected None beside cu_seq_lens_q, got a tensor")
    if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q:
        options["offset"] = (cu_seq_lens_k.diff() - cu_seq_lens_q.diff()).int()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out: Any = attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_seq_lens_q.int(),
        cu_seqlens_k=(cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k).int(),
        max_seqlen_q=kwargs.get("max_length_q"),
        max_seqlen_k=kwargs.get("max_length_k"),
        **options,
    )
    return out[None], None


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name in _HARMLESS or value is None:
            continue
        if name == "output_attentions":
            if value:
                raise ValueError(
                    "output_attentions: expected False, as fastattn never has the weights in "
                    'memory; attn_implementation="eager" does'
                )
            continue
        raise TypeError(f"{name}: not known to fastattn's attention, got {value!r:.80}")


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The boolean mask that transformers makes for torch's function, or None where it skips it.

    It says of padding, windows, chunks, packed sequences and the unused end of a static cache, of
    which `attention_forward` finds the bands.
    """
    from transformers.masking_utils import sdpa_mask

    # Tensors made in inference mode have no version, by which `band` knows what it has seen.
    with torch.inference_mode(False):
        return sdpa_mask(*args, **kwargs)
