"""What a model begins with: tokens or patches as vectors, and where they stand."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.config import RopeScaling
from fastattn.nn import LayerNorm


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
    """``dropout(norm(scale * token + position + type))``, of which a model may leave out parts.

    Vaswani et al. 2017, sections 3.4 and 3.5; types and norm are BERT's (Devlin et al. 2019).

    Args:
        vocab_size: number of tokens.
        d_model: size of the representations.
        max_positions: longest row.
        positions: "sinusoidal"; "learned", which begins as the sinusoids; or "none", of a model
            that knows positions in another way.
        dropout: probability of dropping an element in training.
        scale: of the tokens; default ``sqrt(d_model)``.
        types: number of token types; 0: there are none.
        norm_eps: of the layer norm; None: there is none.
    """

    positions: Tensor | None

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        max_positions: int,
        positions: str,
        dropout: float,
        *,
        scale: float | None = None,
        types: int = 0,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.scale = math.sqrt(d_model) if scale is None else scale
        self.tokens = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.tokens.weight, std=d_model**-0.5)
        if positions == "learned":
            self.positions = nn.Parameter(sinusoids(max_positions, d_model))
        elif positions == "sinusoidal":
            self.register_buffer("positions", sinusoids(max_positions, d_model), persistent=False)
        else:
            self.positions = None
        self.types = nn.Embedding(types, d_model) if types else None
        self.norm = None if norm_eps is None else LayerNorm(d_model, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: Tensor,
        start: int = 0,
        *,
        positions: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """Tokens ``(batch, seqlen)`` to ``(batch, seqlen, d_model)``.

        Args:
            tokens: int64 or int32.
            start: position of the first.
            positions: ``(batch, seqlen)``, of each token, in place of `start`.
            types: ``(batch, seqlen)``, of each token; default 0.
        """
        x = self.tokens(tokens)
        if self.scale != 1.0:
            x = x * self.scale
        if self.positions is not None:
            if positions is None:
                x = x + self.positions[start : start + tokens.shape[1]]
            else:
                x = x + F.embedding(positions, self.positions)
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        if self.norm is not None:
            x = self.norm(x)
        return self.dropout(x)


class PatchEmbedding(nn.Module):
    """Patches of an image as tokens, after a class token (Dosovitskiy et al. 2021, section 3.1).

    Args:
        image_size: height and width.
        patch_size: of each patch, a divisor of `image_size`.
        channels: of the image.
        d_model: size of the representations.
        dropout: probability of dropping an element in training.
    """

    def __init__(
        self, image_size: int, patch_size: int, channels: int, d_model: int, dropout: float
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        patches = (image_size // patch_size) ** 2
        self.patches = nn.Linear(channels * patch_size**2, d_model)
        self.class_token = nn.Parameter(torch.zeros(d_model))
        self.positions = nn.Parameter(0.02 * torch.randn(patches + 1, d_model))
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to ``(batch, 1 + patches, d_model)``."""
        batch, channels, height, width = images.shape
        size = self.patch_size
        x = images.reshape(batch, channels, height // size, size, width // size, size)
        # (batch, rows, columns, channels, size, size), in the order of a convolution's weight
        x = self.patches(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        x = torch.cat([self.class_token.to(x.dtype).expand(batch, 1, -1), x], 1)
        return self.dropout(x + self.positions)


class RotaryTables(nn.Module):
    """Cosines and sines of rotary position embedding, for `fastattn.rotary` (Su et al. 2021).

    Args:
        head_dim: size of a head.
        max_positions: longest row.
        theta: base of the frequencies.
        scaling: of the frequencies, as Llama 3 has it.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        max_positions: int,
        theta: float = 10000.0,
        scaling: RopeScaling | None = None,
    ) -> None:
        super().__init__()
        # In float32, as the models were trained.
        frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        if scaling is not None:
            frequency = _scaled(frequency, scaling)
        angle = torch.arange(max_positions).float()[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tables, or their rows of `positions` ``(batch, seqlen)``."""
        if positions is None:
            return self.cos, self.sin
        return F.embedding(positions, self.cos), F.embedding(positions, self.sin)


def _scaled(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Low frequencies divided by the factor, high ones kept, those between in proportion."""
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequency / scaling.factor + kept * frequency


class RelativePositionBias(nn.Module):
    """A learned number a head for each bucket of distances (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each; the others grow with its logarithm, and the last
    holds all from `max_distance` on.

    Args:
        buckets: how many.
        num_heads: heads.
        bidirectional: keys after the query have half of the buckets; otherwise they count as 0.
        max_distance: see above.
    """

    def __init__(
        self, buckets: int, num_heads: int, bidirectional: bool, max_distance: int
    ) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.zeros(buckets, num_heads))

    def forward(self, seqlen_q: int, seqlen_k: int, offset: int = 0) -> Tensor:
        """``(1, num_heads, seqlen_q, seqlen_k)``; the first query is at position `offset`."""
        device = self.weight.device
        queries = torch.arange(offset, offset + seqlen_q, device=device)
        distance = torch.arange(seqlen_k, device=device) - queries[:, None]
        return F.embedding(self._buckets(distance), self.weight).permute(2, 0, 1)[None]

    def _buckets(self, distance: Tensor) -> Tensor:
        buckets = self.weight.shape[0]
        first = torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            first = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        ratio = math.log(self.max_distance / exact)
        grown = exact + (
            (distance.clamp(min=1).float() / exact).log() / ratio * (buckets - exact)
        ).long().clamp(max=buckets - 1 - exact)
        return first + torch.where(distance < exact, distance, grown)
