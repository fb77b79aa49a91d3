"""The families of Hugging Face models, as tables: our weight, and the names that make it up."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastattn.models.config import RopeScaling

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
_NO_LIMIT = 1 << 20  # positions of a model that has none of its own


class Rule(NamedTuple):
    """How one of our weights is made of theirs: names, in the order in which they are joined.

    Each name may have alternatives, parted by "|", and groups of the pattern.
    """

    pattern: str
    theirs: tuple[str, ...]
    transform: Callable[[Tensor], Tensor] | None = None


class Settings(dict[str, Any]):
    """Their configuration; raises ValueError where a value is missing or of a wrong kind."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{key}: expected in config.json, got none")

    def typed(self, key: str, kind: type, default: Any) -> Any:
        """The value, `default` where it is absent or null."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{key}: expected {kind.__name__}, got {value!r}")
        return value


class Family(NamedTuple):
    """One of their model types."""

    prefix: str  # of the names of a model with a head
    fields: Callable[[Settings], dict[str, Any]]  # their configuration as ours
    rules: tuple[Rule, ...]
    heads: dict[str, str]  # their class, as in "architectures", to the name of ours
    ignored: str  # their names that hold nothing to learn
    copies: dict[str, str]  # their names of what another name holds too, where it is tied
    untied: dict[str, Any]  # our fields of a model whose lm_head is not tied after all


def _expect(theirs: Mapping[str, Any], **expected: Any) -> None:
    """Raises ValueError where an option is there and not the only one that ours has."""
    for name, value in expected.items():
        got = theirs.get(name, value)
        if got not in (value, None):
            raise ValueError(f"{name}: expected {value!r}, got {got!r}")


def _activation(theirs: Settings, name: str, default: str) -> str:
    value = theirs.typed(name, str, default)
    if value not in _ACTIVATIONS:
        raise ValueError(f"{name}: expected one of {', '.join(_ACTIVATIONS)}, got {value!r}")
    return _ACTIVATIONS[value]


def _num_labels(theirs: Settings) -> int:
    return len(theirs.typed("id2label", dict, {})) or theirs.typed("num_labels", int, 2)


def _bert(c: Settings) -> dict[str, Any]:
    _expect(c, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    if c.get("architectures") == ["BertForMaskedLM"]:
        _expect(c, tie_word_embeddings=True)
    return dict(
        vocab_size=c["vocab_size"],
        d_model=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        d_ff=c["intermediate_size"],
        max_positions=c.get("max_position_embeddings", 512),
        types=c.get("type_vocab_size", 2),
        dropout=c.get("hidden_dropout_prob", 0.1),
        attention_dropout=c.get("attention_probs_dropout_prob", 0.1),
        activation=_activation(c, "hidden_act", "gelu"),
        norm_eps=c.get("layer_norm_eps", 1e-12),
        pad_id=c.get("pad_token_id", 0),
        num_labels=_num_labels(c),
    )


def _gpt2(c: Settings) -> dict[str, Any]:
    _expect(
        c,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return dict(
        vocab_size=c["vocab_size"],
        d_model=c["n_embd"],
        num_layers=c["n_layer"],
        num_heads=c["n_head"],
        d_ff=c.get("n_inner") or 4 * c.typed("n_embd", int, 768),
        max_positions=c.get("n_positions", 1024),
        dropout=c.get("resid_pdrop", 0.1),
        attention_dropout=c.get("attn_pdrop", 0.1),
        activation=_activation(c, "activation_function", "gelu_new"),
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=c.typed("tie_word_embeddings", bool, True),
    )


def _llama(c: Settings) -> dict[str, Any]:
    _expect(c, mlp_bias=False, partial_rotary_factor=1.0, use_sliding_window=False)
    kind = c["model_type"]
    rope = Settings(
        c.typed("rope_scaling", dict, {}) | c.typed("rope_parameters", dict, {}),
    )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_type: expected 'default' or 'llama3', got {rope_type!r}")
    _expect(rope, partial_rotary_factor=1.0)
    scaling = None
    if rope_type == "llama3":
        scaling = RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_positions=rope["original_max_position_embeddings"],
        )
    # Where Mistral's is absent, and not null, it is 4096.
    window = c.get("sliding_window", 4096) if kind == "mistral" else None
    layer = "full_attention" if window is None else "sliding_attention"
    for name in c.typed("layer_types", list, ()):
        _expect({"layer_types": name}, layer_types=layer)
    bias = c.typed("attention_bias", bool, False)
    return dict(
        vocab_size=c["vocab_size"],
        d_model=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_heads_kv=c.get("num_key_value_heads"),
        head_dim=c.get("head_dim"),
        d_ff=c["intermediate_size"],
        max_positions=c.get("max_position_embeddings", 2048),
        positions="rotary",
        rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
        rope_scaling=scaling,
        norm="rms",
        norm_eps=c.get("rms_norm_eps", 1e-6),
        activation=_activation(c, "hidden_act", "silu"),
        gated=True,
        bias=bias,
        qkv_bias=True if kind == "qwen2" else bias,
        window=window,
        tie_embeddings=c.typed("tie_word_embeddings", bool, False),
        dropout=0.0,
        attention_dropout=c.get("attention_dropout", 0.0),
    )


def _vit(c: Settings) -> dict[str, Any]:
    return dict(
        num_labels=_num_labels(c),
        image_size=c.get("image_size", 224),
        patch_size=c.get("patch_size", 16),
        channels=c.get("num_channels", 3),
        d_model=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        d_ff=c["intermediate_size"],
        dropout=c.get("hidden_dropout_prob", 0.0),
        attention_dropout=c.get("attention_probs_dropout_prob", 0.0),
        activation=_activation(c, "hidden_act", "gelu"),
        norm_eps=c.get("layer_norm_eps", 1e-12),
        qkv_bias=c.typed("qkv_bias", bool, True),
    )


def _t5(c: Settings) -> dict[str, Any]:
    gated, _, activation = c.typed("feed_forward_proj", str, "relu").rpartition("-")
    if gated not in ("", "gated"):
        raise ValueError(f"feed_forward_proj: expected ACT or gated-ACT, got {gated}-{activation}")
    if gated and activation == "gelu":
        activation = "gelu_new"  # which is what these models were trained with
    tied = c.typed("tie_word_embeddings", bool, True)
    scaled = c.typed("scale_decoder_outputs", bool, tied)
    d_model = c.typed("d_model", int, 512)
    return dict(
        input_vocab_size=c["vocab_size"],
        target_vocab_size=c["vocab_size"],
        d_model=d_model,
        num_layers=c["num_layers"],
        num_decoder_layers=c.get("num_decoder_layers"),
        num_heads=c["num_heads"],
        head_dim=c["d_kv"],
        d_ff=c["d_ff"],
        dropout=c.get("dropout_rate", 0.1),
        max_positions=_NO_LIMIT,
        positions="relative",
        relative_buckets=c.get("relative_attention_num_buckets", 32),
        relative_max_distance=c.get("relative_attention_max_distance", 128),
        norm_first=True,
        activation=_activation(Settings(feed_forward_proj=activation), "feed_forward_proj", "relu"),
        gated=bool(gated),
        tie_embeddings="all" if tied else "inputs",
        pad_id=c.get("pad_token_id", 0),
        bias=False,
        norm="rms",
        norm_eps=c.get("layer_norm_epsilon", 1e-6),
        softmax_scale=1.0,
        embedding_scale=1.0,
        output_scale=max(d_model, 1) ** -0.5 if scaled else 1.0,
    )


def _transposed(weight: Tensor) -> Tensor:
    return weight.transpose(0, -1)


_BERT_LAYER = r"encoder\.layers\.(\d+)\."
_BERT = (
    Rule(r"embedding\.tokens\.weight", ("embeddings.word_embeddings.weight",)),
    Rule(r"embedding\.positions", ("embeddings.position_embeddings.weight",)),
    Rule(r"embedding\.types\.weight", ("embeddings.token_type_embeddings.weight",)),
    Rule(r"embedding\.norm\.(\w+)", (r"embeddings.LayerNorm.\1",)),
    Rule(
        _BERT_LAYER + r"self_attn\.in_proj\.(\w+)",
        tuple(rf"encoder.layer.\1.attention.self.{x}.\2" for x in ("query", "key", "value")),
    ),
    Rule(
        _BERT_LAYER + r"self_attn\.out_proj\.(\w+)",
        (r"encoder.layer.\1.attention.output.dense.\2",),
    ),
    Rule(
        _BERT_LAYER + r"self_attn_norm\.(\w+)",
        (r"encoder.layer.\1.attention.output.LayerNorm.\2",),
    ),
    Rule(
        _BERT_LAYER + r"feed_forward\.linear1\.(\w+)", (r"encoder.layer.\1.intermediate.dense.\2",)
    ),
    Rule(_BERT_LAYER + r"feed_forward\.linear2\.(\w+)", (r"encoder.layer.\1.output.dense.\2",)),
    Rule(_BERT_LAYER + r"feed_forward_norm\.(\w+)", (r"encoder.layer.\1.output.LayerNorm.\2",)),
    Rule(r"pooler\.(\w+)", (r"pooler.dense.\1",)),
    Rule(r"classifier\.(\w+)", (r"classifier.\1|qa_outputs.\1",)),
    Rule(r"transform\.(\w+)", (r"cls.predictions.transform.dense.\1",)),
    Rule(r"transform_norm\.(\w+)", (r"cls.predictions.transform.LayerNorm.\1",)),
    Rule(r"output\.bias", ("cls.predictions.bias|cls.predictions.decoder.bias",)),
)
_GPT2_LAYER = r"decoder\.layers\.(\d+)\."
_GPT2 = (
    Rule(r"embedding\.tokens\.weight", ("wte.weight",)),
    Rule(r"embedding\.positions", ("wpe.weight",)),
    Rule(_GPT2_LAYER + r"self_attn\.in_proj\.weight", (r"h.\1.attn.c_attn.weight",), _transposed),
    Rule(_GPT2_LAYER + r"self_attn\.in_proj\.bias", (r"h.\1.attn.c_attn.bias",)),
    Rule(_GPT2_LAYER + r"self_attn\.out_proj\.weight", (r"h.\1.attn.c_proj.weight",), _transposed),
    Rule(_GPT2_LAYER + r"self_attn\.out_proj\.bias", (r"h.\1.attn.c_proj.bias",)),
    Rule(_GPT2_LAYER + r"feed_forward\.linear1\.weight", (r"h.\1.mlp.c_fc.weight",), _transposed),
    Rule(_GPT2_LAYER + r"feed_forward\.linear1\.bias", (r"h.\1.mlp.c_fc.bias",)),
    Rule(_GPT2_LAYER + r"feed_forward\.linear2\.weight", (r"h.\1.mlp.c_proj.weight",), _transposed),
    Rule(_GPT2_LAYER + r"feed_forward\.linear2\.bias", (r"h.\1.mlp.c_proj.bias",)),
    Rule(_GPT2_LAYER + r"self_attn_norm\.(\w+)", (r"h.\1.ln_1.\2",)),
    Rule(_GPT2_LAYER + r"feed_forward_norm\.(\w+)", (r"h.\1.ln_2.\2",)),
    Rule(r"decoder\.norm\.(\w+)", (r"ln_f.\1",)),
    Rule(r"output\.weight", ("lm_head.weight",)),
)
_LLAMA_LAYER = r"decoder\.layers\.(\d+)\."
_LLAMA = (
    Rule(r"embedding\.tokens\.weight", ("embed_tokens.weight",)),
    Rule(
        _LLAMA_LAYER + r"self_attn\.in_proj\.(\w+)",
        tuple(rf"layers.\1.self_attn.{x}_proj.\2" for x in "qkv"),
    ),
    Rule(_LLAMA_LAYER + r"self_attn\.out_proj\.(\w+)", (r"layers.\1.self_attn.o_proj.\2",)),
    Rule(_LLAMA_LAYER + r"feed_forward\.(\w+)\.weight", (r"layers.\1.mlp.\2.weight",)),
    Rule(_LLAMA_LAYER + r"self_attn_norm\.weight", (r"layers.\1.input_layernorm.weight",)),
    Rule(
        _LLAMA_LAYER + r"feed_forward_norm\.weight",
        (r"layers.\1.post_attention_layernorm.weight",),
    ),
    Rule(r"decoder\.norm\.weight", ("norm.weight",)),
    Rule(r"output\.weight", ("lm_head.weight",)),
)
_VIT_LAYER = r"encoder\.layers\.(\d+)\."


def _vit_names(old: str, new: str) -> str:
    """A weight's name in files of transformers 4, and in those of 5 that kept the new ones."""
    return rf"encoder.layer.\1.{old}.\2|layers.\1.{new}.\2"


