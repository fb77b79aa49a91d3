"""The encoder-decoder Transformer (Vaswani et al. 2017, "Attention is all you need")."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.models import generation
from fastattn.models.blocks import CrossAttention, KeysValues, SelfAttention, Stack
from fastattn.models.cache import Caches, check_cache, make_caches
from fastattn.models.config import TransformerConfig
from fastattn.models.embeddings import Embedding, RelativePositionBias
from fastattn.models.model import Model
from fastattn.models.tokens import check_ends, check_token, check_tokens


class AttentionWeights(NamedTuple):
    """The weights of every attention, one tensor a layer, ``(batch, heads, queries, keys)``."""

    encoder: list[Tensor]  # source to source
    decoder: list[Tensor]  # target to target, causal
    cross: list[Tensor]  # target to source


class Transformer(Model):
    """Encoder-decoder Transformer from source tokens to target tokens.

    ::

        model = Transformer(input_vocab_size=8000, target_vocab_size=8000)
        logits = model(src, tgt)  # tgt begins with bos; the loss wants it a token later
        out = model.eval().generate(src, bos_id=1, eos_id=2, max_new_tokens=64)

    Sources may be padded with ``pad_id`` anywhere, targets at their end. Its layers' weights may
    come from a `torch.nn.Transformer`: see `fastattn.models.load_torch`.

    Args:
        config, fields: as in `fastattn.models.model.Model`; a `TransformerConfig`.
    """

    Config = TransformerConfig
    config: TransformerConfig

    def __init__(self, config: TransformerConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        config = self.config
        self.input_embedding = self._embedding(config.input_vocab_size)
        self.target_embedding = self._embedding(config.target_vocab_size)
        self.encoder = self._stack(cross_attention=False)
        self.decoder = self._stack(cross_attention=True)
        self.output = nn.Linear(config.d_model, config.target_vocab_size, bias=False)
        for stack in (self.encoder, self.decoder):
            for parameter_name, parameter in stack.named_parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
                elif parameter_name.endswith("bias"):
                    nn.init.zeros_(parameter)
        if config.softmax_scale is not None:
            self._rescale_queries(config.softmax_scale)
        nn.init.normal_(self.output.weight, std=config.d_model**-0.5)
        if config.tie_embeddings in ("target", "all"):
            self.output.weight = self.target_embedding.tokens.weight
        if config.tie_embeddings in ("inputs", "all"):
            self.input_embedding.tokens.weight = self.target_embedding.tokens.weight

    @torch.no_grad()
    def _rescale_queries(self, softmax_scale: float) -> None:
        """Scores begin as large as with the usual scale, as T5's do."""
        for module in self.modules():
            if isinstance(module, SelfAttention):
                weight = module.in_proj.weight
                weight[: module.num_heads * module.head_dim] /= softmax_scale * module.head_dim**0.5
            elif isinstance(module, CrossAttention):
                weight = module.q_proj.weight
                weight /= softmax_scale * (len(weight) / module.num_heads) ** 0.5

    def _embedding(self, vocab_size: int) -> Embedding:
        c = self.config
        positions = "none" if c.positions == "relative" else c.positions
        return Embedding(
            vocab_size, c.d_model, c.max_positions, positions, c.dropout, scale=c.embedding_scale
        )

    def _stack(self, *, cross_attention: bool) -> Stack:
        c = self.config
        position_bias = None
        if c.positions == "relative":
            position_bias = RelativePositionBias(
                c.relative_buckets, c.num_heads, not cross_attention, c.relative_max_distance
            )
        num_layers = c.num_decoder_layers if cross_attention else None
        return Stack(
            num_layers or c.num_layers,
            c.d_model,
            c.num_heads,
            c.d_ff,
            cross_attention=cross_attention,
            **c.layer_options(),
            norm_first=c.norm_first,
            bias=c.bias,
            norm=c.norm,
            gated=c.gated,
            head_dim=c.head_dim,
            softmax_scale=c.softmax_scale,
            position_bias=position_bias,
        )

    def _logits(self, x: Tensor) -> Tensor:
        scale = self.config.output_scale
        return self.output(x if scale == 1.0 else x * scale)

    def padding_mask(self, src: Tensor) -> Tensor | None:
        """Which source tokens take part, ``(batch, 1, 1, seqlen)`` boolean; None: all do."""
        if self.config.pad_id is None:
            return None
        return (src != self.config.pad_id)[:, None, None, :]

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits of the token that follows each target token.

        Args:
            src: tokens ``(batch, seqlen_src)``, int64 or int32.
            tgt: tokens ``(batch, seqlen_tgt)``; each sees itself, those before it and the source.

        Returns:
            ``(batch, seqlen_tgt, target_vocab_size)``.

        Raises:
            ValueError, TypeError: an argument has the wrong shape or dtype, or is too long.
        """
        return self.decode(tgt, self.encode(src), self.padding_mask(src))

    def encode(self, src: Tensor) -> Tensor:
        """The memory ``(batch, seqlen_src, d_model)`` of `src`, tokens ``(batch, seqlen_src)``.

        Raises:
            ValueError, TypeError: `src` has the wrong shape or dtype, or is too long.
        """
        check_tokens("src", src, self.config.max_positions)
        return self.encoder(self.input_embedding(src), mask=self.padding_mask(src))

    def decode(self, tgt: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """Logits ``(rows, seqlen_tgt, target_vocab_size)`` of what follows each target token.

        Args:
            tgt: tokens ``(rows, seqlen_tgt)``. With ``rows = n * batch``, each n rows in
                succession share one source.
            memory: ``(batch, seqlen_src, d_model)``, of `encode`.
            memory_mask: ``(batch, 1, 1, seqlen_src)``, of `padding_mask`.

        Raises:
            ValueError, TypeError: an argument has the wrong shape or dtype, or is too long.
        """
        check_tokens("tgt", tgt, self.config.max_positions)
        batch, rows = memory.shape[0], tgt.shape[0]
        if rows % batch if batch else rows:
            raise ValueError(f"tgt: expected a multiple of {batch} rows as in src, got {rows}")
        x = self.decoder(
            self.target_embedding(tgt),
            causal=True,
            memory=self.decoder.keys_values(memory),
            memory_mask=memory_mask,
        )
        return self._logits(x)

    @torch.no_grad()
    def attention_weights(self, src: Tensor, tgt: Tensor) -> AttentionWeights:
        """Run the model on `src` and `tgt` as `forward` does, and return all attention weights.

        They are computed beside the fused attention, for this call only; without dropout.
        """
        weights = AttentionWeights([], [], [])
        hooks = []
        for stack, own in ((self.encoder, weights.encoder), (self.decoder, weights.decoder)):
            for module in stack.modules():
                if isinstance(module, SelfAttention | CrossAttention):
                    seen = own if isinstance(module, SelfAttention) else weights.cross

                    def record(module, args, kwargs, seen=seen):
                        kwargs = {name: kwargs[name] for name in kwargs if name != "cache"}
                        seen.append(module.weights(*args, **kwargs))

                    hooks.append(module.register_forward_pre_hook(record, with_kwargs=True))
        try:
            self(src, tgt)
        finally:
            for hook in hooks:
                hook.remove()
        return weights

    @torch.no_grad()
    def generate(
        self,
        src: Tensor,
        *,
        bos_id: int,
        eos_id: int | Sequence[int] | None,
        max_new_tokens: int,
        cache: str = "static",
        **options: Any,
    ) -> Tensor:
        """Target tokens for `src`: greedy, sampled or by beam search. Call `eval()` first.

        Args:
            src: tokens ``(batch, seqlen_src)``, padded with ``pad_id``.
            bos_id: the token that begins each target; not part of the result.
            eos_id, max_new_tokens: of `fastattn.models.generation.Options`; at most
                ``max_positions`` tokens.
            cache: "static": keep each token's keys and values in memory taken for all of them at
                once; "paged": in pages, which beams share; "none": every step computes all of
                them again. The result is the same.
            options: of `fastattn.models.generation.Options`.

        Returns:
            ``(batch, n)``, n the longest target's tokens with its end; the others padded with
            ``pad_id`` (`eos_id` if the model has none).

        Raises:
            ValueError, TypeError: an argument is out of range, or has no effect beside the others.
        """
        return generation.generate(
            *self._generation(src, bos_id, eos_id, max_new_tokens, cache, options), **options
        )

    @torch.no_grad()
    def stream(
        self,
        src: Tensor,
        *,
        bos_id: int,
        eos_id: int | Sequence[int] | None,
        max_new_tokens: int,
        cache: str = "static",
        **options: Any,
    ) -> Iterator[Tensor]:
        """The tokens of `generate` as they are made, ``(batch,)`` a step; without beams."""
        return generation.stream(
            *self._generation(src, bos_id, eos_id, max_new_tokens, cache, options), **options
        )

    def _generation(
        self,
        src: Tensor,
        bos_id: int,
        eos_id: int | Sequence[int] | None,
        max_new_tokens: int,
        cache: str,
        options: dict[str, Any],
    ) -> tuple[generation.Decoding, Tensor]:
        """A decoding at its beginning and its prompt; completes `options`."""
        config = self.config
        if max_new_tokens > config.max_positions:
            raise ValueError(
                f"max_new_tokens: expected at most max_positions={config.max_positions}, "
                f"got {max_new_tokens}"
            )
        check_token("bos_id", bos_id, config.target_vocab_size)
        ends = check_ends(eos_id, config.target_vocab_size)
        pad_id = config.pad_id if config.pad_id is not None else next(iter(ends), 0)
        options.update(eos_id=ends, max_new_tokens=max_new_tokens)
        options.setdefault("pad_id", pad_id)
        prompt = src.new_full((src.shape[0], 1), bos_id)
        if check_cache(cache) == "none":
            return _RecomputedDecoding(self, src), prompt
        layers = len(self.decoder.layers)
        return _CachedDecoding(self, src, make_caches(cache, layers, max_new_tokens)), prompt


class _CachedDecoding:
    """Each step computes its own tokens; keys and values of the others come from the caches."""

    def __init__(self, model: Transformer, src: Tensor, caches: Caches) -> None:
        self._model = model
        self._memory: Sequence[KeysValues] = model.decoder.keys_values(model.encode(src))
        self._memory_mask = model.padding_mask(src)
        self._caches = caches

    def step(self, tokens: Tensor) -> Tensor:
        model = self._model
        start = self._caches.extend(tokens)
        x = model.decoder(
            model.target_embedding(tokens, start=start),
            causal=True,
            caches=self._caches.layers,
            memory=self._memory,
            memory_mask=self._memory_mask,
        )
        return model._logits(x[:, -1])

    def reorder(self, rows: Tensor) -> None:
        # The memory stays: the beams of a source are in succession and share it.
        self._caches.reorder(rows)


class _RecomputedDecoding:
    """Each step computes all tokens again: what the caches must agree with."""

    def __init__(self, model: Transformer, src: Tensor) -> None:
        self._model = model
        self._memory = model.encode(src)
        self._memory_mask = model.padding_mask(src)
        self._tokens = src.new_empty(src.shape[0], 0)

    def step(self, tokens: Tensor) -> Tensor:
        self._tokens = torch.cat([self._tokens, tokens], 1)
        return self._model.decode(self._tokens, self._memory, self._memory_mask)[:, -1]

    def reorder(self, rows: Tensor) -> None:
        self._tokens = self._tokens[rows]
