"""The models' configurations: frozen, validated when made."""

from dataclasses import dataclass
from typing import Any

from fastattn.ops.ffn import ACTIVATIONS

POSITIONS = ("sinusoidal", "learned")
TIES = ("none", "target", "all")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and options of `fastattn.models.Transformer`; the defaults are the paper's base model.

    Args:
        input_vocab_size: number of source tokens.
        target_vocab_size: number of target tokens.
        d_model: size of the representations.
        num_layers: layers of the encoder, and of the decoder.
        num_heads: attention heads, a divisor of `d_model`.
        d_ff: hidden size of the feed-forward networks.
        dropout: probability of dropping an element of the embeddings, of each sublayer's output
            and of the feed-forward networks' hidden layer.
        attention_dropout: probability of dropping an attention weight; default `dropout`.
        max_positions: longest source and longest target.
        positions: "sinusoidal" (Vaswani et al. 2017, section 3.5) or "learned".
        norm_first: normalise before each sublayer, with a final norm (Xiong et al. 2020), instead
            of after it.
        activation: of the feed-forward networks: "relu", "gelu", "gelu_tanh" or "silu".
        tie_embeddings: "none"; "target": the output projection is the target embedding;
            "all": the source embedding too, for one shared vocabulary (Press and Wolf 2017).
        pad_id: the token that pads sources, hidden from attention, and generated targets;
            None: sources are not padded.
        bias: biases in the layers' projections and norms.
        layer_norm_eps: added to the variance in the norms.

    Raises:
        ValueError, TypeError: a value is out of range; the message names the field.
    """

    input_vocab_size: int
    target_vocab_size: int
    d_model: int = 512
    num_layers: int = 6
    num_heads: int = 8
    d_ff: int = 2048
    dropout: float = 0.1
    attention_dropout: float | None = None
    max_positions: int = 512
    positions: str = "sinusoidal"
    norm_first: bool = False
    activation: str = "relu"
    tie_embeddings: str = "none"
    pad_id: int | None = 0
    bias: bool = True
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in (
            "input_vocab_size", "target_vocab_size", "d_model", "num_layers", "num_heads", "d_ff",
            "max_positions",
        ):  # fmt: skip
            _check_size(name, getattr(self, name))
        if self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of d_model={self.d_model}, got {self.num_heads}"
            )
        _check_probability("dropout", self.dropout)
        if self.attention_dropout is not None:
            _check_probability("attention_dropout", self.attention_dropout)
        _check_choice("positions", self.positions, POSITIONS)
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("tie_embeddings", self.tie_embeddings, TIES)
        if self.tie_embeddings == "all" and self.input_vocab_size != self.target_vocab_size:
            raise ValueError(
                'tie_embeddings: expected equal vocabularies with "all", got '
                f"input_vocab_size={self.input_vocab_size} and "
                f"target_vocab_size={self.target_vocab_size}"
            )
        if self.pad_id is not None:
            _check_int("pad_id", self.pad_id)
            limit = min(self.input_vocab_size, self.target_vocab_size)
            if not 0 <= self.pad_id < limit:
                raise ValueError(
                    f"pad_id: expected a token of both vocabularies, 0 to {limit - 1}, or None, "
                    f"got {self.pad_id}"
                )
        if not self.layer_norm_eps > 0:
            raise ValueError(
                f"layer_norm_eps: expected a positive number, got {self.layer_norm_eps}"
            )


def _check_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected int, got {type(value).__name__}")


def _check_size(name: str, value: Any) -> None:
    _check_int(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
