"""The parts that models are made of: embeddings, attention blocks, layers, stacks of layers."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastattn.models.cache import KeyValueCache
from fastattn.nn import FeedForward, LayerNorm
from fastattn.nn.norm import add_norm
from fastattn.ops import attention, softmax


class KeysValues(NamedTuple):
    """Projected keys and values, each ``(batch, heads, seqlen, head_dim)``."""

    k: Tensor
    v: Tensor


def sinusoids(max_positions: int, d_model: int) -> Tensor:
    """``(max_positions, d_model)``, sines and cosines by turns (Vaswani et al. 2017, 3.5)."""
    position = torch.arange(max_positions, dtype=torch.float64)[:, None]
    frequency = torch.exp(
        torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model)
    )
    table = torch.empty(max_positions, d_model, dtype=torch.float64)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency[: d_model // 2])
    return table.to(torch.get_default_dtype())


class Embedding(nn.Module):
    """``dropout(sqrt(d_model) * token + position)`` (Vaswani et al. 2017, sections 3.4 and 3.5).

    Args:
        vocab_size: number of tokens.
        d_model: size of the representations.
        max_positions: longest row.
        positions: "sinusoidal", or "learned", which begins as the sinusoids.
        dropout: probability of dropping an element in training.
    """

    positions: Tensor

    def __init__(
        self, vocab_size: int, d_model: int, max_positions: int, positions: str, dropout: float
    ) -> None:
        super().__init__()
        self.scale = math.sqrt(d_model)
        self.tokens = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.tokens.weight, std=d_model**-0.5)
        table = sinusoids(max_positions, d_model)
        if positions == "learned":
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table, persistent=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Tokens ``(batch, seqlen)`` to ``(batch, seqlen, d_model)``; the first is at `start`."""
        positions = self.positions[start : start + tokens.shape[1]]
        return self.dropout(self.tokens(tokens) * self.scale + positions)


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, its projections to q, k and v in one product.

    Args:
        d_model: size of input and output.
        num_heads: heads, a divisor of `d_model`.
        dropout: probability of dropping an attention weight in training.
        bias: learn additive biases.
    """

    def __init__(
        self, d_model: int, num_heads: int, dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return _heads(self.in_proj(x), 3, self.num_heads)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """``(batch, seqlen, d_model)`` to the same shape.

        Args:
            x: the sequence; with a cache, its next tokens.
            mask: boolean, True = take part, broadcastable to (batch, heads, seqlen, keys).
            causal: each token sees only itself and those before it.
            cache: keys and values of the tokens before `x`; those of `x` are appended.
        """
        q, k, v = self._project(x)
        offset = 0
        if cache is not None:
            offset = cache.length
            k, v = cache.append(k, v)
            # The newest token alone sees every key: no band is needed.
            causal = causal and q.shape[2] > 1
        dropout_p = self.dropout if self.training else 0.0
        out = attention(q, k, v, causal=causal, offset=offset, mask=mask, dropout_p=dropout_p)
        return self.out_proj(_joined(out))

    def weights(self, x: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """The attention weights of `forward`, ``(batch, heads, seqlen, seqlen)``, undropped."""
        q, k, _ = self._project(x)
        return _weights(q, k, mask, causal)


class CrossAttention(nn.Module):
    """Multi-head attention to another sequence, whose keys and values are one product, made once.

    Args:
        d_model: size of both sequences and of the output.
        num_heads: heads, a divisor of `d_model`.
        dropout: probability of dropping an attention weight in training.
        bias: learn additive biases.
    """

    def __init__(
        self, d_model: int, num_heads: int, dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.kv_proj = nn.Linear(d_model, 2 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

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
        (q,) = _heads(self.q_proj(x).view(batch, queries, x.shape[-1]), 1, self.num_heads)
        dropout_p = self.dropout if self.training else 0.0
        out = attention(q, memory.k, memory.v, mask=mask, dropout_p=dropout_p)
        return self.out_proj(_joined(out).view(x.shape))

    def weights(self, x: Tensor, memory: KeysValues, *, mask: Tensor | None = None) -> Tensor:
        """The attention weights of `forward`, ``(batch, heads, seqlen_q, seqlen_k)``, undropped."""
        (q,) = _heads(self.q_proj(x), 1, self.num_heads)
        return _weights(q, memory.k, mask, False)


def _heads(projected: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(batch, seqlen, parts * d_model) as views (batch, heads, seqlen, head_dim), one a part."""
    batch, seqlen, width = projected.shape
    split = projected.view(batch, seqlen, parts, num_heads, width // (parts * num_heads))
    # Apart before turned: the gradients are then joined in the projection's layout, in one copy.
    return tuple(part.transpose(1, 2) for part in split.unbind(2))


def _joined(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """What attention returned, (batch, heads, seqlen, head_dim), as (batch, seqlen, d_model)."""
    return cast(Tensor, out).transpose(1, 2).flatten(2)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return softmax(q @ k.mT, scale=q.shape[-1] ** -0.5, mask=mask, causal=causal)


class Layer(nn.Module):
    """Self-attention, cross-attention if asked for, and a feed-forward network, each residual.

    A sublayer is ``x + dropout(f(norm(x)))`` with `norm_first`, else ``norm(x + dropout(f(x)))``.

    Args:
        d_model, num_heads, d_ff: sizes.
        cross_attention: attend to a memory too, as a decoder's layer does.
        dropout: of each sublayer's output, and of the feed-forward network's hidden layer.
        attention_dropout: of the attention weights.
        activation: "relu", "gelu", "gelu_tanh", "silu".
        norm_first, bias, layer_norm_eps: as in `TransformerConfig`.
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
        norm_first: bool = False,
        bias: bool = True,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()

        def norm() -> LayerNorm:
            return LayerNorm(d_model, eps=layer_norm_eps, bias=bias)

        self.norm_first = norm_first
        self.self_attn = SelfAttention(d_model, num_heads, attention_dropout, bias)
        self.self_attn_norm = norm()
        self.has_cross_attention = cross_attention
        if cross_attention:
            self.cross_attn = CrossAttention(d_model, num_heads, attention_dropout, bias)
            self.cross_attn_norm = norm()
        self.feed_forward = FeedForward(d_model, d_ff, dropout, activation, bias)
        self.feed_forward_norm = norm()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
        memory: KeysValues | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """``(batch, seqlen, d_model)`` to the same shape.

        Args:
            x, mask, causal, cache: as in `SelfAttention`.
            memory, memory_mask: as in `CrossAttention`; for a layer that has one.
        """

        def attend(y: Tensor) -> Tensor:
            return self.self_attn(y, mask=mask, causal=causal, cache=cache)

        def attend_memory(y: Tensor) -> Tensor:
            return self.cross_attn(y, memory, mask=memory_mask)

        sublayers: list[tuple[LayerNorm, Callable[[Tensor], Tensor]]]
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
    """

    def __init__(self, num_layers: int, d_model: int, num_heads: int, d_ff: int, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(d_model, num_heads, d_ff, **options) for _ in range(num_layers)
        )
        self.norm: LayerNorm | None = None
        if options.get("norm_first", False):
            eps, bias = options.get("layer_norm_eps", 1e-5), options.get("bias", True)
            self.norm = LayerNorm(d_model, eps=eps, bias=bias)

    def keys_values(self, memory: Tensor) -> list[KeysValues]:
        """Keys and values of `memory` ``(batch, seqlen_k, d_model)`` for each layer."""
        return [cast(Layer, layer).cross_attn.keys_values(memory) for layer in self.layers]

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        caches: Sequence[KeyValueCache] | None = None,
        memory: Sequence[KeysValues] | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """``(batch, seqlen, d_model)`` to the same shape; `caches` and `memory` one a layer."""
        for index, layer in enumerate(self.layers):
            x = layer(
                x,
                mask=mask,
                causal=causal,
                cache=None if caches is None else caches[index],
                memory=None if memory is None else memory[index],
                memory_mask=memory_mask,
            )
        return x if self.norm is None else self.norm(x)
