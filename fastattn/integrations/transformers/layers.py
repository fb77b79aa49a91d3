"""Norms and feed-forward networks of transformers' models, on fastattn's ops, for `accelerate`.

Of the Llama, Mistral, Qwen, Gemma and T5 families. Rotary embeddings and the feed-forward networks
of BERT, GPT-2, ViT and Whisper stay transformers' own: they are functions, or parts of a layer's
forward that has other things to do. Their layer norms are torch's, which `accelerate` knows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn.feed_forward import activation_name, feed_forward, gated_feed_forward
from fastattn.ops import rms_norm

_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}
_made: dict[type, type] = {}


class _RMSNorm:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)  # type: ignore


class _OffsetRMSNorm:
    def forward(self: Any, x: Tensor) -> Tensor:
        return rms_norm(x, 1.0 + self.weight.float(), eps=self.eps)  # type: ignore[return-value]


class _GatedMLP:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return gated_feed_forward(x, gate, up, self.act_fn, down, _activation(self.act_fn))


class _T5DenseActDense:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return feed_forward(hidden_states, self.wi, self.act, self.dropout, self.wo)


_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "T5LayerNorm")
_OFFSET_NORMS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")
_GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP")
_FORWARDS: dict[str, type] = {
    **dict.fromkeys(_RMS_NORMS, _RMSNorm),
    **dict.fromkeys(_OFFSET_NORMS, _OffsetRMSNorm),
    **dict.fromkeys(_GATED, _GatedMLP),
    "T5DenseActDense": _T5DenseActDense,
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


def _activation(module: nn.Module) -> str | None:
    """The name of an activation, theirs or torch's; None of one that the ops don't know."""
    known = _ACTIVATIONS.get(type(module).__name__)
    if known is not None and type(module).__module__ == "transformers.activations":
        return known
    return activation_name(module) if isinstance(module, torch.nn.Module) else None
