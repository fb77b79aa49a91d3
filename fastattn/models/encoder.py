"""The encoder-only Transformer (Devlin et al. 2019, "BERT"), and heads for its tasks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.models.blocks import Stack
from fastattn.models.config import EncoderConfig
from fastattn.models.decoder import initialize
from fastattn.models.embeddings import Embedding
from fastattn.models.model import Model
from fastattn.models.tokens import check_beside, check_mask, check_tokens
from fastattn.nn import LayerNorm
from fastattn.nn.feed_forward import make_activation


class Encoder(Model):
    """Each token's state, in sight of all tokens of its row.

    Its heads (`MaskedLanguageModel`, `SequenceClassifier`, `TokenClassifier`, `SpanClassifier`)
    have it as their ``encoder``, and its arguments.

    Args:
        config, fields: as in `fastattn.models.model.Model`; an `EncoderConfig`.
    """

    Config = EncoderConfig
    config: EncoderConfig

    def __init__(self, config: EncoderConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        c = self.config
        self.embedding = Embedding(
            c.vocab_size,
            c.d_model,
            c.max_positions,
            "learned",
            c.dropout,
            scale=1.0,
            types=c.types,
            norm_eps=c.norm_eps,
        )
        self.encoder = Stack(
            c.num_layers,
            c.d_model,
            c.num_heads,
            c.d_ff,
            **c.layer_options(),
        )
        initialize(self, c.d_model)

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, types: Tensor | None = None
    ) -> Tensor:
        """States ``(batch, seqlen, d_model)``.

        Args:
            tokens: ``(batch, seqlen)``, int64 or int32.
            mask: boolean ``(batch, seqlen)``, True = take part. Default: all but the config's
                ``pad_id``.
            types: of each token, ``(batch, seqlen)``; default 0.

        Raises:
            ValueError, TypeError: an argument has the wrong shape or dtype, or is too long.
        """
        check_tokens("tokens", tokens, self.config.max_positions)
        if mask is not None:
            check_mask(mask, *tokens.shape)
        elif self.config.pad_id is not None:
            mask = tokens != self.config.pad_id
        if types is not None:
            check_beside("types", types, tokens)
            if not self.config.types:
                raise ValueError("types: expected None, as the model has none, got a tensor")
        x = self.embedding(tokens, types=types)
        return self.encoder(x, mask=None if mask is None else mask[:, None, None, :])


class _Head(Model):
    """An encoder, and what stands on it."""

    Config = EncoderConfig
    config: EncoderConfig

    def __init__(self, config: EncoderConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.encoder = Encoder(self.config)
        self.dropout = nn.Dropout(self.config.dropout)


class MaskedLanguageModel(_Head):
    """Predicts the tokens that were hidden or changed (Devlin et al. 2019, section 3.1)."""

    def __init__(self, config: EncoderConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        c = self.config
        self.transform = nn.Linear(c.d_model, c.d_model)
        self.activation = make_activation(c.activation)
        self.transform_norm = LayerNorm(c.d_model, eps=c.norm_eps)
        self.output = nn.Linear(c.d_model, c.vocab_size)
        initialize(self.transform, self.config.d_model)
        self.output.weight = self.encoder.embedding.tokens.weight
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Logits ``(batch, seqlen, vocab_size)``; arguments as `Encoder`."""
        return self.output(self.hidden(tokens, **options))

    def hidden(self, tokens: Tensor, **options: Any) -> Tensor:
        """States ``(batch, seqlen, d_model)``, of which `output` makes logits."""
        x = self.encoder(tokens, **options)
        return self.transform_norm(self.activation(self.transform(x)))


class SequenceClassifier(_Head):
    """Classifies whole rows by their first token, as BERT does."""

    def __init__(self, config: EncoderConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.pooler = nn.Linear(self.config.d_model, self.config.d_model)
        self.classifier = nn.Linear(self.config.d_model, self.config.num_labels)
        initialize(self.pooler, self.config.d_model)
        initialize(self.classifier, self.config.d_model)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Logits ``(batch, num_labels)``; arguments as `Encoder`."""
        first = self.encoder(tokens, **options)[:, 0]
        return self.classifier(self.dropout(torch.tanh(self.pooler(first))))


class TokenClassifier(_Head):
    """Classifies each token: parts of speech, names of persons and places."""

    def __init__(self, config: EncoderConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.classifier = nn.Linear(self.config.d_model, self.config.num_labels)
        initialize(self.classifier, self.config.d_model)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Logits ``(batch, seqlen, num_labels)``; arguments as `Encoder`."""
        return self.classifier(self.dropout(self.encoder(tokens, **options)))


class Span(NamedTuple):
    """Logits ``(batch, seqlen)`` of where an answer begins and ends (its last token)."""

    start: Tensor
    end: Tensor


class SpanClassifier(_Head):
    """Finds the answer to a question in a text (Devlin et al. 2019, section 4.2)."""

    def __init__(self, config: EncoderConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.classifier = nn.Linear(self.config.d_model, 2)
        initialize(self.classifier, self.config.d_model)

    def forward(self, tokens: Tensor, **options: Any) -> Span:
        """Logits of the answer's first and last token; arguments as `Encoder`."""
        return Span(*self.classifier(self.encoder(tokens, **options)).unbind(-1))
