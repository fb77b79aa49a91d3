"""Norms and feed-forward networks of transformers' models, on fastattn's ops, for `accelerate`.

Of the BERT, RoBERTa, GPT-2, Llama, Mistral, Qwen, Gemma, T5 and ViT families; layer norms are
torch's, which `accelerate` knows. Two things stay transformers' own, as they are a few lines in a
forward with other things to do, of which a copy would have to follow theirs: rotary embeddings, and
the feed-forward networks of Whisper and, in transformers 4.57, ViT.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.feed_forward import activation_name, feed_forward, gated_feed_forward
from fastattn.nn.hooks import hooked
from fastattn.ops import ffn, rms_norm

_GELU_TANH = nn.GELU(approximate="tanh")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SiLUActivation": F.silu,
    "GELUActivation": F.gelu,
    "GELUTanh": _GELU_TANH,
    "PytorchGELUTanh": _GELU_TANH,
    "NewGELUActivation": _GELU_TANH,
}
_made: dict[type, type] = {}


class _RMSNorm:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:  # theirs decides that of the result
            return super().forward(hidden_states)  # type: ignore[misc]
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)  # type: ignore


class _OffsetRMSNorm:
    def forward(self: Any, x: Tensor) -> Tensor:
        return rms_norm(x, 1.0 + self.weight.float(), eps=self.eps)  # type: ignore[return-value]


class _GatedMLP:
    def forward(self: Any, x: Tensor) -> Tensor:
        act = _activation(self.act_fn)
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return gated_feed_forward(x, gate, up, act, down, activation_name(act))


class _T5DenseActDense:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if self.wi.weight.dtype != self.wo.weight.dtype:  # of a 16-bit model, wo stays float32
            return super().forward(hidden_states)  # type: ignore[misc]
        return feed_forward(hidden_states, self.wi, _activation(self.act), self.dropout, self.wo)


class _T5DenseGatedActDense:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        dropout = self.dropout
        dropping = type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)
        if dropping or hooked(dropout) or self.wi_0.weight.dtype != self.wo.weight.dtype:
            return super().forward(hidden_states)  # type: ignore[misc]
        act = _activation(self.act)
        known = activation_name(act)
        return gated_feed_forward(hidden_states, self.wi_0, self.wi_1, act, self.wo, known)


class _BertLayer:
    def feed_forward_chunk(self: Any, attention_output: Tensor) -> Tensor:
        inner, outer = self.intermediate, self.output
        theirs = all(type(part).__module__.startswith("transformers.") for part in (inner, outer))
        if not theirs or hooked(inner, outer):
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        act = _activation(inner.intermediate_act_fn)
        out = feed_forward(attention_output, inner.dense, act, None, outer.dense)
        return outer.LayerNorm(outer.dropout(out) + attention_output)


class _ViTMLP:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return feed_forward(
            hidden_states, self.fc1, _activation(self.activation_fn), None, self.fc2
        )


class _GPT2MLP:
    @property
    def weight(self: Any) -> Tensor:
        """``(d_ff, d_model)``, for `fastattn.explain`, which asks with an input of that size."""
        return self.c_fc.weight.T

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        inner, outer = self.c_fc, self.c_proj
        known = activation_name(_activation(self.act))
        theirs = all(
            type(part).__name__ == "Conv1D"
            and type(part).__module__ == "transformers.pytorch_utils"
            for part in (inner, outer)
        )
        # Kernels of a GPU would copy the transposed weights.
        if known is None or not theirs or hooked(inner, outer) or hidden_states.is_cuda:
            return super().forward(hidden_states)  # type: ignore[misc]
        weights = inner.weight.T, inner.bias, outer.weight.T, outer.bias
        return self.dropout(ffn(hidden_states, *weights, activation=known))


_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "T5LayerNorm")
_OFFSET_NORMS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")
_GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP")
_BERT_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer")
_FORWARDS: dict[str, type] = {
    **dict.fromkeys(_RMS_NORMS, _RMSNorm),
    **dict.fromkeys(_OFFSET_NORMS, _OffsetRMSNorm),
    **dict.fromkeys(_GATED, _GatedMLP),
    **dict.fromkeys(_BERT_LAYERS, _BertLayer),
    "GPT2MLP": _GPT2MLP,
    "T5DenseActDense": _T5DenseActDense,
    "T5DenseGatedActDense": _T5DenseGatedActDense,
    "ViTMLP": _ViTMLP,
}


def replacement_class(kind: type) -> type | None:
    """The class that stands in for a class of transformers; None of one that is not known."""
    forward = _FORWARDS.get(kind.__name__)
    if forward is None or not kind.__module__.startswith("transformers.models."):
        return None
    if kind not in _made:
        name = f"{kind.__module__.rpartition('.')[2]}__{kind.__name__}"
        _made[kind] = type(name, (forward, kind), {"__module__": __name__})
    return _made[kind]


def __getattr__(name: str) -> type:
    """The class of that name, for pickles of accelerated models."""
    module, found, kind = name.partition("__")
    if found and module.startswith("modeling_"):
        import importlib

        family = module.removeprefix("modeling_")
        theirs = importlib.import_module(f"transformers.models.{family}.{module}")
        made = replacement_class(getattr(theirs, kind))
        if made is not None:
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _activation(module: Any) -> Any:
    """The same activation of torch in place of one of transformers, if there is one."""
    if type(module).__module__ != "transformers.activations" or hooked(module):
        return module
    return _ACTIVATIONS.get(type(module).__name__, module)