_VIT = (
    Rule(r"embedding\.class_token", ("embeddings.cls_token",), Tensor.flatten),
    Rule(
        r"embedding\.positions",
        ("embeddings.position_embeddings",),
        lambda weight: weight.squeeze(0),
    ),
    Rule(
        r"embedding\.patches\.weight",
        ("embeddings.patch_embeddings.projection.weight",),
        lambda weight: weight.reshape(len(weight), -1),
    ),
    Rule(r"embedding\.patches\.bias", ("embeddings.patch_embeddings.projection.bias",)),
    Rule(
        _VIT_LAYER + r"self_attn\.in_proj\.(\w+)",
        tuple(
            _vit_names(f"attention.attention.{x}", f"attention.{x[0]}_proj")
            for x in ("query", "key", "value")
        ),
    ),
    Rule(
        _VIT_LAYER + r"self_attn\.out_proj\.(\w+)",
        (_vit_names("attention.output.dense", "attention.o_proj"),),
    ),
    Rule(
        _VIT_LAYER + r"feed_forward\.linear1\.(\w+)", (_vit_names("intermediate.dense", "mlp.fc1"),)
    ),
    Rule(_VIT_LAYER + r"feed_forward\.linear2\.(\w+)", (_vit_names("output.dense", "mlp.fc2"),)),
    Rule(
        _VIT_LAYER + r"self_attn_norm\.(\w+)", (_vit_names("layernorm_before", "layernorm_before"),)
    ),
    Rule(
        _VIT_LAYER + r"feed_forward_norm\.(\w+)",
        (_vit_names("layernorm_after", "layernorm_after"),),
    ),
    Rule(r"encoder\.norm\.(\w+)", (r"layernorm.\1",)),
    Rule(r"classifier\.(\w+)", (r"classifier.\1",)),
)
_T5_LAYER = r"(encoder|decoder)\.layers\.(\d+)\."
_T5_FIRST = r"\1.block.\2.layer.0"
_T5_LAST = (r"encoder.block.\1.layer.1", r"decoder.block.\1.layer.2")


