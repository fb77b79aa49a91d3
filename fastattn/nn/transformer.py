"""Transformer encoder and decoder layers (Vaswani et al. 2017) under torch.nn's interface."""

import torch
from torch import Tensor

from fastattn.nn import nested
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.feed_forward import feed_forward
from fastattn.nn.norm import add_norm


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on `fastattn.attention` and `fastattn.ffn`.

    Constructor, parameters, state dict, and the arguments of `forward` and their meaning are
    torch's, and so is the start value of each parameter for a seed. What differs, on purpose, is
    what differs in `MultiheadAttention`, and:

    - Its modules are called in evaluation too, each one's hooks included, where torch's fast path
      reads their parameters.
    - A sequence with every token padded comes out finite.
    - A nested tensor may be jagged too, in training too, and with any number of heads.

    `linear1`, the activation, `dropout` and `linear2` run as one op where they are torch's own,
    without hooks, and so does a norm with the residual add before it; otherwise they are called
    one by one.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """One layer of the encoder.

        Args:
            src: ``(seqlen, batch, d_model)``, with `batch_first` ``(batch, seqlen, d_model)``,
                unbatched ``(seqlen, d_model)``, or nested and without masks.
            src_mask: `attn_mask` of `MultiheadAttention`.
            src_key_padding_mask: its `key_padding_mask`.
            is_causal: promises that `src_mask` is causal.

        Returns:
            Tensor of the shape of `src`.

        Raises:
            RuntimeError: `is_causal` without `src_mask`.
            ValueError, TypeError: an argument has the wrong shape or dtype.
        """
        x = src
        if self.norm_first:
            attended = self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            normed, x = add_norm(attended, x, self.norm2)
            return x + self._ff_block(normed)
        attended = self._sa_block(x, src_mask, src_key_padding_mask, is_causal)
        x, _ = add_norm(attended, x, self.norm1)
        return add_norm(self._ff_block(x), x, self.norm2)[0]

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(_feed_forward(self, x))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on `fastattn.attention` and `fastattn.ffn`.

    Constructor, parameters, state dict, and the arguments of `forward` and their meaning are
    torch's, and so is the start value of each parameter for a seed. What differs, on purpose, is
    what differs in `MultiheadAttention`.

    `linear1`, the activation, `dropout` and `linear2` run as one op where they are torch's own,
    without hooks, and so does a norm with the residual add before it; otherwise they are called
    one by one.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention
        self.multihead_attn.__class__ = MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """One layer of the decoder.

        Args:
            tgt: ``(seqlen, batch, d_model)``, with `batch_first` ``(batch, seqlen, d_model)``,
                or unbatched ``(seqlen, d_model)``.
            memory: the encoder's output, as `tgt`.
            tgt_mask, memory_mask: `attn_mask` of `MultiheadAttention`.
            tgt_key_padding_mask, memory_key_padding_mask: its `key_padding_mask`.
            tgt_is_causal, memory_is_causal: promise that the mask is causal.

        Returns:
            Tensor of the shape of `tgt`.

        Raises:
            RuntimeError: a promise without its mask.
            ValueError, TypeError: an argument has the wrong shape or dtype.
        """
        own = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        cross = memory, memory_mask, memory_key_padding_mask, memory_is_causal
        x = tgt
        if self.norm_first:
            attended = self._sa_block(self.norm1(x), *own)
            normed, x = add_norm(attended, x, self.norm2)
            normed, x = add_norm(self._mha_block(normed, *cross), x, self.norm3)
            return x + self._ff_block(normed)
        x, _ = add_norm(self._sa_block(x, *own), x, self.norm1)
        x, _ = add_norm(self._mha_block(x, *cross), x, self.norm2)
        return add_norm(self._ff_block(x), x, self.norm3)[0]

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(_feed_forward(self, x))


def _feed_forward(layer: TransformerEncoderLayer | TransformerDecoderLayer, x: Tensor) -> Tensor:
    args = (layer.linear1, layer.activation, layer.dropout, layer.linear2)
    if not x.is_nested:
        return feed_forward(x, *args)
    values, _, _ = nested.pack(x)
    return nested.unpack(feed_forward(values, *args), x)
