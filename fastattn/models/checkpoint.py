"""Models on disk: a folder with config.json and model.safetensors; and torch's own layers."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.models.decoder import Decoder
from fastattn.models.encoder import (
    Encoder,
    MaskedLanguageModel,
    SequenceClassifier,
    SpanClassifier,
    TokenClassifier,
)
from fastattn.models.presets import PRESETS
from fastattn.models.replaced import replaced
from fastattn.models.transformer import Transformer
from fastattn.models.vision import VisionTransformer

MODELS: dict[str, Any] = {
    model.__name__: model
    for model in (
        Decoder,
        Encoder,
        MaskedLanguageModel,
        SequenceClassifier,
        SpanClassifier,
        TokenClassifier,
        Transformer,
        VisionTransformer,
    )
}
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = ", ".join(map(str, DTYPES))
_FORMAT = 1
_RENAMED = {
    "encoder": {".norm1.": ".self_attn_norm.", ".norm2.": ".feed_forward_norm."},
    "decoder": {
        ".norm1.": ".self_attn_norm.",
        ".norm2.": ".cross_attn_norm.",
        ".norm3.": ".feed_forward_norm.",
        ".multihead_attn.": ".cross_attn.",
    },
}


def _renamed(key: str) -> str:
    for old, new in _RENAMED[key.partition(".")[0]].items():
        key = key.replace(old, new)
    return key.replace(".linear", ".feed_forward.linear").replace(".in_proj_", ".in_proj.")


def load_torch(model: Transformer, stock: nn.Transformer) -> None:
    """Copy the layers of a `torch.nn.Transformer` into a model of the same sizes.

    With the same embeddings around them, both then compute the same. A post-norm model has no
    final norms: leave them out of `stock` too (``stock.encoder.norm = None``, and the decoder's).

    Raises:
        ValueError: num_heads or norm_first differ, or a weight of either has no counterpart.
        RuntimeError: the shapes differ (from `load_state_dict`).
    """
    config, layer = model.config, stock.encoder.layers[0]
    for name, ours, theirs in (
        ("num_heads", config.num_heads, stock.nhead),
        ("norm_first", config.norm_first, layer.norm_first),
    ):
        if ours != theirs:
            raise ValueError(f"stock: expected {name}={ours} as in model, got {theirs}")
    weights: dict[str, Tensor] = {}
    for key, weight in stock.state_dict().items():
        key = _renamed(key)
        if ".cross_attn.in_proj." in key:
            split = config.d_model
            weights[key.replace("in_proj", "q_proj")] = weight[:split]
            weights[key.replace("in_proj", "kv_proj")] = weight[split:]
        else:
            weights[key] = weight
    expected = {key for key in model.state_dict() if key.startswith(("encoder.", "decoder."))}
    if odd := sorted(expected ^ weights.keys()):
        raise ValueError(f"stock: expected the layers of model, got other weights: {odd}")
    model.load_state_dict(weights, strict=False)


def build(name: str, /, *, preset: str | None = None, **fields: Any) -> nn.Module:
    """A new model by its class's name, such as "Decoder", from fields of its configuration.

    Args:
        name: one of ``MODELS``.
        preset: one of ``PRESETS`` of that model, in place of the defaults.
        fields: of its configuration.

    Raises:
        ValueError, TypeError: an unknown name or field, or a value out of range.
    """
    if name not in MODELS:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    if preset is None:
        return model(model.Config.from_dict(fields))
    known = [key for key, config in PRESETS.items() if isinstance(config, model.Config)]
    if preset not in known:
        raise ValueError(f"preset: expected one of {', '.join(known)} for {name}, got {preset!r}")
    return model(PRESETS[preset].changed(**fields))


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a model of `fastattn.models` to `folder`, for `load`.

    Each file is replaced whole or not at all, and `load` refuses the one of this save beside the
    other of another model. What is shared is written once.

    Raises:
        TypeError: another kind of model.
        ValueError: its weights are not those that its configuration asks for: some were added,
            replaced by others of another shape, tied or untied.
        ModuleNotFoundError: safetensors is missing.
    """
    name = type(model).__name__
    if MODELS.get(name) is not type(model):
        raise TypeError(f"model: expected one of {', '.join(MODELS)}, got {name}")
    from fastattn.models.files import write_weights

    config: Any = model.config
    with torch.device("meta"):
        fresh = type(model)(config)
    weights = weights_once(model)
    if problems := _misfits(weights_once(fresh), weights):
        raise ValueError(f"model: not as its config says: {'; '.join(problems)}")
    facts = {"fastattn": _FORMAT, "model": name, "config": config.to_dict()}
    facts["save"] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    text = json.dumps(facts, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS, weights, {"save": facts["save"]})
    with replaced(folder / CONFIG) as part:
        part.write_text(text, encoding="utf-8")


def load(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model that `save` wrote, in evaluation mode.

    Args:
        folder: of `save`.
        device: default the CPU.
        dtype: of its weights, one of `DTYPES`; default the file's.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a file is damaged, the two are of different saves, or a weight is missing,
            unknown or of another shape or dtype; the message names it.
        TypeError: a field of config.json is unknown, missing or of a wrong kind.
        ModuleNotFoundError: safetensors is missing.
    """
    from fastattn.models.files import read_facts, read_json, read_weights

    folder = Path(folder)
    facts = read_json(folder / CONFIG)
    if facts.get("fastattn") != _FORMAT or not {"model", "config"} <= facts.keys():
        hint = "; see fastattn.models.from_huggingface" if "model_type" in facts else ""
        raise ValueError(f"{folder / CONFIG}: not written by fastattn.models.save{hint}")
    name, fields = facts["model"], facts["config"]
    if not isinstance(name, str) or not isinstance(fields, dict):
        raise TypeError(f"{folder / CONFIG}: expected a model's name and fields, got {facts}")
    weights = read_weights(folder / WEIGHTS)
    if read_facts(folder / WEIGHTS).get("save") != facts.get("save"):
        raise ValueError(f"{folder}: {CONFIG} and {WEIGHTS} are of different saves")
    model = build(name, **fields)
    fill(model, weights, folder, dtype)
    return model.eval().to(device)


def weights_once(model: nn.Module) -> dict[str, Tensor]:
    """The weights of `model` by name, each that is shared under the first of its names."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def fill(
    model: nn.Module, weights: Mapping[str, Tensor], source: object, dtype: torch.dtype | None
) -> None:
    """Give `model` the weights of `weights_once`, in `dtype` or in their own.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape or dtype; or they have
            several dtypes, and none is asked for.
    """
    problems = _misfits(weights_once(model), weights)
    found = sorted({str(weight.dtype) for weight in weights.values()})
    if dtype is None and len(found) > 1:
        problems.append(f"expected one dtype, or dtype=, got {' and '.join(found)}")
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")
    if dtype is None:
        dtype = next(iter(weights.values())).dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {_DTYPES}, got {dtype}")
    model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with `weights` where those of `own` are expected."""
    problems = [f"{name} {tuple(own[name].shape)} is missing" for name in own.keys() - weights]
    for name, weight in weights.items():
        if name not in own:
            problems.append(f"{name} {tuple(weight.shape)} is not of this model")
        elif weight.shape != own[name].shape:
            expected = tuple(own[name].shape)
            problems.append(f"{name}: expected shape {expected}, got {tuple(weight.shape)}")
        elif weight.dtype not in DTYPES:
            problems.append(f"{name}: expected one of {_DTYPES}, got {weight.dtype}")
    return sorted(problems)
