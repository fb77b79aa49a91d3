"""The decoder-only Transformer: a language model, with GPT-2's or Llama's options."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.models import generation
from fastattn.models.blocks import Stack
from fastattn.models.cache import Cache, Caches, PagedCaches, check_cache, make_caches
from fastattn.models.config import DecoderConfig
from fastattn.models.embeddings import Embedding, RotaryTables
from fastattn.models.model import Model
from fastattn.models.tokens import check_beside, check_ends, check_mask, check_tokens


class Decoder(Model):
    """Language model: each token sees those before it, and predicts the next.

    ::

        model = Decoder(vocab_size=8000, d_model=256, num_layers=4, num_heads=4, d_ff=1024)
        logits = model(tokens)  # logits[:, i] is of tokens[:, i + 1]

    GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023) are configurations of it: see
    `DecoderConfig`. Rows may be padded on either side.

    Args:
        config, fields: as in `fastattn.models.model.Model`; a `DecoderConfig`.
    """

    Config = DecoderConfig
    config: DecoderConfig

    def __init__(self, config: DecoderConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        c = self.config
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
            **c.layer_options(),
            gated=c.gated,
            norm=c.norm,
            norm_first=True,
            bias=c.bias,
            qkv_bias=c.qkv_bias,
            num_heads_kv=c.num_heads_kv,
            head_dim=c.head_dim,
            window=c.window,
            softcap=c.softcap,
        )
        self.output = nn.Linear(c.d_model, c.vocab_size, bias=False)
        std = initialize(self, c.d_model)
        # What a layer adds shrinks with the number of them (Radford et al. 2019, section 2.3).
        for name, weight in self.decoder.named_parameters():
            if name.endswith(("out_proj.weight", "linear2.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=std / math.sqrt(2 * c.num_layers))
        if c.tie_embeddings:
            self.output.weight = self.embedding.tokens.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """Logits ``(batch, seqlen, vocab_size)`` of the token that follows each.

        Args:
            tokens: ``(batch, seqlen)``, int64 or int32; with `caches`, the next ones.
            mask: boolean ``(batch, seqlen)``, with `caches` of all tokens so far: True = take
                part. Default: all but the config's ``pad_id``; beside `positions` all.
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
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """States ``(batch, seqlen, d_model)``, of which `output` makes logits; as `forward`."""
        start = 0 if caches is None else caches[0].length
        check_tokens("tokens", tokens, self.config.max_positions, start)
        batch, seqlen = tokens.shape
        if mask is not None:
            check_mask(mask, batch, start + seqlen)
        elif positions is None:
            mask = self._padding(tokens, start)
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

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        eos_id: int | Sequence[int] | None,
        max_new_tokens: int,
        cache: str = "static",
        **options: Any,
    ) -> Tensor:
        """Continue each row: greedy, sampled or by beam search. Call `eval()` first.

        Args:
            tokens: ``(batch, seqlen)``, seqlen at least 1; shorter rows are padded on the left.
            mask: boolean ``(batch, seqlen)``, False where it is padding. Default: where it is not
                the config's ``pad_id``.
            eos_id, max_new_tokens: of `fastattn.models.generation.Options`; at most
                ``max_positions`` tokens with those of the prompt.
            cache: "static": keep each token's keys and values in memory taken for all of them at
                once; "paged": in pages, which rows share and padding does not take; "none": every
                step computes all of them again. The result is the same.
            options: of `fastattn.models.generation.Options`.

        Returns:
            The new tokens ``(batch, n)``, n the longest row's with its end; the others padded.

        Raises:
            ValueError, TypeError: an argument is out of range, or has no effect beside the others.
        """
        decoding, mask = self._generation(tokens, mask, eos_id, max_new_tokens, cache, options)
        return generation.generate(decoding, tokens, mask=mask, **options)

    @torch.no_grad()
    def stream(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        eos_id: int | Sequence[int] | None,
        max_new_tokens: int,
        cache: str = "static",
        **options: Any,
    ) -> Iterator[Tensor]:
        """The tokens of `generate` as they are made, ``(batch,)`` a step; without beams."""
        decoding, mask = self._generation(tokens, mask, eos_id, max_new_tokens, cache, options)
        return generation.stream(decoding, tokens, mask=mask, **options)

    def _generation(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        eos_id: int | Sequence[int] | None,
        max_new_tokens: int,
        cache: str,
        options: dict[str, Any],
    ) -> tuple[generation.Decoding, Tensor | None]:
        """A decoding at its beginning, and the prompt's mask; completes `options`."""
        config = self.config
        check_tokens("tokens", tokens, config.max_positions)
        capacity = tokens.shape[1] + max_new_tokens
        if capacity > config.max_positions:
            raise ValueError(
                f"max_new_tokens: expected at most max_positions={config.max_positions} less the "
                f"prompt's {tokens.shape[1]}, got {max_new_tokens}"
            )
        ends = check_ends(eos_id, config.vocab_size)
        options.update(eos_id=ends, max_new_tokens=max_new_tokens)
        pad_id = config.pad_id if config.pad_id is not None else next(iter(ends), 0)
        options.setdefault("pad_id", pad_id)
        if mask is None:
            mask = self._padding(tokens, 0)
        padding = None
        if mask is not None:
            check_mask(mask, *tokens.shape)
            padding = (~mask).sum(1)
            if (mask[:, 1:] < mask[:, :-1]).any():
                raise ValueError("mask: expected padding on the left only, where a row begins")
        if check_cache(cache) == "none":
            return _RecomputedDecoding(self, tokens, mask), mask
        caches = make_caches(cache, len(self.decoder.layers), capacity, padding)
        return _CachedDecoding(self, tokens, caches, mask, padding), mask

    def _padding(self, tokens: Tensor, start: int) -> Tensor | None:
        if self.config.pad_id is None:
            return None
        if start:
            raise ValueError("mask: expected one of all tokens so far, beside caches and pad_id")
        return tokens != self.config.pad_id


