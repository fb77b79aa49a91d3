"""The vision Transformer (Dosovitskiy et al. 2021, "An image is worth 16x16 words")."""

from typing import Any

from torch import Tensor, nn

from fastattn.models.blocks import Stack
from fastattn.models.config import VisionConfig
from fastattn.models.decoder import initialize
from fastattn.models.embeddings import PatchEmbedding
from fastattn.models.model import Model


class VisionTransformer(Model):
    """Classifies images, whose patches are its tokens.

    Args:
        config, fields: as in `fastattn.models.model.Model`; a `VisionConfig`.
    """

    Config = VisionConfig
    config: VisionConfig

    def __init__(self, config: VisionConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        c = self.config
        self.embedding = PatchEmbedding(
            c.image_size, c.patch_size, c.channels, c.d_model, c.dropout
        )
        self.encoder = Stack(
            c.num_layers,
            c.d_model,
            c.num_heads,
            c.d_ff,
            **c.layer_options(),
            norm_first=True,
            qkv_bias=c.qkv_bias,
        )
        self.classifier = nn.Linear(c.d_model, c.num_labels) if c.num_labels else None
        initialize(self, c.d_model)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_labels)``, or without labels the states ``(batch, d_model)``.

        Args:
            images: ``(batch, channels, image_size, image_size)``, in the dtype of the weights.

        Raises:
            ValueError: `images` has the wrong shape.
        """
        x = self.hidden(images)
        x = x[:, 0] if self.config.pooling == "class" else x[:, 1:].mean(1)
        return x if self.classifier is None else self.classifier(x)

    def hidden(self, images: Tensor) -> Tensor:
        """States ``(batch, 1 + patches, d_model)`` of the class token and the patches."""
        c = self.config
        expected = (c.channels, c.image_size, c.image_size)
        if images.dim() != 4 or images.shape[1:] != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"images: expected (batch, {shape}), got {tuple(images.shape)}")
        return self.encoder(self.embedding(images))
