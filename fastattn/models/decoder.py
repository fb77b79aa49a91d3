"""The decoder-only Transformer: a language model, with GPT-2's or Llama's options."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastattn.models.blocks import Stack
from fastattn.models.cache import KeyValueCache
from fastattn.models.config import DecoderConfig
from fastattn.models.embeddings import Embedding, RotaryTables
from fastattn.models.tokens import check_beside, check_mask, check_tokens


class Decoder(nn.Module):
    """Language model: each token sees those before it, and predicts the next.

    ::

        model = Decoder(vocab_size=8000, d_model=256, num_layers=4, num_heads=4, d_ff=1024)
        logits = model(tokens)  # logits[:, i] is of tokens[:, i + 1]

    GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023) are configurations of it: see
    `fastattn.models.preset`. Rows may be padded on either side.

    Args:
        config: sizes and options; default those of `fields`.
        fields: of `DecoderConfig`, in place of the config's own.

    Raises:
        ValueError, TypeError: an option is out of range; the message names it.
    """

    Config = DecoderConfig

    def __init__(self, config: DecoderConfig | None = None, **fields: Any) -> None:
        super().__init__()
        c = DecoderConfig(**fields) if config is None else replace(config, **fields)
        self.config = c
        rotary = c.positions == "rotary"
        self.embedding = Embedding(
            c.vocab_size,
            c.d_model,
            c.max_positions,
            "none" if rotary else c.positions,
            c.dropout,
            scale=1.0,
        )
        self.rotation: RotaryTables | None = None
        if rotary:
            head_dim = c.head_dim or c.d_model // c.num_heads
            self.rotation = RotaryTables(head_dim, c.max_positions, c.rope_theta, c.rope_scaling)
        self.decoder = Stack(
            c.num_layers,
            c.d_model,
            c.num_heads,
            c.d_ff,
            dropout=c.dropout,
            attention_dropout=c.dropout if c.attention_dropout is None else c.attention_dropout,
            activation=c.activation,
            gated=c.gated,
            norm=c.norm,
            norm_first=True,
            norm_eps=c.norm_eps,
            bias=c.bias,
            checkpoint_activations=c.checkpoint_activations,
            qkv_bias=c.qkv_bias,
            num_heads_kv=c.num_heads_kv,
            head_dim=c.head_dim,
            window=c.window,
            softcap=c.softcap,
        )
        self.output = nn.Linear(c.d_model, c.vocab_size, bias=False)
        initialize(self)
        # What a layer adds shrinks with the number of them (Radford et al. 2019, section 2.3).
        for name, weight in self.decoder.named_parameters():
            if name.endswith(("out_proj.weight", "linear2.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * c.num_layers))
        if c.tie_embeddings:
            self.output.weight = self.embedding.tokens.weight

    @property
    def num_parameters(self) -> int:
        """Number of trained numbers; what is shared counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Logits ``(batch, seqlen, vocab_size)`` of the token that follows each.

        Args:
            tokens: ``(batch, seqlen)``, int64 or int32; with `caches`, the next ones.
            mask: boolean ``(batch, seqlen)``, with `caches` of all tokens so far: True = take
                part. Default: all but the config's ``pad_id``.
            positions: ``(batch, seqlen)``; default: those that take part are counted.
            caches: of the tokens before, one a layer; `tokens` are appended.

        Raises:
            ValueError, TypeError: an argument has the wrong shape or dtype, or is too long.
        """
        return self.output(self.hidden(tokens, mask=mask, positions=positions, caches=caches))

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """States ``(batch, seqlen, d_model)``, of which `output` makes logits; as `forward`."""
        start = 0 if caches is None else caches[0].length
        check_tokens("tokens", tokens, self.config.max_positions, start)
        batch, seqlen = tokens.shape
        if mask is None:
            mask = self._padding(tokens, start)
        else:
            check_mask(mask, batch, start + seqlen)
        if positions is not None:
            check_beside("positions", positions, tokens)
        elif mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]
        return self.decoder(
            self.embedding(tokens, start, positions=positions),
            mask=None if mask is None else mask[:, None, None, :],
            causal=True,
            caches=caches,
            rotation=None if self.rotation is None else self.rotation(positions),
        )

    def _padding(self, tokens: Tensor, start: int) -> Tensor | None:
        if self.config.pad_id is None:
            return None
        if start:
            raise ValueError("mask: expected one of all tokens so far, beside caches and pad_id")
        return tokens != self.config.pad_id


def initialize(model: nn.Module) -> None:
    """Weights of linear and embedding layers normal with deviation 0.02, biases 0 (BERT, GPT-2)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Embedding) and isinstance(module.positions, nn.Parameter):
            nn.init.normal_(module.positions, std=0.02)
