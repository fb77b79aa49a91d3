"""Models of `fastattn.models` from the folders that Hugging Face transformers writes.

Nothing of the transformers package is needed, and what a model here can't do is refused by name.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.models.checkpoint import MODELS, fill, weights_once
from fastattn.models.huggingface.families import FAMILIES, Family, Rule, Settings


def from_huggingface(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **fields: Any,
) -> nn.Module:
    """A BERT, GPT-2, Llama, Mistral, Qwen2, ViT or T5 model with the weights in `folder`.

    Args:
        folder: config.json, and model.safetensors, pytorch_model.bin (of which only tensors are
            read) or the files of an index.
        device: default the CPU.
        dtype: of its weights; default the file's.
        fields: of our configuration, in place of what the folder's says: ``dropout=0.1``.

    Returns:
        The class that its architecture asks for, in evaluation mode. It has the same logits; rows
        are padded by the config's pad_token_id where no mask is given, but in a `Decoder`, which
        then takes every token for one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the model has what ours has not, a file is damaged, or a weight is missing,
            unknown or of another shape; the message names it.
        TypeError: a setting is of the wrong kind, or `fields` has an unknown one.
        ModuleNotFoundError: safetensors is missing.
    """
    from fastattn.models.files import read_folder, read_json

    folder = Path(folder)
    theirs = Settings(read_json(folder / "config.json"))
    kind = theirs.typed("model_type", str, None)
    if kind not in FAMILIES:
        raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, got {kind!r}")
    family = FAMILIES[kind]
    architecture, *_ = theirs.typed("architectures", list, None) or family.heads
    if not isinstance(architecture, str) or architecture not in family.heads:
        raise ValueError(
            f"architectures: expected one of {', '.join(family.heads)}, got {architecture!r}"
        )
    model_class = MODELS[family.heads[architecture]]
    config = family.fields(theirs)
    if architecture == "ViTModel":
        config["num_labels"] = 0
    weights = _named(family, read_folder(folder), folder)
    if not _is_copy("lm_head.weight", family, weights):
        config |= family.untied
    model = model_class(model_class.Config.from_dict({**config, **fields}))
    fill(model, _converted(model, family, weights, folder), folder, dtype)
    return model.eval().to(device)


def _named(family: Family, weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Their weights under the names of a model without a head."""
    named: dict[str, Tensor] = {}
    for name, weight in weights.items():
        short = name.removeprefix(family.prefix)
        # Names of the first files of BERT.
        short = short.replace("LayerNorm.gamma", "LayerNorm.weight")
        short = short.replace("LayerNorm.beta", "LayerNorm.bias")
        if short in named:
            raise ValueError(f"{source}: {name} is there under another name, too")
        named[short] = weight
    return named


def _is_copy(name: str, family: Family, weights: Mapping[str, Tensor]) -> bool:
    """Whether weight `name`, where there is one, is what it should be a copy of."""
    original = weights.get(family.copies.get(name, ""))
    if name not in weights or original is None:
        return name not in weights
    return torch.equal(weights[name], original)


def _converted(
    model: nn.Module, family: Family, weights: Mapping[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """Their weights under our names; raises ValueError for each that is missing or left over."""
    unused = dict(weights)
    converted, problems = {}, []
    for name, own in weights_once(model).items():
        rule, names = _sources(family, name, unused)
        if missing := [text for text in names if text not in unused]:
            problems.append(f"{' and '.join(missing)} is missing, for {name} {tuple(own.shape)}")
            continue
        parts = {text: unused.pop(text) for text in names}
        whole = _joined(list(parts.values()), rule, own.shape)
        if whole is None:
            shapes = ", ".join(f"{text} {tuple(part.shape)}" for text, part in parts.items())
            problems.append(f"{shapes}: expected {tuple(own.shape)} together, for {name}")
        else:
            converted[name] = whole
    for name, weight in unused.items():
        if name in family.copies and family.copies[name] in weights:
            if not _is_copy(name, family, weights):
                problems.append(f"{name}: expected a copy of {family.copies[name]}, got another")
        elif not re.fullmatch(family.ignored, name):
            place = f"has no place in {type(model).__name__}"
            problems.append(f"{name} {tuple(weight.shape)} {place}")
    if problems:
        raise ValueError(f"{source}: " + "; ".join(problems))
    return converted


def _rule(family: Family, name: str) -> tuple[Rule, re.Match[str]]:
    # The heads have the encoder itself as their `encoder`.
    for text in (name, name.removeprefix("encoder.")):
        for rule in family.rules:
            if match := re.fullmatch(rule.pattern, text):
                return rule, match
    raise LookupError(f"no rule for {name}")


def _sources(family: Family, name: str, weights: Mapping[str, Tensor]) -> tuple[Rule, list[str]]:
    """The rule of our weight, and the names that it has in `weights`, or should have."""
    rule, match = _rule(family, name)
    names = []
    for template in rule.theirs:
        alternatives = [match.expand(text) for text in template.split("|")]
        names.append(next((text for text in alternatives if text in weights), alternatives[0]))
    return rule, names


def _joined(parts: list[Tensor], rule: Rule, shape: torch.Size) -> Tensor | None:
    """Our weight of that shape; None if the parts don't make one."""
    # Keys and values have as many rows; how many the queries have, out_proj's columns say.
    alike = len({part.shape[1:] for part in parts}) == len({part.shape for part in parts[-2:]}) == 1
    if not alike or not all(part.dim() for part in parts):
        return None
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if rule.transform is not None:
        whole = rule.transform(whole)
    return whole if whole.shape == shape else None