def initialize(model: nn.Module, d_model: int) -> float:
    """Draws weights of linear and embedding layers from a normal distribution; biases are 0.

    Its deviation, which it returns, is BERT's and GPT-2's 0.02 at their width of 768, and at
    others goes with ``1 / sqrt(d_model)``, so that a small model begins alike.
    """
    std = 0.02 * math.sqrt(768 / d_model)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Embedding) and isinstance(module.positions, nn.Parameter):
            nn.init.normal_(module.positions, std=std)
    return std


class _CachedDecoding:
    """Each step computes its own tokens; keys and values of the others come from the caches."""

    def __init__(
        self,
        model: Decoder,
        prompt: Tensor,
        caches: Caches,
        mask: Tensor | None,
        padding: Tensor | None,
    ) -> None:
        self._model = model
        self._caches = caches
        # Pages hold no padding, which needs no mask then.
        self._mask = None if isinstance(caches, PagedCaches) else mask
        self._padding = torch.zeros_like(prompt[:, 0]) if padding is None else padding

    def step(self, tokens: Tensor) -> Tensor:
        seqlen = tokens.shape[1]
        start = self._caches.extend(tokens)
        if start and self._mask is not None:
            new = torch.ones_like(tokens, dtype=torch.bool)
            self._mask = torch.cat([self._mask, new], 1)
        positions = torch.arange(start, start + seqlen, device=tokens.device)
        positions = (positions - self._padding[:, None]).clamp(min=0)
        x = self._model.hidden(
            tokens, mask=self._mask, positions=positions, caches=self._caches.layers
        )
        return self._model.output(x[:, -1])

    def reorder(self, rows: Tensor) -> None:
        self._caches.reorder(rows)
        self._padding = self._padding[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]


class _RecomputedDecoding:
    """Each step computes all tokens again: what the caches must agree with."""

    def __init__(self, model: Decoder, prompt: Tensor, mask: Tensor | None) -> None:
        self._model = model
        self._mask = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask
        self._tokens = prompt[:, :0]

    def step(self, tokens: Tensor) -> Tensor:
        if self._tokens.shape[1]:
            new = torch.ones_like(tokens, dtype=torch.bool)
            self._mask = torch.cat([self._mask, new], 1)
        self._tokens = torch.cat([self._tokens, tokens], 1)
        return self._model.output(self._model.hidden(self._tokens, mask=self._mask)[:, -1])

    def reorder(self, rows: Tensor) -> None:
        self._tokens, self._mask = self._tokens[rows], self._mask[rows]
