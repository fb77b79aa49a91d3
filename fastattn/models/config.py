"""The models' configurations: frozen, validated when made."""

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from fastattn.ops.ffn import ACTIVATIONS

if TYPE_CHECKING:
    from typing_extensions import Self

NORMS = ("layer", "rms")
POSITIONS = ("sinusoidal", "learned", "relative")
DECODER_POSITIONS = ("learned", "sinusoidal", "rotary")
POOLINGS = ("class", "mean")
TIES = ("none", "inputs", "target", "all")


class Config:
    """What every configuration can, and its first check: each field is of the kind it says."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            if not any(_is(value, kind) for kind in kinds):
                expected = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
                raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for `from_dict`."""
        return asdict(self)  # type: ignore[call-overload]

    def changed(self, **fields: Any) -> "Self":
        """The same with other values of some fields; raises as `from_dict`."""
        return self.from_dict({**self.to_dict(), **fields})

    def layer_options(self: Any) -> dict[str, Any]:
        """The options of `Stack` that every configuration has."""
        attention_dropout = self.attention_dropout
        return dict(
            dropout=self.dropout,
            attention_dropout=self.dropout if attention_dropout is None else attention_dropout,
            activation=self.activation,
            norm_eps=self.norm_eps,
            checkpoint_activations=self.checkpoint_activations,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Self":
        """The configuration of these fields; those that are absent have their defaults.

        Raises:
            TypeError: a key is not a field, or one without a default is absent.
        """
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        if odd := sorted(values.keys() - set(known)):
            raise TypeError(f"{', '.join(odd)}: not of {cls.__name__}, which has {known}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Sizes and options of `fastattn.models.Transformer`; the defaults are the paper's base model.

    Args:
        input_vocab_size: number of source tokens.
        target_vocab_size: number of target tokens.
        d_model: size of the representations.
        num_layers: layers of the encoder, and of the decoder.
        num_decoder_layers: of the decoder, where it has another number.
        num_heads: attention heads, a divisor of `d_model`.
        d_ff: hidden size of the feed-forward networks.
        dropout: probability of dropping an element of the embeddings, of each sublayer's output
            and of the feed-forward networks' hidden layer.
        attention_dropout: probability of dropping an attention weight; default `dropout`.
        max_positions: longest source and longest target.
        positions: "sinusoidal" (Vaswani et al. 2017, section 3.5), "learned", or "relative": a
            learned bias of the scores (Raffel et al. 2020, section 2.1).
        relative_buckets, relative_max_distance: of the relative positions.
        norm_first: normalise before each sublayer, with a final norm (Xiong et al. 2020), instead
            of after it.
        activation: of the feed-forward networks: "relu", "gelu", "gelu_tanh" or "silu".
        tie_embeddings: "none"; "inputs": source and target embedding are one, for a shared
            vocabulary; "target": the output projection is the target embedding (Press and Wolf
            2017); "all": all three are one.
        pad_id: the token that pads sources, hidden from attention, and generated targets;
            None: sources are not padded.
        bias: biases in the layers' projections and norms.
        gated: the feed-forward networks are gated (Shazeer 2020), without biases.
        norm: "layer", or "rms" (Zhang and Sennrich 2019).
        norm_eps: added to the variance, or to the mean square, in the norms.
        head_dim: size of a head; default ``d_model / num_heads``.
        softmax_scale: factor of the attention scores; default ``1 / sqrt(head_dim)``.
        embedding_scale: factor of the token embeddings; default ``sqrt(d_model)``.
        output_scale: factor of the logits.
        checkpoint_activations: in training, compute the layers' activations again in the backward
            instead of keeping them (Chen et al. 2016).

    Raises:
        ValueError, TypeError: a value is out of range; the message names the field.
    """

    input_vocab_size: int
    target_vocab_size: int
    d_model: int = 512
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    d_ff: int = 2048
    dropout: float = 0.1
    attention_dropout: float | None = None
    max_positions: int = 512
    positions: str = "sinusoidal"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm_first: bool = False
    activation: str = "relu"
    tie_embeddings: str = "none"
    pad_id: int | None = 0
    bias: bool = True
    gated: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-5
    head_dim: int | None = None
    softmax_scale: float | None = None
    embedding_scale: float | None = None
    output_scale: float = 1.0
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self, "input_vocab_size", "target_vocab_size", "max_positions")
        _check_layers(self)
        if self.num_decoder_layers is not None:
            _check_sizes(self, "num_decoder_layers")
        _check_sizes(self, "relative_buckets", "relative_max_distance")
        _check_choice("norm", self.norm, NORMS)
        _check_choice("positions", self.positions, POSITIONS)
        _check_choice("tie_embeddings", self.tie_embeddings, TIES)
        shared = self.tie_embeddings in ("inputs", "all")
        if shared and self.input_vocab_size != self.target_vocab_size:
            raise ValueError(
                f"tie_embeddings: expected equal vocabularies with {self.tie_embeddings!r}, got "
                f"input_vocab_size={self.input_vocab_size} and "
                f"target_vocab_size={self.target_vocab_size}"
            )
        if self.pad_id is not None:
            limit = min(self.input_vocab_size, self.target_vocab_size)
            if not 0 <= self.pad_id < limit:
                raise ValueError(
                    f"pad_id: expected a token of both vocabularies, 0 to {limit - 1}, or None, "
                    f"got {self.pad_id}"
                )


@dataclass(frozen=True)
class RopeScaling(Config):
    """How Llama 3.1 stretches rotary positions: low frequencies are divided by `factor`.

    Args:
        factor: of the low frequencies.
        low_freq_factor, high_freq_factor: frequencies with fewer turns in
            `original_max_positions` than the one are divided, with more than the other kept, and
            between the two in proportion.
        original_max_positions: longest row of the first training.

    Raises:
        ValueError, TypeError: a value is out of range; the message names the field.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self, "original_max_positions")
        _check_positive("factor", self.factor)
        _check_positive("low_freq_factor", self.low_freq_factor)
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor: expected more than low_freq_factor={self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """Sizes and options of `fastattn.models.Decoder`; the defaults are GPT-2's smallest.

    Llama's are ``positions="rotary", norm="rms", activation="silu", gated=True, bias=False,
    tie_embeddings=False, dropout=0.0``.

    Args:
        vocab_size: number of tokens.
        d_model, num_layers, num_heads, d_ff: sizes.
        num_heads_kv: heads of keys and values, a divisor of `num_heads` (Ainslie et al. 2023);
            default `num_heads`.
        head_dim: size of a head; default ``d_model / num_heads``.
        max_positions: longest row.
        positions: "learned", "sinusoidal" or "rotary" (Su et al. 2021).
        rope_theta: base of the rotary frequencies.
        rope_scaling: see `RopeScaling`.
        norm, norm_eps, activation, gated, bias, dropout, attention_dropout,
            checkpoint_activations: as in `TransformerConfig`. The norms come before each sublayer.
        qkv_bias: biases in the projections to q, k and v; default `bias`.
        window: how many tokens each sees, itself included (Jiang et al. 2023); default all.
        softcap: of the attention scores, as in `fastattn.attention`.
        tie_embeddings: the output projection is the embedding (Press and Wolf 2017).
        pad_id: the token that pads rows; None: rows are padded by a mask only.

    Raises:
        ValueError, TypeError: a value is out of range; the message names the field.
    """

    vocab_size: int
    d_model: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_heads_kv: int | None = None
    head_dim: int | None = None
    d_ff: int = 3072
    max_positions: int = 1024
    positions: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: bool = True
    qkv_bias: bool | None = None
    window: int | None = None
    softcap: float | None = None
    tie_embeddings: bool = True
    dropout: float = 0.1
    attention_dropout: float | None = None
    pad_id: int | None = None
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_dict(self.rope_scaling))
        super().__post_init__()
        _check_sizes(self, "vocab_size", "max_positions")
        _check_layers(self)
        if self.num_heads_kv is not None:
            _check_sizes(self, "num_heads_kv")
            if self.num_heads % self.num_heads_kv:
                raise ValueError(
                    f"num_heads_kv: expected a divisor of num_heads={self.num_heads}, "
                    f"got {self.num_heads_kv}"
                )
        if self.window is not None:
            _check_sizes(self, "window")
        if self.softcap is not None:
            _check_positive("softcap", self.softcap)
        _check_positive("rope_theta", self.rope_theta)
        head_dim = self.head_dim or self.d_model // self.num_heads
        if self.positions == "rotary" and head_dim % 2:
            raise ValueError(
                f"head_dim: expected an even number with rotary positions, got {head_dim}"
            )
        if self.rope_scaling is not None and self.positions != "rotary":
            raise ValueError(
                f"rope_scaling: expected None with positions={self.positions!r}, which it does not "
                f"stretch, got {self.rope_scaling}"
            )
        _check_choice("norm", self.norm, NORMS)
        _check_choice("positions", self.positions, DECODER_POSITIONS)
        _check_pad(self.pad_id, self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """Sizes and options of `fastattn.models.Encoder` and its heads; the defaults are BERT-base's.

    Args:
        vocab_size: number of tokens.
        d_model, num_layers, num_heads, d_ff: sizes.
        max_positions: longest row.
        types: number of token types; 0: there are none.
        dropout, attention_dropout, activation, norm_eps, checkpoint_activations: as in
            `TransformerConfig`. The norms come after each sublayer.
        pad_id: the token that pads rows; None: rows are padded by a mask only.
        num_labels: of `SequenceClassifier` and `TokenClassifier`.

    Raises:
        ValueError, TypeError: a value is out of range; the message names the field.
    """

    vocab_size: int
    d_model: int = 768
    num_layers: int = 12
    num_heads: int = 12
    d_ff: int = 3072
    max_positions: int = 512
    types: int = 2
    dropout: float = 0.1
    attention_dropout: float | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-12
    pad_id: int | None = 0
    num_labels: int = 2
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self, "vocab_size", "max_positions", "num_labels")
        _check_layers(self)
        if self.types < 0:
            raise ValueError(f"types: expected at least 0, got {self.types}")
        _check_pad(self.pad_id, self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Config):
    """Sizes and options of `fastattn.models.VisionTransformer`; the defaults are ViT-B/16's.

    Args:
        num_labels: classes; 0: the model returns the pooled states.
        image_size: height and width.
        patch_size: of the patches, a divisor of `image_size`.
        channels: of the images.
        d_model, num_layers, num_heads, d_ff: sizes.
        pooling: classify the "class" token or the "mean" of the patches.
        dropout, attention_dropout, activation, norm_eps, checkpoint_activations: as in
            `TransformerConfig`. The norms come before each sublayer.
        qkv_bias: biases in the projections to q, k and v.

    Raises:
        ValueError, TypeError: a value is out of range; the message names the field.
    """

    num_labels: int
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    d_model: int = 768
    num_layers: int = 12
    num_heads: int = 12
    d_ff: int = 3072
    pooling: str = "class"
    dropout: float = 0.1
    attention_dropout: float | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-12
    qkv_bias: bool = True
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self, "image_size", "patch_size", "channels")
        _check_layers(self)
        if self.num_labels < 0:
            raise ValueError(f"num_labels: expected at least 0, got {self.num_labels}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of image_size={self.image_size}, "
                f"got {self.patch_size}"
            )
        _check_choice("pooling", self.pooling, POOLINGS)


def _check_layers(config: Any) -> None:
    """The fields that every model has."""
    _check_sizes(config, "d_model", "num_layers", "num_heads", "d_ff")
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        _check_sizes(config, "head_dim")
    elif config.d_model % config.num_heads:
        raise ValueError(
            f"num_heads: expected a divisor of d_model={config.d_model}, got {config.num_heads}"
        )
    _check_probability("dropout", config.dropout)
    if config.attention_dropout is not None:
        _check_probability("attention_dropout", config.attention_dropout)
    _check_choice("activation", config.activation, ACTIVATIONS)
    _check_positive("norm_eps", config.norm_eps)


def _check_pad(pad_id: int | None, vocab_size: int) -> None:
    if pad_id is not None and not 0 <= pad_id < vocab_size:
        raise ValueError(f"pad_id: expected a token, 0 to {vocab_size - 1}, or None, got {pad_id}")


def _is(value: Any, kind: Any) -> bool:
    """Whether it is of that kind: a whole number is a float too, True is no number."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _check_sizes(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
