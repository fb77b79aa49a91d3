"""The parts that models are made of: attention blocks, layers, stacks of layers."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from fastattn.models.cache import Cache
from fastattn.models.embeddings import RelativePositionBias
from fastattn.nn import FeedForward, GatedFeedForward, LayerNorm, RMSNorm
from fastattn.nn.norm import add_norm
from fastattn.ops import attention, rotary, softmax

Norm = LayerNorm | RMSNorm


class KeysValues(NamedTuple):
    """Projected keys and values, each ``(batch, heads, seqlen, head_dim)``."""

    k: Tensor
    v: Tensor


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, its projections to q, k and v in one product.

    Args:
        d_model: size of input and output.
        num_heads: heads.
        dropout: probability of dropping an attention weight in training.
        bias: learn additive biases.
        qkv_bias: of the projection to q, k and v; default `bias`.
        num_heads_kv: heads of keys and values, a divisor of `num_heads` (Ainslie et al. 2023);
            default `num_heads`.
        head_dim: size of a head; default ``d_model / num_heads``.
        softmax_scale: factor of the scores; default ``1 / sqrt(head_dim)``.
        window: how many tokens each sees, itself included, to the left and, unless causal, to the
            right (Beltagy et al. 2020); default all.
        softcap: of the scores, as in `fastattn.attention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        qkv_bias: bool | None = None,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        softmax_scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv or num_heads
        self.head_dim = head_dim or d_model // num_heads
        self.dropout = dropout
        self.softmax_scale = softmax_scale
        self.window = (None, None) if window is None else (window - 1, window - 1)
        self.softcap = softcap
        width = (num_heads + 2 * self.num_heads_kv) * self.head_dim
        self.in_proj = nn.Linear(d_model, width, bias=bias if qkv_bias is None else qkv_bias)
        self.out_proj = nn.Linear(num_heads * self.head_dim, d_model, bias=bias)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        projected = self.in_proj(x)
        if self.num_heads_kv == self.num_heads:
            return _heads(projected, 3, self.num_heads)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        parts = (self.num_heads, self.num_heads_kv, self.num_heads_kv)
        return tuple(part.transpose(1, 2) for part in heads.split(parts, 2))

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: Cache | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """``(batch, seqlen, d_model)`` to the same shape.

        Args:
            x: the sequence; with a cache, its next tokens.
            mask: boolean, True = take part, broadcastable to (batch, heads, seqlen, keys).
            causal: each token sees only itself and those before it.
            cache: keys and values of the tokens before `x`; those of `x` are appended.
            rotation: cosines and sines of q and k, of `RotaryTables`: of all positions
                ``(max_positions, head_dim / 2)``, or of these tokens' ``(batch, seqlen, ...)``.
            bias: added to the scores, broadcastable to (batch, heads, seqlen, keys).
        """
        q, k, v = self._project(x)
        offset: int | Tensor = 0 if cache is None else cache.offset
        if rotation is not None:
            cos, sin = rotation
            start = cache.length if cache is not None and cos.dim() == 2 else 0
            q, k = rotary(q, cos, sin, offset=start), rotary(k, cos, sin, offset=start)
        pages: dict[str, Any] = {}
        if cache is not None:
            k, v, pages = cache.append(k, v)
            # The newest token alone sees every key: no band is needed.
            causal = causal and (q.shape[2] > 1 or self.window[0] is not None)
        out = attention(
            q,
            k,
            v,
            softmax_scale=self.softmax_scale,
            causal=causal,
            window=self.window,
            offset=offset,
            mask=mask,
            bias=bias,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
            **pages,
        )
        return self.out_proj(_joined(out))

    def weights(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The attention weights of `forward`, ``(batch, heads, seqlen, seqlen)``, undropped."""
        if self.window != (None, None) or self.softcap is not None:
            raise ValueError("weights: expected a model without window and softcap")
        q, k, _ = self._project(x)
        if rotation is not None:
            q, k = (rotary(y, *rotation) for y in (q, k))
        k = k.repeat_interleave(self.num_heads // self.num_heads_kv, 1)
        return _weights(q, k, mask, causal, self.softmax_scale, bias)


class CrossAttention(nn.Module):
    """Multi-head attention to another sequence, whose keys and values are one product, made once.

    Args:
        d_model: size of both sequences and of the output.
        num_heads, dropout, bias, head_dim, softmax_scale: as in `SelfAttention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        head_dim: int | None = None,
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.softmax_scale = softmax_scale
        width = num_heads * (head_dim or d_model // num_heads)
        self.q_proj = nn.Linear(d_model, width, bias=bias)
        self.kv_proj = nn.Linear(d_model, 2 * width, bias=bias)
        self.out_proj = nn.Linear(width, d_model, bias=bias)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Keys and values of `memory`, ``(batch, seqlen_k, d_model)``, for `forward`."""
        return KeysValues(*_heads(self.kv_proj(memory), 2, self.num_heads))

    def forward(self, x: Tensor, memory: KeysValues, *, mask: Tensor | None = None) -> Tensor:
        """``(rows, seqlen_q, d_model)`` to the same shape.

        Args:
            x: the querying sequences. With ``rows = n * batch``, each n rows in succession (the
                beams of a search, say) attend to the same memory, which is not repeated.
            memory: of `keys_values`.
            mask: boolean, True = take part, ``(batch, 1, 1, seqlen_k)``.
        """
        batch = memory.k.shape[0]
        queries = x.shape[0] // max(batch, 1) * x.shape[1]
        projected = self.q_proj(x)
        (q,) = _heads(projected.view(batch, queries, projected.shape[-1]), 1, self.num_heads)
        out = attention(
            q,
            memory.k,
            memory.v,
            softmax_scale=self.softmax_scale,
            mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(_joined(out).view(projected.shape))

    def weights(self, x: Tensor, memory: KeysValues, *, mask: Tensor | None = None) -> Tensor:
        """The attention weights of `forward`, ``(batch, heads, seqlen_q, seqlen_k)``, undropped."""
        (q,) = _heads(self.q_proj(x), 1, self.num_heads)
        return _weights(q, memory.k, mask, False, self.softmax_scale)


def _heads(projected: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(batch, seqlen, parts * width) as views (batch, heads, seqlen, head_dim), one a part."""
    batch, seqlen, width = projected.shape
    split = projected.view(batch, seqlen, parts, num_heads, width // (parts * num_heads))
    # Apart before turned: the gradients are then joined in the projection's layout, in one copy.
    return tuple(part.transpose(1, 2) for part in split.unbind(2))


def _norm(kind: str, d_model: int, eps: float, bias: bool) -> Norm:
    if kind == "rms":
        return RMSNorm(d_model, eps=eps)
    return LayerNorm(d_model, eps=eps, bias=bias)


def _joined(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """What attention returned, (batch, heads, seqlen, head_dim), as (batch, seqlen, d_model)."""
    return cast(Tensor, out).transpose(1, 2).flatten(2)


def _weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    bias: Tensor | None = None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return softmax(q @ k.mT, scale=scale, mask=mask, bias=bias, causal=causal)


class Layer(nn.Module):
    """Self-attention, cross-attention if asked for, and a feed-forward network, each residual.

    A sublayer is ``x + dropout(f(norm(x)))`` with `norm_first`, else ``norm(x + dropout(f(x)))``.

    Args:
        d_model, num_heads, d_ff: sizes.
        cross_attention: attend to a memory too, as a decoder's layer does.
        dropout: of each sublayer's output, and of the hidden layer of a feed-forward network that
            is not gated.
        attention_dropout: of the attention weights.
        activation: "relu", "gelu", "gelu_tanh", "silu".
        gated: the feed-forward network is gated (Shazeer 2020), without biases.
        norm: "layer" or "rms".
        norm_first, bias, norm_eps: as in `TransformerConfig`.
        attention: further options of `SelfAttention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        cross_attention: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation: str = "relu",
        gated: bool = False,
        norm: str = "layer",
        norm_first: bool = False,
        bias: bool = True,
        norm_eps: float = 1e-5,
        **attention: Any,
    ) -> None:
        super().__init__()

        def make_norm() -> Norm:
            return _norm(norm, d_model, norm_eps, bias)

        self.norm_first = norm_first
        self.self_attn = SelfAttention(d_model, num_heads, attention_dropout, bias, **attention)
        self.self_attn_norm = make_norm()
        self.has_cross_attention = cross_attention
        if cross_attention:
            shared = {key: attention.get(key) for key in ("head_dim", "softmax_scale")}
            self.cross_attn = CrossAttention(d_model, num_heads, attention_dropout, bias, **shared)
            self.cross_attn_norm = make_norm()
        self.feed_forward = (
            GatedFeedForward(d_model, d_ff, activation)
            if gated
            else FeedForward(d_model, d_ff, dropout, activation, bias)
        )
        self.feed_forward_norm = make_norm()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        memory: KeysValues | None = None,
        memory_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """``(batch, seqlen, d_model)`` to the same shape.

        Args:
            x: as in `SelfAttention`.
            memory, memory_mask: as in `CrossAttention`; for a layer that has one.
            options: of `SelfAttention`: mask, causal, cache, rotation, bias.
        """

        def attend(y: Tensor) -> Tensor:
            return self.self_attn(y, **options)

        def attend_memory(y: Tensor) -> Tensor:
            return self.cross_attn(y, memory, mask=memory_mask)

        sublayers: list[tuple[Norm, Callable[[Tensor], Tensor]]]
        sublayers = [(self.self_attn_norm, attend)]
        if self.has_cross_attention:
            sublayers.append((self.cross_attn_norm, attend_memory))
        sublayers.append((self.feed_forward_norm, self.feed_forward))
        if not self.norm_first:
            for norm, sublayer in sublayers:
                x, _ = add_norm(self.dropout(sublayer(x)), x, norm)
            return x
        # Each add goes with the norm after it.
        normed = self.self_attn_norm(x)
        for (_, sublayer), (norm, _) in pairwise(sublayers):
            normed, x = add_norm(self.dropout(sublayer(normed)), x, norm)
        return x + self.dropout(self.feed_forward(normed))


class Stack(nn.Module):
    """Layers one after another, and with `norm_first` a final norm.

    Args:
        num_layers: how many.
        d_model, num_heads, d_ff, options: of each `Layer`.
        position_bias: added to the scores of every layer's self-attention.
        checkpoint_activations: in training keep only each layer's input, and compute the rest
            again in the backward (Chen et al. 2016).
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        position_bias: RelativePositionBias | None = None,
        checkpoint_activations: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.position_bias = position_bias
        self.layers = nn.ModuleList(
            Layer(d_model, num_heads, d_ff, **options) for _ in range(num_layers)
        )
        self.norm: Norm | None = None
        if options.get("norm_first", False):
            eps, bias = options.get("norm_eps", 1e-5), options.get("bias", True)
            self.norm = _norm(options.get("norm", "layer"), d_model, eps, bias)

    def keys_values(self, memory: Tensor) -> list[KeysValues]:
        """Keys and values of `memory` ``(batch, seqlen_k, d_model)`` for each layer."""
        return [cast(Layer, layer).cross_attn.keys_values(memory) for layer in self.layers]

    def forward(
        self,
        x: Tensor,
        *,
        caches: Sequence[Cache] | None = None,
        memory: Sequence[KeysValues] | None = None,
        **options: Any,
    ) -> Tensor:
        """``(batch, seqlen, d_model)`` to the same shape; `caches` and `memory` one a layer.

        Other `options` are those of each `Layer`.
        """
        if self.position_bias is not None:
            start, keys = 0, x.shape[1]
            if caches is not None:
                start, keys = caches[0].length, caches[0].keys(keys)
            options["bias"] = self.position_bias(x.shape[1], keys, start)
        save_memory = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            if caches is not None:
                options["cache"] = caches[index]
            if memory is not None:
                options["memory"] = memory[index]
            if save_memory:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, **options)
            else:
                x = layer(x, **options)
        return x if self.norm is None else self.norm(x)