def _t5_last(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The feed-forward network is a layer's second part in the encoder, third in the decoder."""
    return tuple(
        Rule(rf"{place[:7]}\.layers\.(\d+)\.{ours}", (f"{place}.{theirs}",)) for place in _T5_LAST
    )


_T5 = (
    Rule(r"(input|target)_embedding\.tokens\.weight", ("shared.weight",)),
    Rule(
        r"(encoder|decoder)\.position_bias\.weight",
        (r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
    ),
    Rule(
        _T5_LAYER + r"self_attn\.in_proj\.weight",
        tuple(f"{_T5_FIRST}.SelfAttention.{x}.weight" for x in "qkv"),
    ),
    Rule(_T5_LAYER + r"self_attn\.out_proj\.weight", (f"{_T5_FIRST}.SelfAttention.o.weight",)),
    Rule(_T5_LAYER + r"self_attn_norm\.weight", (f"{_T5_FIRST}.layer_norm.weight",)),
    Rule(
        _T5_LAYER + r"cross_attn\.q_proj\.weight",
        (r"\1.block.\2.layer.1.EncDecAttention.q.weight",),
    ),
    Rule(
        _T5_LAYER + r"cross_attn\.kv_proj\.weight",
        tuple(rf"\1.block.\2.layer.1.EncDecAttention.{x}.weight" for x in "kv"),
    ),
    Rule(
        _T5_LAYER + r"cross_attn\.out_proj\.weight",
        (r"\1.block.\2.layer.1.EncDecAttention.o.weight",),
    ),
    Rule(_T5_LAYER + r"cross_attn_norm\.weight", (r"\1.block.\2.layer.1.layer_norm.weight",)),
    *_t5_last(r"feed_forward\.linear1\.weight", "DenseReluDense.wi.weight"),
    *_t5_last(r"feed_forward\.gate_proj\.weight", "DenseReluDense.wi_0.weight"),
    *_t5_last(r"feed_forward\.up_proj\.weight", "DenseReluDense.wi_1.weight"),
    *_t5_last(r"feed_forward\.(?:linear2|down_proj)\.weight", "DenseReluDense.wo.weight"),
    *_t5_last(r"feed_forward_norm\.weight", "layer_norm.weight"),
    Rule(r"(encoder|decoder)\.norm\.weight", (r"\1.final_layer_norm.weight",)),
    Rule(r"output\.weight", ("lm_head.weight",)),
)

FAMILIES: dict[str, Family] = {
    "bert": Family(
        "bert.",
        _bert,
        _BERT,
        {
            "BertModel": "Encoder",
            "BertForMaskedLM": "MaskedLanguageModel",
            "BertForSequenceClassification": "SequenceClassifier",
            "BertForTokenClassification": "TokenClassifier",
            "BertForQuestionAnswering": "SpanClassifier",
        },
        r"embeddings\.position_ids|pooler\.dense\.\w+|cls\.seq_relationship\.\w+",
        {
            "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        {},
    ),
    "gpt2": Family(
        "transformer.",
        _gpt2,
        _GPT2,
        {"GPT2LMHeadModel": "Decoder"},
        r"h\.\d+\.attn\.(masked_)?bias",
        {"lm_head.weight": "wte.weight"},
        {"tie_embeddings": False},
    ),
    "vit": Family(
        "vit.",
        _vit,
        _VIT,
        {"ViTForImageClassification": "VisionTransformer", "ViTModel": "VisionTransformer"},
        r"pooler\.dense\.\w+",
        {},
        {},
    ),
    "t5": Family(
        "",
        _t5,
        _T5,
        {"T5ForConditionalGeneration": "Transformer"},
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        {
            f"{name}.weight": "shared.weight"
            for name in ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")
        },
        {"tie_embeddings": "inputs"},
    ),
} | {
    kind: Family(
        "model.",
        _llama,
        _LLAMA,
        {f"{name}ForCausalLM": "Decoder"},
        r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        {"lm_head.weight": "embed_tokens.weight"},
        {"tie_embeddings": False},
    )
    for kind, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))
}
